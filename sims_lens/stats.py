"""Intervals. The unit of resampling is the prompt: responses to one prompt are not independent of each other."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    >>> str(Interval(0.84, 0.781, 0.9))
    '0.840 [0.781, 0.900]'
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> list[float]:
        """``[estimate, low, high]``."""
        return [self.estimate, self.low, self.high]

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The interval of a monotone rising function of the quantity."""
        return Interval(function(self.estimate), function(self.low), function(self.high))


def bootstrap_mean(values: Float[np.ndarray, " prompt"], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean over prompts with its percentile bootstrap interval, prompts resampled with replacement.

    Given one value per prompt (the mean over its responses), this is the prompt-clustered bootstrap. It covers the
    choice of held-out prompts and their sampling; it does not cover the randomness of the fit: for that, look at
    the shuffled-label controls.

    Reference: Efron & Tibshirani 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    values = np.asarray(values, dtype=np.float64)
    drawn = values[rng.integers(0, len(values), size=(draws, len(values)))].mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def win_probability(ours: Float[np.ndarray, " draw"], theirs: Float[np.ndarray, " other_draw"]) -> float:
    """P(a draw of ours scores higher than one of theirs), ties half, over all pairs of draws.

    >>> win_probability(np.array([1.0, 2.0]), np.array([1.0]))
    0.75
    """
    difference = np.asarray(ours)[:, None] - np.asarray(theirs)[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def distinct_ratio(ngrams: Sequence[Sequence[Sequence[Hashable]]]) -> Interval:
    """Distinct n-grams over all n-grams of a corpus, with a delete-one-prompt jackknife interval.

    The ratio is one of the whole corpus, so that a model that says the same to everyone is seen; a bootstrap would
    be biased by the prompts that it draws twice, the jackknife draws none twice.

    Reference: Li et al. 2016, "A Diversity-Promoting Objective Function" (distinct-n).

    Args:
        ngrams: for each prompt, for each response, its n-grams.
    """
    per_prompt = [[gram for response in prompt for gram in response] for prompt in ngrams]
    counts: dict[Hashable, int] = {}
    for prompt in per_prompt:
        for gram in prompt:
            counts[gram] = counts.get(gram, 0) + 1
    total = sum(counts.values())
    if total == 0:
        return Interval(0.0, 0.0, 0.0)
    ratio = len(counts) / total
    left_out = []
    for prompt in per_prompt:
        own: dict[Hashable, int] = {}
        for gram in prompt:
            own[gram] = own.get(gram, 0) + 1
        gone = sum(1 for gram, count in own.items() if counts[gram] == count)
        left_out.append((len(counts) - gone) / max(1, total - len(prompt)))
    n = len(per_prompt)
    error = float(np.sqrt((n - 1) / n * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)))
    return Interval(ratio, ratio - 1.96 * error, ratio + 1.96 * error)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: of those below 0.05, any one is false in at most 5% of families.

    Reference: Holm 1979, "A simple sequentially rejective multiple test procedure".

    >>> holm([0.01, 0.04])
    [0.02, 0.04]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def interval_from(data: Any) -> Interval:
    """The inverse of :meth:`Interval.to_json`."""
    estimate, low, high = data
    return Interval(float(estimate), float(low), float(high))
