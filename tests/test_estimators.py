"""Planted directions are recovered with their sign; controls recover nothing; quality says what it measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sims_lens.errors import ConfigError, FitError
from sims_lens.estimators import (
    ESTIMATORS,
    PCA,
    Estimator,
    LogisticProbe,
    MassMean,
    MeanDifference,
    RandomDirection,
    ShuffledLabels,
    WhitenedMeanDifference,
    fit_layers,
    fit_quality,
    mean_difference,
    shuffled_mean_differences,
    split_half_cosine,
    unit,
)
from sims_lens.estimators.directions import _shrunk_covariance
from sims_lens.transforms import Ablation, Addition

PAIRS, LAYERS, WIDTH = 200, 3, 64

DIRECTIONS: tuple[Any, ...] = (
    MeanDifference(),
    MeanDifference(paired=False),
    PCA(),
    PCA(of="classes"),
    LogisticProbe(),
    MassMean(),
    WhitenedMeanDifference(),
)
UNPAIRED: tuple[Any, ...] = (MeanDifference(paired=False), LogisticProbe(), MassMean(), WhitenedMeanDifference())
CONTROLS: tuple[Any, ...] = (RandomDirection(), *(ShuffledLabels(estimator) for estimator in DIRECTIONS))

named = pytest.mark.parametrize("estimator", DIRECTIONS, ids=repr)


def planted(
    noise: float | Tensor = 1.0, *, pairs: int = PAIRS, varying: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that share something and differ by a direction, to a degree that varies from pair to pair or not."""
    generator = torch.Generator().manual_seed(100 + seed)  # not that of a random direction

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    direction = unit(drawn(LAYERS, WIDTH))
    shared = drawn(pairs, LAYERS, WIDTH)
    strength = 4 * torch.rand(pairs, 1, 1, generator=generator) if varying else 1.0
    positive = shared + strength * direction + noise * drawn(pairs, LAYERS, WIDTH)
    negative = shared - strength * direction + noise * drawn(pairs, LAYERS, WIDTH)
    return positive, negative, direction


def confounded(*, pairs: int = PAIRS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A constant direction in noise whose standard deviation falls from 12 to 0.2 over the axes."""
    return planted(12.0 / torch.arange(1, WIDTH + 1), pairs=pairs, varying=False, seed=seed)


def vectors(estimator: Estimator, positive: Tensor, negative: Tensor) -> Tensor:
    fitted = fit_layers(estimator, positive, negative)
    assert all(type(transform) is Addition for transform in fitted)
    return torch.stack([transform.tensors()["vector"] for transform in fitted])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def auc(vector: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    up, down = (torch.einsum("pld,ld->lp", rows, vector) for rows in (positive, negative))
    return (up[:, :, None] > down[:, None, :]).float().mean((1, 2))


def test_mean_difference_recovers_the_planted_direction_and_its_sign() -> None:
    positive, negative, direction = planted(varying=False)
    before = positive.clone(), negative.clone()
    found = mean_difference(positive, negative)
    assert (cosine(found, direction) > 0.9).all()
    torch.testing.assert_close(mean_difference(negative, positive), -found)
    assert torch.equal(positive, before[0]) and torch.equal(negative, before[1])


def test_half_precision_activations_are_averaged_in_float32() -> None:
    positive = torch.full((1000, 4), 0.1, dtype=torch.bfloat16)
    assert mean_difference(positive, torch.zeros_like(positive)).dtype == torch.float32
    fitted = MeanDifference().fit(positive, torch.zeros_like(positive)).vector
    torch.testing.assert_close(fitted, positive[0].float())


def test_shuffled_labels_recover_nothing() -> None:
    positive, negative, direction = planted(varying=False)
    shuffled = shuffled_mean_differences(positive, negative, count=20, seed=0)
    assert shuffled.shape == (20, LAYERS, WIDTH)
    assert cosine(shuffled, direction).mean().abs() < 0.15
    assert shuffled.norm(dim=-1).mean() < 0.5 * mean_difference(positive, negative).norm(dim=-1).mean()
    assert torch.equal(shuffled, shuffled_mean_differences(positive, negative, count=20, seed=0))


def test_split_half_cosine_tells_signal_from_noise() -> None:
    positive, negative, _ = planted(varying=False)
    assert (split_half_cosine(positive, negative, seed=0) > 0.7).all()
    noise = torch.randn(PAIRS, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))
    assert split_half_cosine(noise, torch.zeros_like(noise), seed=0).abs().max() < 0.3
    assert split_half_cosine(positive[:1], negative[:1], seed=0).isnan().all()


def test_unit_leaves_zero_alone() -> None:
    assert torch.equal(unit(torch.zeros(3)), torch.zeros(3))
    torch.testing.assert_close(unit(torch.tensor([0.0, -2.0])), torch.tensor([0.0, -1.0]))


@named
def test_a_planted_direction_is_recovered_at_the_length_that_separates_the_classes(estimator: Any) -> None:
    positive, negative, direction = planted()
    before = positive.clone(), negative.clone()
    found = vectors(estimator, positive, negative)
    assert found.dtype == torch.float32
    assert (cosine(found, direction) > 0.75).all()
    gap = mean_difference(positive, negative)
    torch.testing.assert_close(found.norm(dim=-1), (unit(found) * gap).sum(-1))
    assert torch.equal(positive, before[0]) and torch.equal(negative, before[1])


@named
def test_the_sign_is_that_of_the_data(estimator: Any) -> None:
    for seed in range(12):
        positive, negative, direction = planted(pairs=100, seed=seed)
        found = vectors(estimator, positive, negative)
        assert (cosine(found, direction) > 0.4).all(), seed
        torch.testing.assert_close(vectors(estimator, negative, positive), -found, rtol=1e-3, atol=1e-4)


@named
def test_order_scale_and_basis_of_the_stream_make_no_difference(estimator: Any) -> None:
    positive, negative, _ = planted(pairs=40)
    found = vectors(estimator, positive, negative)
    close: Callable[..., None] = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)  # noqa: E731
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    close(vectors(estimator, positive[order], negative[order]), found)
    close(vectors(estimator, 100 * positive, 100 * negative) / 100, found)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0]
    close(vectors(estimator, positive @ turn, negative @ turn), found @ turn)
    far = torch.full((WIDTH,), 30.0)  # where the stream lies as a whole is no news
    close(vectors(estimator, positive + far, negative + far), found)


@named
def test_all_layers_at_once_are_each_layer_alone(estimator: Any) -> None:
    positive, negative, _ = planted(pairs=40)
    alone = [estimator.fit(positive[:, k], negative[:, k]).vector for k in range(LAYERS)]
    torch.testing.assert_close(vectors(estimator, positive, negative), torch.stack(alone))


@pytest.mark.parametrize("estimator", UNPAIRED, ids=repr)
def test_unpaired_estimators_take_classes_of_different_sizes(estimator: Any) -> None:
    positive, _, direction = planted()
    found = vectors(estimator, positive[:150], planted()[1][40:])
    assert (cosine(found, direction) > 0.65).all()
    with pytest.raises(FitError, match=r"got \[150, 3, 64\] positive and \[160, 3, 64\] negative"):
        PCA().fit_layers(positive[:150], positive[40:])


@pytest.mark.parametrize("pairs", [25, 400])  # wider than their pairs, and the other way round
def test_what_uses_the_covariance_is_not_confounded(pairs: int) -> None:
    positive, negative, _ = confounded(pairs=pairs)
    unseen = confounded(pairs=1000)  # the same direction, other noise
    assert torch.equal(unseen[2], confounded(pairs=pairs)[2])
    of = {type(e): auc(vectors(e, positive, negative), *unseen[:2]) for e in DIRECTIONS}
    for better in (WhitenedMeanDifference, LogisticProbe, MassMean):
        assert (of[better] > of[MeanDifference] + 0.05).all(), of


def test_what_both_classes_share_may_be_large() -> None:
    shared = 10_000 + torch.randn(999, 4, generator=torch.Generator().manual_seed(0))
    found = MeanDifference(paired=False).fit(shared + 0.25, shared).vector
    torch.testing.assert_close(found, torch.full((4,), 0.25), rtol=0, atol=1e-4)


def test_principal_components_of_differences_see_what_varies_and_those_of_classes_what_is_there() -> None:
    positive, negative, direction = planted(0.5, varying=False)
    assert cosine(vectors(PCA(), positive, negative), direction).max() < 0.6  # as repeng's: the mean is taken off
    assert (cosine(vectors(PCA(of="classes"), positive, negative), direction) > 0.95).all()


@pytest.mark.parametrize("pairs", [30, 200])
def test_pca_is_that_of_scikit_learn(pairs: int) -> None:
    from sklearn.decomposition import PCA as Reference

    positive, negative, _ = planted(pairs=pairs)
    found = {of: vectors(PCA(of=of), positive, negative) for of in ("differences", "classes")}
    for layer in range(LAYERS):
        p, n = positive[:, layer].numpy(), negative[:, layer].numpy()
        rows = {"differences": p - n, "classes": np.concatenate([p - (p + n) / 2, n - (p + n) / 2])}
        for of, train in rows.items():
            axis = Reference(n_components=1, svd_solver="full").fit(train).components_[0]
            axis *= np.sign((p @ axis > n @ axis).mean() - 0.5)  # as repeng orients it
            assert cosine(found[of][layer], torch.as_tensor(axis)) > 0.99999


@pytest.mark.parametrize("pairs", [30, 200])
def test_the_covariance_is_that_of_ledoit_and_wolf(pairs: int) -> None:
    from sklearn.covariance import ledoit_wolf

    positive, negative, _ = confounded(pairs=pairs)
    for layer in range(LAYERS):
        p, n = positive[:, layer].double(), negative[:, layer].double()
        rows = torch.cat([p - p.mean(0), n - n.mean(0)])
        expected, _ = ledoit_wolf(rows.numpy(), assume_centered=True)
        variances, axes, floor = _shrunk_covariance(rows)
        dense = floor * torch.eye(WIDTH) + axes.T @ torch.diag(variances - floor) @ axes
        torch.testing.assert_close(dense, torch.as_tensor(expected), rtol=1e-7, atol=1e-7)

        gap = (p - n).mean(0)
        values, basis = np.linalg.eigh(expected)
        for estimator, power in ((MassMean(), -1.0), (WhitenedMeanDifference(), -0.5)):
            reference = torch.as_tensor(basis @ (values**power * (basis.T @ gap.numpy())))
            assert cosine(estimator.fit(p, n).vector.double(), reference) > 1 - 1e-6


def test_mass_mean_is_linear_discriminant_analysis() -> None:
    from sklearn.covariance import ledoit_wolf_shrinkage
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    positive, negative, _ = confounded()
    p, n = positive[:, 0].double(), negative[:, 0].double()
    rows = torch.cat([p - p.mean(0), n - n.mean(0)]).numpy()
    shrinkage = ledoit_wolf_shrinkage(rows, assume_centered=True)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    reference.fit(torch.cat([p, n]).numpy(), np.repeat([1, 0], PAIRS))
    assert cosine(MassMean().fit(p, n).vector, torch.as_tensor(reference.coef_[0]).float()) > 1 - 1e-6


def test_the_probe_is_the_logistic_regression_of_all_entries_and_turns_into_the_mean_difference() -> None:
    from sklearn.linear_model import LogisticRegression

    positive, negative, _ = confounded(pairs=20)
    p, n = positive[:, 0], negative[:, 0]
    rows = torch.cat([p, n]) - torch.cat([p, n]).mean(0)
    rows = rows / rows.square().mean().sqrt()
    reference = LogisticRegression(C=1 / (40 * 0.03), tol=1e-8, max_iter=10_000)
    reference.fit(rows.numpy(), np.repeat([1, 0], 20))
    found = LogisticProbe(l2=0.03).fit(p, n).vector
    assert cosine(found, torch.as_tensor(reference.coef_[0]).float()) > 0.9999
    assert cosine(LogisticProbe(l2=1e5).fit(p, n).vector, (p - n).mean(0)) > 0.9999
    assert cosine(found, (p - n).mean(0)) < 0.9


@pytest.mark.parametrize("estimator", CONTROLS, ids=repr)
def test_controls_recover_nothing(estimator: Any) -> None:
    positive, negative, direction = planted()
    found = torch.stack(
        [vectors(type(estimator)(**{**vars(estimator), "seed": s}), positive, negative) for s in range(8)]
    )
    cosines = cosine(found, direction)
    if "PCA" not in repr(estimator):  # an axis is the same whatever the signs; its sign is what labels give
        assert cosines.mean().abs() < 0.25
    assert (cosines > 0).any() and (cosines < 0).any()
    assert torch.equal(found[0], vectors(estimator, positive, negative))
    assert not torch.equal(found[0], found[1])


def test_shuffled_labels_swap_within_pairs_as_the_loop_does_and_permute_what_is_not_paired() -> None:
    positive, negative, _ = planted()
    expected = shuffled_mean_differences(positive, negative, count=1, seed=5)[0]
    torch.testing.assert_close(vectors(ShuffledLabels(seed=5), positive, negative), expected)
    unpaired = ShuffledLabels(MeanDifference(paired=False), seed=5)
    assert not torch.allclose(vectors(unpaired, positive, negative), expected)
    assert vectors(unpaired, positive[:150], negative).shape == (LAYERS, WIDTH)


def test_a_random_direction_is_as_long_as_the_mean_difference() -> None:
    positive, negative, _ = planted()
    found = vectors(RandomDirection(), positive, negative)
    torch.testing.assert_close(found.norm(dim=-1), mean_difference(positive, negative).norm(dim=-1))
    assert cosine(found[0], found[1]).abs() < 0.5


def test_every_name_leads_to_the_estimator_that_has_it() -> None:
    for name, make in ESTIMATORS.items():
        estimator = make()
        assert estimator.name == name and estimator.reads in ("mean", "tokens")
        assert isinstance(estimator, Estimator)


def test_gradients_stay_with_the_caller() -> None:
    positive, negative, _ = planted(pairs=10)
    fitted = MassMean().fit(positive[:, 0].requires_grad_(), negative[:, 0])
    assert not fitted.vector.requires_grad


def bad(layer: int, value: float) -> Tensor:
    rows = planted(pairs=10)[0]
    rows[3, layer, 5] = value
    return rows


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3), r"must have shape \[pair, layer, d_model\], got \[4, 3\]"),
        (torch.zeros(4, 3, 0), torch.zeros(4, 3, 0), r"must have shape .* got \[4, 3, 0\]"),
        (torch.zeros(4, 3, 2), torch.zeros(4, 2, 2), "same layers and d_model"),
        (torch.zeros(4, 3, 2), torch.zeros(5, 3, 2), "one negative for each positive"),
        (torch.ones(1, 3, 2), torch.zeros(1, 3, 2), "two pairs or more"),
        (torch.ones(4, 3, 2).long(), torch.zeros(4, 3, 2), "tensor of floats, got torch.int64"),
        ([[[1.0]]], torch.zeros(4, 3, 2), "tensor of floats, got list"),
        (bad(1, math.nan), torch.zeros(10, LAYERS, WIDTH), "positive .* leave out layer 1 of the 3 given"),
        (torch.zeros(10, LAYERS, WIDTH), bad(2, math.inf), "negative .* leave out layer 2 of the 3 given"),
        (torch.ones(4, 7, 2), torch.ones(4, 7, 2), "same mean.* leave out layers 0, 1, 2, 3, 4, ... of the 7 given"),
    ],
)
def test_what_cannot_be_fitted_is_named(unchecked: None, positive: Any, negative: Any, message: str) -> None:
    for fit in (MeanDifference().fit_layers, ShuffledLabels().fit_layers):
        with pytest.raises(FitError, match=message):
            fit(positive, negative)
    with pytest.raises(FitError, match=message):
        fit_quality(MeanDifference(), positive, negative)


def test_one_site_has_no_layer_to_name(unchecked: None) -> None:
    with pytest.raises(FitError, match="leave out the site given"):
        MeanDifference().fit(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(FitError, match=r"shape \[pair, d_model\], got \[3, 2, 2\]"):
        MassMean().fit(torch.ones(3, 2, 2), torch.ones(3, 2, 2))


def test_directions_that_say_nothing_are_refused() -> None:
    positive = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FitError, match="differ by the same vector.* layers 0, 1 of the 2 given"):
        PCA().fit_layers(positive, positive - torch.ones(8))
    across = torch.zeros(4, 1, 3)  # varies along the first axis, but its mean lies along the second
    across[:, 0, 0] = torch.tensor([-5.0, -5.0, 5.0, 5.0])
    across[:, 0, 1] = torch.tensor([0.9, 1.1, 0.9, 1.1])
    with pytest.raises(FitError, match="pca found no direction that separates the class means at layer 0"):
        PCA().fit_layers(across, torch.zeros(4, 1, 3))


def test_classes_without_a_spread_have_the_mean_difference() -> None:
    for estimator in (MassMean(), WhitenedMeanDifference(), LogisticProbe()):
        found = estimator.fit(torch.ones(3, 4), torch.zeros(3, 4)).vector
        torch.testing.assert_close(found, torch.ones(4))


def test_options_are_checked(unchecked: None) -> None:
    with pytest.raises(ConfigError, match="of must be one of differences, classes; got 'both'"):
        PCA(of="both")
    for l2 in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="l2 must be a positive number"):
            LogisticProbe(l2=l2)
    with pytest.raises(FitError, match="folds must be an integer of at least 2, got 1"):
        fit_quality(MeanDifference(), *planted(pairs=10)[:2], folds=1)


@dataclass(frozen=True)
class FirstAxis:
    """A user's estimator: ``fit`` and no more, a transform that has a direction but no length, and one without."""

    name: str = "first_axis"
    reads: str = "mean"
    blind: bool = False

    def fit(self, positive: Tensor, negative: Tensor) -> Any:
        return Blind() if self.blind else Ablation(torch.eye(positive.shape[1])[0])


class Blind:
    kind = "blind"

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def delta(self, stream: Tensor, tensors: Any, strength: Any) -> Tensor:
        return 0 * stream


def test_an_estimator_needs_only_fit() -> None:
    positive, negative, _ = planted(pairs=10)
    fitted = fit_layers(FirstAxis(), positive, negative)
    assert len(fitted) == LAYERS and all(isinstance(t, Ablation) for t in fitted)
    assert all(map(math.isnan, fit_quality(FirstAxis(), positive, negative).length))
    assert isinstance(FirstAxis(), Estimator)
    assert len(fit_layers(ShuffledLabels(FirstAxis()), positive, negative)) == LAYERS
    assert ShuffledLabels(FirstAxis()).paired  # until an estimator says otherwise
    with pytest.raises(FitError, match="kind 'blind' has no direction"):
        fit_quality(FirstAxis(blind=True), positive, negative)


def projected(up: list[float], down: list[float]) -> tuple[Tensor, Tensor]:
    """Activations whose first entries are these, and whose others only keep the means apart."""
    rows = torch.zeros(2, len(up), 1, 2)
    rows[0, :, 0, 0], rows[1, :, 0, 0], rows[0, :, 0, 1] = torch.tensor(up), torch.tensor(down), 1.0
    return rows[0], rows[1]


def test_accuracy_is_within_a_pair_and_auc_between_pairs() -> None:
    level = [100.0 * k for k in range(40)]  # each pair at its own level
    quality = fit_quality(FirstAxis(), *projected([x + 1 for x in level], level))
    assert quality.accuracy[0].estimate == 1.0
    assert quality.auc[0].estimate == 0.5
    assert quality.effect_size[0] < 0.01
    ties = fit_quality(FirstAxis(), *projected([1.0, 2.0] * 10, [1.0, 2.0] * 10))
    assert ties.accuracy[0].estimate == ties.auc[0].estimate == 0.5
    apart = fit_quality(FirstAxis(), *projected([1.0, 3.0] * 20, [-1.0, -3.0] * 20), folds=2)
    assert apart.auc[0].estimate == apart.accuracy[0].estimate == 1.0
    assert apart.auc[0].low == pytest.approx(40 / (40 + 1.96**2)) and apart.auc[0].high == 1.0  # Wilson's, not a point
    assert apart.effect_size[0] == pytest.approx(4.0, rel=0.1)
    assert fit_quality(FirstAxis(), *projected([-1.0, -3.0] * 20, [1.0, 3.0] * 20)).auc[0].estimate == 0.0


def test_an_interval_is_as_wide_as_estimates_scatter() -> None:
    samples = torch.zeros(60, 150, 2)  # samples stand where layers do; a negative is its positive reversed
    samples[:, :, 0] = torch.randn(60, 150, generator=torch.Generator().manual_seed(0))
    quality = fit_quality(FirstAxis(), samples, -samples)
    for intervals in (quality.accuracy, quality.auc):
        width = np.mean([i.high - i.low for i in intervals])
        assert width == pytest.approx(3.92 * np.std([i.estimate for i in intervals]), rel=0.15)


def test_quality_is_of_pairs_that_were_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(40, 5, 300, generator=generator) for _ in range(2))
    assert (auc(vectors(MassMean(), positive, negative), positive, negative) > 0.99).all()
    quality = fit_quality(MassMean(), positive, negative)
    assert all(0.25 < a.estimate < 0.75 for a in (*quality.auc, *quality.accuracy))
    assert max(map(abs, quality.split_half)) < 0.4 and max(map(abs, quality.effect_size)) < 0.8


def test_quality_tells_what_is_planted_from_the_controls() -> None:
    positive, negative, _ = planted()
    strong = fit_quality(MeanDifference(), positive, negative)
    assert all(a.low > 0.85 for a in strong.accuracy) and min(strong.split_half) > 0.85
    assert torch.allclose(torch.tensor(strong.length), mean_difference(positive, negative).norm(dim=-1))
    for control in (RandomDirection, lambda seed: ShuffledLabels(seed=seed)):
        found = [fit_quality(control(seed=seed), positive, negative) for seed in range(12)]
        centre = np.mean([a.estimate for quality in found for a in quality.auc])
        assert 0.35 < centre < 0.65, centre
        assert max(a.low for quality in found for a in quality.accuracy) < min(a.low for a in strong.accuracy)
    assert min(fit_quality(RandomDirection(), positive, negative).split_half) > 0.999  # the same each time: no merit


def test_intervals_hold_chance_where_there_is_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(40, 100, 8, generator=generator) for _ in range(2))
    for estimator in (RandomDirection(), MeanDifference()):
        quality = fit_quality(estimator, positive, negative)
        for intervals in (quality.auc, quality.accuracy):
            assert np.mean([i.low <= 0.5 <= i.high for i in intervals]) > 0.75
            assert abs(np.mean([i.estimate for i in intervals]) - 0.5) < 0.03


@pytest.mark.parametrize("signal", [0.7, 1.2])
def test_the_intervals_cover_the_truth(signal: float) -> None:
    samples, pairs, width = 150, 30, 8  # samples stand where layers do
    generator = torch.Generator().manual_seed(3)
    shared, up, down = (torch.randn(pairs, samples, width, generator=generator) for _ in range(3))
    axis = signal * torch.eye(width)[0]
    positive, negative = shared + up + axis, shared + down - axis
    quality = fit_quality(MeanDifference(), positive, negative)
    part = cosine(mean_difference(positive, negative), axis).double()  # the folds' own differ little from it
    normal = torch.distributions.Normal(0, 1)
    for intervals, distance in ((quality.accuracy, math.sqrt(2)), (quality.auc, 1.0)):
        truth = normal.cdf(distance * signal * part)
        assert np.mean([i.low <= t <= i.high for i, t in zip(intervals, truth.tolist(), strict=True)]) > 0.9
        assert abs(np.mean([i.estimate for i in intervals]) - truth.mean()) < 0.03
        assert np.mean([i.high - i.low for i in intervals]) < 0.3
    assert abs(np.mean(quality.effect_size) - (math.sqrt(2) * signal * part).mean()) < 0.15


def test_quality_is_the_same_for_the_same_seed_and_leaves_its_input_alone() -> None:
    positive, negative, _ = planted(pairs=30)
    before = positive.clone(), negative.clone()
    quality = fit_quality(MassMean(), positive, negative, seed=4)
    assert quality == fit_quality(MassMean(), positive, negative, seed=4)
    assert quality != fit_quality(MassMean(), positive, negative, seed=5)
    assert torch.equal(positive, before[0]) and torch.equal(negative, before[1])


def test_the_best_layer_is_the_one_with_the_signal() -> None:
    positive, negative, direction = planted(varying=False)
    positive[:, 0] -= 0.9 * direction[0]
    positive[:, 2] -= 0.4 * direction[2]
    quality = fit_quality(MeanDifference(), positive, negative)
    assert quality.best(2) == (1, 2) and quality.best() == (1,) and quality.best(9) == (1, 2, 0)
    table = quality.table()
    assert table.index.name == "layer" and list(table.index) == [0, 1, 2]
    assert table.loc[1, "accuracy_low"] == quality.accuracy[1].low
    assert list(table.columns[-3:]) == ["effect_size", "split_half", "length"]
    lines = repr(quality).splitlines()
    assert lines[0].startswith("FitQuality of mean_difference: 200 pairs")
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "0"]
    assert str(quality.auc[1]) in lines[2] and str(quality.auc[1]) in quality._repr_html_()


def test_many_layers_are_cut_to_the_best() -> None:
    positive, negative, _ = planted(pairs=10)
    text = repr(fit_quality(MeanDifference(), positive.repeat(1, 4, 1), negative.repeat(1, 4, 1)))
    assert text.endswith("4 more layers: see .table()") and len(text.splitlines()) == 11


def test_few_pairs_are_fitted_but_not_judged() -> None:
    positive, negative, _ = planted(pairs=3)
    quality = fit_quality(MeanDifference(), positive, negative)
    assert math.isnan(quality.accuracy[0].estimate) and math.isnan(quality.split_half[0]) and quality.length[0] > 0
    assert "3 pairs are too few" in repr(quality) and quality._repr_html_()
    assert quality.table().shape[0] == LAYERS
    with pytest.raises(FitError, match="name one, or give 4 pairs or more"):
        quality.best()
    assert not math.isnan(fit_quality(MeanDifference(), *planted(pairs=4)[:2]).auc[0].estimate)
