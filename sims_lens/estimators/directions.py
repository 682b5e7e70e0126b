"""Steering vectors from contrast pairs: difference in means, principal component, logistic probe, LDA.

What is fitted is a float32 vector per layer. Spectra are taken of the smaller Gram matrix, pairs x pairs or
d_model x d_model, in float64, so that wide models cost no more than their pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from sims_lens.errors import ConfigError
from sims_lens.estimators.base import DirectionEstimator, along, mean_gap, refuse

_CONSTANT = 1e-10
"""A share of the differences' energy below which their variance is rounding."""

_LEAST_SHRINKAGE = 1e-6
"""Keeps the covariance invertible where Ledoit and Wolf would not shrink it at all."""


def mean_difference(
    positive: Float[Tensor, "pair *site d_model"], negative: Float[Tensor, "pair *site d_model"]
) -> Float[Tensor, "*site d_model"]:
    """Mean of the positive activations less the mean of the negative ones.

    Reference: Marks & Tegmark 2023 (difference in means); Rimsky et al. 2024 (CAA, arXiv 2312.06681).

    >>> mean_difference(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).tolist()
    [2.0, -1.0]
    """
    difference: Tensor = reduce(positive.float() - negative.float(), "pair ... -> ...", "mean")
    return difference


@dataclass(frozen=True)
class MeanDifference(DirectionEstimator):
    """The difference of the class means, at its own length: contrastive activation addition.

    Reference: see :func:`mean_difference`.

    Args:
        paired: False takes classes of different sizes.

    >>> MeanDifference().fit(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.zeros(2, 2)).vector.tolist()
    [3.0, 0.0]
    """

    name = "mean_difference"
    paired: bool = True

    def vectors(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> Float[Tensor, "layer d_model"]:
        """The class means' differences."""
        return mean_difference(positive, negative) if self.paired else mean_gap(positive, negative)


@dataclass(frozen=True)
class PCA(DirectionEstimator):
    """The first principal component of contrast pairs, with the sign and length of the mean difference along it.

    ``of="differences"`` is the direction along which the pairs' differences vary most *around their mean*. It finds a
    concept that the pairs show to different degrees; one that they all show alike is in the mean, which is taken off.
    ``of="classes"`` takes each pair's midpoint off both its activations, which leaves half the difference and its
    negative: the direction along which the differences are largest, mean included.

    Reference: Zou et al. 2023, "Representation engineering" (arXiv 2310.01405); both forms as in repeng
        (``repeng/extract.py``, ``pca_diff``, its default, and ``pca_center``). They differ in length (repeng's is 1)
        and orient the sign by the majority of pairs, we by the class means.

    Args:
        of: ``"differences"`` or ``"classes"``.
    """

    of: str = "differences"
    paired = True

    def __post_init__(self) -> None:
        if self.of not in get_args(_Of):
            raise ConfigError(f"of must be one of {', '.join(get_args(_Of))}; got {self.of!r}")

    @property
    def name(self) -> str:
        """``pca``, or ``pca_classes``."""
        return "pca" if self.of == "differences" else f"pca_{self.of}"

    def vectors(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "pair layer d_model"],
    ) -> Float[Tensor, "layer d_model"]:
        """The mean differences' parts along the first components."""
        rows = positive - negative
        mean = rows.mean(0)
        if self.of == "differences":
            energy = rows.square().sum((0, 2))
            rows = rows - mean
            constant = rows.square().sum((0, 2)) <= _CONSTANT * energy
            refuse(constant, "all pairs differ by the same vector, use PCA(of='classes') or MeanDifference() at")
        return along(_each_layer(lambda layer: _spectrum(layer)[1][-1], rows), mean)


_Of = Literal["differences", "classes"]


@dataclass(frozen=True)
class LogisticProbe(DirectionEstimator):
    """The weight of a logistic regression of the class on the activation, with a bias, which is not kept.

    Activations are centred and scaled by one number per layer, their root mean square entry, so that ``l2`` means the
    same at every layer, and turning the stream's basis turns the probe with it: entries are not standardised one by
    one. The probe minimises ``mean log loss + l2 / 2 * |w|^2``.

    Reference: Alain & Bengio 2016, "Understanding intermediate layers using linear classifier probes"
        (arXiv 1610.01644). As a steering direction: Li et al. 2023 (ITI, arXiv 2306.03341).

    Args:
        l2: weight of the penalty, positive. A large one gives the direction of the mean difference. The default was
            chosen on synthetic data only.
    """

    name = "logistic_probe"
    l2: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.l2 < math.inf:
            raise ConfigError(f"l2 must be a positive number, got {self.l2!r}")

    def vectors(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> Float[Tensor, "layer d_model"]:
        """The mean differences' parts along the probes."""
        return along(_each_layer(self._weight, positive, negative), mean_gap(positive, negative))

    def _weight(self, positive: Tensor, negative: Tensor) -> Tensor:
        from sklearn.linear_model import LogisticRegression

        rows = torch.cat([positive, negative]).double()
        rows = rows - rows.mean(0)
        rows = rows / rows.square().mean().sqrt()
        # The weight lies in the span of the rows, so it is found there: as many numbers as pairs, not as d_model.
        axes = _spectrum(rows)[1]
        label = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
        probe = LogisticRegression(C=1 / (self.l2 * len(rows)), tol=1e-6, max_iter=10_000)
        probe.fit((rows @ axes.T).cpu().numpy(), label.numpy())
        return (torch.as_tensor(probe.coef_[0], device=axes.device) @ axes).float()


@dataclass(frozen=True)
class MassMean(DirectionEstimator):
    """Linear discriminant analysis: the mean difference through the inverse within-class covariance.

    The best linear classifier of two normal classes of one covariance: it avoids directions in which responses differ
    for other reasons. The covariance is that around the class means, shrunk to a multiple of the identity.

    Reference: Marks & Tegmark 2023, "The geometry of truth" (arXiv 2310.06824), mass-mean probe; Ledoit & Wolf 2004,
        "A well-conditioned estimator for large-dimensional covariance matrices".
    """

    name = "mass_mean"

    def vectors(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> Float[Tensor, "layer d_model"]:
        """The mean differences' parts along the discriminants."""
        return _through_covariance(positive, negative, power=-1.0)


@dataclass(frozen=True)
class WhitenedMeanDifference(DirectionEstimator):
    """The mean difference of whitened activations: halfway from the mean difference to :class:`MassMean`.

    The whitening is the symmetric one, by the inverse root of the covariance that :class:`MassMean` inverts; the
    direction is used in the stream as it is, so strong directions of the stream are divided out once, not twice.

    Reference: Kessy, Lewin & Strimmer 2018, "Optimal whitening and decorrelation" (ZCA whitening).
    """

    name = "whitened_mean_difference"

    def vectors(
        self,
        positive: Float[Tensor, "pair layer d_model"],
        negative: Float[Tensor, "other_pair layer d_model"],
    ) -> Float[Tensor, "layer d_model"]:
        """The mean differences' parts along the whitened ones."""
        return _through_covariance(positive, negative, power=-0.5)


def _through_covariance(positive: Tensor, negative: Tensor, *, power: float) -> Float[Tensor, "layer d_model"]:
    """The parts of the mean differences d along ``S^power d``, S the shrunk within-class covariance of a layer."""

    def turned(positive: Tensor, negative: Tensor) -> Tensor:
        rows = torch.cat([positive - positive.mean(0), negative - negative.mean(0)]).double()
        variances, axes, floor = _shrunk_covariance(rows)
        gap = mean_gap(positive, negative).double()
        # S is floor * I but on the few axes; scaled by floor, which a direction does not see, it is I there.
        return (gap + ((variances / floor) ** power - 1) * (axes @ gap) @ axes).float()

    return along(_each_layer(turned, positive, negative), mean_gap(positive, negative))


def _shrunk_covariance(
    rows: Float[Tensor, "row d_model"],
) -> tuple[Float[Tensor, " axis"], Float[Tensor, "axis d_model"], Float[Tensor, ""]]:
    """Ledoit and Wolf's covariance of centred rows: variances on the axes that the rows span, and that on all others.

    Their shrinkage, ``(1 - a) S + a m I`` with m the mean variance and a what minimises the expected squared error, is
    computed from norms and the spectrum alone. (scikit-learn's ``ledoit_wolf(assume_centered=True)``, to rounding.)
    """
    count, d_model = rows.shape
    energies, axes = _spectrum(rows)
    variances = energies / count
    mean = variances.sum() / d_model
    square = variances.square().sum()
    spread = square - d_model * mean.square()
    error = (rows.square().sum(1).square().mean() - square) / count
    shrinkage = (error / spread if float(spread) > float(error) else torch.ones_like(error)).clamp(min=_LEAST_SHRINKAGE)
    floor = shrinkage * mean
    return (1 - shrinkage) * variances + floor, axes, floor


def _spectrum(rows: Float[Tensor, "row d_model"]) -> tuple[Float[Tensor, " axis"], Float[Tensor, "axis d_model"]]:
    """Non-zero eigenvalues of ``rows.T @ rows``, ascending, and their eigenvectors, in float64."""
    rows = rows.double()
    wide = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    values, vectors = values[kept], vectors[:, kept].T
    return values, vectors @ rows / values.sqrt()[:, None] if wide else vectors


def _each_layer(function: Callable[..., Tensor], *classes: Tensor) -> Float[Tensor, "layer d_model"]:
    """``function`` of every layer's rows. Layer by layer, so that float64 copies stay small."""
    return torch.stack([function(*rows).float() for rows in zip(*(c.unbind(1) for c in classes), strict=True)])
