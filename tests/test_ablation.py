"""Ablation studies: planted effects are found, parts without one lose nothing, and a planted direction is necessary."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from common import D_MODEL, KINDS, fingerprint, plan_of, vector
from test_plots import write_run

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.ablation import (
    DirectionalAblation,
    LeaveOneOut,
    ablation_plan,
    directional_ablation,
    leave_one_out,
    parts_of,
    random_like,
    variance_share,
)
from sims_lens.behaviour import PairBehaviour
from sims_lens.errors import ConfigError, ModelError, PlanError, RunError
from sims_lens.iteration import compose
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.plots import ablation as plots
from sims_lens.stats import bootstrap_mean, holm, sign_flip_p

PAIRS = [(prompt, " aab", " ccd") for prompt in ("It is", "Why?", "So", "A long prompt.", "And", "Rain.", "Now", "Oh")]


@dataclass(frozen=True)
class Linear:
    """A behaviour that reads the plan, not the model: unit u has ``base_u + gain_u * sum_l target_l · vector_l``."""

    targets: dict[int, torch.Tensor]
    units: int = 20
    ceiling: float = float("inf")
    name: str = "<linear>"
    unit: str = "prompt"
    measure_name: str = "points"

    def measure(self, _model: Any, plan: SteeringPlan = NOTHING) -> torch.Tensor:
        rng = np.random.default_rng(0)
        base, gain = rng.normal(size=self.units), rng.uniform(0.5, 1.5, size=self.units)
        dose = sum(float(v @ self.targets[layer]) for (layer, _), v in plan.vectors().items() if layer in self.targets)
        return torch.tensor(base + np.minimum(gain * dose, self.ceiling), dtype=torch.float32)


def gain(units: int = 20) -> np.ndarray:
    rng = np.random.default_rng(0)
    rng.normal(size=units)
    return rng.uniform(0.5, 1.5, size=units)


AXIS = torch.eye(D_MODEL)[3]
"""Not centred, and sparse: a random direction holds about none of it."""


# Leave one out


def planted(**options: Any) -> tuple[SteeringPlan, Linear]:
    """Layer 0 does 3 points, layer 1 does nothing, layer 2 takes one off."""
    plan = SteeringPlan.addition({0: 3.0 * AXIS, 1: 3.0 * AXIS, 2: -1.0 * AXIS}, scope="all")
    return plan, Linear({0: AXIS, 2: AXIS}, **options)


@pytest.fixture(scope="module")
def found(zoo: Any) -> LeaveOneOut:
    plan, behaviour = planted()
    return leave_one_out(zoo("llama", "bridge"), plan, behaviour, controls=6, progress=False)


def test_planted_parts_are_found(found: LeaveOneOut) -> None:
    effects = {"layer 0": 3.0 * gain(), "layer 1": 0.0 * gain(), "layer 2": -1.0 * gain()}
    assert [p.name for p in found.parts] == list(effects)
    total = np.sum(list(effects.values()), axis=0)
    assert found.effect.to_json() == pytest.approx(bootstrap_mean(total).to_json(), abs=1e-5)
    for part, wanted in zip(found.parts, effects.values(), strict=True):
        assert part.lost.to_json() == pytest.approx(bootstrap_mean(wanted).to_json(), abs=1e-5)
        assert part.alone.to_json() == pytest.approx(part.lost.to_json(), abs=1e-5)
        assert part.without.estimate == pytest.approx(found.effect.estimate - part.lost.estimate, abs=1e-5)
        assert part.share is not None
        assert part.share.to_json() == pytest.approx([wanted[0] / total[0]] * 3, abs=1e-4)  # every unit has one ratio
    assert found.beyond_sum.estimate == pytest.approx(0.0, abs=1e-5)
    assert found.units == 20 and found.unit == "prompt" and found.by == "layer"


def test_only_the_parts_that_matter_are_significant(found: LeaveOneOut) -> None:
    first, second, third = found.parts
    assert first.p_holm < 0.01 and third.p_holm < 0.01 and second.p == second.p_holm == 1.0
    assert "falls without layer 0, and grows without layer 2." in found.verdict()


def test_a_random_direction_loses_what_leaving_the_part_out_does(found: LeaveOneOut) -> None:
    first, second, _ = found.parts
    assert first.replaced is not None and first.replaced_range is not None
    assert first.replaced.estimate == pytest.approx(first.lost.estimate, rel=0.25)
    low, high = first.replaced_range
    assert low < first.replaced.estimate < high and low > 0.5 * first.lost.estimate
    assert second.replaced is not None and second.replaced.estimate == pytest.approx(0.0, abs=1e-6)


@dataclass(frozen=True)
class Dose(Linear):
    """A behaviour that sees a vector's norm alone."""

    def measure(self, _model: Any, plan: SteeringPlan = NOTHING) -> torch.Tensor:
        return torch.linspace(0, 1, self.units) + sum(float(v.norm()) for v in plan.vectors().values())


def test_where_only_the_norm_matters_a_random_direction_loses_nothing(zoo: Any) -> None:
    found = leave_one_out(zoo("llama", "bridge"), planted()[0], Dose({}), controls=3, progress=False)
    for part, norm in zip(found.parts, (3.0, 3.0, 1.0), strict=True):
        assert part.lost.estimate == pytest.approx(norm, abs=1e-5)
        assert part.replaced is not None and part.replaced.estimate == pytest.approx(0.0, abs=1e-5)


def test_parts_that_do_each_others_work(zoo: Any) -> None:
    """At a ceiling neither part is needed, though each does it alone."""
    plan = SteeringPlan.addition({0: 3.0 * AXIS, 2: 3.0 * AXIS})
    behaviour = Linear({0: AXIS, 2: AXIS}, ceiling=1.0)
    found = leave_one_out(zoo("llama", "bridge"), plan, behaviour, controls=0, progress=False)
    assert [p.lost.estimate for p in found.parts] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert [p.alone.estimate for p in found.parts] == pytest.approx([1.0, 1.0])
    assert found.beyond_sum.estimate == pytest.approx(-1.0)
    assert "No part by itself is needed" in found.verdict() and found.parts[0].replaced is None


@pytest.mark.parametrize(("units", "told"), [(6, False), (7, True)])
def test_too_few_units_are_said_to_be_too_few(zoo: Any, units: int, told: bool) -> None:
    """Two parts: 2 * 2/2^6 = 0.0625, 2 * 2/2^7 = 0.03."""
    plan = SteeringPlan.addition({0: 3.0 * AXIS, 2: 3.0 * AXIS}, scope="all")
    behaviour = Linear({0: AXIS, 2: AXIS}, units=units)
    found = leave_one_out(zoo("llama", "bridge"), plan, behaviour, controls=1, progress=False)
    assert ("falls without layer 0 and layer 2" in found.verdict()) == told
    few = "Too few prompts to tell which part the effect"
    assert (few in found.verdict() and "there are 6, and no test of 2 parts" in found.verdict()) == (not told)
    assert told or found.verdict().endswith("can be significant below 7.")
    assert "1 random replacement" in repr(found) and "1 random replacements" not in repr(found)
    assert " to " not in repr(found).splitlines()[2]  # the range of one control is one number
    (diamonds,) = (t.name for t in plots.leave_one_out(found).data if "random" in (t.name or ""))
    assert diamonds == "lost if its direction is random"


def test_without_an_effect_there_is_no_share(zoo: Any) -> None:
    found = leave_one_out(zoo("llama", "bridge"), planted()[0], Linear({}), controls=1, progress=False)
    assert {p.share for p in found.parts} == {None} and "no clear effect" in found.verdict()


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.cases(8)
def test_pairs_on_a_real_forward_pass(model: Any, site: str) -> None:
    """Against an independent reference: margins of plans that are written out by hand."""
    plan, behaviour = plan_of(1, 2, scope="generation", site=site), PairBehaviour(PAIRS)
    before = {where: v.clone() for where, v in plan.vectors().items()}
    found = leave_one_out(model, plan, behaviour, controls=1, seed=3, progress=False)
    m = {
        name: behaviour.measure(model, p).double().numpy()
        for name, p in {
            "base": NOTHING,
            "1": plan_of(1, scope="generation", site=site),
            "2": plan_of(2, scope="generation", site=site),
        }.items()
    }
    whole = behaviour.measure(model, plan).double().numpy()
    assert found.effect.to_json() == pytest.approx(bootstrap_mean(whole - m["base"], seed=3).to_json(), abs=1e-4)
    for part, alone, without in zip(found.parts, ("1", "2"), ("2", "1"), strict=True):
        assert part.lost.to_json() == pytest.approx(bootstrap_mean(whole - m[without], seed=3).to_json(), abs=1e-4)
        assert part.alone.estimate == pytest.approx(float((m[alone] - m["base"]).mean()), abs=1e-4)
    assert all(torch.equal(v, before[where]) for where, v in plan.vectors().items())


def test_pairs_of_one_prompt_are_one_unit(llama: Any) -> None:
    pairs = [("A", " a", " b"), ("A", " c", " d"), ("B", " a", " b"), ("C", " a", " b")]
    found = leave_one_out(llama, plan_of(1), PairBehaviour(pairs), controls=0, progress=False)
    assert (found.units, found.unit) == (3, "prompt")
    one = leave_one_out(llama, plan_of(1), PairBehaviour(pairs[:2]), controls=0, progress=False)
    assert (one.units, one.unit) == (2, "pair")


def test_sampled_responses_and_named_plans(llama: Any) -> None:
    def vowels(_prompt: str, responses: list[str]) -> list[float]:
        return [float(sum(c in "aeiou" for c in r)) for r in responses]

    behaviour = sims.SampledBehaviour(
        vowels, ["Hi", "Why?", "So"], sampling=sims.SamplingConfig(max_new_tokens=4, top_k=None)
    )
    plans = {"nothing": plan_of(1, coefficient=0.0), "b": plan_of(2, coefficient=5.0)}
    found = leave_one_out(llama, plans, behaviour, controls=1, progress=False)
    assert found.by == "plan" and found.parts[0].lost.estimate == 0.0
    assert found.parts[1].lost.estimate == found.effect.estimate


# Parts


def test_parts_by_layer_and_by_intervention() -> None:
    a, b = plan_of(1), plan_of(1, 2, seed=4)
    plan = a + b + SteeringPlan.of({0: sims.Ablation(AXIS)})
    layers = parts_of(plan)
    assert {name: len(p.interventions) for name, p in layers.items()} == {"layer 0": 1, "layer 1": 2, "layer 2": 1}
    assert layers["layer 1"].interventions == plan.interventions[:2]
    each = parts_of(plan, "intervention")
    assert tuple(i for p in each.values() for i in p.interventions) == plan.interventions
    assert list(each)[0] == "1: layer 1 resid_post addition"  # two have one name, so they are numbered
    assert list(parts_of(a, "intervention")) == ["layer 1 resid_post addition"]
    assert parts_of({"x": a, "y": b}) == {"x": a, "y": b}


def composed_run(path: Path, iterations: int) -> sims.Run:
    """A run whose last plan is composed as the loop does it."""
    run = write_run(path, iterations=iterations)
    norms = run.iterations[0].tensors["median_norm"]
    shares = [0.2 / iterations] * iterations
    plan = compose([i.vectors for i in run.iterations], shares, [2, 8], norms, run.config.steering, run.model)
    last = replace(run.iterations[-1], plan=plan, coefficients=tuple(shares))
    return replace(run, iterations=(*run.iterations[:-1], last))


def test_the_iterations_of_a_run_add_up_to_its_plan(tmp_path: Path) -> None:
    run = composed_run(tmp_path / "run", 3)
    parts = parts_of(run, "iteration")
    assert list(parts) == ["iteration 1", "iteration 2", "iteration 3"]
    total = sum(parts.values(), NOTHING).vectors()
    for where, wanted in run.plan.vectors().items():
        torch.testing.assert_close(total[where], wanted, rtol=1e-4, atol=1e-5)
    for iteration, part in zip(run.iterations, parts.values(), strict=True):
        assert part.layers == (2, 8)
        for (layer, _), got in part.vectors().items():
            cosine = torch.cosine_similarity(got, iteration.vectors[layer].float(), dim=0)
            assert float(cosine) == pytest.approx(1.0, abs=1e-5)
    assert parts_of(run) == {f"layer {layer}": run.plan.restrict([layer]) for layer in run.plan.layers}


def test_iterations_that_cannot_be_taken_apart(tmp_path: Path) -> None:
    run = composed_run(tmp_path / "run", 2)
    steering = replace(run.config.steering, compose="replace")
    with pytest.raises(PlanError, match=r"replaced each other .* by='layer'"):
        parts_of(replace(run, config=replace(run.config, steering=steering)), "iteration")
    *before, last = run.iterations
    other = replace(last, coefficients=tuple(2 * c for c in last.coefficients))
    with pytest.raises(RunError, match="miss its plan"):
        parts_of(replace(run, iterations=(*before, other)), "iteration")
    with pytest.raises(PlanError, match=r"does not know its iterations; give the run"):
        parts_of(run.plan, "iteration")
    with pytest.raises(RunError, match="has no residual norm at layer 8"):
        parts_of(write_run(tmp_path / "other"), "iteration")


@pytest.mark.usefixtures("unchecked")
def test_parts_that_are_refused() -> None:
    with pytest.raises(PlanError, match="by must be one of layer, iteration, intervention, got 'head'"):
        parts_of(plan_of(1), "head")
    with pytest.raises(PlanError, match="leave out by='layer'"):
        parts_of({"a": plan_of(1)}, "layer")
    with pytest.raises(PlanError, match="there is nothing to leave out"):
        parts_of(NOTHING)
    with pytest.raises(PlanError, match="no plans to leave out"):
        parts_of({})
    with pytest.raises(PlanError, match="parts are plans by name, got 'a': int"):
        parts_of({"a": 3})
    with pytest.raises(PlanError, match="expected a SteeringPlan, a Run or plans by name, got int"):
        parts_of(3)


def test_random_directions_keep_the_norm_and_the_transform() -> None:
    units = SteeringPlan.addition({1: vector()}, coefficient=0.3, units="residual_norm", residual_norms={1: 50.0})
    plan = plan_of(0, 2) + units + SteeringPlan.of({0: sims.Clamp(AXIS, 2.0)}) + plan_of(0)
    drawn = random_like(plan, np.random.default_rng(0))
    for i, j in zip(plan.interventions, drawn.interventions, strict=True):
        assert (i.layer, i.site, i.coefficient, i.units, i.transform.kind) == (
            j.layer, j.site, j.coefficient, j.units, j.transform.kind,
        )  # fmt: skip
        assert float(j.transform.direction @ i.transform.direction) < 0.7
    for where, v in (plan_of(0, 2) + units).vectors().items():
        got = random_like(plan_of(0, 2) + units, np.random.default_rng(0)).vectors()[where]
        assert float(got.norm()) == pytest.approx(float(v.norm()), rel=1e-5)
    first, *_, last = (i.transform.direction for i in drawn.interventions)
    assert torch.equal(first, last)  # one vector stays one vector
    assert random_like(plan_of(1).centred(), np.random.default_rng(0)).is_centred
    assert not random_like(plan_of(1), np.random.default_rng(0)).is_centred


def test_a_transform_without_a_direction_to_replace(llama: Any) -> None:
    hpr = SteeringPlan.of({1: sims.HPR(vector(), (torch.zeros(1, D_MODEL),), (torch.zeros(1),))})
    with pytest.raises(PlanError, match="pass controls=0"):
        leave_one_out(llama, hpr, PairBehaviour(PAIRS), progress=False)
    leave_one_out(llama, hpr, PairBehaviour(PAIRS), controls=0, progress=False)


def test_sign_flips_and_holm() -> None:
    values = np.array([1.0, 2.0, 0.5, 1.5, 1.0])
    assert sign_flip_p(values) == pytest.approx(2 / 2**5, abs=0.01)  # all of one sign: two of 32 are as large
    assert sign_flip_p(np.array([1.0, -1.0, 2.0, -2.0])) == 1.0
    assert sign_flip_p(-values) == sign_flip_p(values)
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# Directional ablation


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    return vector(77) / vector(77).norm()


@pytest.fixture(scope="module", params=KINDS)
def biased(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hidden: torch.Tensor) -> Any:
    """A model that writes a direction with every token, and reads " a" from it and " c" from its opposite."""
    folder = tmp_path_factory.mktemp("biased")
    network, text = tiny.model("llama", std=0.1), tiny.tokenizer("llama")
    a, c = (text(letter, add_special_tokens=False)["input_ids"][0] for letter in "ac")
    with torch.no_grad():
        network.get_input_embeddings().weight += 2.0 * hidden
        network.lm_head.weight[a] += 3.0 * hidden
        network.lm_head.weight[c] -= 3.0 * hidden
    network.save_pretrained(folder)
    text.save_pretrained(folder)
    model = sims.load(folder, kind=request.param)
    model.run_with_cache(torch.arange(8)[None])  # TransformerLens keeps things of its own
    return model


BIAS = PairBehaviour([(prompt, "a", "c") for prompt, _, _ in PAIRS], name="a over c")


@pytest.fixture
def untouched(biased: Any) -> Iterator[Any]:
    before = fingerprint(biased)
    yield biased
    assert fingerprint(biased) == before


@pytest.fixture(scope="module")
def ablated(biased: Any, hidden: torch.Tensor) -> DirectionalAblation:
    return directional_ablation(biased, {1: 5.0 * hidden}, BIAS, controls=4, progress=False)


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_planted_direction_is_necessary(untouched: Any, hidden: torch.Tensor, everywhere: bool) -> None:
    found = directional_ablation(untouched, {2: hidden}, BIAS, everywhere=everywhere, controls=4, progress=False)
    assert found.baseline.estimate > 3 and abs(found.ablated.estimate) < 0.25 * found.baseline.estimate
    assert found.falls and found.beats_controls
    for control in found.of_kind("random"):
        assert abs(control.difference.estimate) < 0.3 * found.baseline.estimate
    assert "falls by" in found.verdict() and "NOT" not in found.verdict()


def test_another_direction_is_not(untouched: Any, hidden: torch.Tensor) -> None:
    other = vector(5) - (vector(5) @ hidden) * hidden
    found = directional_ablation(untouched, {1: other}, BIAS, controls=4, progress=False)
    assert not (found.falls and found.beats_controls)
    assert found.ablated.estimate > 0.7 * found.baseline.estimate


def test_the_values_are_those_of_plain_plans(
    untouched: Any, hidden: torch.Tensor, ablated: DirectionalAblation
) -> None:
    plan = ablation_plan(3, hidden, scope="generation")
    base, without = (BIAS.measure(untouched, p).double().numpy() for p in (NOTHING, plan))
    assert ablated.baseline.to_json() == pytest.approx(bootstrap_mean(base).to_json(), abs=1e-3)
    assert ablated.difference.to_json() == pytest.approx(bootstrap_mean(without - base).to_json(), abs=1e-3)
    adapter = adapt(untouched)
    rises = []
    for prompt, *texts in BIAS.pairs:
        for text in texts:
            ids, target = adapter.encode(prompt), adapter.encode_response(text)[0]
            tokens = torch.tensor([ids])
            both = []
            for p in (NOTHING, plan):
                with sims.steering(untouched, p) as steered, torch.no_grad(), steered.prompt(len(ids)):
                    both.append(-float(untouched(tokens)[0, -1].log_softmax(-1)[target]))
            rises.append(both[1] - both[0])
    assert ablated.nll is not None and ablated.nll.estimate == pytest.approx(float(np.mean(rises)), abs=1e-3)


@pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_ablating_everywhere_is_orthogonalising_the_weights(fresh: Any, architecture: str) -> None:
    """Arditi et al. 2024, equation 5: the plan and the weights without the direction are one model."""
    steered, edited = fresh(architecture, "hooked"), fresh(architecture, "hooked")
    u = vector(3) / vector(3).norm()
    with torch.no_grad():
        for name, weight in edited.named_parameters():
            kind = name.rpartition(".")[2]
            if kind in ("W_E", "W_pos", "W_O", "W_out", "b_O", "b_out"):
                weight -= (weight @ u)[..., None] * u
    tokens = torch.arange(20, 32)[None]
    with torch.no_grad():
        wanted = edited(tokens)
        with sims.steering(steered, ablation_plan(3, u)):
            got = steered(tokens)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_the_matched_controls_hold_the_directions_variance(model: Any) -> None:
    found = directional_ablation(model, {1: vector(8)}, PairBehaviour(PAIRS), controls=3, progress=False)
    for control in found.of_kind("matched"):
        assert control.variance == pytest.approx(found.variance, rel=1e-3)
    assert len({c.variance for c in found.controls}) == 6


@pytest.mark.parametrize("scope", ["all", "prompt", "last_prompt", "response", "generation"])
def test_variance_is_that_of_the_scope(untouched: Any, hidden: torch.Tensor, scope: str) -> None:
    """Of the tokens that are ablated, without first positions; and controls match where tokens are few."""
    found = directional_ablation(untouched, {1: hidden}, PAIRS, scope=scope, controls=2, progress=False)
    adapter, stream = adapt(untouched), []
    for prompt, *texts in PAIRS:
        for text in texts:
            ids, answer = adapter.encode(prompt), adapter.encode_response(text)
            _, cache = untouched.run_with_cache(torch.tensor([[*ids, *answer]]))
            end = {"prompt": len(ids), "last_prompt": len(ids)}.get(scope)
            start = {"all": 1, "prompt": 1, "response": len(ids)}.get(scope, len(ids) - 1)
            stream.append(cache["blocks.1.hook_resid_post"][0, start:end].detach())
    assert found.variance == pytest.approx(variance_share(torch.cat(stream), hidden), rel=1e-3)
    for control in found.of_kind("matched"):
        assert control.variance == pytest.approx(found.variance, rel=1e-3)
    assert found.first_position == (scope in ("all", "prompt"))
    for text in (repr(found), found._repr_html_()):
        assert ("first position is ablated too" in text) == found.first_position


def test_by_default_the_first_position_is_left_alone(untouched: Any, ablated: DirectionalAblation) -> None:
    assert ablated.scope == "generation" and not ablated.first_position
    alone = [(prompt, "a", "c") for prompt in "xyz"]
    assert not directional_ablation(untouched, {1: vector()}, alone, controls=1, progress=False).first_position


def test_one_token_has_no_variance_to_match(untouched: Any) -> None:
    pairs = [("So", "a", "c"), ("So", "b", "d")]
    with pytest.raises(ConfigError, match=r"the same at all 4 tokens of scope 'last_prompt', .* give more prompts"):
        directional_ablation(untouched, {1: vector()}, pairs, scope="last_prompt", progress=False)


def test_one_control_of_each_kind_is_one(untouched: Any, hidden: torch.Tensor) -> None:
    found = directional_ablation(untouched, {1: hidden}, BIAS, controls=1, progress=False)
    text = repr(found)
    assert "1 random directions" not in text and " to " not in text.splitlines()[4]
    assert "more than without a random direction (" in text and ") or a random direction of the same variance (" in text


def test_a_list_of_pairs_is_a_behaviour(llama: Any) -> None:
    behaviour = PairBehaviour(PAIRS)
    for analysis in (leave_one_out, directional_ablation):
        one, other = (analysis(llama, plan_of(1), each, controls=1, progress=False) for each in (PAIRS, behaviour))
        assert one.table().equals(other.table())


def test_a_steered_model_is_refused(llama: Any) -> None:
    for analysis in (leave_one_out, directional_ablation):
        with sims.steering(llama, plan_of(0)), pytest.raises(ModelError, match="a plan is attached"):
            analysis(llama, plan_of(1), PAIRS, progress=False)


def test_variance_shares_add_up() -> None:
    stream = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    shares = [variance_share(stream, 4.0 * row) for row in torch.eye(6)]
    assert sum(shares) == pytest.approx(1.0) and shares[5] > shares[0]


def test_the_same_twice_and_another_seed(untouched: Any, hidden: torch.Tensor, ablated: DirectionalAblation) -> None:
    again = directional_ablation(untouched, {1: 5.0 * hidden}, BIAS, controls=4, progress=False)
    assert again == ablated
    other = directional_ablation(untouched, {1: 5.0 * hidden}, BIAS, controls=4, seed=1, progress=False)
    assert other.controls != ablated.controls and other.difference.estimate == ablated.difference.estimate


def test_sampled_behaviour_and_a_run_choose_their_layer(tmp_path: Path, llama: Any) -> None:
    def vowels(_prompt: str, responses: list[str]) -> list[float]:
        return [float(sum(c in "aeiou" for c in r)) for r in responses]

    sampled = sims.SampledBehaviour(
        vowels, ["Hi", "Why?", "So"], sampling=sims.SamplingConfig(max_new_tokens=4, top_k=None)
    )
    found = directional_ablation(llama, plan_of(2), sampled, controls=1, progress=False)
    assert found.layer == 2 and found.nll is None and found.scope == "generation"
    assert "NLL" not in repr(found)
    for scope in ("prompt", "response"):
        found = directional_ablation(llama, plan_of(2), sampled, controls=1, scope=scope, progress=False)
        assert found.of_kind("matched")[0].variance == pytest.approx(found.variance, rel=1e-3)
    run = write_run(tmp_path / "run")
    with pytest.raises(PlanError, match="layer 8 is not in"):  # the layer that the run steers
        directional_ablation(llama, run, sampled, progress=False)


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused(llama: Any) -> None:
    pairs = PairBehaviour(PAIRS)
    with pytest.raises(PlanError, match=r"has directions at layers \[1, 2\]; name the layer"):
        directional_ablation(llama, plan_of(1, 2), pairs)
    with pytest.raises(PlanError, match="no direction at layer 0"):
        directional_ablation(llama, plan_of(1), pairs, layer=0)
    with pytest.raises(PlanError, match="name one of a, b"):
        directional_ablation(llama, {"a": plan_of(1), "b": plan_of(2)}, pairs)
    with pytest.raises(PlanError, match="is zero: there is nothing to ablate"):
        directional_ablation(llama, {1: torch.zeros(D_MODEL)}, pairs)
    with pytest.raises(PlanError, match="has 5 entries"):
        directional_ablation(llama, {1: torch.ones(5)}, pairs)
    with pytest.raises(ConfigError, match="controls must be an integer from 0 up, got -1"):
        leave_one_out(llama, plan_of(1), pairs, controls=-1)
    with pytest.raises(ConfigError, match="seed must be an integer from 0 up, got None"):
        leave_one_out(llama, plan_of(1), pairs, seed=None)
    with pytest.raises(ConfigError, match=r"expected a behaviour such as sims.PairBehaviour.* got int"):
        leave_one_out(llama, plan_of(1), 3)
    with pytest.raises(ConfigError, match="two units of the behaviour or more, got 1 pair"):
        leave_one_out(llama, plan_of(1), PairBehaviour(PAIRS[:1]), progress=False)
    with pytest.raises(PlanError, match="layer 7"):
        leave_one_out(llama, plan_of(7), pairs, progress=False)


# Text and figures


def test_tables_and_text(found: LeaveOneOut, ablated: DirectionalAblation) -> None:
    table = found.table()
    assert list(table.index) == ["layer 0", "layer 1", "layer 2"]
    assert table.loc["layer 0", "lost_low"] <= table.loc["layer 0", "lost"] <= table.loc["layer 0", "lost_high"]
    assert "p (Holm)" in repr(found) and "beyond the sum of its parts" in repr(found)
    assert "<linear>" in repr(found) and "<linear>" not in found._repr_html_()
    rows = ablated.table()
    assert list(rows["kind"]) == ["base", "direction", *["random"] * 4, *["matched"] * 4]
    assert rows.loc["vectors", "difference"] == ablated.difference.estimate
    assert "4 random" in repr(ablated) and "NLL" in repr(ablated) and "<table>" in ablated._repr_html_()


def test_figures(found: LeaveOneOut, ablated: DirectionalAblation) -> None:
    figure = plots.leave_one_out(found)
    lost = next(t for t in figure.data if t.name == "lost without it")
    assert list(lost.x) == [p.lost.estimate for p in found.parts]
    assert "<linear>" not in figure.to_json()
    bare = plots.leave_one_out(replace(found, controls=0, parts=tuple(replace(p, replaced=None) for p in found.parts)))
    assert len(bare.data) == 2
    figure = plots.directional_ablation(ablated)
    values = [t.x[0] for t in figure.data if t.xaxis == "x"]
    assert values == [
        ablated.baseline.estimate,
        ablated.ablated.estimate,
        *(c.value.estimate for c in ablated.controls),
    ]
    assert [t.x[0] for t in figure.data if t.xaxis == "x2"][0] == ablated.nll.estimate  # type: ignore[union-attr]
    alone = plots.directional_ablation(replace(ablated, nll=None, controls=()))
    assert len(alone.data) == 2
