"""The audit tells planted judges apart, its intervals hold what is planted, and its verdict follows its rule."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Circular, Judge, PairJudge, oracle, quality, texts

from sims_lens.auditing import MEASURES, Audit, PairAudit, audit, audit_pairs
from sims_lens.auditing.agreement import correlation_interval, cyclic_share, kendall_tau, pair_signs, rate_interval
from sims_lens.auditing.known_answers import KINDS, PER_KIND, known_pairs, nearest_in_length, shuffled, truncated
from sims_lens.data import ContrastPair, Sample
from sims_lens.errors import ConfigError, PromptError, RankerError
from sims_lens.rankers import ReadingEase
from sims_lens.rankers.cache import CachedRanker
from sims_lens.rankers.ensemble import Ensemble
from sims_lens.sampling import TokenCount
from sims_lens.stats import Interval

SEEDS, PROMPTS = 100, 20


@lru_cache(maxsize=SEEDS + 5)
def corpus(seed: int, prompts: int = PROMPTS) -> tuple[list[str], list[list[str]]]:
    return texts(prompts, seed=seed)


def audited(ranker: object, **options: Any) -> Audit:
    return audit(ranker, *corpus(0), **options)


# --- planted judges: told apart, and the truth covered ----------------------------------------------------------------


def within(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return interval.low - 1e-9 <= truth <= interval.high + 1e-9


@pytest.mark.parametrize(
    ("fault", "rate", "verdicts"),
    [
        ("noise", 0.0, {"usable"}),
        ("position", 0.4, {"weak"}),
        ("length", 0.5, {"weak", "usable"}),
        ("noise", 0.2, {"weak"}),
    ],
)
@pytest.mark.cases(2)
def test_the_intervals_hold_what_is_planted_in_lists(fault: str, rate: float, verdicts: set[str]) -> None:
    truth = Judge(fault, rate).truth()
    covered, found = Counter(), Counter()
    for seed in range(SEEDS):
        result = audit(Judge(fault, rate, seed=1000 + seed), *corpus(seed), reference=oracle, seed=seed)
        covered.update({name: int(within(getattr(result, name), value)) for name, value in truth.items()})
        found[replace(result, reference=None).verdict] += 1  # as it would be without the reference
    assert {name for name in truth if covered[name] < 0.9 * SEEDS} == set(), covered
    assert sum(found[verdict] for verdict in verdicts) >= 0.9 * SEEDS, found


def test_the_intervals_hold_what_is_planted_in_pairs() -> None:
    truth = PairJudge(first=0.5, flips=0.1).truth()
    covered: Counter[str] = Counter()
    for seed in range(SEEDS):
        result = audit(PairJudge(first=0.5, flips=0.1, seed=seed), *corpus(seed), seed=seed)
        covered.update({name: int(within(getattr(result, name), value)) for name, value in truth.items()})
    assert {name for name in truth if covered[name] < 0.9 * SEEDS} == set(), covered


def test_a_coin_is_chance() -> None:
    found = Counter(audit(Judge("noise", 0.5, seed=seed), *corpus(seed)).verdict for seed in range(30))
    assert found["no better than chance"] >= 27, found


def test_a_perfect_judge_is_usable() -> None:
    result = audited(Judge(), reference=oracle)
    assert result.verdict == "usable" and result.kind == "judge" and result.reference == "oracle"
    for measure in MEASURES:
        interval = getattr(result, measure.field)
        if measure.scale == "rate" and measure.good == "high" and interval is not None:
            assert interval.estimate == interval.high == 1.0 and 0.8 < interval.low < 1
    assert result.reference_tau is not None and result.reference_tau.estimate == 1.0
    assert [band.accuracy.estimate for band in result.reference_by_margin] == [1.0] * 3
    assert "100%" in result.reason and "reference" in result.reason


def test_a_judge_of_the_position_alone_is_chance_and_the_reason_says_so() -> None:
    result = audited(Judge("position", 1.0))
    assert result.verdict == "no better than chance" and "prefers what is shown first, in 100%" in result.reason
    assert result.first_wins is not None and result.first_wins.estimate == 1.0
    assert result.position_consistency is not None and result.position_consistency.estimate == 0.0
    assert result.repetition_stability is not None and result.repetition_stability.estimate == 1.0
    assert result.known_pooled is not None and result.known_pooled.estimate == 0.5  # balanced within every prompt


def test_a_judge_of_the_length_alone_is_chance_though_it_gets_all_truncated_pairs_right() -> None:
    result = audited(Judge("length", 1.0))
    assert result.verdict == "no better than chance" and "prefers longer responses, tau +1.00" in result.reason
    assert result.length_tau is not None and result.length_tau.estimate == 1.0
    assert result.known_truncated is not None and result.known_truncated.estimate == 1.0
    assert result.known_pooled is not None and result.known_pooled.low > 0.5  # which is why it does not decide
    assert result.known_equal_length is not None and result.known_equal_length.estimate == 0.5


def test_an_upside_down_judge_is_told() -> None:
    result = audited(Judge("noise", 1.0))
    assert result.verdict == "no better than chance" and "upside down" in result.reason


def test_a_circular_judge_is_found() -> None:
    result = audited(Circular())
    assert result.cyclic_triples is not None and result.cyclic_triples.estimate == 0.5
    assert result.single_order_consistency is not None and result.single_order_consistency.estimate == 1.0
    assert result.verdict == "weak" and "circle" in result.reason
    straight = audited(PairJudge())
    assert straight.cyclic_triples is not None and straight.cyclic_triples.high < 0.25 and straight.verdict == "usable"


def test_averaging_over_orders_hides_a_bias_from_the_scores_but_not_from_the_single_verdicts() -> None:
    class Shaded(PairJudge):
        """Always "A", a little less surely where A is worse."""

        def matrix(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
            scores = np.array(oracle(prompt, responses))
            return np.where(scores[:, None] > scores[None, :], 0.9, 0.8)

    result = audited(Shaded())
    assert result.single_order_consistency is not None and result.single_order_consistency.estimate == 0.0
    assert result.first_wins is not None and result.first_wins.estimate == 1.0
    assert result.position_consistency is not None and result.position_consistency.estimate == 1.0
    assert result.verdict == "usable" and "shown first" in result.reason


# --- the rule ---------------------------------------------------------------------------------------------------------


def no_judge(prompt: str, responses: Sequence[str]) -> list[float]:
    """An oracle of something that known answers know nothing of."""
    return [float(hash_of(response) % 1000) for response in responses]


def hash_of(text: str) -> int:
    return sum((i + 1) * ord(char) for i, char in enumerate(text))


def test_an_oracle_need_not_know_the_known_answers_but_a_judge_must() -> None:
    result = audited(no_judge)
    assert result.kind == "oracle" and result.verdict == "usable"
    assert result.known_equal_length is not None and result.known_equal_length.low < 0.5
    assert replace(result, kind="judge").verdict == "no better than chance"


def test_an_oracle_that_is_noise_is_chance() -> None:
    rng = np.random.default_rng(0)
    result = audited(lambda prompt, responses: rng.random(len(responses)))
    assert result.kind == "oracle" and result.verdict == "no better than chance" and "as a coin" in result.reason


def test_a_reference_decides_whatever_the_kind() -> None:
    assert audited(no_judge, reference=oracle).verdict == "no better than chance"
    right_on_known = audited(Judge(), reference=no_judge)
    assert right_on_known.known_equal_length is not None and right_on_known.known_equal_length.low > 0.8
    assert right_on_known.verdict == "no better than chance" and "the reference agrees" in right_on_known.reason


def test_the_verdict_rests_on_the_ends_of_the_intervals() -> None:
    good = audited(Judge())
    half = Interval(0.75, 0.5, 0.9)
    assert replace(good, known_equal_length=half).verdict == "no better than chance"
    assert replace(good, known_equal_length=Interval(0.75, 0.501, 0.9)).verdict == "weak"
    assert replace(good, known_equal_length=Interval(0.75, 0.67, 0.9)).verdict == "usable"
    for name in ("known_other", "known_shuffled", "repetition_stability", "position_consistency"):
        assert replace(good, **{name: half}).verdict == "weak", name
    assert replace(good, all_tied=Interval(0.7, 0.51, 0.8)).verdict == "weak"
    assert replace(good, all_tied=Interval(0.6, 0.49, 0.8)).verdict == "usable"
    assert replace(good, cyclic_triples=Interval(0.3, 0.25, 0.4)).verdict == "weak"
    assert replace(good, repetition_stability=None).verdict == "usable"
    assert replace(good, known_equal_length=None).verdict == "no better than chance"


@pytest.mark.parametrize(
    ("prompts", "verdict"), [(6, "no better than chance"), (7, "weak"), (10, "weak"), (11, "usable")]
)
def test_how_many_prompts_a_perfect_judge_needs(prompts: int, verdict: str) -> None:
    result = audit(Judge(), *corpus(0, prompts))
    assert result.verdict == verdict
    assert ("too few" in result.reason) == (verdict == "weak")


def test_a_ranker_that_ties_everything_has_nothing_to_teach() -> None:
    result = audited(lambda prompt, responses: [0.0] * len(responses), reference=oracle)
    assert result.verdict == "no better than chance" and "same score" in result.reason
    assert result.all_tied is not None and result.all_tied.estimate == 1.0
    assert result.reference_accuracy is result.reference_tau is result.length_tau is None
    assert result.known_pooled is not None and result.known_pooled.estimate == 0.5


def test_real_oracles_are_usable() -> None:
    prompts = [f"Prompt {i}?" for i in range(12)]
    responses = [
        [f"It is nice{' indeed' * k}. Electricity number {i} is {'un' * k}believable." for k in range(4)]
        for i in range(12)
    ]
    assert audit(ReadingEase(), prompts, responses).verdict == "usable"


# --- asking -----------------------------------------------------------------------------------------------------------


def test_the_audit_is_the_same_again_and_leaves_its_input_alone() -> None:
    prompts, responses = corpus(0)
    before = json.dumps(responses)
    a, b = (audit(Judge("noise", 0.2, seed=3), prompts, responses, seed=5) for _ in range(2))
    assert replace(a, cost=b.cost) == b and json.dumps(responses) == before
    c, d = (audit(no_judge, prompts, responses, seed=seed) for seed in (5, 6))
    assert c.length_tau == d.length_tau and c.to_json() != replace(d, cost=c.cost).to_json()


def test_the_cost_is_the_rankers_own() -> None:
    class Counting(Judge):
        def __init__(self) -> None:
            super().__init__()
            self.count = TokenCount(prefill=100)

        def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
            self.count.prefill += 10 * len(responses)
            self.count.decode += 1
            return super().rank(prompt, responses)

    cost = audited(Counting(), reference=oracle).cost
    lists, pairs = 3 * PROMPTS, len(KINDS) * PER_KIND * PROMPTS
    assert (cost.calls, cost.decode) == (lists + pairs, lists + pairs)
    assert cost.prefill == 10 * (4 * lists + 2 * pairs) and cost.seconds > 0 and "tokens" in str(cost)
    once = audited(Counting(), repeats=1)
    assert once.cost.calls == 2 * PROMPTS + pairs and once.repetition_stability is None
    assert "asked once" in repr(once) and once.verdict == "usable"
    together = audited(Ensemble([(Counting(), 1), (oracle, 1)]))
    assert together.cost.prefill == cost.prefill and together.kind == "judge"


def test_rankers_that_score_in_one_go_are_asked_in_one_go() -> None:
    class Batched(Judge):
        batches = 0

        def rank_all(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
            self.batches += 1
            return [oracle(prompt, responses) for prompt, responses in items]

        def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
            raise AssertionError("asked one by one")

    judge = Batched()
    assert audited(judge).verdict == "usable" and judge.batches == 4


def test_verdicts_on_disk_are_asked_past_for_stability(tmp_path: Path) -> None:
    cached = CachedRanker(Judge("noise", 0.5), tmp_path, settings="noise")
    result = audited(cached)
    assert result.kind == "judge"
    assert result.repetition_stability is not None and result.repetition_stability.estimate < 0.9


def test_a_sparse_matrix_counts_what_was_asked() -> None:
    class Sparse(PairJudge):
        def matrix(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
            full = super().matrix(prompt, responses)
            full[0, 1] = full[1, 0] = math.nan
            return full

        def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
            return oracle(prompt, responses)

    result = audited(Sparse())
    assert result.comparisons["single_order_consistency"] == 5 * PROMPTS
    assert result.comparisons["cyclic_triples"] == 2 * PROMPTS
    assert result.single_order_consistency is not None and result.single_order_consistency.estimate == 1.0


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (lambda prompt, responses: np.zeros((2, 3)), "shape"),
        (lambda prompt, responses: np.full((4, 4), 1.5), "outside 0..1"),
        (lambda prompt, responses: "A", "no matrix of numbers"),
        (lambda prompt, responses: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_bad_matrix_is_named(matrix: Any, message: str) -> None:
    judge = Judge()
    judge.matrix = matrix  # type: ignore[attr-defined]
    with pytest.raises(RankerError, match=rf"noise 0.*{message}"):
        audited(judge)


def test_errors_name_the_value_and_the_remedy() -> None:
    prompts, responses = corpus(0)
    with pytest.raises(PromptError, match="19 lists of responses for 20 prompts"):
        audit(oracle, prompts, responses[1:])
    with pytest.raises(PromptError, match="not a list of strings"):
        audit(oracle, prompts, ["one", *responses[1:]])
    with pytest.raises(
        ConfigError, match="repeats, how often the ranker is asked, must be an integer of at least 1, got 0"
    ):
        audit(oracle, prompts, responses, repeats=0)
    with pytest.raises(RankerError, match="not finite"):
        audit(lambda prompt, group: [math.nan] * len(group), prompts, responses)
    with pytest.raises(RankerError, match="'broken' on the prompt .* KeyError"):
        audit(broken, prompts, responses)


def broken(prompt: str, responses: Sequence[str]) -> list[float]:
    raise KeyError("no such thing")


TEXT = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            "yes",
            "the the the the the the",
            "Ünïcödé 💡 中文句子沒有空格但是很長",
            "\u200d" * 12,
            "a\x00b",
        ]
    ),
    st.text(max_size=60),
)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.lists(TEXT, max_size=4), min_size=1, max_size=5), seed=st.integers(0, 3), paired=st.booleans()
)
def test_odd_responses_do_no_harm(groups: list[list[str]], seed: int, paired: bool) -> None:
    ranker = Circular() if paired else no_judge
    prompts = [f"About {i}" for i in range(len(groups))]
    result = audit(ranker, prompts, groups, reference=oracle, seed=seed)
    assert result.verdict in ("usable", "weak", "no better than chance") and result.reason
    assert Audit.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))) == result
    assert repr(result) and len(result.table()) == len(MEASURES)
    for measure in MEASURES:
        interval = getattr(result, measure.field)
        if interval is not None and measure.scale != "units":
            bottom = -1 if measure.scale == "correlation" else 0
            ends = [bottom, interval.low, interval.estimate, interval.high, 1]
            assert all(a <= b + 1e-9 for a, b in zip(ends, ends[1:], strict=False)), (measure.field, interval)
    if all(len(set(group)) < 2 for group in groups):
        assert result.verdict == "no better than chance" and "two different responses" in result.reason


# --- what is read -----------------------------------------------------------------------------------------------------


def test_an_audit_round_trips_and_reads_well() -> None:
    result = audit(PairJudge(flips=0.1), *corpus(0), reference=oracle)
    data = json.loads(json.dumps(result.to_json()))
    assert Audit.from_json(data) == result
    assert data["verdict"] == result.verdict and data["reason"] == result.reason
    text = repr(result)
    assert text.startswith(f"Audit of pairs (judge): {result.verdict}\n") and result.reason[1:] in text
    assert "20 prompts, 80 different responses, reference oracle" in text and "margins" in text
    assert "Not measured" not in text and "Not measured: reference agrees" in repr(audited(oracle))
    assert all(len(line) < 120 for line in text.splitlines()[4:])
    table = result.table()
    assert list(table.index) == [measure.field for measure in MEASURES]
    assert {measure.field for measure in MEASURES} <= {f.name for f in fields(Audit)}
    row = table.loc["position_consistency"]
    assert result.position_consistency == Interval(row["estimate"], row["low"], row["high"])
    assert row["comparisons"] == 6 * PROMPTS and row["chance"] == 0.5
    assert audited(oracle).table().loc["cyclic_triples", "note"].startswith("does not apply")


def test_html_is_escaped() -> None:
    judge = Judge()
    judge.name = "<script>"
    assert "<script>" not in audited(judge)._repr_html_() and "&lt;script&gt;" in audited(judge)._repr_html_()


# --- the pairs of an iteration ----------------------------------------------------------------------------------------


def pairs_of(ranker: Any, prompts: list[str], responses: list[list[str]]) -> list[ContrastPair]:
    pairs = []
    for index, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        scores = ranker(prompt, group)
        best, worst = (
            Sample(index, k, tuple(range(len(group[k].split()))), group[k], True, score=scores[k])
            for k in (int(np.argmax(scores)), int(np.argmin(scores)))
        )
        pairs.append(ContrastPair(index, best, worst))
    return pairs


def test_pairs_are_asked_about_again() -> None:
    prompts, responses = corpus(0)
    pairs = pairs_of(oracle, prompts, responses)
    result = audit_pairs(oracle, prompts, pairs, reference=no_judge)
    assert result.pairs == PROMPTS and result.cost.calls == 2 * PROMPTS
    assert result.position_consistency is not None and result.position_consistency.estimate == 1.0
    assert result.upheld is not None and result.upheld.estimate == 1.0
    gaps = [len(pair.best.tokens) - len(pair.worst.tokens) for pair in pairs]
    assert result.length_gap is not None and result.length_gap.estimate == pytest.approx(np.mean(gaps))
    assert result.reference_accuracy is not None and 0.2 < result.reference_accuracy.estimate < 0.8
    assert PairAudit.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert "20 contrast pairs, reference no_judge" in repr(result) and "<table>" in result._repr_html_()


def test_extremes_of_noise_are_not_upheld() -> None:
    prompts, responses = corpus(0)
    rng = np.random.default_rng(0)
    pairs = pairs_of(lambda prompt, group: list(rng.random(len(group))), prompts, responses)
    result = audit_pairs(lambda prompt, group: list(rng.random(len(group))), prompts, pairs)
    assert result.upheld is not None and result.upheld.low < 0.5 < result.upheld.high
    first = audit_pairs(Judge("position", 1.0), prompts, pairs)
    assert first.position_consistency is not None and first.position_consistency.estimate == 0.0
    assert first.upheld is not None and first.upheld.estimate == 0.5


def test_several_pairs_of_a_prompt_are_one_cluster() -> None:
    prompts, responses = corpus(0)
    pairs = pairs_of(oracle, prompts, responses)
    once, thrice = audit_pairs(oracle, prompts, pairs), audit_pairs(oracle, prompts, pairs * 3)
    assert thrice.pairs == 3 * once.pairs and thrice.upheld == once.upheld and thrice.length_gap == once.length_gap


def test_no_pairs_no_figures() -> None:
    result = audit_pairs(oracle, [], [], reference=no_judge)
    assert result == PairAudit("oracle", "no_judge", 0) and PairAudit.from_json(result.to_json()) == result
    assert "0 contrast pairs" in repr(result)


# --- pure measures ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=8))
def test_kendalls_tau_is_that_of_its_definition(values: list[tuple[int, int]]) -> None:
    x, y = zip(*values, strict=True)
    concordant = ties_x = ties_y = 0
    for i in range(len(values)):
        for j in range(i):
            concordant += np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
            ties_x, ties_y = ties_x + (x[i] == x[j]), ties_y + (y[i] == y[j])
    pairs = math.comb(len(values), 2)
    tau = kendall_tau(pair_signs([float(v) for v in x]), pair_signs([float(v) for v in y]))
    if pairs in (ties_x, ties_y):
        assert math.isnan(tau)
    else:
        assert tau == pytest.approx(concordant / math.sqrt((pairs - ties_x) * (pairs - ties_y)))


def test_a_difference_in_the_last_digits_is_a_tie() -> None:
    assert pair_signs([0.1 + 0.2, 0.3, -0.3]).tolist() == [0.0, 1.0, 1.0]
    assert pair_signs([1e308, -1e308]).tolist() == [1.0]
    assert pair_signs([1e-300, 2e-300]).tolist() == [-1.0]


def test_circles_are_counted() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        upper = np.triu(rng.random((5, 5)), 1)
        shares.append(cyclic_share(upper + np.tril(1 - upper.T, -1))[0])
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02)  # coins
    in_order = (np.arange(5)[:, None] < np.arange(5)).astype(float)
    assert cyclic_share(in_order) == (0.0, 10)
    assert math.isnan(cyclic_share(np.full((2, 2), 0.5))[0])


@pytest.mark.parametrize("prompts", [8, 16, 40])
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("clustering", [0.05, 0.5, 0.9])
def test_the_interval_of_a_rate_covers(prompts: int, rate: float, clustering: float) -> None:
    """Three free comparisons per prompt, correlated as given."""
    rng = np.random.default_rng(1)
    a, b = (p * (1 - clustering) / clustering for p in (rate, 1 - rate))
    drawn = rng.binomial(3, rng.beta(a, b, size=(400, prompts))) / 3
    covered = [within(rate_interval(list(rates), [3] * prompts), rate) for rates in drawn]
    assert np.mean(covered) >= 0.9


def test_an_interval_without_variance_is_not_a_point() -> None:
    full = rate_interval([1.0] * 20, [3] * 20)
    assert full.estimate == full.high == 1.0 and 0.8 < full.low < 0.87
    half = rate_interval([0.5] * 20, [3] * 20)
    assert 0.4 < half.low < 0.5 < half.high < 0.6
    assert rate_interval([1.0], [3]).low < 0.01
    tau = correlation_interval([-1.0] * 20, [3] * 20)
    assert tau.estimate == tau.low == -1 and -0.8 < tau.high < -0.6


# --- known answers ----------------------------------------------------------------------------------------------------


def test_known_pairs_are_balanced_in_every_prompt() -> None:
    prompts, responses = corpus(0)
    pairs = known_pairs(responses, seed=0)
    assert len(pairs) == len(KINDS) * PER_KIND * PROMPTS and known_pairs(responses, seed=0) == pairs
    for pair in pairs:
        assert pair.real in responses[pair.prompt] and pair.spoilt not in responses[pair.prompt]
        assert quality(prompts[pair.prompt], pair.real) > quality(prompts[pair.prompt], pair.spoilt)
        assert pair.shown[0 if pair.real_first else 1] == pair.real
    sides = Counter((pair.prompt, pair.kind, pair.real_first) for pair in pairs)
    assert set(sides.values()) == {1}
    assert all(len(pair.real) == len(pair.spoilt) for pair in pairs if pair.kind == "shuffled")


def test_a_single_response_stands_in_both_orders() -> None:
    pairs = known_pairs([["one two three four five six"], ["six seven eight nine ten eleven"]])
    assert Counter((pair.prompt, pair.kind) for pair in pairs) == {(i, kind): 2 for i in (0, 1) for kind in KINDS}
    assert {pair.real_first for pair in pairs if (pair.prompt, pair.kind) == (0, "truncated")} == {True, False}


def test_what_is_too_short_is_not_spoilt() -> None:
    rng = np.random.default_rng(0)
    for text in ("", "  ", "Yes.", "Yes, I do"):
        assert shuffled(text, rng) is None and truncated(text) is None
    assert known_pairs([["Yes.", ""], ["No."]]) == []
    assert shuffled("the the the the the", rng) is None and truncated("the the the the the") == "the"


def test_white_space_stays_where_it_was_and_letters_stand_in_for_words() -> None:
    rng = np.random.default_rng(0)
    mixed = shuffled("one  two\nthree four\t five ", rng)
    assert mixed is not None and sorted(mixed.split()) == ["five", "four", "one", "three", "two"]
    assert [c for c in mixed if c.isspace()] == list("  \n \t  ")
    assert truncated("one  two\nthree four\t five six") == "one  two"
    chinese = "這是一個沒有空格的句子"
    assert sorted(shuffled(chinese, rng) or "") == sorted(chinese) and truncated(chinese) == chinese[:3]


def test_the_other_answer_is_of_about_the_same_length() -> None:
    rng = np.random.default_rng(0)
    assert nearest_in_length("12345", ["1", "1234567", "123456"], rng) == "123456"
    assert nearest_in_length("12345", [], rng) is None
