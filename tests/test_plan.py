"""Plans: what they refuse, that nothing changes them, their algebra, and files that come back bit for bit."""

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import SITES, plan_of, random_tokens, vector
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sims_lens import TokenScope
from sims_lens.errors import PlanError, SimsError
from sims_lens.hooks import steering
from sims_lens.plan import FORMAT, NOTHING, Intervention, Provenance, SteeringPlan
from sims_lens.sites import check_layer
from sims_lens.transforms import Addition

TOKENS = random_tokens()
FULL = Provenance("tiny-llama", "5f2c", "none", 3, 32, "improve, iteration 3, “config” 5f2c")


def same(left: SteeringPlan, right: SteeringPlan) -> bool:
    """Whether two plans are equal bit for bit."""

    def parts(plan: SteeringPlan) -> list[Any]:
        return [replace(i, transform=type(i.transform)) for i in plan.interventions]  # type: ignore[arg-type]

    tensors = [
        (a.transform.tensors(), b.transform.tensors())
        for a, b in zip(left.interventions, right.interventions, strict=True)
    ]
    return (
        left.provenance == right.provenance
        and parts(left) == parts(right)
        and all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in tensors)
    )


# --- values that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], "must be a torch tensor, got list; use torch.tensor"),
        (torch.ones(2, 2), r"must have shape \[d_model\], got \[2, 2\]"),
        (torch.tensor(1.0), r"must have shape \[d_model\], got \[\]"),
        (torch.ones(0), r"must have shape \[d_model\], got \[0\]"),
        (torch.ones(4, dtype=torch.int64), r"must hold floats, got torch.int64; use .float\(\)"),
        (torch.tensor([1.0, math.nan, math.inf, 2.0]), "has 2 NaN or infinite entries of 4; fit it again"),
    ],
    ids=["list", "2-d", "0-d", "empty", "int", "nan"],
)
@pytest.mark.usefixtures("unchecked")
def test_vectors_that_cannot_steer_are_named(value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=f"the vector of layer 14 {message}"):
        SteeringPlan.addition({3: torch.ones(4), 14: value})
    with pytest.raises(PlanError, match=f"a steering vector {message}"):
        Addition(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid_mid"}, "site 'resid_mid' is not one of resid_pre, resid_post, attn_out, mlp_out; add at"),
        ({"site": "hook_resid_post"}, "site 'hook_resid_post' is not one of resid_pre, resid_post, attn_out, mlp_out$"),
        ({"scope": "answers"}, "scope 'answers' is not one of all, prompt, last_prompt, response, generation"),
        ({"units": "sigma"}, "units 'sigma' is not one of absolute, residual_norm"),
        ({"coefficient": math.nan}, "coefficient must be finite, got nan"),
        ({"coefficient": -math.inf}, "coefficient must be finite, got -inf"),
        ({"coefficient": True}, "coefficient must be a number, got True"),
        ({"coefficient": "2"}, "coefficient must be a number, got '2'"),
        ({"residual_norms": {1: 0.0}}, "residual_norm must be a positive number, got 0.0"),
        ({"residual_norms": {1: math.nan}}, "residual_norm must be a positive number, got nan"),
        ({"residual_norms": {1: "3"}}, "residual_norm must be a positive number, got '3'"),
        ({"residual_norms": {1: torch.tensor(3.0)}}, r"residual_norm must be a positive number, got tensor\(3.\)"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SteeringPlan.addition({1: torch.ones(4)}, **options)


@pytest.mark.parametrize("layer", [-1, True, 1.0, "1", None], ids=repr)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_layer_is_named(layer: Any) -> None:
    with pytest.raises(PlanError, match=f"layer must be an integer from 0 up, got {layer!r}"):
        SteeringPlan.addition({layer: torch.ones(4)})
    with pytest.raises(PlanError, match=rf"layer {layer!s} is not in 0\.\.2 of tiny; see model\.cfg\.n_layers"):
        check_layer(layer, 3, "tiny")


@pytest.mark.usefixtures("unchecked")
def test_other_mistakes_are_named() -> None:
    for nothing in ({}, None, [torch.ones(4)]):
        with pytest.raises(PlanError, match=r"vectors must map layers to tensors, for instance \{14: vector\}"):
            SteeringPlan.addition(nothing)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"vectors of one plan must have one size, got \[4, 5\]"):
        SteeringPlan.addition({0: torch.ones(4), 1: torch.ones(5)})
    with pytest.raises(PlanError, match="the vector of layer 1 is zero: it has no direction to scale"):
        SteeringPlan.addition({1: torch.zeros(4)}, units="residual_norm")
    with pytest.raises(PlanError, match=r"blocks\.1\.hook_resid_post is not known yet; attach the plan, or call"):
        _ = SteeringPlan.addition({1: torch.ones(4)}, units="residual_norm").vectors()
    with pytest.raises(TypeError, match="coefficent"):
        SteeringPlan.addition({1: torch.ones(4)}, coefficent=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        _ = plan_of(1) + {1: vector()}  # type: ignore[operator]
    assert issubclass(PlanError, SimsError) and issubclass(PlanError, ValueError)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_any_float_type_are_kept_in_float32(dtype: torch.dtype) -> None:
    plan = SteeringPlan.addition({1: vector().to(dtype)})
    (kept,) = plan.interventions[0].transform.tensors().values()
    assert kept.dtype == torch.float32 and torch.equal(kept, vector().to(dtype).float())


def test_a_vector_may_be_a_view_of_something_larger() -> None:
    whole = torch.stack([vector(0), vector(1)], dim=1)
    plan = SteeringPlan.addition({1: whole[:, 1], 2: vector(2).expand(3, -1)[0]})
    assert torch.equal(plan.vectors()[1, "resid_post"], vector(1))
    assert torch.equal(plan.vectors()[2, "resid_post"], vector(2))


# --- frozen ----------------------------------------------------------------------------------------------------------


def test_nothing_that_is_passed_in_is_kept_or_changed() -> None:
    vectors, norms = {1: 3 * vector(1)}, {1: 8.0}
    for units in ("absolute", "residual_norm"):
        plan = SteeringPlan.addition(vectors, units=units, residual_norms=norms)
        expected = plan.vectors()[1, "resid_post"].clone()
        assert torch.equal(vectors[1], 3 * vector(1)) and norms == {1: 8.0}
        vectors[1].mul_(0)
        norms[1], vectors[2] = 1.0, vector(2)
        assert torch.equal(plan.vectors()[1, "resid_post"], expected) and plan.layers == (1,)
        vectors, norms = {1: 3 * vector(1)}, {1: 8.0}


@pytest.mark.usefixtures("unchecked")
def test_a_plan_cannot_be_written_to() -> None:
    plan = plan_of(1)
    for part, name in ((plan, "interventions"), (plan.interventions[0], "layer"), (plan.provenance, "model")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, None)
    listed = list(plan.interventions)
    copied = SteeringPlan(listed)  # type: ignore[arg-type]
    assert isinstance(copied.interventions, tuple)
    listed.clear()
    assert copied.interventions == plan.interventions


def test_operations_make_new_plans() -> None:
    left, right = plan_of(0, 1), plan_of(2)
    before = repr(left), repr(right)
    _ = left + right, left.scaled(3.0), left.restrict([1]), left.unbound(), left.vectors()
    assert (repr(left), repr(right)) == before
    left.vectors()[0, "resid_post"].zero_()
    assert torch.equal(left.vectors()[0, "resid_post"], 2.0 * vector(0))


# --- algebra ---------------------------------------------------------------------------------------------------------


def test_sums_keep_order_and_scaling_multiplies() -> None:
    left, right = plan_of(1, site="attn_out"), plan_of(0, 1, seed=5, coefficient=0.5)
    total = left + right
    assert [(i.layer, i.site) for i in total.interventions] == [(1, "attn_out"), (0, "resid_post"), (1, "resid_post")]
    assert total.layers == (0, 1)
    assert same((left + right) + left, left + (right + left))
    assert same(NOTHING + left, left) and same(left + NOTHING, left)
    assert same(total.scaled(2.0), left.scaled(2.0) + right.scaled(2.0))
    assert same(total.scaled(1.0), total)
    assert torch.equal(left.scaled(-3.0).vectors()[1, "attn_out"], -6.0 * vector(1))


def test_whole_numbers_are_numbers() -> None:
    plan = plan_of(1)
    assert same(2 * plan, plan.scaled(2.0)) and same(0 * plan, plan.scaled(0.0))
    assert same(plan.decaying(20), plan.decaying(20.0))
    vectors = {1: vector(1)}
    assert same(SteeringPlan.addition(vectors, coefficient=2), SteeringPlan.addition(vectors, coefficient=2.0))
    assert same(plan.using(Addition, 3), plan.using(Addition, 3.0))


def test_vectors_add_up_at_a_site() -> None:
    total = plan_of(1) + plan_of(1, seed=5, coefficient=-0.5) + plan_of(1, seed=5, site="mlp_out")
    found = total.vectors()
    assert list(found) == [(1, "resid_post"), (1, "mlp_out")]
    torch.testing.assert_close(found[1, "resid_post"], 2.0 * vector(1) - 0.5 * vector(6))


def test_restricting_keeps_the_layers_asked_for() -> None:
    plan = plan_of(0, 1, 2)
    assert same(plan.restrict([2, 1]), plan_of(1, 2))
    with pytest.raises(PlanError, match=r"does not steer layers \[5, 7\]; it steers \[0, 1, 2\]"):
        plan.restrict([1, 7, 5])


def test_provenance_of_a_sum() -> None:
    left, right = plan_of(1, provenance=FULL), plan_of(0, provenance=replace(FULL, source="by hand"))
    assert (left + left).provenance == FULL
    assert (left + right).provenance == replace(FULL, source=f"{FULL.source} + by hand")
    assert (left + plan_of(0)).provenance == (plan_of(0) + left).provenance == FULL
    assert left.scaled(2.0).provenance == left.restrict([1]).provenance == FULL
    assert left.unbound().provenance == Provenance()
    other = plan_of(0, provenance=Provenance(model="tiny-gpt2"))
    with pytest.raises(PlanError, match="plans for 'tiny-llama' and 'tiny-gpt2' can't be composed; use plan.unbound"):
        _ = left + other
    assert (left + other.unbound()).provenance == FULL


def test_units_of_the_residual_norm_are_of_unit_vectors() -> None:
    plan = SteeringPlan.addition({1: 7 * vector(1)}, coefficient=0.25, units="residual_norm", residual_norms={1: 8.0})
    (intervention,) = plan.interventions
    assert intervention.strength == 2.0
    torch.testing.assert_close(plan.vectors()[1, "resid_post"], 2.0 * vector(1) / vector(1).norm())
    absolute = SteeringPlan.addition({1: 7 * vector(1)}, coefficient=0.25, residual_norms={1: 8.0})
    assert torch.equal(absolute.vectors()[1, "resid_post"], 0.25 * 7 * vector(1))


def test_a_plan_says_what_it_does() -> None:
    unknown = SteeringPlan.addition({1: vector()}, coefficient=0.2, units="residual_norm", scope="response")
    known = replace(unknown.interventions[0], residual_norm=331.25)
    assert repr(unknown).endswith("blocks.1.hook_resid_post  addition  +0.2 x residual norm  on response")
    assert known.describe().endswith("+0.2 x residual norm (331.2)  on response")
    named = repr(plan_of(0, 1, provenance=FULL))
    assert named.startswith(f"SteeringPlan with 2 interventions for tiny-llama ({FULL.source})\n  blocks.0.hook")
    hostile = plan_of(1, provenance=Provenance(model="<script>", source="a & b"))
    assert "&lt;script&gt;" in hostile._repr_html_() and "a &amp; b" in hostile._repr_html_()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return plan_of(1, 2, provenance=FULL).save(tmp_path / "plan.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    coefficient=st.floats(allow_nan=False, allow_infinity=False),
    norm=st.none() | st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False),
    units=st.sampled_from(["absolute", "residual_norm"]),
    scope=st.sampled_from(["all", "prompt", "last_prompt", "response", "generation"]),
    site=st.sampled_from(SITES),
    source=st.text(st.characters(exclude_categories=["Cs"])),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
)
def test_a_saved_plan_comes_back_bit_for_bit(
    tmp_path: Path,
    coefficient: float,
    norm: float | None,
    units: str,
    scope: str,
    site: str,
    source: str,
    values: list[float],
) -> None:
    odd = TokenScope(prompt=True, response=True)
    plan = SteeringPlan(
        (
            Intervention(2, site, Addition(torch.tensor(values)), coefficient, units, TokenScope.of(scope), norm),
            Intervention(2, site, Addition(vector(7, size=len(values))), 1.0, scope=odd),
        ),
        replace(FULL, d_model=len(values), source=source),
    )
    back = SteeringPlan.load(plan.save(tmp_path / "plan.safetensors"))
    assert same(back, plan)
    assert math.copysign(1, back.interventions[0].coefficient) == math.copysign(1, coefficient)  # -0.0 too
    assert [path.name for path in tmp_path.iterdir()] == ["plan.safetensors"]


def test_the_empty_plan_and_a_learned_one_can_be_saved(tmp_path: Path) -> None:
    assert same(SteeringPlan.load(NOTHING.save(tmp_path / "nothing")), NOTHING)
    learned = SteeringPlan.addition({1: vector().requires_grad_()})
    back = SteeringPlan.load(learned.save(tmp_path / "learned"))
    assert same(back, learned) and not back.interventions[0].transform.tensors()["vector"].requires_grad


def test_a_loaded_plan_steers_as_the_saved_one(model: Any, tmp_path: Path) -> None:
    plan = plan_of(0, 1, scope="generation", units="residual_norm", coefficient=0.3)
    with steering(model, plan) as steered:
        expected, resolved = model(TOKENS), steered.plan
    for each in (plan, resolved):
        with steering(model, SteeringPlan.load(each.save(tmp_path / "plan.safetensors"))):
            assert torch.equal(model(TOKENS), expected)


def test_saving_over_a_plan_replaces_it_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError("disk full")

    before = SteeringPlan.load(saved)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails)
        with pytest.raises(OSError, match="disk full"):
            plan_of(0).save(saved)
    assert same(SteeringPlan.load(saved), before)
    plan_of(0).save(str(saved))
    assert same(SteeringPlan.load(str(saved)), plan_of(0))


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    assert {name: value.tolist() for name, value in load_file(saved).items()} == {
        "0.vector": vector(1).tolist(),
        "1.vector": vector(2).tolist(),
    }


def test_a_plan_that_cannot_be_saved_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"folder .*nowhere does not exist; create it first"):
        plan_of(1).save(tmp_path / "nowhere" / "plan.safetensors")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """The file with its header and tensors changed; ``change`` may return a list, to be the header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = change(header, tensors)
    save_file(tensors, path, metadata={FORMAT: json.dumps(changed if isinstance(changed, list) else header)})
    return path


def test_rewriting_alone_is_no_damage(saved: Path) -> None:
    """Or the tests below would prove nothing. What a later version might add to the provenance is passed over."""
    plan = SteeringPlan.load(saved)
    assert same(SteeringPlan.load(rewritten(saved, lambda header, tensors: None)), plan)
    assert same(SteeringPlan.load(rewritten(saved, lambda h, t: h["provenance"].update(licence="MIT"))), plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(version=3), r"format version 3 is not one that this sims_lens reads \(1..2\); update"),
        (lambda h, t: h.update(version="1"), "format version '1'"),
        (lambda h, t: h.update(format="other"), "format 'other' is not 'sims_lens.plan'"),
        (lambda h, t: [], "TypeError"),
        (lambda h, t: h.__delitem__("interventions"), "KeyError: 'interventions'"),
        (lambda h, t: h["interventions"][0].pop("scope"), "KeyError: 'scope'"),
        (lambda h, t: h["interventions"][0].update(transform="eval"), "transform 'eval' is not one of addition"),
        (lambda h, t: h["interventions"][0].update(transform=[]), "TypeError"),
        (lambda h, t: h["interventions"][0].update(layer=1.5), "layer must be an integer from 0 up, got 1.5"),
        (lambda h, t: h["interventions"][0].update(coefficient=math.nan), "coefficient must be finite, got nan"),
        (lambda h, t: h["interventions"][0].update(residual_norm="3"), "residual_norm must be a positive number"),
        (lambda h, t: h["interventions"][0].update(scope={"answer": True}), "TypeError"),
        (lambda h, t: h["interventions"][0].update(tensors={}), "TypeError"),
        (lambda h, t: t.pop("1.vector"), "KeyError: '1.vector'"),
        (lambda h, t: t["0.vector"].fill_(math.nan), "a steering vector has 32 NaN or infinite entries"),
        (lambda h, t: t.update({"0.vector": torch.ones(4, 4)}), r"must have shape \[d_model\], got \[4, 4\]"),
    ],
    ids=range(16),
)
@pytest.mark.usefixtures("unchecked")
def test_damaged_plans_are_refused(saved: Path, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        SteeringPlan.load(rewritten(saved, change))
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_plans_are_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    cases: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "is not a readable safetensors file"),
        "text": (b"SteeringPlan", "is not a readable safetensors file"),
        "truncated": (content[:-40], "is not a readable safetensors file"),
        "half a header": (content[:100], "is not a readable safetensors file"),
        "no json": (content.replace(b'{\\"centred\\"', b'x\\"centred\\"'), "is damaged or not of this format"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PlanError, match=f"{tmp_path / name} {message}"):
            SteeringPlan.load(tmp_path / name)
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign", metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"foreign holds no sims_lens plan; files are written by plan\.save"):
        SteeringPlan.load(tmp_path / "foreign")
    torch.save({"vector": torch.ones(2)}, tmp_path / "pickle")
    with pytest.raises(PlanError, match="pickle is not a readable safetensors file"):
        SteeringPlan.load(tmp_path / "pickle")
    for nothing in (tmp_path / "missing", tmp_path):
        with pytest.raises(PlanError, match=f"there is no plan at {nothing}"):
            SteeringPlan.load(nothing)
