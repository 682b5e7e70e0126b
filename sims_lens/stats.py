"""Intervals. The unit of resampling is the prompt: responses to one prompt are not independent of each other."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from sims_lens.checks import check_integer, check_seed, shown
from sims_lens.errors import ConfigError

CONFIDENCE = 0.95
DRAWS = 2000
FLIPS = 9999
"""Random sign flips of a paired test."""

POWER = 0.8
"""Share of data sets in which a change that counts as detectable is told from none."""

_Z_CONFIDENCE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_Z_POWER = NormalDist().inv_cdf(POWER)


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

    @property
    def detectable(self) -> float:
        """The smallest true change that so many prompts would tell from none in 80% of data sets.

        The standard error is read off the interval's width: (1.96 + 0.84) standard errors.
        """
        error = (self.high - self.low) / (2 * _Z_CONFIDENCE)
        return (_Z_CONFIDENCE + _Z_POWER) * error

    def to_json(self) -> list[float | None]:
        """``[estimate, low, high]``; JSON has no numbers that are not finite, so those are null."""
        return [value if math.isfinite(value) else None for value in (self.estimate, self.low, self.high)]

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The interval of a monotone rising function of the quantity."""
        return Interval(function(self.estimate), function(self.low), function(self.high))


def bootstrap_mean(values: Float[np.ndarray, " prompt"], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean over prompts with its bootstrap interval (:func:`bca`), prompts resampled with replacement.

    Given one value per prompt (the mean over its responses), this is the prompt-clustered bootstrap; of differences
    between two plans on the same prompts, the paired one. It covers the choice of held-out prompts and their sampling;
    it does not cover the randomness of the fit: for that, see :func:`null_band`.
    """
    rng = np.random.default_rng(check_seed(seed))
    check_integer("draws", draws)
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"values must be an array of numbers, one per prompt, got {shown(values)}") from None
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ConfigError(
            f"values must be finite numbers, one per prompt and at least one, got {shown(values.tolist())}"
        )
    drawn = values[rng.integers(0, len(values), size=(draws, len(values)))].mean(axis=1)
    return bca(float(values.mean()), drawn, values - values.mean())


def bca(estimate: float, drawn: Float[np.ndarray, " draw"], influence: Float[np.ndarray, " prompt"]) -> Interval:
    """A bootstrap interval that is corrected for bias and skewness (BCa), and for few prompts.

    Args:
        estimate: of the quantity.
        drawn: the same of each bootstrap sample; what is not finite is left out.
        influence: of each prompt on the estimate, up to a factor; for a mean the value less the mean.

    With few prompts a bootstrap's intervals are too short, as normal ones are where Student's are right. So the normal
    quantile is replaced by sqrt(n / (n - 1)) of Student's. Of 1,000 synthetic data sets 93 to 97% are covered
    (``benchmarks/coverage.py``, ``docs/statistics.md``), save of very heavy tails.

    Reference: Efron & Tibshirani 1993, chapter 14; for few prompts Hesterberg 2015, "What Teachers Should Know About
        the Bootstrap", section 5.2.
    """
    from scipy.special import ndtr, ndtri, stdtrit

    drawn, n = np.asarray(drawn)[np.isfinite(drawn)], len(influence)
    if n < 2 or not len(drawn) or not np.ptp(drawn) > 1e-12 * max(1.0, abs(estimate)):
        return Interval(estimate, estimate, estimate)
    centred = np.asarray(influence, dtype=np.float64) - np.mean(influence)
    acceleration = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5) if centred.any() else 0.0
    slack = 1e-12 * max(1.0, abs(estimate))
    below = (drawn < estimate - slack).mean() + 0.5 * (np.abs(drawn - estimate) <= slack).mean()
    bias = ndtri(np.clip(below, 1 / (len(drawn) + 1), len(drawn) / (len(drawn) + 1)))
    reach = np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + CONFIDENCE) / 2)
    shifted = bias + np.array([-reach, reach])
    room = 1 - acceleration * shifted  # where it is used up, the correction has no end: take the extreme
    level = np.where(room > 0, ndtr(bias + shifted / np.where(room > 0, room, 1.0)), [0.0, 1.0])
    low, high = np.percentile(drawn, 100 * level)
    return Interval(estimate, float(low), float(high))


def null_band(effects: Sequence[float]) -> Interval | None:
    """Where the effect of one more control would lie with 95% probability, from those of some; None of fewer than two.

    The controls are plans of the same norm, fitted to shuffled labels: they differ from each other by the fit's own
    randomness as well as by that of the prompts, and a plan that has learnt nothing is one more of them. So an effect
    beyond this band is evidence that something was learnt; one beyond the largest of five controls is not: it happens
    once in six runs by chance.

    Reference: the prediction interval of one more draw from a normal distribution, mean ± t(k - 1) s sqrt(1 + 1 / k).

    >>> null_band([1.0]) is None
    True
    """
    from scipy.special import stdtrit

    k = len(effects)
    if k < 2:
        return None
    mean, spread = float(np.mean(effects)), float(np.std(effects, ddof=1))
    reach = float(stdtrit(k - 1, (1 + CONFIDENCE) / 2)) * spread * math.sqrt(1 + 1 / k)
    return Interval(mean, mean - reach, mean + reach)


def sign_flip_p(values: Float[np.ndarray, " prompt"], *, seed: int = 0) -> float:
    """Two-sided p of a mean of zero, by random sign flips of the values (each is as likely to be as its negative).

    >>> sign_flip_p(np.zeros(5))
    1.0
    """
    rng = np.random.default_rng(seed)
    flipped = rng.choice([-1.0, 1.0], size=(FLIPS, len(values))) @ values
    as_large = np.abs(flipped) >= abs(values.sum()) * (1 - 1e-12)
    return float((1 + as_large.sum()) / (FLIPS + 1))


def length_controlled_win_rate(
    wins: Float[np.ndarray, " pair"],
    lengths: Float[np.ndarray, " pair"],
    prompts: Sequence[int],
    *,
    seed: int = 0,
    draws: int = 500,
) -> Interval:
    """The win rate that is expected between responses of equal length.

    A logistic regression of wins on the difference of lengths, read off where that is zero; prompts are resampled.

    Args:
        wins: 1 where ours won a comparison, 0 where it lost, 0.5 for a tie.
        lengths: of ours less that of theirs, in tokens.
        prompts: of each comparison, which prompt it is on.
        seed: of the bootstrap.
        draws: bootstrap samples.

    Reference: Dubois et al. 2024, "Length-Controlled AlpacaEval": the same model without the terms for the difficulty
        of instructions, and with tanh of the length difference in its standard deviations. A weak ridge (half a
        comparison) keeps the weights finite where every comparison is won.
    """
    wins, lengths = np.asarray(wins, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    spread = lengths.std()
    longer = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    names, of = np.unique(prompts, return_inverse=True)
    n = len(names)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    leave_one_out = 1.0 - np.eye(n)
    weights = np.concatenate([np.ones((1, n)), counts, leave_one_out])[:, of]
    rates = _logistic_at_zero(wins, longer, weights)
    whole, left_out = float(rates[0]), rates[1 + draws :]
    return bca(whole, rates[1 : 1 + draws], left_out.mean() - left_out)


def _logistic_at_zero(
    wins: Float[np.ndarray, " pair"], x: Float[np.ndarray, " pair"], weights: Float[np.ndarray, "fit pair"]
) -> Float[np.ndarray, " fit"]:
    """The fitted probabilities at x = 0 of logistic regressions on the same pairs with different weights (Newton)."""
    ridge, level, slope = 0.5, np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(30):
        p = 1 / (1 + np.exp(-(level[:, None] + slope[:, None] * x)))
        residual, curve = weights * (wins - p), weights * p * (1 - p)
        to_level, to_slope = residual.sum(1) - ridge * level, (residual * x).sum(1) - ridge * slope
        a, b, c = curve.sum(1) + ridge, (curve * x).sum(1), (curve * x * x).sum(1) + ridge
        determinant = a * c - b * b
        moved = np.stack([(c * to_level - b * to_slope) / determinant, (a * to_slope - b * to_level) / determinant])
        moved = np.clip(moved, -2.0, 2.0)
        level, slope = level + moved[0], slope + moved[1]
        if np.abs(moved).max() < 1e-9:
            break
    return np.asarray(1 / (1 + np.exp(-level)))


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
    """The inverse of :meth:`Interval.to_json`: null is not a number, or beside an estimate an end that is nowhere.

    >>> interval_from([1.0, None, None]), interval_from([None, None, None])
    (Interval(estimate=1.0, low=-inf, high=inf), Interval(estimate=nan, low=nan, high=nan))
    """
    estimate, low, high = data
    ends = (math.nan, math.nan) if estimate is None else (-math.inf, math.inf)
    given = zip((estimate, low, high), (math.nan, *ends), strict=True)
    return Interval(*(other if value is None else float(value) for value, other in given))


@dataclass(frozen=True)
class Crossed:
    """A mean over prompts and over repetitions of the whole procedure with other seeds, with what each contributes.

    Args:
        interval: of the mean, for other prompts *and* other seeds.
        prompts: for other prompts, with these very seeds.
        seed_sd: standard deviation between seeds that is left once that of the sampling is taken off; None of one seed.
    """

    interval: Interval
    prompts: Interval
    seed_sd: float | None

    def __str__(self) -> str:
        return str(self.interval)


def crossed_mean(
    values: Float[np.ndarray, "seed prompt"], *, low: float = -math.inf, high: float = math.inf, seed: int = 0
) -> Crossed:
    """Mean of what was measured with several seeds on the same prompts.

    Prompts and seeds are crossed random effects: value = mean + prompt + seed + rest. By the mean squares of the
    two-way analysis of variance, with S seeds and P prompts, var(mean) has a part (MS_seed - MS_rest) / (S P), of S - 1
    degrees of freedom, and a part MS_prompt / (S P), of P - 1. The half-width of the interval is the root of the sum of
    squares of both parts' half-widths, Student's t times the root of the part. So with few seeds that differ much it is
    honestly wide. With one seed it is that of :func:`bootstrap_mean`, and covers no fit but this one.

    Args:
        values: finite.
        low: the least that a mean can be, 0 of a rate.
        high: the most that it can be, 1 of a rate.
        seed: of the bootstrap over prompts.

    Reference: Graybill & Wang 1980, "Confidence Intervals on Nonnegative Linear Combinations of Variances", for the sum
        of squares; Searle, Casella & McCulloch 1992, chapter 4, for the components. ``benchmarks/coverage.py`` measures
        its coverage.
    """
    from scipy.special import stdtrit

    values = np.asarray(values, dtype=np.float64)
    seeds, prompts = values.shape
    over_prompts = bootstrap_mean(values.mean(axis=0), seed=seed)
    if seeds < 2 or prompts < 2:
        return Crossed(over_prompts, over_prompts, None)
    mean, by_seed, by_prompt = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_prompt[None, :] + mean
    ms_seed = prompts * ((by_seed - mean) ** 2).sum() / (seeds - 1)
    ms_prompt = seeds * ((by_prompt - mean) ** 2).sum() / (prompts - 1)
    ms_rest = (rest**2).sum() / ((seeds - 1) * (prompts - 1))
    level = (1 + CONFIDENCE) / 2
    between = max(0.0, ms_seed - ms_rest)
    parts = stdtrit(seeds - 1, level) ** 2 * between + stdtrit(prompts - 1, level) ** 2 * max(ms_prompt, ms_rest)
    reach = math.sqrt(float(parts) / values.size)
    interval = Interval(float(mean), max(low, float(mean) - reach), min(high, float(mean) + reach))
    return Crossed(interval, over_prompts, math.sqrt(between / prompts))
