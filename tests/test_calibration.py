"""The search follows its rule, the choice is made on one split and reported on the other, margins are those of plain
forward passes."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from common import KINDS, plan_of, vector

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.behaviour import PairBehaviour, logprob_margin
from sims_lens.calibration import (
    Calibration,
    FluencyBudget,
    Point,
    best_within,
    calibrate,
    perplexity_ratio,
    search,
)
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, PlanError, PromptError, RankerError
from sims_lens.evaluate import Evaluation, evaluate, side_effects
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.stats import Interval

PROMPTS = [f"Say {letter}{letter}." for letter in "abcdfghijklmnpqr"]
UNLIMITED = FluencyBudget(math.inf, math.inf)
SAMPLING = sims.SamplingConfig(responses=2, max_new_tokens=6, top_k=None)
PAIRS = [(f"Say {letter}.", f"ee{letter}e", f"oo{letter}") for letter in "abcdfghi"]


def share_of_e(prompt: str, responses: Sequence[str]) -> list[float]:
    return [r.count("e") / max(1, len(r)) for r in responses]


def towards(model: Any, text: str = "e", *, coefficient: float = 0.3) -> SteeringPlan:
    """A plan that makes one token likelier: its row of the unembedding, added at the last layer."""
    adapter = adapt(model)
    token = adapter.encode_response(text)[0] if text else adapter.tokenizer.eos_token_id
    vectors = {adapter.n_layers - 1: model.W_U[:, token].detach()}
    return SteeringPlan.addition(vectors, coefficient=coefficient, units="residual_norm")


def found_on(model: Any, plan: Any = None, **settings: Any) -> Calibration:
    if "behaviour" not in settings:
        settings = {"ranker": share_of_e} | settings
    settings = {"prompts": PROMPTS, "sampling": SAMPLING, "progress": False, "refine": 1} | settings
    return calibrate(model, towards(model) if plan is None else plan, **settings)


def point(
    factor: float, effect: float, ratio: float, kl: float = 0.0, *, spread: float = 0.0, name: str = "a"
) -> Point:
    def around(value: float) -> Interval:
        return Interval(float(value), float(value - spread), float(value + spread))

    evaluation = Evaluation(**{f.name: around(0.5) for f in fields(Evaluation) if f.default is MISSING})
    evaluation = replace(evaluation, difference=around(effect), kl=around(kl))
    return Point(name, float(factor), 0.2 * factor, evaluation, around(ratio))


def searched(measure: Callable[[float], Point], factors: Sequence[float], **settings: Any) -> tuple[list[float], Any]:
    """The factors in the order in which they were measured, and the best point."""
    asked: list[float] = []

    def recorded(factor: float) -> Point:
        asked.append(factor)
        return measure(factor)

    budget = settings.pop("budget", FluencyBudget(perplexity_ratio=1.5, kl=0.5))
    points = search(recorded, [float(f) for f in factors], budget, refine=settings.pop("refine", 2))
    assert [p.factor for p in points] == sorted(asked) and len(set(asked)) == len(asked)
    return asked, best_within(points, budget)


# The search


def test_where_effect_and_cost_rise_the_search_bisects_the_end_of_the_budget() -> None:
    def measure(factor: float) -> Point:
        return point(factor, effect=factor, ratio=math.exp(0.2 * factor))  # 1.5 is reached at 2.027

    asked, best = searched(measure, [4.0, 1.0, 2.0, 0.5], refine=0)
    assert asked == [0.5, 1.0, 2.0, 4.0] and best.factor == 2.0
    asked, best = searched(measure, [0.5, 1.0, 4.0], refine=2)
    assert asked == [0.5, 1.0, 4.0, 2.0, math.sqrt(8)] and best.factor == 2.0
    _, best = searched(measure, [0.5, 1.0, 4.0], refine=12)
    assert best.factor == pytest.approx(math.log(1.5) / 0.2, rel=1e-3)


def test_each_limit_ends_the_ascent_once_an_interval_is_wholly_beyond_it() -> None:
    for costly in ({"ratio": 3.0}, {"ratio": 1.0, "kl": 2.0}):
        asked, best = searched(lambda f: point(f, f, **(costly if f > 1 else {"ratio": 1.0})), [1, 2, 3], refine=0)  # noqa: B023
        assert asked == [1, 2] and best.factor == 1
    asked, _ = searched(lambda f: point(f, f, 1.6 if f > 1 else 1.0, spread=0.2), [1, 2, 3], refine=0)
    assert asked == [1, 2, 3]


def test_a_peak_within_the_budget_is_refined_rather_than_the_end_of_the_budget() -> None:
    asked, best = searched(lambda f: point(f, -((math.log2(f) - 0.5) ** 2) + 5, 1.0 + 0.1 * f), [0.5, 1, 2, 4, 8])
    assert asked[:5] == [0.5, 1, 2, 4, 8] and asked[5] == pytest.approx(math.sqrt(2)) and best.factor == asked[5]
    assert asked[6] == pytest.approx(2**0.75)  # between the new best and the next above it


def test_nothing_is_chosen_where_nothing_is_within_or_nothing_helps() -> None:
    asked, best = searched(lambda f: point(f, f, 9.0), [1, 2])
    assert asked == [1] and best is None
    asked, best = searched(lambda f: point(f, -f, 1.0), [1, 2])
    assert asked == [1, 2] and best is None
    asked, best = searched(lambda f: point(f, 0.0, 1.0), [1, 2])
    assert best is None


def test_fluency_need_not_be_monotone() -> None:
    ratio = {0.5: 1.6, 1: 1.2, 2: 1.7, math.sqrt(2): 1.4}
    asked, best = searched(lambda f: point(f, f, ratio[f], spread=0.3), [0.5, 1, 2], refine=1)
    assert asked == [0.5, 1, 2, math.sqrt(2)] and best.factor == math.sqrt(2)


def test_the_largest_factor_has_nothing_above_it_to_refine() -> None:
    asked, best = searched(lambda f: point(f, f, 1.0), [1, 2], refine=5)
    assert asked == [1, 2] and best.factor == 2


def test_budget_is_checked_and_may_be_infinite(unchecked: None) -> None:
    assert UNLIMITED.allows(point(1, 1, 1e9, 1e9))
    assert not FluencyBudget().allows(point(1, 1, math.nan))
    budget = FluencyBudget(perplexity_ratio=1.5, kl=0.5)
    assert budget.allows(point(1, 1, 1.5, 0.5)) and not budget.allows(point(1, 1, 1.51))
    assert budget.is_sure_of(point(1, 1, 1.2, 0.2, spread=0.1)) and budget.is_sure_of(point(1, 1, 2.0, spread=0.1))
    assert not budget.is_sure_of(point(1, 1, 1.2, 0.45, spread=0.1))
    for wrong in ({"perplexity_ratio": 1.0}, {"kl": 0.0}, {"kl": math.nan}, {"perplexity_ratio": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FluencyBudget(**wrong)


def test_perplexity_ratio_is_paired_by_prompt_and_leaves_silence_out() -> None:
    def sample(prompt: int, draw: int, nll: float | None, words: int = 2) -> Sample:
        return Sample(prompt, draw, tuple(range(words)), "a b"[: 2 * words], ended=False, nll=nll)

    base = [sample(0, 0, 1.0), sample(0, 1, 2.0), sample(1, 0, 0.5), sample(1, 1, None), sample(2, 0, 9.0)]
    ours = [sample(0, 0, 2.0), sample(0, 1, 0.0, words=0), sample(1, 0, 0.7), sample(1, 1, 0.9), sample(2, 0, 0.0, 0)]
    found = perplexity_ratio(ours, base)
    differences = [2.0 - 1.5, 0.8 - 0.5]
    assert found.estimate == pytest.approx(math.exp(np.mean(differences)))
    assert math.exp(min(differences)) <= found.low <= found.estimate <= found.high <= math.exp(max(differences))
    assert perplexity_ratio([sample(0, 0, 0.0, 0)], [sample(0, 0, 1.0)]).low == math.inf


# On a model


def test_the_choice_is_the_largest_effect_within_the_budget(llama: Any) -> None:
    budget = FluencyBudget(perplexity_ratio=4.0, kl=0.6)
    found = found_on(llama, budget=budget)
    assert found.chosen is not None and found.report is not None
    allowed = [p for p in found.curve if budget.allows(p)]
    assert 0 < len(allowed) < len(found.curve)  # the budget matters
    assert found.chosen.effect.estimate == max(p.effect.estimate for p in allowed) > 0.05
    assert found.report.factor == found.chosen.factor and found.report != found.chosen
    assert found.report.effect.estimate > 0.05
    (intervention,) = found.plan.interventions
    assert intervention.coefficient == pytest.approx(0.3 * found.chosen.factor) == found.chosen.coefficient
    assert found.prompts == (8, 8) and found.units == "residual_norm" and found.objective == "share_of_e"
    assert found.cost["sample"].decode > 0 and found.cost["measure"].prefill > 0 and "rank" in found.cost
    kls = [p.evaluation.kl.estimate for p in found.curve]
    assert kls == sorted(kls)


class Listening:
    """A ranker that remembers which prompts it was asked about."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        self.asked.append(prompt)
        return share_of_e(prompt, responses)


def test_a_point_is_what_evaluate_says_of_the_scaled_plan(llama: Any) -> None:
    plan, ranker = towards(llama), Listening()
    found = found_on(llama, plan, ranker=ranker, factors=[2.0], refine=0, budget=UNLIMITED, seed=3)
    splits = ranker.asked[:8], ranker.asked[8:]
    assert sorted(splits[0] + splits[1]) == sorted(PROMPTS)  # every prompt once: the splits are disjoint
    for found_point, prompts in zip((found.curve[0], found.report), splits, strict=True):
        drawn = []
        for each in (plan.scaled(2.0), NOTHING):
            samples = list(sims.LocalSampler(llama, SAMPLING).sample(prompts, n=2, plan=each, seed=3))
            measured = side_effects(llama, prompts, samples, each)
            measured = [s if s.tokens else replace(s, nll=None, kl=None) for s in measured]
            drawn.append([replace(s, score=share_of_e("", [s.text])[0]) for s in measured])
        assert found_point is not None
        assert found_point.evaluation.to_json() == evaluate(*drawn, seed=3).to_json()
        assert found_point.perplexity_ratio == perplexity_ratio(*drawn, seed=3)


def test_the_same_seed_repeats_and_another_splits_otherwise(zoo: Any) -> None:
    model, rankers = zoo("llama", KINDS[-1]), [Listening() for _ in range(3)]
    one, same, other = (
        found_on(model, ranker=ranker, factors=[1.0], refine=0, budget=UNLIMITED, seed=seed)
        for ranker, seed in zip(rankers, (0, 0, 1), strict=True)
    )
    assert one.curve == same.curve and one.report == same.report and rankers[0].asked == rankers[1].asked
    assert other.curve != one.curve and rankers[0].asked != rankers[2].asked


def test_the_report_split_is_asked_about_once_and_last(zoo: Any) -> None:
    ranker = Listening()
    found_on(zoo("llama", KINDS[-1]), ranker=ranker, factors=[1.0, 2.0], refine=0, report=0.25, budget=UNLIMITED)
    first, again, last = ranker.asked[:12], ranker.asked[12:24], ranker.asked[24:]
    assert first == again and len(last) == 4 and not set(first) & set(last)


def test_unsteered_and_steered_responses_share_their_random_numbers(llama: Any) -> None:
    found = found_on(llama, factors=[1e-6], refine=0)
    (only,) = found.curve
    assert only.effect == Interval(0.0, 0.0, 0.0) and only.evaluation.win_rate.estimate == 0.5
    assert only.perplexity_ratio.estimate == pytest.approx(1.0, abs=1e-4)
    assert only.evaluation.kl.estimate == pytest.approx(0.0, abs=1e-6)


def test_both_kinds_find_the_same(zoo: Any) -> None:
    if len(KINDS) < 2:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    hooked, bridge = (found_on(zoo("llama", kind), budget=FluencyBudget(4.0, 0.6)) for kind in KINDS)
    assert [p.factor for p in hooked.curve] == [p.factor for p in bridge.curve]
    for a, b in zip(hooked.curve, bridge.curve, strict=True):
        assert a.evaluation.kl.estimate == pytest.approx(b.evaluation.kl.estimate, abs=1e-3)
        assert a.effect.estimate == pytest.approx(b.effect.estimate, abs=1e-6)


def test_of_several_candidates_the_one_with_the_larger_effect_wins(llama: Any) -> None:
    planted = towards(llama)
    away = SteeringPlan.addition({1: vector(1)}, coefficient=0.3, units="residual_norm")
    settings = {"budget": FluencyBudget(perplexity_ratio=4.0, kl=0.6), "factors": [1.0], "refine": 0}
    found = found_on(llama, [away, planted], **settings)
    assert found.candidates == ("layer 1", "layer 2") and found.chosen is not None
    assert found.chosen.candidate == "layer 2" and found.plan.layers == (2,)
    named = found_on(llama, {"b": planted, "a": away}, **settings)
    assert named.candidates == ("b", "a") and named.chosen is not None and named.chosen.candidate == "b"
    assert named.chosen.effect == found.chosen.effect


def test_candidates_have_a_name_and_a_coefficient(zoo: Any) -> None:
    model = zoo("llama", KINDS[-1])
    planted, both = towards(model), plan_of(1, coefficient=0.1) + plan_of(2, coefficient=-0.5)
    found = found_on(model, [planted, both, 2.0 * planted], factors=[0.1], refine=0)
    assert found.candidates == ("1: layer 2", "2: layers 1, 2", "3: layer 2") and found.units == "mixed"
    assert [p.coefficient for p in found.curve] == pytest.approx([0.03, -0.05, 0.06])


def test_a_ranker_that_compares_sees_steered_beside_unsteered(llama: Any) -> None:
    def centred(prompt: str, responses: Sequence[str]) -> list[float]:
        scores = share_of_e(prompt, responses)
        return [score - sum(scores) / len(scores) for score in scores]

    settings = {"factors": [1.0], "refine": 0, "budget": UNLIMITED}
    alone, together = (found_on(llama, ranker=r, **settings).curve[0].effect for r in (share_of_e, centred))
    assert together.estimate == pytest.approx(alone.estimate) and alone.estimate > 0.05


def test_a_judge_is_bound_to_the_model(llama: Any) -> None:
    class Judge:
        def bind(self, model: Any) -> "Judge":
            assert model is llama
            self.bound = True
            return self

        def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
            assert self.bound
            return share_of_e(prompt, responses)

    found = found_on(llama, ranker=Judge(), factors=[1.0], refine=0)
    assert found.objective == "Judge" and found.curve[0].evaluation.score.estimate > 0


def test_where_nothing_is_within_the_budget_there_is_no_plan(llama: Any) -> None:
    found = found_on(llama, budget=FluencyBudget(perplexity_ratio=1.0001, kl=1e-9))
    assert found.chosen is None and found.report is None and len(found.curve) == 1
    with pytest.raises(PlanError, match=r"not even a factor of 0\.25; give smaller factors"):
        _ = found.plan
    assert "Chosen: none" in repr(found) and Calibration.from_json(found.to_json()) == found
    opposite = found_on(llama, -towards(llama), budget=UNLIMITED)
    assert opposite.chosen is None
    with pytest.raises(PlanError, match=r"raises the score; turn the plan round"):
        _ = opposite.plan


def test_a_model_that_falls_silent_is_not_fluent(llama: Any) -> None:
    cold = replace(SAMPLING, temperature=0.05)
    silent = found_on(llama, towards(llama, "", coefficient=50.0), factors=[1.0], refine=0, sampling=cold)
    assert silent.curve[-1].evaluation.length.estimate == 0.0
    assert silent.curve[-1].perplexity_ratio.estimate == math.inf and not silent.budget.allows(silent.curve[-1])


def test_a_behaviour_is_calibrated_on_half_of_its_pairs(llama: Any) -> None:
    pairs = [*PAIRS, (PAIRS[0][0], "ee", "o")]
    plan, behaviour = towards(llama), PairBehaviour(pairs, name="says e")
    found = found_on(llama, plan, behaviour=behaviour, factors=[0.5, 1.0], refine=0, budget=UNLIMITED)
    assert found.objective == "says e" and found.report is not None and "behaviour" in found.cost
    change = (logprob_margin(llama, pairs, plan) - logprob_margin(llama, pairs)).tolist()
    by_prompt = [np.mean([change[0], change[8]]), *change[1:8]]  # two pairs of one prompt count as one
    halves = [p.effect.estimate for p in (found.curve[1], found.report)]
    assert np.mean(halves) == pytest.approx(np.mean(by_prompt), abs=1e-5) and halves[0] != halves[1]
    assert found.curve[1].effect.estimate > found.curve[0].effect.estimate > 0
    assert found.curve[1].evaluation.win_rate.estimate > 0.5
    assert found.curve[1].evaluation.kl.estimate > 0


def test_json_text_and_table(llama: Any) -> None:
    found = found_on(llama, {"<b>": towards(llama)}, budget=FluencyBudget(4.0, 0.6))
    again = Calibration.from_json(json.loads(json.dumps(found.to_json())), plan=found.plan)
    assert again == found and again.plan is found.plan
    with pytest.raises(PlanError, match="JSON holds no plan"):
        _ = Calibration.from_json(found.to_json()).plan
    text, page = repr(found), found._repr_html_()
    assert text.count("<- chosen") == 2 and found.reason in text and found.verdict in text
    assert "perplexity ratio up to 4, KL up to 0.6" in text and "<b> at factor" in found.reason
    assert "&lt;b&gt; at factor" in page and "<td><b>" not in page
    assert page.count("<tr>") == 1 + len(found.curve) + 1
    table = found.table()
    assert list(table.split) == ["calibration"] * len(found.curve) + ["report"]
    assert list(table.columns[:7]) == [
        "split",
        "candidate",
        "factor",
        "coefficient",
        "effect",
        "effect_low",
        "effect_high",
    ]
    assert table.chosen.sum() == 2 and set(table[table.chosen].split) == {"calibration", "report"}
    assert list(table.within) == [found.budget.allows(p) for p in (*found.curve, found.report)]
    assert list(table.coefficient) == pytest.approx(list(0.3 * table.factor))


def test_the_reason_says_what_is_open() -> None:
    def calibration(*points: Point) -> Calibration:
        return Calibration("m", "r", "absolute", FluencyBudget(), points, None, (4, 4), 2, 0, {})

    inside = calibration(point(1, 1, 1.1), point(2, 3, 1.2), point(4, 2, 1.3))
    assert "a at factor 2 (coefficient 0.4)" in inside.reason and "of 3 points within the budget" in inside.reason
    assert "may do better" not in inside.reason and "beyond" not in inside.reason
    assert "may do better" in calibration(point(1, 1, 1.1), point(2, 3, 1.2)).reason
    unsure = calibration(point(1, 1, 1.4, spread=0.2), point(2, 3, 1.9))
    assert "reaches beyond the budget" in unsure.reason and "may do better" not in unsure.reason
    reported = replace(inside, report=point(2, 3, 1.7))
    assert "NOT within the budget" in reported.verdict
    assert ": within the budget." in replace(inside, report=point(2, 3, 1.2)).verdict
    assert "reaches across a limit" in replace(inside, report=point(2, 3, 1.4, spread=0.2)).verdict


def test_what_cannot_be_used_is_refused_before_anything_is_computed(
    zoo: Any, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo("llama", "bridge")
    plan = towards(model)
    monkeypatch.setattr(sims.LocalSampler, "sample", lambda *a, **k: pytest.fail("it was sampled"))
    long = PairBehaviour([*PAIRS, ("Say it.", "a" * 200, "b")])
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "got both", {"behaviour": PairBehaviour(PAIRS), "ranker": share_of_e}),
        (ConfigError, "got neither", {"ranker": None}),
        (ConfigError, "must be a PairBehaviour, got list", {"behaviour": PAIRS}),
        (RankerError, "is neither", {"ranker": 3}),
        (ConfigError, "different positive numbers", {"factors": []}),
        (ConfigError, "different positive numbers", {"factors": [1.0, 1.0]}),
        (ConfigError, "calibrate -plan", {"factors": [-1.0]}),
        (ConfigError, "positive number, got inf", {"factors": [math.inf]}),
        (ConfigError, "refine must be", {"refine": -1}),
        (ConfigError, "report must be", {"report": 1.0}),
        (PromptError, "7 prompts give 3 to calibrate on and 4 to report on", {"prompts": PROMPTS[:7]}),
        (PromptError, "2 of each|16 prompts give 14", {"report": 0.1}),
        (PromptError, "3 prompts of the behaviour's pairs", {"behaviour": PairBehaviour(PAIRS[:3])}),
        (PromptError, "the context 128", {"behaviour": long}),
        (PromptError, "lower max_new_tokens", {"prompts": [*PROMPTS, "a" * 200]}),
        (PlanError, "no coefficient other than 0", {"plan": 0.0 * plan}),
        (PlanError, "no coefficient other than 0", {"plan": NOTHING}),
        (PlanError, "there are no plans", {"plan": []}),
        (PlanError, "expected a SteeringPlan, got str", {"plan": ["x"]}),
        (PlanError, "layer 9", {"plan": plan_of(9)}),
    ]
    for error, message, settings in refused:
        with pytest.raises(error, match=message):
            found_on(model, **{"plan": plan, **settings})


# The behaviour


def test_margins_are_those_of_single_unpadded_forward_passes(llama: Any) -> None:
    adapter, plan = adapt(llama), plan_of(1, scope="generation", coefficient=0.8)
    pairs = [("Hi", "a longer text", "b"), ("Tell me of rain.", "yes", "never ever"), ("Hi", "c", "dd")]

    def mean_logprob(prompt: str, text: str, plan: SteeringPlan) -> float:
        ids, tokens = adapter.encode(prompt), adapter.encode_response(text)
        with torch.no_grad(), sims.steering(llama, plan) as steered, steered.prompt(len(ids)):
            log_p = llama(torch.tensor([[*ids, *tokens]]))[0, len(ids) - 1 : -1].log_softmax(-1)
        return float(log_p[torch.arange(len(tokens)), tokens].mean())

    for each in (NOTHING, plan):
        expected = [mean_logprob(p, a, each) - mean_logprob(p, b, each) for p, a, b in pairs]
        for rows in (1, 4, 32):
            found = logprob_margin(llama, pairs, each, batch_rows=rows)
            torch.testing.assert_close(found, torch.tensor(expected), atol=3e-5, rtol=0)
    assert torch.equal(PairBehaviour(pairs).measure(llama, plan), logprob_margin(llama, pairs, plan))


def test_a_planted_direction_moves_the_margin_its_way(llama: Any) -> None:
    plan = towards(llama)
    before, after, away = (logprob_margin(llama, PAIRS, p) for p in (NOTHING, plan, -plan))
    assert (after > before).all() and (away < before).all()


def test_pairs_are_checked(unchecked: None) -> None:
    assert PairBehaviour([["x", "y", "z"]]).pairs == (("x", "y", "z"),)  # type: ignore[list-item]
    for wrong, message in (
        ([], "there are none"),
        ([("x", "y")], "pair 0 is not"),
        ([("x", "y", "z"), ("x", " ", "z")], "pair 1 is not"),
        ([("x", "y", 3)], "pair 0 is not"),
        (["xyz"], "pair 0 is not"),
        ([("x", "y", "y")], "one text twice"),
    ):
        with pytest.raises(PromptError, match=message):
            PairBehaviour(wrong)  # type: ignore[arg-type]
