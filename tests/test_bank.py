"""The bank holds what it should and no more, and every policy chooses what it says that it chooses."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sims_lens import plots
from sims_lens.bank import (
    AGE_FACTOR,
    BankEntry,
    MemoryBank,
    PairDiagnostics,
    diagnose,
    plan_digest,
    prompts_digest,
    select_pairs,
    turnover,
)
from sims_lens.contrast import best_against_worst
from sims_lens.data import ContrastPair, Sample
from sims_lens.errors import BankError, ConfigError, RunError
from sims_lens.plan import NOTHING, SteeringPlan

QUICK = settings(deadline=None, max_examples=60)  # a busy machine is no failure
POLICIES = ("all", "top_margin", "stratified", "recency", "random")


def sample(prompt: int, draw: int, score: float | None, tokens: tuple[int, ...] | None = None) -> Sample:
    tokens = (10 * prompt + draw + 1, int(100 * (score or 0))) if tokens is None else tokens
    return Sample(prompt=prompt, draw=draw, tokens=tokens, text=" ".join(map(str, tokens)), ended=False, score=score)


def content_score(prompt: int, tokens: tuple[int, ...]) -> float:
    """A ranker that gives the same response the same score, with some ties."""
    return (crc32(repr((prompt, tokens)).encode()) % 12) / 4


Row = tuple[int, int, int, list[int]]
rows = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 5), st.lists(st.integers(1, 4), max_size=3)),
    unique_by=lambda row: row[:3],
    max_size=40,
)
"""Prompt, iteration, draw and tokens: five prompts, four iterations, with duplicates and empty responses among them."""


def entries_of(rows: list[Row]) -> list[BankEntry]:
    """Made in the test, not in the strategy: the run-time type checks draw random numbers of their own."""
    return [
        BankEntry(sample(prompt, k, content_score(prompt, tuple(tokens)), tuple(tokens)), iteration, f"plan{iteration}")
        for prompt, iteration, k, tokens in rows
    ]


def bank_of(found: list[BankEntry], **options: Any) -> MemoryBank:
    return MemoryBank(entries=tuple(found), **options)


def options_of(policy: str, size: int | None) -> dict[str, Any]:
    return {"policy": policy, "size": None if policy == "all" else size}


# The bank


@QUICK
@given(rows=rows, limit=st.integers(1, 30), policy=st.sampled_from(POLICIES))
def test_the_limit_is_never_exceeded_and_no_response_is_there_twice(rows: list[Row], limit: int, policy: str) -> None:
    found = entries_of(rows)
    bank = MemoryBank(limit=limit, policy=policy)
    for iteration in range(1, 5):
        bank = bank.add([e.sample for e in found if e.iteration == iteration], iteration=iteration)
        assert len(bank) <= limit
        assert len({(e.prompt, e.sample.tokens) for e in bank.entries}) == len(bank)
        assert len({(e.prompt, e.sample.text) for e in bank.entries}) == len(bank)
        assert all(e.sample.tokens for e in bank.entries)
    assert set(bank.seen) == {e.prompt for e in found}


@QUICK
@given(rows=rows, limit=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_bank_does_not_depend_on_the_order_of_insertion(rows: list[Row], limit: int, seed: int) -> None:
    found = entries_of(rows)
    shuffled = random.Random(seed).sample(found, len(found))
    assert bank_of(found, limit=limit) == bank_of(shuffled, limit=limit)


@QUICK
@given(rows=rows, limit=st.integers(1, 60), policy=st.sampled_from(POLICIES))
def test_rows_round_trip_through_json(rows: list[Row], limit: int, policy: str) -> None:
    found = entries_of(rows)
    bank = bank_of(found, limit=limit, policy=policy, model="tiny", ranker="oracle", prompts="0123")
    written = [json.loads(json.dumps(row)) for row in bank.to_rows()]
    assert MemoryBank.from_rows(written, model="tiny", ranker="oracle", prompts="0123") == bank
    assert MemoryBank.from_rows(written) == bank


@QUICK
@given(rows=rows, limit=st.integers(10, 30))
def test_with_room_for_two_of_each_prompt_eviction_costs_no_pair(rows: list[Row], limit: int) -> None:
    found = entries_of(rows)
    small, large = MemoryBank(limit=limit), MemoryBank()
    for iteration in range(1, 5):
        new = [e.sample for e in found if e.iteration == iteration]
        small, large = small.add(new, iteration=iteration), large.add(new, iteration=iteration)
        assert select_pairs(small).pairs == select_pairs(large).pairs


def test_middle_scores_go_first_then_small_margins() -> None:
    scores = {0: (0.0, 1.0, 5.0, 9.0, 10.0), 1: (0.0, 0.5, 1.0), 2: (0.0, 3.0)}
    found = [sample(i, k, s) for i, row in scores.items() for k, s in enumerate(row)]

    def left(limit: int) -> dict[int, list[float]]:
        bank = MemoryBank(limit=limit).add(found, iteration=1)
        return {i: [e.score for e in group] for i, group in bank.by_prompt().items()}

    assert left(9)[0] == [0.0, 1.0, 9.0, 10.0]  # the innermost of all
    assert left(8) == {0: [0.0, 1.0, 9.0, 10.0], 1: [0.0, 1.0], 2: [0.0, 3.0]}
    assert left(6) == {0: [0.0, 10.0], 1: [0.0, 1.0], 2: [0.0, 3.0]}
    assert left(4) == {0: [0.0, 10.0], 1: [], 2: [0.0, 3.0]}  # then the prompt that tells its responses apart least
    bank = MemoryBank(limit=4).add(found, iteration=1)
    assert bank.seen == (0, 1, 2) and select_pairs(bank).dropped == {"tie": 0, "margin": 0, "empty": 1}


def test_recency_evicts_old_extremes_before_new_ones() -> None:
    old = [sample(0, k, s) for k, s in enumerate((-90.0, 0.0, 90.0))]
    new = [sample(0, k, s) for k, s in enumerate((-1.0, 0.5, 1.0))]

    def left(policy: str) -> list[tuple[int, float]]:
        bank = MemoryBank(limit=2, policy=policy).add(old, iteration=1).add(new, iteration=2)
        return [(e.iteration, e.score) for e in bank.entries]

    assert left("recency") == [(2, -1.0), (2, 1.0)]
    assert left("top_margin") == [(1, -90.0), (1, 90.0)]


def test_a_response_that_comes_back_is_kept_as_the_newest() -> None:
    first = sample(0, 0, 1.0, (1, 2))
    same_tokens = replace(first, draw=3, score=2.0)
    same_text = replace(first, draw=1, tokens=(9,), text=first.text + " \n")
    other_prompt = replace(first, prompt=1)
    bank = MemoryBank().add([first, same_text, other_prompt], iteration=1, plan="a").add([same_tokens], iteration=2)
    assert [(e.prompt, e.iteration, e.score, e.plan) for e in bank.entries] == [(0, 2, 2.0, ""), (1, 1, 1.0, "a")]


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_unranked_responses_are_refused(score: float | None) -> None:
    with pytest.raises(BankError, match="response 2 to prompt 7 .* rank"):
        MemoryBank().add([Sample(7, 2, (1,), "x", True, score)], iteration=1)


def test_iterations_are_counted_from_one() -> None:
    with pytest.raises(BankError, match="from 1, got 0"):
        MemoryBank().add([sample(0, 0, 1.0)], iteration=0)


def test_a_bank_of_another_model_ranker_or_prompts_is_refused_by_name() -> None:
    prompts = prompts_digest(["What is a prompt?"])
    bank = MemoryBank(model="SmolLM2-135M", ranker="vader", prompts=prompts).add([sample(0, 0, 1.0)], iteration=1)
    with pytest.raises(BankError, match="another model: 'SmolLM2-135M', not 'gpt2'"):
        MemoryBank.from_rows(bank.to_rows(), model="gpt2")
    with pytest.raises(BankError, match="another ranker: 'vader', not 'reading-ease'"):
        bank.check(model="SmolLM2-135M", ranker="reading-ease")
    with pytest.raises(BankError, match="another set of prompts"):
        bank.check(prompts=prompts_digest(["What is a prompt?", "And this?"]))
    assert bank.check(model="SmolLM2-135M") is bank and MemoryBank().check(model="any") == MemoryBank()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], "no memory bank"),
        (lambda rows: rows[1:], "no memory bank"),
        (lambda rows: [{**rows[0], "version": 99}, *rows[1:]], "newer sims_lens"),
        (lambda rows: [{k: v for k, v in rows[0].items() if k != "seen"}, *rows[1:]], "damaged .KeyError: 'seen'"),
        (lambda rows: [rows[0], {k: v for k, v in rows[1].items() if k != "tokens"}], "damaged .KeyError: 'tokens'"),
        (lambda rows: [rows[0], {**rows[1], "score": None}], "damaged .*rank responses"),
        (lambda rows: [rows[0], {**rows[1], "score": "high"}], "damaged .ValueError"),
        (lambda rows: [{**rows[0], "limit": 0}, *rows[1:]], "damaged .*limit"),
    ],
)
def test_damaged_rows_are_told_apart(change: Any, message: str) -> None:
    rows = MemoryBank().add([sample(0, 0, 1.0)], iteration=1).to_rows()
    with pytest.raises(BankError, match=message):
        MemoryBank.from_rows(change(rows))


def test_rescored_replaces_scores_in_order() -> None:
    bank = MemoryBank().add([sample(0, 0, 1.0), sample(0, 1, 2.0)], iteration=1)
    new = bank.rescored([5.0, 4.0])
    assert [e.score for e in new.entries] == [5.0, 4.0] and [e.score for e in bank.entries] == [1.0, 2.0]
    (pair,) = select_pairs(new).pairs
    assert (pair.best.draw, pair.worst.draw) == (0, 1)
    with pytest.raises(BankError, match="2 entries, got 1"):
        bank.rescored([1.0])


# Pairs


@QUICK
@given(
    rows=rows,
    policy=st.sampled_from(POLICIES),
    size=st.none() | st.integers(1, 8),
    per_prompt=st.integers(1, 3),
    min_margin=st.sampled_from([0.0, 0.5, 1.5]),
    length=st.sampled_from(["report", "match", "regress"]),
    seed=st.integers(0, 9),
)
def test_what_holds_for_the_pairs_of_every_policy(
    rows: list[Row],
    policy: str,
    size: int | None,
    per_prompt: int,
    min_margin: float,
    length: str,
    seed: int,
) -> None:
    found = entries_of(rows)
    chosen: dict[str, Any] = {
        **options_of(policy, size), "per_prompt": per_prompt, "min_margin": min_margin, "length": length, "seed": seed
    }  # fmt: skip
    bank = bank_of(found)
    contrast = select_pairs(bank, **chosen)
    pairs = contrast.pairs
    assert contrast == select_pairs(bank_of(random.Random(seed).sample(found, len(found))), **chosen)
    assert all(p.best.score > p.worst.score and p.margin > min_margin for p in pairs)  # type: ignore[operator]
    assert chosen["size"] is None or len(pairs) <= chosen["size"]
    assert all(count <= per_prompt for count in Counter(p.prompt for p in pairs).values())
    used = [(p.prompt, s.tokens) for p in pairs for s in (p.best, p.worst)]
    assert len(used) == len(set(used))
    if length == "match":
        assert all(
            abs(len(p.best.tokens) - len(p.worst.tokens)) <= 0.1 * max(len(p.best.tokens), len(p.worst.tokens))
            for p in pairs
        )
    known = {(e.prompt, e.iteration, e.sample.draw, e.sample.tokens) for e in bank.entries}
    for p in pairs:
        assert p.prompt == p.best.prompt == p.worst.prompt
        assert (p.prompt, p.best_iteration, p.best.draw, p.best.tokens) in known
        assert (p.prompt, p.worst_iteration, p.worst.draw, p.worst.tokens) in known
    assert [p.prompt for p in pairs] == sorted(p.prompt for p in pairs)
    assert len({p.prompt for p in pairs}) + sum(contrast.dropped.values()) == len(bank.seen)


@QUICK
@given(rows=rows, size=st.integers(1, 10), per_prompt=st.integers(1, 3), seed=st.integers(0, 9))
def test_top_margins_dominate_those_of_any_choice_of_equal_size(
    rows: list[Row], size: int, per_prompt: int, seed: int
) -> None:
    found = entries_of(rows)
    bank = bank_of(found)
    every = select_pairs(bank, per_prompt=per_prompt).pairs
    top = select_pairs(bank, policy="top_margin", size=size, per_prompt=per_prompt).pairs
    rest = [p.margin for p in every if p not in top]
    assert all(p.margin >= max(rest, default=0.0) for p in top)
    best = sorted((p.margin for p in top), reverse=True)
    for policy in ("random", "stratified"):
        other = select_pairs(bank, policy=policy, size=size, per_prompt=per_prompt, seed=seed).pairs
        assert len(other) == len(top) and set(other) <= set(every)
        assert all(a >= b for a, b in zip(best, sorted((p.margin for p in other), reverse=True), strict=True))


@QUICK
@given(rows=rows)
def test_one_iteration_without_a_size_is_best_against_worst(rows: list[Row]) -> None:
    found = entries_of(rows)
    bank = bank_of([replace(e, iteration=1) for e in found])
    plain = best_against_worst([e.sample for e in bank.entries])
    from_bank = select_pairs(bank)
    assert [(p.best, p.worst) for p in from_bank.pairs] == [(p.best, p.worst) for p in plain.pairs]
    for policy in POLICIES:
        assert select_pairs(bank, policy=policy) == from_bank


def test_the_best_of_one_iteration_meets_the_worst_of_another() -> None:
    bank = (
        MemoryBank()
        .add([sample(0, 0, 1.0), sample(0, 1, 5.0)], iteration=1)
        .add([sample(0, 0, 3.0), sample(0, 1, 9.0)], iteration=2)
    )
    (pair,) = select_pairs(bank).pairs
    assert (pair.best.score, pair.best_iteration, pair.worst.score, pair.worst_iteration) == (9.0, 2, 1.0, 1)
    assert pair.crosses and pair.margin == 8.0
    first, second = select_pairs(bank, per_prompt=2).pairs
    assert first == pair and (second.best.score, second.worst.score) == (5.0, 3.0)


def test_stratified_gives_every_prompt_a_pair_before_any_a_second() -> None:
    rows = {0: (0.0, 1.0, 90.0, 100.0), 1: (0.0, 1.0, 4.0, 5.0), 2: (0.0, 1.0, 2.0, 3.0)}
    bank = MemoryBank().add([sample(i, k, s) for i, row in rows.items() for k, s in enumerate(row)], iteration=1)

    def prompts(policy: str, size: int) -> list[int]:
        return [p.prompt for p in select_pairs(bank, policy=policy, size=size, per_prompt=2).pairs]

    assert prompts("top_margin", 3) == [0, 0, 1] and prompts("stratified", 3) == [0, 1, 2]
    assert prompts("stratified", 2) == [0, 1] and prompts("stratified", 4) == [0, 0, 1, 2]


def test_recency_prefers_new_responses_to_far_apart_ones() -> None:
    bank = (
        MemoryBank()
        .add([sample(0, 0, 0.0), sample(0, 1, 10.0)], iteration=1)
        .add([sample(0, 0, 1.0), sample(0, 1, 9.0)], iteration=2)
    )
    (pair,) = select_pairs(bank, policy="recency").pairs
    assert (pair.best_iteration, pair.worst_iteration) == (2, 2)
    assert 10.0 * AGE_FACTOR < pair.margin < 10.0 == select_pairs(bank).pairs[0].margin
    two = bank.add([sample(1, 0, 0.0), sample(1, 1, 6.0)], iteration=2).add([sample(1, 0, 0.0)], iteration=1)
    assert [p.prompt for p in select_pairs(two, policy="recency", size=1).pairs] == [0]


def test_random_is_seeded_and_a_larger_size_draws_more_of_the_same() -> None:
    bank = MemoryBank().add([sample(i, k, float(k * i)) for i in range(1, 30) for k in range(3)], iteration=1)

    def drawn(size: int, seed: int) -> set[int]:
        return {p.prompt for p in select_pairs(bank, policy="random", size=size, seed=seed).pairs}

    assert drawn(10, 0) == drawn(10, 0) != drawn(10, 1)
    assert drawn(10, 0) < drawn(20, 0)
    assert select_pairs(bank, policy="random", size=10).dropped == {"tie": 0, "margin": 0, "empty": 0, "size": 19}


def test_every_reason_for_a_dropped_prompt_is_counted() -> None:
    rows: dict[int, tuple[tuple[float, int], ...]] = {  # score and length
        0: ((1.0, 10), (2.0, 10)),
        1: ((1.0, 10), (1.0, 12)),
        2: ((1.0, 10), (1.2, 10)),
        3: ((1.0, 10),),
        4: ((1.0, 10), (5.0, 30)),
        5: ((1.0, 10), (1.9, 10)),
    }
    samples = [
        sample(i, k, score, tuple(range(k, k + length)))
        for i, row in rows.items()
        for k, (score, length) in enumerate(row)
    ]
    bank = MemoryBank().add(samples, iteration=1)
    contrast = select_pairs(bank, policy="top_margin", size=1, min_margin=0.5, length="match")
    assert [p.prompt for p in contrast.pairs] == [0]
    assert contrast.dropped == {"tie": 1, "margin": 1, "empty": 1, "length": 1, "size": 1}
    assert select_pairs(MemoryBank()).pairs == ()


def test_a_drift_of_length_over_iterations_is_no_effect_of_length() -> None:
    """Steered responses are longer and better: within an iteration length explains nothing, so nothing is removed."""
    generator = random.Random(0)
    bank = MemoryBank()
    for iteration in (1, 2):
        found = []
        for i in range(60):
            for k in range(4):
                length = 10 * iteration + generator.randrange(6)
                tokens = tuple(generator.randrange(1000) for _ in range(length))
                found.append(sample(i, k, 5.0 * iteration + generator.gauss(0, 0.1), tokens))
        bank = bank.add(found, iteration=iteration)
    pairs = select_pairs(bank, length="regress").pairs
    assert all(p.best_iteration == 2 and p.worst_iteration == 1 for p in pairs)
    assert sum(p.margin for p in pairs) / len(pairs) > 4.5


def test_choices_out_of_range_are_named(unchecked: None) -> None:
    bank = MemoryBank().add([sample(0, 0, 1.0), sample(0, 1, 2.0)], iteration=1)
    for options, message in (
        ({"policy": "best"}, "policy must be one of all, top_margin, stratified, recency, random, got 'best'"),
        ({"policy": "all", "size": 3}, "takes every pair and no size"),
        ({"policy": "random", "size": 0}, "size must be an integer of at least 1, got 0"),
        ({"per_prompt": 0}, "per_prompt"),
        ({"min_margin": -1.0}, "min_margin"),
        ({"length": "short"}, "length must be one of report, match, regress, got 'short'"),
        ({"tolerance": math.nan}, "tolerance"),
    ):
        with pytest.raises(ConfigError, match=message):
            select_pairs(bank, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="limit"):
        MemoryBank(limit=0)
    with pytest.raises(ConfigError, match="policy"):
        MemoryBank(policy="oldest")


# Diagnostics


def pair(
    prompt: int, best: int, worst: int, *, iterations: tuple[int, int] = (1, 1), margin: float = 1.0
) -> ContrastPair:
    return ContrastPair(
        prompt, sample(prompt, 0, margin, (best,) * 5), sample(prompt, 1, 0.0, (worst,) * 3), *iterations
    )


def test_turnover_counts_pairs_that_are_new() -> None:
    before = [pair(0, 1, 2), pair(1, 1, 2), pair(2, 1, 2)]
    after = [pair(0, 1, 2, iterations=(2, 2)), pair(1, 3, 2), pair(2, 2, 1), pair(3, 1, 2)]
    assert turnover(before, before) == 0.0 and turnover([], before) == 1.0 and turnover(before, []) == 0.0
    assert turnover(before, after) == 0.75


def test_diagnostics_are_those_of_the_pairs() -> None:
    gaps = ((1, 1), (2, 1), (2, 1), (1, 2))
    pairs = [pair(i, 1, 2, iterations=gap, margin=float(i + 1)) for i, gap in enumerate(gaps)]
    found = diagnose(pairs, iteration=2, previous=pairs[:1])
    assert (found.iteration, found.pairs, found.turnover, found.cross_share) == (2, 4, 0.75, 0.75)
    assert found.iteration_gap == 0.25 and found.margin == found.margins[2] == 2.5
    assert list(found.margins) == sorted(found.margins) and found.length_gap.estimate == 2.0
    assert PairDiagnostics.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert json.loads(json.dumps(diagnose([], iteration=1).to_json()))["pairs"] == 0


def test_a_plan_digest_is_of_what_the_plan_does(tmp_path: Any) -> None:
    vector = torch.randn(8, generator=torch.Generator().manual_seed(0))
    plan = SteeringPlan.addition({3: vector}, coefficient=2.0)
    assert plan_digest(SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))) == plan_digest(plan)
    others = [
        NOTHING,
        plan + plan,
        plan.scaled(2.0),
        SteeringPlan.addition({4: vector}, coefficient=2.0),
        SteeringPlan.addition({3: vector}, coefficient=2.0, scope="all"),
        SteeringPlan.addition({3: vector + 1e-6}, coefficient=2.0),
    ]
    assert len({plan_digest(p) for p in (plan, *others)}) == 7
    assert plan_digest(plan.unbound()) == plan_digest(plan)


# The figure


@pytest.fixture
def diagnostics() -> list[PairDiagnostics]:
    bank, found, previous = MemoryBank(), [], ()
    generator = random.Random(0)
    for t in range(1, 5):
        bank = bank.add([sample(i, k, generator.gauss(0, 1)) for i in range(20) for k in range(4)], iteration=t)
        pairs = select_pairs(bank).pairs
        found.append(diagnose(pairs, iteration=t, previous=previous))
        previous = pairs
    return found


def test_the_figure_shows_the_diagnostics(diagnostics: list[PairDiagnostics]) -> None:
    figure = plots.pair_selection(diagnostics)
    assert figure.layout.template == plots.TEMPLATE and figure.layout.title.text
    assert figure.to_json() == plots.pair_selection(diagnostics).to_json()
    drawn = {t.name: t for t in figure.data}
    box = drawn["margin"]
    quantiles = list(zip(box.lowerfence, box.q1, box.median, box.q3, box.upperfence, strict=True))
    assert quantiles == [d.margins for d in diagnostics]
    assert list(drawn["mean margin"].y) == [d.margin for d in diagnostics]
    assert list(drawn["new since the iteration before"].y) == [d.turnover for d in diagnostics]
    assert list(drawn["best and worst of different iterations"].y) == [d.cross_share for d in diagnostics]
    assert "ranker's units" in figure.layout.yaxis.title.text and figure.layout.xaxis2.title.text == "iteration"
    # the rise that chance alone makes of four times as many responses, as the subtitle warns
    assert diagnostics[-1].margin > 1.3 * diagnostics[0].margin


def test_the_figure_of_one_iteration_or_of_many(diagnostics: list[PairDiagnostics]) -> None:
    assert plots.pair_selection(diagnostics[:1]).data
    many = plots.pair_selection([replace(diagnostics[0], iteration=t) for t in range(1, 24)])
    assert 23 in many.layout.xaxis.tickvals and len(many.layout.xaxis.tickvals) <= 12
    with pytest.raises(RunError, match="one PairDiagnostics"):
        plots.pair_selection([])
