"""Estimators: from the activations of contrast pairs to a transform per layer. No model in sight.

Any object with a ``name``, what it ``reads``, and ``fit(positive, negative) -> Transform`` is one. Those that find a
direction return an :class:`~sims_lens.transforms.Addition` of the mean difference's part along it, so that they
differ in direction only, and in how much of the mean difference it carries. The sign comes from the data.
"""

from collections.abc import Callable

from sims_lens.estimators.base import DirectionEstimator, Estimator, fit_layers, unit
from sims_lens.estimators.controls import RandomDirection, ShuffledLabels, shuffled_mean_differences
from sims_lens.estimators.directions import (
    PCA,
    LogisticProbe,
    MassMean,
    MeanDifference,
    WhitenedMeanDifference,
    mean_difference,
)
from sims_lens.estimators.hpr import HouseholderRotation
from sims_lens.estimators.quality import FitQuality, fit_quality, split_half_cosine

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "mean_difference": MeanDifference,
    "pca": PCA,
    "pca_classes": lambda: PCA(of="classes"),
    "logistic_probe": LogisticProbe,
    "mass_mean": MassMean,
    "whitened_mean_difference": WhitenedMeanDifference,
    "hpr": HouseholderRotation,
    "random_direction": RandomDirection,
    "shuffled_mean_difference": ShuffledLabels,
}
"""By the name that each gives itself: what a command line offers."""

__all__ = [
    "ESTIMATORS",
    "PCA",
    "DirectionEstimator",
    "Estimator",
    "FitQuality",
    "HouseholderRotation",
    "LogisticProbe",
    "MassMean",
    "MeanDifference",
    "RandomDirection",
    "ShuffledLabels",
    "WhitenedMeanDifference",
    "fit_layers",
    "fit_quality",
    "mean_difference",
    "shuffled_mean_differences",
    "split_half_cosine",
    "unit",
]
