"""Transforms: what each does to a stream, that it does nothing else, and that a model sees the same."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import D_MODEL, log_probs, random_tokens, vector
from torch import Tensor

from sims_lens.errors import PlanError
from sims_lens.hooks import steering
from sims_lens.plan import Intervention, SteeringPlan
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
    label,
    restore,
)

U = (vector(9).double() / vector(9).double().norm()).float()


def hpr(seed: int = 0, *, size: int = D_MODEL) -> HPR:
    g = torch.Generator().manual_seed(seed)
    widths = [size, 8, 4, 1]
    shapes = [(out, width) for width, out in zip(widths, widths[1:], strict=False)]
    return HPR(
        torch.randn(size, generator=g),
        tuple(torch.randn(shape, generator=g) / shape[1] ** 0.5 for shape in shapes),
        tuple(torch.randn(shape[0], generator=g) for shape in shapes),
    )


PLAIN: dict[str, Any] = {
    "addition": Addition(3 * vector(9)),
    "ablation": Ablation(3 * vector(9)),
    "amplification": Amplification(3 * vector(9)),
    "clamp": Clamp(3 * vector(9), 4.0),
    "rotation": Rotation(3 * vector(9)),
    "hpr": hpr(),
}
EVERY = PLAIN | {f"gated {name}": Gated(t, vector(5), -0.25, above=name != "clamp") for name, t in PLAIN.items()}

every = pytest.mark.parametrize("transform", EVERY.values(), ids=EVERY)
turning = pytest.mark.parametrize("transform", [PLAIN["rotation"], PLAIN["hpr"]], ids=["rotation", "hpr"])


def stream(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = shape or (3, 7)
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed)).to(dtype)


def delta(transform: Any, x: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    return transform.delta(x, transform.tensors(), strength)


def after(transform: Any, x: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    return x + delta(transform, x, strength)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """By the half-angle form, which is exact where the cosine is flat."""
    a, b = (v.double() / v.double().norm(dim=-1, keepdim=True) for v in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# --- what holds for all of them --------------------------------------------------------------------------------------


def test_every_kind_is_tested_here() -> None:
    assert {t.kind for t in EVERY.values()} == set(TRANSFORMS)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_strength_of_zero_is_bitwise_nothing(transform: Any, dtype: torch.dtype) -> None:
    x = stream(dtype=dtype)
    for zero in (0.0, -0.0, torch.zeros(3, 7, 1), torch.zeros(1, 7, 1)):
        found = delta(transform, x, zero)
        assert found.dtype == dtype and found.shape == x.shape
        assert not found.any() and torch.equal(x + found, x)
    assert delta(transform, x).any()


@every
def test_inputs_are_not_written_to(transform: Any) -> None:
    x, strength = stream(), torch.full((3, 7, 1), 0.7)
    tensors = {name: t.clone() for name, t in transform.tensors().items()}
    transform.delta(x, tensors, strength)
    assert torch.equal(x, stream()) and torch.equal(strength, torch.full((3, 7, 1), 0.7))
    assert all(torch.equal(t, tensors[name]) for name, t in transform.tensors().items())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_is_the_streams_and_the_delta_is_rounded_once(transform: Any, dtype: torch.dtype) -> None:
    x = stream(dtype=dtype)
    found = delta(transform, x, 0.7)
    assert found.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(found.float(), delta(transform, x.float(), 0.7), atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, delta(transform, x.float(), 0.7).to(dtype))


@every
def test_tokens_do_not_see_each_other_and_each_has_its_own_strength(transform: Any) -> None:
    x, strengths = stream(), torch.linspace(-0.8, 1.0, 21).reshape(3, 7, 1)
    found = delta(transform, x, strengths)
    for b in range(3):
        for t in range(7):
            alone = delta(transform, x[b : b + 1, t : t + 1], float(strengths[b, t]))
            close(found[b, t], alone[0, 0], 1e-6)
    row = delta(transform, x, strengths[:1])
    close(row[2], delta(transform, x[2:], strengths[:1])[0], 1e-6)


@every
@pytest.mark.parametrize("size", [1e-20, 1e-12, 1e12, 1e20])
def test_huge_and_tiny_streams_stay_finite(transform: Any, size: float) -> None:
    x = (stream() * size).requires_grad_()
    found = after(transform, x)
    found.sum().backward()
    assert found.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@every
def test_a_zero_stream_gives_no_nan_and_neither_does_its_gradient(transform: Any) -> None:
    x = torch.zeros(1, 2, D_MODEL, requires_grad=True)
    found = after(transform, x)
    found.sum().backward()
    assert found.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    inner = getattr(transform, "inner", transform)
    if not isinstance(inner, (Addition, Clamp)):  # the others act on what is there
        assert not found.any()


@every
def test_gradients_reach_the_stream_and_every_tensor(transform: Any) -> None:
    x = stream().double().requires_grad_()
    tensors = {name: t.double().requires_grad_() for name, t in transform.tensors().items()}
    transform.delta(x, tensors, 0.7).square().sum().backward()
    for name, t in tensors.items():
        if name == "axis" and isinstance(transform, Gated):
            assert t.grad is None  # a gate is open or shut
        else:
            assert t.grad is not None and t.grad.isfinite().all() and t.grad.any(), name


@every
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4])
def test_saving_and_restoring_changes_no_bit(transform: Any, size: float) -> None:
    if isinstance(transform, (Ablation, Amplification, Rotation)):
        transform = type(transform)(size * vector(3))
    data, tensors = dump(transform, "4")
    assert all(name.startswith("4.") for name in tensors)
    back = restore(data, tensors)
    assert type(back) is type(transform) and label(back) == label(transform)
    found, expected = back.tensors(), transform.tensors()
    assert list(found) == list(expected) and all(torch.equal(found[k], expected[k]) for k in found)
    assert torch.equal(delta(back, stream(), 0.3), delta(transform, stream(), 0.3))
    again, once_more = dump(back, "4")
    assert again == data and once_more.keys() == tensors.keys()


# --- along a direction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addition_is_the_vector_bit_for_bit(dtype: torch.dtype) -> None:
    found = delta(Addition(vector(2)), stream(dtype=dtype), -1.5)
    assert torch.equal(found, (-1.5 * vector(2)).to(dtype).expand(3, 7, -1))


def test_ablation_takes_the_direction_out_once_and_for_all() -> None:
    x, ablate = stream(), PLAIN["ablation"]
    once = after(ablate, x)
    assert (once @ U).abs().max() < 1e-5 < (x @ U).abs().max()
    close(after(ablate, once), once, 1e-6)
    rest = x - (x @ U)[..., None] * U
    close(once, rest)
    half = after(ablate, x, 0.5)
    close(half @ U, 0.5 * (x @ U))
    close(half - (half @ U)[..., None] * U, rest)


def test_amplification_doubles_and_undoes_ablation() -> None:
    x = stream()
    close(after(PLAIN["amplification"], x) @ U, 2 * (x @ U))
    close(delta(PLAIN["amplification"], x, -1.0), delta(PLAIN["ablation"], x), 1e-7)
    close(delta(PLAIN["amplification"], x) / U, ((x @ U)[..., None]).expand_as(x), 1e-4)  # along U alone


def test_clamp_sets_the_projection() -> None:
    x = stream()
    clamped = after(PLAIN["clamp"], x)
    close(clamped @ U, torch.full((3, 7), 4.0))
    close(clamped - 4.0 * U, x - (x @ U)[..., None] * U)
    close(after(PLAIN["clamp"], x, 0.25) @ U, 0.75 * (x @ U) + 1.0)
    close(delta(Clamp(vector(9), 0.0), x), delta(PLAIN["ablation"], x), 1e-7)


# --- rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1e-3, 0.1, 1.0, math.pi / 2, 3.0, -0.1, -2.0])
def test_rotation_turns_by_the_angle_and_keeps_the_norm(turn: float) -> None:
    x = stream()
    turned = after(PLAIN["rotation"], x, turn)
    close(turned.norm(dim=-1) / x.norm(dim=-1), torch.ones(3, 7), 1e-6)
    close(angle(x, turned), torch.full((3, 7), abs(turn), dtype=torch.float64), 1e-6)
    to_axis = angle(x, U.expand_as(x))
    expected = (to_axis - turn).abs()  # past the direction, and past its opposite
    close(angle(turned, U.expand_as(x)), torch.minimum(expected, 2 * math.pi - expected), 1e-5)
    plane, _ = torch.linalg.qr(torch.stack([x.double(), U.double().expand_as(x)], dim=-1))
    inside = (plane @ (plane.mT @ turned.double()[..., None]))[..., 0]
    close(inside, turned.double(), 1e-5)


def test_a_rotation_and_its_opposite_cancel() -> None:
    x = stream()
    close(after(PLAIN["rotation"], after(PLAIN["rotation"], x, 0.4), -0.4), x)


@turning
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_a_turned_stream_scales_with_the_stream(transform: Any, size: float) -> None:
    x = stream()
    if isinstance(transform, HPR):  # the net's bias alone gives the angle, so that it does not depend on the size
        transform = HPR(transform.probe, tuple(torch.zeros_like(w) for w in transform.weights), transform.biases)
        x = torch.where((x @ transform.probe)[..., None] < 0, x, -x)  # on the side that is turned
    expected = delta(transform, x, 0.5)
    assert (expected.abs().amax(-1) > 0.1).all()
    close(delta(transform, x * size, 0.5) / size, expected, 1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0, 37.0, -1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_parallel_stream_is_left_alone(sign: float, dtype: torch.dtype) -> None:
    for turning_transform in (PLAIN["rotation"], PLAIN["hpr"]):
        axis = next(iter(turning_transform.tensors().values())).to(dtype)
        x = (sign * axis).expand(1, 1, -1).clone().requires_grad_()
        found = delta(turning_transform, x, 1.0)
        found.sum().backward()
        assert not found.any() and x.grad is not None and x.grad.isfinite().all()


def test_a_nearly_parallel_stream_keeps_its_norm() -> None:
    across = vector(4) - (vector(4) @ U) * U
    for distance in (1e-2, 1e-4, 1e-5):
        x = (50 * (U + distance * across / across.norm())).expand(1, 1, -1)
        close(after(PLAIN["rotation"], x, 1.0).norm(dim=-1) / x.norm(dim=-1), torch.ones(1, 1), 1e-6)


# --- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("above", [True, False])
def test_a_gate_is_open_per_token_and_on_one_side(inner: Any, above: bool) -> None:
    x, axis = stream(), vector(5)
    projection = x @ (axis / axis.norm())
    opened = projection > 0.5 if above else projection < 0.5
    assert 3 <= int(opened.sum()) <= 18
    gated = Gated(inner, 7 * axis, 0.5, above=above)
    expected = torch.where(opened[..., None], delta(inner, x, 0.3), 0.0)
    assert torch.equal(delta(gated, x, 0.3), expected)


def test_a_gate_at_its_threshold_is_shut() -> None:
    x = torch.tensor([[[2.0, 0.0]]])
    for above in (True, False):
        assert not delta(Gated(Addition(torch.ones(2)), torch.tensor([1.0, 0.0]), 2.0, above=above), x).any()


def test_a_gate_is_counted_in_the_units_of_what_it_gates() -> None:
    assert Gated(PLAIN["addition"], U, 0.0).strength_is_length
    assert not Gated(PLAIN["rotation"], U, 0.0).strength_is_length
    assert torch.equal(Gated(PLAIN["clamp"], vector(5), 0.0).direction, PLAIN["clamp"].direction)


# --- values that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ablation(torch.zeros(4)), "the direction of the ablation is zero: it has no direction"),
        (lambda: Rotation(torch.tensor([1.0, math.nan])), "the direction of the rotation has 1 NaN or infinite"),
        (lambda: Amplification(torch.ones(2, 2)), r"amplification must have shape \[d_model\], got \[2, 2\]"),
        (lambda: Clamp(torch.ones(2), math.inf), "the value of a clamp must be a finite number, got inf"),
        (lambda: Clamp(torch.ones(2), True), "the value of a clamp must be a finite number, got True"),
        (lambda: Gated(Addition(torch.ones(2)), torch.ones(3), 0.0), "gate's direction has 3 entries, its addition"),
        (lambda: Gated(Gated(Addition(U), U, 0.0), U, 0.0), "inner transform of a gate must be one that is not"),
        (lambda: Gated(U, U, 0.0), "inner transform of a gate must be one that is not gated, got Tensor"),
        (lambda: Gated(Addition(U), U, math.nan), "the threshold of a gate must be a finite number, got nan"),
        (lambda: Gated(Addition(U), U, 0.0, above=1), "above must be True or False, got 1"),
        (lambda: HPR(torch.zeros(4), (torch.ones(1, 4),), (torch.ones(1),)), "the probe of an HPR is zero"),
        (lambda: HPR(torch.ones(4), (), ()), "one bias per weight, got 0 weights and 0 biases"),
        (lambda: HPR(torch.ones(4), (torch.ones(1, 4),), ()), "got 1 weights and 0 biases"),
        (lambda: HPR(torch.ones(4), (torch.ones(1, 3),), (torch.ones(1),)), r"layer 0 .* it needs \[1, 4\] and \[1\]"),
        (lambda: HPR(torch.ones(4), (torch.ones(2, 4),), (torch.ones(2),)), r"layer 0 .* it needs \[1, 4\] and \[1\]"),
        (
            lambda: HPR(torch.ones(4), (torch.ones(2, 4), torch.ones(1, 3)), (torch.ones(2), torch.ones(1))),
            r"layer 1 of an HPR's angle net has weight \[1, 3\] and bias \[1\]; it needs \[1, 2\]",
        ),
        (lambda: HPR(torch.ones(4), (torch.full((1, 4), math.nan),), (torch.ones(1),)), "angle net has 4 NaN"),
        (lambda: hpr().mapped(lambda v: v), "its direction can't be changed; fit it again"),
    ],
    ids=range(18),
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_is_passed_in_is_copied() -> None:
    given = [vector(1), torch.ones(1, D_MODEL), torch.ones(1)]
    made = [Addition(given[0]), Ablation(U.clone()), HPR(given[0], (given[1],), (given[2],))]
    before = [delta(t, stream()).clone() for t in made]
    for tensor in given:
        tensor.zero_()
    assert all(torch.equal(delta(t, stream()), b) for t, b in zip(made, before, strict=True))


def test_a_direction_of_norm_one_is_kept_bit_for_bit() -> None:
    for seed in range(20):
        axis = Ablation(vector(seed)).axis
        assert torch.equal(Ablation(axis).axis, axis)
        close(axis.double().norm(), torch.tensor(1.0, dtype=torch.float64), 1e-6)


# --- on a model ------------------------------------------------------------------------------------------------------

TOKENS = random_tokens()
WIDTH, NEW = TOKENS.shape[1], 6
NAME = "blocks.1.steer_resid_post.hook_"
STRENGTH = 0.7


def plan(*transforms: Any, **options: Any) -> SteeringPlan:
    made = [SteeringPlan.of({1: t}, coefficient=STRENGTH, **{"scope": "all", **options}) for t in transforms]
    return sum(made[1:], made[0])


def on_tokens(transform: Any, model: Any, scope: str = "all") -> dict[str, Tensor]:
    with steering(model, plan(transform, scope=scope)) as steered, steered.prompt(4):
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.startswith(NAME))
    return {name: cache[name].clone() for name in (NAME + "pre", NAME + "delta", NAME + "post")}


@every
def test_a_model_sees_what_the_pure_function_says(llama: Any, transform: Any) -> None:
    _, base = llama.run_with_cache(TOKENS)
    x = base["blocks.1.hook_resid_post"]
    expected = delta(transform, x, STRENGTH)
    found = on_tokens(transform, llama)
    assert expected.any()
    assert torch.equal(found[NAME + "pre"], x)
    assert torch.equal(found[NAME + "delta"], expected)
    assert torch.equal(found[NAME + "post"], x + expected)
    scoped = on_tokens(transform, llama, scope="response")
    assert not scoped[NAME + "delta"][:, :4].any()
    assert torch.equal(scoped[NAME + "delta"][:, 4:], expected[:, 4:])


def test_the_order_at_a_site_is_seen(llama: Any) -> None:
    _, base = llama.run_with_cache(TOKENS)
    x = base["blocks.1.hook_resid_post"]
    add, ablate = Addition(2 * U + vector(3)), Ablation(U)
    results = []
    for first, second in ((add, ablate), (ablate, add)):
        with steering(llama, plan(first, second)):
            _, cache = llama.run_with_cache(TOKENS)
        results.append(cache["blocks.1.hook_resid_post"])
        close(results[-1], after(second, after(first, x, STRENGTH), STRENGTH), 2e-5)
    assert (results[0] - results[1]).abs().max() > 0.1


# --- decay -----------------------------------------------------------------------------------------------------------


def generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    arguments = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False} | options
    result = model.generate(TOKENS, output_logits=True, return_dict_in_generate=True, **arguments)
    return result.sequences.clone(), log_probs(torch.stack(tuple(result.logits), dim=1)).clone()


def decay(columns: Tensor, half_life: float) -> Tensor:
    """What is left of the strength in each column of rows whose prompts end at ``columns``."""
    age = (torch.arange(WIDTH)[None] - columns[:, None] + 1).clamp(min=0)
    return 0.5 ** (age / half_life)


@pytest.mark.parametrize("half_life", [0.5, 2.0, 3.0, 1e6])
@pytest.mark.parametrize("columns", [4, torch.tensor([4, 4]), torch.tensor([2, 7])], ids=["4", "4 4", "2 7"])
def test_the_strength_halves_with_the_generated_tokens(llama: Any, half_life: float, columns: Any) -> None:
    decaying = plan(Addition(vector(9)), half_life=half_life)
    with steering(llama, decaying) as steered, steered.prompt(columns):
        _, cache = llama.run_with_cache(TOKENS)
    left = decay(torch.as_tensor(columns).expand(2), half_life)
    close(cache[NAME + "delta"], STRENGTH * left[..., None] * vector(9), 1e-6)
    if isinstance(columns, int):
        assert left[0, 3] == 1.0  # the last prompt token gets all of it, the first generated one less
        assert left[0, 4] == pytest.approx(0.5 ** (1 / half_life))


@pytest.mark.parametrize("transform", PLAIN.values(), ids=PLAIN)
def test_a_decaying_plan_is_the_same_with_a_cache_without_one_and_teacher_forced(llama: Any, transform: Any) -> None:
    steady = plan(transform, scope="generation")
    with steering(llama, steady):
        _, constant = generated(llama)
    with steering(llama, steady.decaying(1.5)) as steered:
        tokens, cached = generated(llama)
        same, uncached = generated(llama, use_past_kv_cache=False)
        with steered.prompt(WIDTH):
            forced = log_probs(llama(tokens))[:, WIDTH - 1 : -1]
        with steered.prompt(torch.full((2,), WIDTH)):
            per_row = log_probs(llama(tokens))[:, WIDTH - 1 : -1]
    assert torch.equal(same, tokens)
    for other in (uncached, forced, per_row):
        torch.testing.assert_close(other, cached, atol=1e-4, rtol=0)
    torch.testing.assert_close(constant[:, 0], cached[:, 0], atol=1e-4, rtol=0)  # the prompt's last token is not late
    assert (constant[:, 1] - cached[:, 1]).abs().max() > 1e-3


def test_a_plan_stops_decaying() -> None:
    steady = plan(Addition(vector(9)))
    assert steady.decaying(2.0).interventions[0].half_life == 2.0
    assert steady.decaying(2.0).decaying(None).interventions[0] == steady.interventions[0]


@pytest.mark.parametrize("half_life", [0, -1.0, math.nan, math.inf, True, "2"], ids=repr)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_half_life_is_named(half_life: Any) -> None:
    with pytest.raises(PlanError, match=f"half_life must be a positive number of generated tokens, got {half_life!r}"):
        plan(Addition(vector(9)), half_life=half_life)


@pytest.mark.parametrize("transform", [t for k, t in EVERY.items() if "addition" not in k], ids=lambda t: label(t))
def test_only_lengths_have_units(transform: Any) -> None:
    with pytest.raises(PlanError, match="is no length, so it has no residual_norm units; use units='absolute'"):
        Intervention(1, "resid_post", transform, 0.2, units="residual_norm")
