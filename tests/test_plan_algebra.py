"""Plans as arithmetic: what sums, multiples and projections of plans do to a model; files of both versions."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import D_MODEL, difference, plan_of, random_tokens, vector
from safetensors import safe_open
from torch import Tensor

from sims_lens.errors import PlanError
from sims_lens.hooks import steering
from sims_lens.plan import FORMAT, FORMAT_VERSION, NOTHING, Intervention, Provenance, SteeringPlan
from sims_lens.scope import ALL, GENERATION, RESPONSE
from sims_lens.transforms import (
    HPR,
    TRANSFORMS,
    Ablation,
    Addition,
    Amplification,
    Clamp,
    Gated,
    Rotation,
    dump,
)

DATA = Path(__file__).parent / "data"
TOKENS = random_tokens()
POST = (1, "resid_post")


def unit(v: Tensor) -> Tensor:
    return (v.double() / v.double().norm()).float()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def logits(model: Any, plan: SteeringPlan, prompt: int = 4) -> Tensor:
    with steering(model, plan) as steered, steered.prompt(prompt):
        return model(TOKENS).clone()


def only(plan: SteeringPlan) -> Intervention:
    (intervention,) = plan.interventions
    return intervention


# --- sums and multiples ----------------------------------------------------------------------------------------------


def test_a_combination_of_plans_acts_as_the_combination_of_their_vectors(llama: Any) -> None:
    a, b, c = plan_of(1, 2), plan_of(1, seed=10), plan_of(2, seed=20)
    combined = a + 0.5 * b - c
    close(combined.vectors()[POST], 2.0 * vector(1) + 0.5 * 2.0 * vector(11))
    close(combined.vectors()[2, "resid_post"], 2.0 * vector(2) - 2.0 * vector(22))
    by_hand = {1: 2.0 * vector(1) + vector(11), 2: 2.0 * vector(2) - 2.0 * vector(22)}
    assert difference(logits(llama, combined), logits(llama, SteeringPlan.addition(by_hand, scope="all"))) < 1e-4
    assert difference(logits(llama, combined), logits(llama, a + 0.5 * b + c)) > 0.01
    assert difference(logits(llama, a - a), llama(TOKENS)) < 1e-4 < difference(logits(llama, a), llama(TOKENS))


def test_multiples_are_of_the_coefficient_whatever_the_units_and_the_transform() -> None:
    a = SteeringPlan.of({1: Ablation(vector())}, coefficient=0.5)
    lengths = SteeringPlan.addition({1: vector()}, coefficient=0.2, units="residual_norm", residual_norms={1: 8.0})
    for plan in (a, lengths, plan_of(1)):
        before = only(plan)
        for made, factor in ((2.0 * plan, 2.0), (plan * 0.5, 0.5), (-plan, -1.0), (plan.scaled(-3.0), -3.0)):
            after = only(made)
            assert after == replace(before, coefficient=factor * before.coefficient)
            assert after.transform is before.transform
        assert (NOTHING - plan).interventions == (-plan).interventions
    assert only(2.0 * lengths).strength == pytest.approx(3.2)


@pytest.mark.parametrize(
    "mistake",
    [lambda p: p + 1, lambda p: p - vector(), lambda p: 1 - p, lambda p: p * p, lambda p: "2" * p, lambda p: p * None],
    ids=range(6),
)
@pytest.mark.usefixtures("unchecked")
def test_plans_are_added_to_plans_and_multiplied_by_numbers(mistake: Callable[[SteeringPlan], Any]) -> None:
    with pytest.raises(TypeError):
        mistake(plan_of(1))


def test_differences_have_the_provenance_of_sums() -> None:
    left, right = plan_of(1, provenance=Provenance("a", source="x")), plan_of(1, provenance=Provenance("b"))
    with pytest.raises(PlanError, match="plans for 'a' and 'b' can't be composed; use plan.unbound"):
        _ = left - right
    assert (left - right.unbound()).provenance == left.provenance


# --- the same plan otherwise -----------------------------------------------------------------------------------------


def test_a_plan_on_other_tokens(llama: Any) -> None:
    plan = plan_of(0, 1)
    assert [i.scope for i in plan.on("response").interventions] == [RESPONSE, RESPONSE]
    assert plan.on(ALL).interventions == plan.interventions
    assert torch.equal(logits(llama, plan.on("prompt"))[:, :4], logits(llama, plan)[:, :4])
    assert torch.equal(logits(llama, plan.on("response"))[:, :4], llama(TOKENS)[:, :4])
    with pytest.raises(PlanError, match="scope 'reply' is not one of all"):
        plan.on("reply")


def test_another_transform_along_the_same_directions(llama: Any) -> None:
    plan = SteeringPlan.addition(
        {1: 3 * vector(1), 2: vector(2)}, coefficient=0.2, units="residual_norm", residual_norms={1: 9.0, 2: 7.0}
    ).on("all")
    ablated = plan.using(Ablation)
    for before, after in zip(plan.interventions, ablated.interventions, strict=True):
        assert isinstance(after.transform, Ablation)
        close(after.transform.axis, unit(vector(before.layer)), 1e-6)
        assert (after.layer, after.site, after.scope) == (before.layer, before.site, before.scope)
        assert (after.coefficient, after.units, after.residual_norm) == (1.0, "absolute", None)
    with steering(llama, ablated):
        _, cache = llama.run_with_cache(TOKENS)
    for layer in (1, 2):
        assert (cache[f"blocks.{layer}.hook_resid_post"] @ unit(vector(layer))).abs().max() < 1e-4
    clamped = plan.using(lambda direction: Clamp(direction, 4.0), 0.5)
    assert [(i.transform.value, i.coefficient) for i in clamped.interventions] == [(4.0, 0.5)] * 2  # type: ignore
    added = ablated.using(Addition, 3.0)
    close(added.vectors()[POST], 3.0 * unit(vector(1)))
    assert [i.half_life for i in plan.decaying(4.0).using(Rotation).interventions] == [4.0, 4.0]


def test_centred_directions_have_no_mean() -> None:
    v = vector(3) + 1.0
    lengths = SteeringPlan.addition({1: v}, coefficient=0.5, units="residual_norm", residual_norms={1: 8.0})
    for plan in (SteeringPlan.addition({1: v}, coefficient=2.0), lengths):
        assert not plan.is_centred and plan.centred().is_centred
        (found,), (before,) = plan.centred().vectors().values(), plan.vectors().values()
        close(found, before - before.mean())  # what is left keeps its length, also in units of the norm
    for transform in (Ablation(v), Rotation(v), Clamp(v, 2.0), Amplification(v), Gated(Ablation(v), v, 1.0)):
        plan = SteeringPlan.of({1: transform})
        centred = only(plan.centred()).transform
        assert not plan.is_centred and plan.centred().is_centred and type(centred) is type(transform)
        close(centred.direction, unit(v - v.mean()), 1e-6)  # type: ignore[attr-defined]
    assert only(SteeringPlan.of({1: Clamp(v, 2.0)}).centred()).transform.value == 2.0  # type: ignore[attr-defined]
    assert NOTHING.is_centred and not (plan_of(0).centred() + SteeringPlan.of({1: Ablation(v)})).is_centred


def test_restricting_keeps_the_interventions_of_a_layer_in_order() -> None:
    plan = plan_of(1) + SteeringPlan.of({1: Ablation(vector()), 2: Rotation(vector())}) + plan_of(0)
    assert plan.restrict([1]).interventions == plan.interventions[:2]
    assert plan.restrict(range(3)).interventions == plan.interventions
    with pytest.raises(PlanError, match=r"does not steer layers \[3\]; it steers \[0, 1, 2\]"):
        plan.restrict([3])


# --- orthogonal_to ---------------------------------------------------------------------------------------------------


def test_what_two_plans_share_is_taken_out(llama: Any) -> None:
    u, v = unit(vector(7)), vector(1)
    plan = plan_of(1)
    left = plan.orthogonal_to(SteeringPlan.of({1: Ablation(5 * u)}))
    close(left.vectors()[POST], 2.0 * (v - (v @ u) * u))
    assert left.vectors()[POST].norm() < plan.vectors()[POST].norm()
    with steering(llama, left):
        _, cache = llama.run_with_cache(TOKENS)
    assert (cache["blocks.1.steer_resid_post.hook_delta"] @ u).abs().max() < 1e-5
    assert torch.equal(plan.vectors()[POST], 2.0 * v)


def test_units_of_the_residual_norm_shrink_with_the_vector() -> None:
    u, v = unit(vector(7)), unit(vector(1) + vector(7))
    plan = SteeringPlan.addition({1: v}, coefficient=0.5, units="residual_norm", residual_norms={1: 8.0})
    found = only(plan.orthogonal_to(plan_of(1, seed=6)))
    rest = v - (v @ u) * u
    assert found.units == "residual_norm" and found.residual_norm == 8.0
    close(found.transform.vector, unit(rest))  # type: ignore[attr-defined]
    assert found.coefficient == pytest.approx(0.5 * float(rest.norm()), rel=1e-5)
    close(found.strength * found.transform.vector, 4.0 * rest)  # type: ignore[attr-defined]


def test_other_transforms_keep_a_unit_direction() -> None:
    u, v = unit(vector(7)), vector(1)
    plan = SteeringPlan.of({1: Clamp(v, 3.0)}, coefficient=0.5)
    found = only(plan.orthogonal_to(plan_of(1, seed=6)))
    close(found.transform.axis, unit(v - (v @ u) * u))  # type: ignore[attr-defined]
    assert found.transform.value == 3.0 and found.coefficient == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_directions_that_overlap_are_all_taken_out(count: int) -> None:
    base = vector(50)
    others = [vector(50 + k) + 3 * base for k in range(1, count)] + [base, -2 * base]  # the last says nothing new
    other = sum((SteeringPlan.addition({1: o}) for o in others), NOTHING)
    left = plan_of(1).orthogonal_to(other).vectors()[POST]
    assert max(abs(float(left @ unit(o))) for o in others) < 1e-4 < float(left.norm())
    span, _ = torch.linalg.qr(torch.stack(others[:-1], dim=1).double())
    expected = 2.0 * vector(1).double()
    close(left.double(), expected - span @ (span.T @ expected), 1e-4)


def test_other_layers_and_sites_are_left_alone() -> None:
    plan = plan_of(0, 1) + plan_of(1, site="mlp_out")
    found = plan.orthogonal_to(plan_of(1, seed=6) + plan_of(2) + plan_of(0, site="attn_out"))
    assert found.interventions[0] == plan.interventions[0] and found.interventions[2] == plan.interventions[2]
    assert not torch.equal(found.vectors()[POST], plan.vectors()[POST])
    assert plan.orthogonal_to(NOTHING).interventions == plan.interventions


def test_nothing_left_is_named() -> None:
    for units in ("absolute", "residual_norm"):
        plan = SteeringPlan.addition({1: vector()}, units=units)
        with pytest.raises(
            PlanError, match=r"nothing is left of blocks\.1\.hook_resid_post  addition .*same direction"
        ):
            plan.orthogonal_to(SteeringPlan.of({1: Ablation(-3 * vector())}))
    within = SteeringPlan.of({1: Ablation(vector(0) + vector(1))})
    with pytest.raises(PlanError, match=r"nothing is left of blocks\.1\.hook_resid_post  ablation"):
        within.orthogonal_to(plan_of(1) + SteeringPlan.addition({1: vector(0)}))


def test_an_hpr_has_no_direction_to_exchange_but_one_to_keep_clear_of() -> None:
    plan = EVERY.restrict([1])
    with pytest.raises(PlanError, match="an HPR's angle net belongs to its probe: its direction can't be changed"):
        plan.centred()
    probe = torch.linspace(-1, 1, 8)
    left = SteeringPlan.addition({1: torch.arange(8.0)}).orthogonal_to(plan).vectors()[POST]
    close(left, torch.arange(8.0) - (torch.arange(8.0) @ unit(probe)) * unit(probe))


# --- files of both versions ------------------------------------------------------------------------------------------


def every() -> SteeringPlan:
    """A plan with every transform, of exact numbers: what ``tests/data/plan_v2.safetensors`` holds."""
    ramp, comb = torch.arange(8.0), torch.tensor([1.0, 0.0, -1.0, 0.0] * 2) / 2
    net = (torch.arange(32.0).reshape(4, 8) / 32, torch.arange(4.0).reshape(1, 4) / 4)
    hpr = HPR(torch.linspace(-1, 1, 8), net, (torch.tensor([0.5, -0.5, 0.25, 0.0]), torch.tensor([0.125])))
    return SteeringPlan(
        (
            Intervention(0, "resid_pre", Addition(ramp), -1.5, scope=RESPONSE, half_life=8.0),
            Intervention(0, "resid_post", Addition(comb), 0.2, "residual_norm", residual_norm=12.5),
            Intervention(0, "resid_post", Ablation(comb), 0.5, scope=ALL),
            Intervention(0, "attn_out", Amplification(comb), -0.25),
            Intervention(0, "mlp_out", Clamp(comb, 4.5), 1.0),
            Intervention(1, "resid_post", hpr, 0.75),
            Intervention(2, "resid_post", Rotation(comb), 0.1, half_life=2.5),
            Intervention(2, "resid_post", Gated(Addition(ramp), comb, 0.5), 0.3, "residual_norm", residual_norm=8.0),
            Intervention(2, "resid_post", Gated(hpr, comb, -0.5, above=False), 1.0),
            Intervention(2, "resid_post", Gated(Clamp(comb, -2.0), comb, 3.0), 1.0),
        ),
        Provenance("tiny", "r2", "folded", 3, 8, "every transform", "5f2c"),
    )


EVERY = every()


def same(left: SteeringPlan, right: SteeringPlan) -> bool:
    """Whether two plans are equal bit for bit."""

    def parts(plan: SteeringPlan) -> list[Any]:
        return [(replace(i, transform=type(i.transform)), dump(i.transform, "")[0]) for i in plan.interventions]  # type: ignore[arg-type]

    def tensors(plan: SteeringPlan) -> list[tuple[str, Tensor]]:
        return [item for i in plan.interventions for item in i.transform.tensors().items()]

    return (
        left.provenance == right.provenance
        and parts(left) == parts(right)
        and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(tensors(left), tensors(right), strict=True))
    )


def content(path: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[FORMAT]), {k: file.get_tensor(k).tolist() for k in file.keys()}  # noqa: SIM118


def test_a_file_of_version_1_still_loads() -> None:
    header, _ = content(DATA / "plan_v1.safetensors")
    assert header["version"] == 1
    plan = SteeringPlan.load(DATA / "plan_v1.safetensors")
    g = torch.Generator().manual_seed(0)
    vectors = [torch.randn(8, generator=g) for _ in range(2)]
    expected = (
        (1, "resid_post", 0.2, "residual_norm", GENERATION, 12.5, vectors[0] / vectors[0].norm()),
        (3, "resid_post", 0.2, "residual_norm", GENERATION, None, vectors[1] / vectors[1].norm()),
        (0, "attn_out", -1.5, "absolute", RESPONSE, None, torch.arange(8.0)),
    )
    for i, (*values, steering_vector) in zip(plan.interventions, expected, strict=True):
        assert [i.layer, i.site, i.coefficient, i.units, i.scope, i.residual_norm] == values
        assert isinstance(i.transform, Addition) and i.half_life is None
        assert torch.equal(i.transform.vector, steering_vector)
    assert plan.provenance.model == "tiny" and plan.provenance.revision == "r1"
    assert plan.provenance.source == "improve, iteration 3, config 5f2c" and plan.provenance.config == ""


def test_a_file_of_version_1_is_saved_as_of_today(tmp_path: Path) -> None:
    plan = SteeringPlan.load(DATA / "plan_v1.safetensors")
    header, _ = content(plan.save(tmp_path / "plan"))
    assert header["version"] == FORMAT_VERSION and same(SteeringPlan.load(tmp_path / "plan"), plan)


def test_the_file_of_version_2_holds_every_transform_and_loads() -> None:
    loaded = SteeringPlan.load(DATA / "plan_v2.safetensors")
    assert same(loaded, EVERY)
    assert {i.transform.kind for i in loaded.interventions} == set(TRANSFORMS)


def test_the_file_of_version_2_is_what_is_written_today(tmp_path: Path) -> None:
    assert FORMAT_VERSION == 2
    assert content(EVERY.save(tmp_path / "plan")) == content(DATA / "plan_v2.safetensors")


def test_every_transform_steers_as_before_it_was_saved(llama: Any, tmp_path: Path) -> None:
    wide = SteeringPlan(
        tuple(
            Intervention(i.layer, i.site, widened(i.transform), i.coefficient, scope=i.scope, half_life=i.half_life)
            for i in EVERY.interventions
        )
    )
    back = SteeringPlan.load(wide.save(tmp_path / "plan"))
    assert torch.equal(logits(llama, back), logits(llama, wide))
    assert difference(logits(llama, back), llama(TOKENS)) > 0.01


def widened(transform: Any) -> Any:
    """The transform with its directions repeated up to the model's width."""
    times = D_MODEL // 8
    if isinstance(transform, Gated):
        return replace(transform, inner=widened(transform.inner), axis=transform.axis.repeat(times))
    if isinstance(transform, HPR):
        first = transform.weights[0].repeat(1, times)
        return HPR(transform.probe.repeat(times), (first, *transform.weights[1:]), transform.biases)
    name = "vector" if isinstance(transform, Addition) else "axis"
    return replace(transform, **{name: getattr(transform, name).repeat(times)})
