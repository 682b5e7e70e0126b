"""Several plans at once: alone, together, and what is beyond their sum."""

from typing import Any

import numpy as np
import pytest
import torch
from common import plan_of, vector

import sims_lens as sims
from sims_lens.analysis.interactions import TOGETHER, Interaction
from sims_lens.errors import ConfigError, PlanError
from sims_lens.plots import TEMPLATE
from sims_lens.rankers import as_ranker, rank

PROMPTS = ["Hi", "Tell me of rain.", "A longer prompt than those.", "Why?", "And then?"]
SAMPLING = sims.SamplingConfig(max_new_tokens=6, top_k=None)


def vowels(_prompt: str, responses: list[str]) -> list[float]:
    return [float(sum(c in "aeiou" for c in r)) for r in responses]


def length(_prompt: str, responses: list[str]) -> list[float]:
    return [float(len(r)) for r in responses]


def measure(model: Any, plans: dict[str, sims.SteeringPlan], **options: Any) -> Interaction:
    rankers = {"vowels": vowels, "length": length}
    return sims.interaction(model, plans, rankers, PROMPTS, sampling=SAMPLING, progress=False, **options)


@pytest.fixture(scope="module")
def found(zoo: Any) -> Interaction:
    plans = {"<a>": plan_of(1, coefficient=4.0), "b": plan_of(1, 2, seed=5, coefficient=4.0)}
    return measure(zoo("llama", "bridge"), plans, seed=4)


def test_together_is_the_sum_of_the_plans_and_the_rest_is_arithmetic(zoo: Any, found: Interaction) -> None:
    model = zoo("llama", "bridge")
    a, b = found.plans.values()
    sampler = sims.LocalSampler(model, SAMPLING)
    means = {}
    for name, plan in {"base": a.scaled(0.0), "a": a, "b": b, "both": a + b}.items():
        drawn = list(sampler.sample(PROMPTS, n=2, plan=plan, seed=4))
        scored = rank(as_ranker(vowels), PROMPTS, drawn)
        means[name] = np.array([np.mean([s.score for s in scored if s.prompt == i]) for i in range(len(PROMPTS))])
    effects = {name: float((means[name] - means["base"]).mean()) for name in ("a", "b", "both")}
    shown = found.evaluations["vowels"]
    assert shown["<a>"].difference.estimate == pytest.approx(effects["a"])
    assert shown["b"].difference.estimate == pytest.approx(effects["b"])
    assert shown[TOGETHER].difference.estimate == pytest.approx(effects["both"])
    expected = effects["both"] - effects["a"] - effects["b"]
    term = found.interaction["vowels"]
    assert term.estimate == pytest.approx(expected) and term.low <= term.estimate <= term.high
    assert expected != 0.0


def test_cosines_of_shared_sites_follow_the_coefficients_sign(zoo: Any, found: Interaction) -> None:
    expected = float(torch.cosine_similarity(vector(1), vector(6), dim=0))
    assert found.cosines["<a>", "b"] == {(1, "resid_post"): pytest.approx(expected, abs=1e-6)}
    plans = {"<a>": -found.plans["<a>"], "b": found.plans["b"]}
    other = measure(zoo("llama", "bridge"), plans, samples=1)
    assert other.cosines["<a>", "b"][1, "resid_post"] == pytest.approx(-expected, abs=1e-6)


def test_the_same_twice(zoo: Any, found: Interaction) -> None:
    again = measure(zoo("llama", "bridge"), found.plans, seed=4)
    assert again.table().equals(found.table()) and again.interaction == found.interaction


def test_plans_that_leave_each_other_alone_add_up(llama: Any) -> None:
    nothing = measure(llama, {"a": plan_of(1, coefficient=0.0), "b": plan_of(2, coefficient=0.0)})
    assert {t.estimate for t in nothing.interaction.values()} == {0.0}
    assert nothing.evaluations["length"]["a"].kl.estimate == pytest.approx(0.0, abs=1e-6)


def test_table_and_text(found: Interaction) -> None:
    table = found.table()
    assert list(table.loc["vowels"].index) == ["<a>", "b", TOGETHER, "interaction"]
    assert table.loc[("length", "b"), "effect_low"] <= table.loc[("length", "b"), "effect"]
    text = repr(found)
    assert "together less the sum" in text and "NLL" in text and "cosine of <a> and b at layer 1 resid_post" in text
    assert "<a>" not in found._repr_html_() and "&lt;a&gt;" in found._repr_html_()


def test_the_figure(found: Interaction) -> None:
    figure = sims.plots.interaction(found)
    assert figure.layout.template.layout.font == TEMPLATE.layout.font
    bars = {(bar.xaxis, bar.x[0]): bar.y[0] for bar in figure.data}
    assert bars["x", "b"] == found.evaluations["vowels"]["b"].difference.estimate
    assert bars["x2", TOGETHER] == found.evaluations["length"][TOGETHER].difference.estimate
    sums = [sum(e[name].difference.estimate for name in ("<a>", "b")) for e in found.evaluations.values()]
    assert [shape.y0 for shape in figure.layout.shapes] == pytest.approx(sums)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_measured(llama: Any) -> None:
    one, two = plan_of(1), plan_of(2)
    with pytest.raises(ConfigError, match=r"two or more plans by name, .* got \['a'\]"):
        sims.interaction(llama, {"a": one}, {"v": vowels}, PROMPTS)
    with pytest.raises(ConfigError, match="none of them called 'together'"):
        sims.interaction(llama, {"a": one, TOGETHER: two}, {"v": vowels}, PROMPTS)
    with pytest.raises(ConfigError, match=r"rankers must have names, .* got \{\}"):
        sims.interaction(llama, {"a": one, "b": two}, {}, PROMPTS)
    with pytest.raises(ConfigError, match="samples must be an integer of at least 1, got 0"):
        sims.interaction(llama, {"a": one, "b": two}, {"v": vowels}, PROMPTS, samples=0)
    with pytest.raises(PlanError, match=r"layer 7 is not in"):
        sims.interaction(llama, {"a": one, "b": plan_of(7)}, {"v": vowels}, PROMPTS)
