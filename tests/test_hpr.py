"""Householder pseudo-rotation: the published formula, written out slowly, and what is learned from planted pairs."""

import math
from typing import Any

import pytest
import torch
from common import D_MODEL, vector
from torch import Tensor, nn

from sims_lens.errors import ConfigError, FitError, SimsError
from sims_lens.estimators.hpr import HouseholderRotation, HPRReport, _schedule, top_layers
from sims_lens.transforms import HPR

# --- the transform ---------------------------------------------------------------------------------------------------


def random_hpr(size: int, seed: int, *, depth: int = 4, bias: float = 1.0) -> HPR:
    g = torch.Generator().manual_seed(seed)
    widths = [max(1, size // 2**k) for k in range(depth)] + [1]
    shapes = list(zip(widths[1:], widths, strict=False))
    return HPR(
        torch.randn(size, generator=g),
        tuple(torch.randn(shape, generator=g) / shape[1] ** 0.5 for shape in shapes),
        tuple(bias * torch.randn(shape[0], generator=g) for shape in shapes),
    )


def net_angle(transform: HPR, x: Tensor) -> float:
    hidden = x
    for index, (weight, bias) in enumerate(zip(transform.weights, transform.biases, strict=True)):
        if index:
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        hidden = weight.double() @ hidden + bias.double()
    return math.pi * float(torch.sigmoid(hidden))


def published(transform: HPR, stream: Tensor, strength: float) -> Tensor:
    """Reflect each negative token by the Householder matrix and interpolate (equations 5 to 8 of the paper)."""
    w = transform.probe.double()
    householder = torch.eye(len(w), dtype=torch.float64) - 2 * torch.outer(w, w) / torch.dot(w, w)
    out = stream.double().clone()
    for row in out.reshape(-1, len(w)):  # a view
        a = row.clone()
        if round(float(torch.sigmoid(torch.dot(w, a)))) == 1:
            continue
        reflected = householder @ a
        gamma1 = strength * net_angle(transform, a)
        gamma2 = math.acos(float(torch.dot(a, reflected) / (a.norm() * reflected.norm())))
        beta1 = math.sin(gamma1) / math.sin(gamma2)
        beta2 = math.sin(gamma2 - gamma1) / math.sin(gamma2)
        row.copy_(beta1 * reflected + beta2 * a)
    return out


def stream_of(size: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (2, 6)), size, generator=torch.Generator().manual_seed(seed)).double()


def delta(transform: HPR, stream: Tensor, strength: Any = 1.0) -> Tensor:
    return transform.delta(stream, transform.tensors(), strength)


def angle(a: Tensor, b: Tensor) -> Tensor:
    a, b = (v.double() / v.double().norm(dim=-1, keepdim=True) for v in (a, b))
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5, 1.7])
@pytest.mark.parametrize("size", [2, 8, 40])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_published_formula(size: int, strength: float, scale: float) -> None:
    for seed in range(3):
        transform, x = random_hpr(size, seed), scale * stream_of(size, seed=seed)
        expected = published(transform, x, strength)
        turned = (expected != x).any(-1)
        assert 0 < int(turned.sum()) < turned.numel()
        found = x + delta(transform, x, strength)
        assert ((found - expected).norm(dim=-1) / x.norm(dim=-1)).max() < 1e-6
        in_float32 = x.float() + delta(transform, x.float(), strength)
        assert ((in_float32 - expected).norm(dim=-1) / x.norm(dim=-1)).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_norm_is_kept_the_angle_is_the_nets_and_the_positive_side_is_left_alone(dtype: torch.dtype) -> None:
    transform, x = random_hpr(24, 3), stream_of(24, 4, 9).to(dtype)
    positive = x @ transform.probe.to(dtype) > 0
    gamma = torch.tensor([net_angle(transform, a) for a in x.double().reshape(-1, 24)]).reshape(4, 9)
    for strength in (0.2, 0.9, 1.0, -0.4):
        found = x + delta(transform, x, strength)
        assert torch.equal(found[positive], x[positive])
        assert (found.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-6
        turned = angle(x, found)[~positive]
        torch.testing.assert_close(turned, abs(strength) * gamma[~positive].double(), atol=2e-6, rtol=0)
        closer = (found @ transform.direction.to(dtype))[~positive] - (x @ transform.direction.to(dtype))[~positive]
        small = (turned < 0.5) & (angle(x, transform.direction.expand_as(x))[~positive] < 2.5)
        assert small.any() or abs(strength) > 0.8
        assert (closer[small] * strength > 0).all()  # towards the positive side, or away from it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_strength_is_bitwise_nothing_in_every_dtype(dtype: torch.dtype) -> None:
    transform, x = random_hpr(D_MODEL, 0), stream_of(D_MODEL).to(dtype)
    for zero in (0.0, torch.zeros(2, 6, 1)):
        found = delta(transform, x, zero)
        assert found.dtype == dtype and not found.any() and torch.equal(x + found, x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=str)
def test_half_precision_streams(dtype: torch.dtype, tolerance: float) -> None:
    transform, x = random_hpr(D_MODEL, 2), (50 * stream_of(D_MODEL)).to(dtype)
    found = x + delta(transform, x)
    assert found.dtype == dtype and found.isfinite().all()
    assert ((found.double() - published(transform, x, 1.0)).norm(dim=-1) / x.double().norm(dim=-1)).max() < tolerance


def test_on_the_hyperplane_and_along_the_probe_nothing_is_nan() -> None:
    transform = random_hpr(8, 1)
    w = transform.probe / transform.probe.norm()
    across = vector(4, size=8) - (vector(4, size=8) @ w) * w
    x = torch.stack([across, -3 * w, 3 * w, torch.zeros(8)])[None]
    found = x + delta(transform, x)
    assert found.isfinite().all() and torch.equal(found[0, 1:], x[0, 1:])
    assert (found.norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-5


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_gradients_are_those_of_finite_differences(side: float) -> None:
    transform = random_hpr(6, 5, depth=2)
    x = stream_of(6, 1, 3)
    x = torch.where((x @ transform.probe.double())[..., None].sign() == side, x, -x)  # away from the jump
    names, tensors = zip(*transform.tensors().items(), strict=True)

    def changed(stream: Tensor, strength: Tensor, *values: Tensor) -> Tensor:
        return transform.delta(stream, dict(zip(names, values, strict=True)), strength)

    inputs = [x, torch.full((1, 3, 1), 0.7).double(), *(t.double() for t in tensors)]
    assert torch.autograd.gradcheck(changed, [value.requires_grad_() for value in inputs])
    moved = torch.autograd.grad(changed(*inputs).square().sum(), inputs, allow_unused=True)
    assert all(g is not None and bool(g.any()) == (side < 0) for g in moved)


# --- the fit ---------------------------------------------------------------------------------------------------------

SIZE = 16
FAST = HouseholderRotation(learning_rate=2e-2)


def planted(pairs: int = 400, layers: int = 2, *, gap: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Positive and negative activations on two sides of a plane of each layer, and the plane's normals."""
    g = torch.Generator().manual_seed(seed)
    normals = nn.functional.normalize(torch.randn(layers, SIZE, generator=g), dim=-1)
    noise = [torch.randn(pairs, layers, SIZE, generator=g) for _ in range(2)]
    return noise[0] + gap * normals, noise[1] - gap * normals, normals


def same(left: HPR, right: HPR) -> bool:
    a, b = left.tensors(), right.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def report() -> HPRReport:
    positive, negative, _ = planted()
    return FAST.fit_report(positive, negative)


def test_a_planted_direction_is_recovered(report: HPRReport) -> None:
    positive, negative, normals = planted()
    fresh = torch.Generator().manual_seed(9)
    for layer, transform in enumerate(report.transforms):
        assert float(transform.direction @ normals[layer]) > 0.93
        good = torch.randn(1, 200, SIZE, generator=fresh) + 2.0 * normals[layer]
        bad = torch.randn(1, 200, SIZE, generator=fresh) - 2.0 * normals[layer]
        assert ((good @ transform.probe > 0).float().mean() + (bad @ transform.probe < 0).float().mean()) / 2 > 0.95
        moved = bad + delta(transform, bad)
        assert (moved @ transform.probe > 0).float().mean() > 0.95  # turned over
        assert angle(moved, good).mean() < angle(bad, good).mean() - 0.3
        unmoved = good + delta(transform, good)
        assert (unmoved != good).any(-1).float().mean() < 0.05
    assert report.accuracy.min() > 0.95
    typical = angle(negative[:, 0], positive[:, 0])
    assert report.angle_error.max() < 0.4 and 1.7 < typical.mean() < 1.9  # a constant would be off by 0.9


def test_labels_that_mean_nothing_teach_nothing() -> None:
    positive, negative, normals = planted()
    swapped = torch.rand(len(positive), 1, 1, generator=torch.Generator().manual_seed(3)) < 0.5
    null = FAST.fit_report(torch.where(swapped, negative, positive), torch.where(swapped, positive, negative))
    assert ((null.accuracy - 0.5).abs() < 0.15).all()
    g = torch.Generator().manual_seed(4)
    noise = FAST.fit_report(*(torch.randn(400, 2, SIZE, generator=g) for _ in range(2)))
    assert ((noise.accuracy - 0.5).abs() < 0.15).all()
    assert ((torch.stack([t.direction for t in noise.transforms]) * normals).sum(-1).abs() < 0.7).all()


def test_the_report_is_of_the_validation_pairs(report: HPRReport) -> None:
    """Recomputed from the kept transforms, on the run of neighbouring rows that reproduces every number."""
    positive, negative, _ = planted()
    count, matches = round(0.2 * len(positive)), 0
    for start in range(len(positive)):
        rows = (torch.arange(count) + start) % len(positive)
        good, bad = positive[rows, 0], negative[rows, 0]
        transform = report.transforms[0]
        off = torch.cat([gamma(transform, good), gamma(transform, bad) - angle(bad, good)])
        right = torch.cat([good @ transform.probe > 0, bad @ transform.probe <= 0]).float().mean()
        matches += bool(
            abs(float(off.square().mean().sqrt() - report.angle_error[0])) < 1e-5
            and abs(float(right - report.accuracy[0])) < 1e-6
        )
    assert matches == 1


def gamma(transform: HPR, a: Tensor) -> Tensor:
    modules: list[nn.Module] = []
    for index, (weight, bias) in enumerate(zip(transform.weights, transform.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [nn.GELU()] * bool(index) + [linear]
    with torch.no_grad():
        return math.pi * torch.sigmoid(nn.Sequential(*modules)(a))[..., 0]


def test_one_step_is_the_optimisers_step_on_the_published_loss() -> None:
    """The published loss by torch's own modules, probabilities and clipping, for one layer and two whole epochs."""
    positive, negative, _ = planted(40, 1, gap=0.5)
    fitted = HouseholderRotation(learning_rate=5e-2, epochs=2, batch_size=64, seed=5).fit_report(positive, negative)
    start = HouseholderRotation(learning_rate=1e-30, epochs=1, batch_size=64, seed=5).fit(
        positive[:, 0], negative[:, 0]
    )
    probe = nn.Linear(SIZE, 1, bias=False)
    probe.load_state_dict({"weight": start.probe[None]})
    layers: list[nn.Module] = []
    for index, (weight, bias) in enumerate(zip(start.weights, start.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers += [nn.GELU()] * bool(index) + [linear]
    net = nn.Sequential(*layers)
    parameters = [*probe.parameters(), *net.parameters()]
    g = torch.Generator().manual_seed(5)
    first = int(torch.randint(40, (1,), generator=g))
    rows = (torch.arange(40) + first) % 40
    good, bad = positive[rows[8:], 0], negative[rows[8:], 0]
    a, label = torch.cat([good, bad]), torch.cat([torch.ones(32, 1), torch.zeros(32, 1)])
    target = torch.cat([torch.zeros(32), angle(bad, good).float()])[:, None]
    states = []
    optimizer = torch.optim.AdamW(parameters, lr=5e-2, weight_decay=0.0)
    for rate in (0.0, 5e-2):  # one warm-up step of two, at rate 0
        optimizer.param_groups[0]["lr"] = rate
        loss = nn.functional.binary_cross_entropy(torch.sigmoid(probe(a)), label)
        loss = loss + nn.functional.mse_loss(math.pi * torch.sigmoid(net(a)), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        states.append([p.detach().clone() for p in parameters])
    expected = states[fitted.epochs[0] - 1]
    found = [fitted.transforms[0].probe[None]]
    for weight, bias in zip(fitted.transforms[0].weights, fitted.transforms[0].biases, strict=True):
        found += [weight, bias]
    assert fitted.epochs == (2,)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-3)


def test_the_schedule_is_linear_up_and_down() -> None:
    assert [_schedule(step, 5) for step in range(5)] == [0.0, 1.0, 0.75, 0.5, 0.25]
    assert [_schedule(step, 40) for step in (0, 1, 2, 21, 39)] == [0.0, 0.5, 1.0, 0.5, 1 / 38]
    assert _schedule(0, 1) == 0.0


def test_parameters_begin_as_those_of_linear_layers_and_the_widths_halve() -> None:
    positive, negative, _ = planted(10, 1)
    start = HouseholderRotation(learning_rate=1e-30).fit(positive[:, 0], negative[:, 0])
    assert [tuple(w.shape) for w in start.weights] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    g = torch.Generator().manual_seed(0)
    wide = HouseholderRotation(learning_rate=1e-30, epochs=1).fit(*(torch.randn(4, 256, generator=g) for _ in range(2)))
    for tensor, width in [(wide.probe, 256), *((w, w.shape[1]) for w in wide.weights[:3])]:
        assert 0.95 / width**0.5 < tensor.abs().max() <= 1 / width**0.5
        assert tensor.abs().mean() == pytest.approx(0.5 / width**0.5, rel=0.15)
    assert wide.biases[0].abs().max() <= 1 / 16 < 1.2 * wide.biases[0].abs().max()


def test_a_layer_is_fitted_as_if_it_were_alone(report: HPRReport) -> None:
    positive, negative, _ = planted()
    for layer in range(2):
        alone = FAST.fit(positive[:, layer], negative[:, layer])
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(tensor, report.transforms[layer].tensors()[name], atol=1e-4, rtol=1e-4)
    loud = (
        torch.stack([positive[:, 0], 1e3 * positive[:, 1]], dim=1),
        torch.stack([negative[:, 0], negative[:, 1]], dim=1),
    )
    beside = FAST.fit_report(*loud)  # whose gradients are huge: clipping is each layer's own
    torch.testing.assert_close(beside.transforms[0].probe, report.transforms[0].probe, atol=1e-4, rtol=1e-4)
    assert beside.epochs[0] == report.epochs[0]


def test_the_seed_decides_and_nothing_global_is_touched(report: HPRReport) -> None:
    positive, negative, _ = planted()
    state = torch.random.get_rng_state()
    torch.rand(3)
    again = FAST.fit_report(positive, negative)
    torch.random.set_rng_state(state)
    FAST.fit(positive[:40, 0], negative[:40, 0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(same(a, b) for a, b in zip(again.transforms, report.transforms, strict=True))
    assert torch.equal(again.accuracy, report.accuracy) and again.epochs == report.epochs
    other = HouseholderRotation(learning_rate=2e-2, seed=1).fit_report(positive, negative)
    assert not same(other.transforms[0], report.transforms[0])
    assert all(same(a, b) for a, b in zip(FAST.fit_layers(positive, negative), report.transforms, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_trains_in_any_mode_and_returns_plain_tensors(mode: Any, report: HPRReport) -> None:
    with mode():
        positive, negative, _ = planted()
        fitted = FAST.fit_report(positive, negative)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    for transform, expected in zip(fitted.transforms, report.transforms, strict=True):
        assert same(transform, expected)
        assert not any(t.requires_grad or t.is_inference() for t in transform.tensors().values())
    assert not fitted.accuracy.is_inference() and not fitted.angle_error.is_inference()


def test_inputs_are_left_as_they_were() -> None:
    positive, negative, _ = planted(20)
    positive.requires_grad_()
    before = positive.detach().clone(), negative.clone()
    FAST.fit_report(positive, negative)
    assert torch.equal(positive, before[0]) and torch.equal(negative, before[1]) and positive.grad is None
    half = FAST.fit_report(positive.detach().bfloat16(), negative.bfloat16())
    wide = FAST.fit_report(positive.detach().bfloat16().float(), negative.bfloat16().float())
    assert all(same(a, b) for a, b in zip(half.transforms, wide.transforms, strict=True))
    assert half.transforms[0].probe.dtype == torch.float32


@pytest.mark.parametrize("pairs", [2, 3, 5, 16, 17])
def test_few_pairs_are_enough(pairs: int) -> None:
    positive, negative, _ = planted(pairs)
    fitted = FAST.fit_report(positive, negative)
    assert ((fitted.accuracy >= 0) & (fitted.accuracy <= 1)).all() and fitted.angle_error.isfinite().all()
    assert all(1 <= epoch <= 5 for epoch in fitted.epochs)


def test_pairs_that_are_the_same_are_left_out_where_they_are() -> None:
    positive, negative, normals = planted()
    alike = torch.arange(len(positive)) % 2 == 0
    clean = FAST.fit_report(positive, negative)
    spoilt = negative.clone()
    spoilt[alike, 0, :12] = positive[alike, 0, :12]  # three quarters
    fitted = FAST.fit_report(positive, spoilt)
    assert fitted.accuracy[0] > 0.95 and float(fitted.transforms[0].direction @ normals[0]) > 0.9
    torch.testing.assert_close(fitted.transforms[1].probe, clean.transforms[1].probe)
    spoilt[alike, 0, 12:] += 9.0  # whatever else they are, they teach nothing and count for nothing
    other = FAST.fit_report(positive, spoilt)
    assert same(other.transforms[0], fitted.transforms[0]) and torch.equal(other.accuracy, fitted.accuracy)
    spoilt[alike, 0, 11] += 1.0  # less than three quarters
    assert not same(FAST.fit_report(positive, spoilt).transforms[0], fitted.transforms[0])


def test_the_most_accurate_epoch_is_kept_and_of_equals_the_one_with_the_best_angles(report: HPRReport) -> None:
    positive, negative, _ = planted(gap=9.0)
    easy = FAST.fit_report(positive, negative)
    assert (easy.accuracy == 1.0).all()
    first = FAST.fit_report(positive, negative).angle_error
    one = HouseholderRotation(learning_rate=2e-2, epochs=1).fit_report(positive, negative)
    assert (one.accuracy == 1.0).all() and min(easy.epochs) > 1
    assert (first < one.angle_error).all()


def test_the_best_layers() -> None:
    accuracy = torch.tensor([0.9, 0.5, 0.7, 0.9, 0.6, 0.8, 0.7])
    assert top_layers(accuracy) == (0, 2, 3, 5, 6)
    assert top_layers(accuracy, count=1) == (0,) and top_layers(accuracy, count=3) == (0, 3, 5)
    assert top_layers(accuracy, count=4) == (0, 2, 3, 5) and top_layers(accuracy, count=99) == tuple(range(7))


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (torch.ones(4, 2, 8), torch.ones(3, 2, 8), r"counterparts; got \[4, 2, 8\] and \[3, 2, 8\]"),
        (torch.ones(4, 8), torch.ones(4, 8), r"must both be \[pair, layer, d_model\], .* got \[4, 8\] and \[4, 8\]"),
        (
            torch.ones(1, 2, 8),
            torch.ones(1, 2, 8),
            r"needs two pairs of activations at least.* got 1 of shape \[2, 8\]",
        ),
        (torch.ones(0, 2, 8), torch.ones(0, 2, 8), "needs two pairs of activations at least.* got 0 of shape"),
        (torch.full((4, 2, 8), math.nan), torch.ones(4, 2, 8), "positive activations hold NaN or infinite entries"),
        (torch.ones(4, 2, 8), torch.full((4, 2, 8), math.inf), "negative activations hold NaN or infinite entries"),
        (torch.ones(10, 1, 8), torch.ones(10, 1, 8), "at layer 0 of the 1 given, all 8 training pairs are"),
    ],
    ids=range(7),
)
@pytest.mark.usefixtures("unchecked")
def test_activations_that_cannot_be_used_are_named(positive: Tensor, negative: Tensor, message: str) -> None:
    with pytest.raises(FitError, match=message) as caught:
        FAST.fit_report(positive, negative)
    assert (
        isinstance(caught.value, SimsError) and isinstance(caught.value, ValueError) and "\n" not in str(caught.value)
    )
    if positive.ndim == 3:
        with pytest.raises(FitError, match=r"must both be \[pair, d_model\]"):
            FAST.fit(positive, negative)


def test_a_layer_without_a_usable_pair_and_a_training_that_diverges_are_named() -> None:
    positive, negative, _ = planted(40, 3)
    negative[:, 1] = positive[:, 1]
    with pytest.raises(FitError, match="at layer 1 of the 3 given, all 32 training pairs are .nearly. identical"):
        FAST.fit_report(positive, negative)
    positive, negative, _ = planted(40, 1)
    with pytest.raises(FitError, match="diverged at layer 0 of the 1 given; try a learning_rate below 1e.38"):
        HouseholderRotation(learning_rate=1e38).fit_report(positive, negative)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, got 0.0"),
        ({"learning_rate": math.inf}, "learning_rate must be a positive number, got inf"),
        ({"learning_rate": math.nan}, "learning_rate must be a positive number, got nan"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"validation_share": 0.0}, "validation_share must be between 0 and 1, got 0.0"),
        ({"validation_share": 1.0}, "validation_share must be between 0 and 1, got 1.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HouseholderRotation(**options)
