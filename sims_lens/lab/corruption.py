r"""What corrupted contrast pairs do to a mean difference: theory, and the same measured. Pure: no model, no text.

Pair i has a difference x_i = a(best) - a(worst), with mean d and second moment M = E[x xᵀ] = Σ + d dᵀ. With
probability ε it is corrupted, independently of all else, into a difference z_i with mean e. A flip is z = -x.

**The mean difference under flips.** With signs s_i = ±1, P(s_i = -1) = ε, the fit is the mean of s_i x_i over n pairs:

    E[d_ε] = (1 - 2ε) d        Cov[d_ε] = (Σ + 4ε(1 - ε) d dᵀ) / n

because E[s x] = (1 - 2ε) d and E[(s x)(s x)ᵀ] = Σ + d dᵀ whatever ε is. So E|d_ε|² = (1 - 2ε)² |d|² + (tr Σ + 4ε(1 - ε)
|d|²) / n: noise turns the direction by shrinking its signal, while its length falls only to that of noise. In general
E[d_ε] = (1 - ε) d + ε e.

**Break-even.** The pairs are split at random: half B gives a reference direction u = x̄_B / |x̄_B|, from the n_A pairs
of half A a corrupted d_ε is fitted. Two fits on the same pairs would share their sampling error; these don't. The
signal is the expected projection E[u · d_ε]. Under shuffled labels (ε = ½) the projection has mean 0 and variance
E[(u · x)²] / n_A. **The break-even ε* is the rate at which the signal equals the null's upper edge, 1.96 standard
deviations**: there one noisy fit in two still lies beyond what 39 of 40 shuffled fits reach; above ε* most do not.

With T = E[(x̄_B · x)²] = dᵀ M d (1 - 1/n_B) + tr(M²) / n_B for an x that is not in B, the length of x̄_B cancels:

    (1 - ε) |d|² + ε d·e = 1.96 √(T / n_A)      ε* = (|d|² - 1.96 √(T / n_A)) / (|d|² - d·e)

and for flips, where d·e = -|d|², ε* = ½ (1 - 1.96 √(T / n_A) / |d|²). Where the reference is known exactly
(n_B → ∞) and σ² = Var(u · x), this is the familiar ½ (1 - 1.96 √((1 + σ² / |d|²) / n)).

**Bias.** |x̄|² is too long by tr Σ / n on average: in 576 dimensions and of some 50 pairs that is most of it. So every
moment here is a U-statistic: averages of products of *different* pairs, which are unbiased (Hoeffding 1948).

All of it needs inner products of pairs only, [pair, pair], never the width of the model.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int

from sims_lens.checks import check_integer, check_list, check_number, check_seed, shown
from sims_lens.errors import ConfigError, TooFewPairsError
from sims_lens.stats import CONFIDENCE, Interval

Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""Standard deviations to the null's upper edge."""

FEWEST = 8
"""Pairs: below, halves of them say nothing."""

SHUFFLES = 20
"""Shuffled labels of each split."""


@dataclass(frozen=True)
class Moments:
    """What theory needs to know of pairs. Inner products of mean vectors; units of the stream, squared.

    Args:
        signal: |d|².
        length: E|x|² = |d|² + tr Σ.
        across: d · e.
        other: |e|².
        other_length: E|z|².
        along: dᵀ M d.
        spread: tr(M²).
    """

    signal: float
    length: float
    across: float
    other: float
    other_length: float
    along: float
    spread: float

    @classmethod
    def of_population(
        cls, mean: Float[np.ndarray, " d_model"], covariance: Float[np.ndarray, "d_model d_model"]
    ) -> "Moments":
        """Those of flips of pairs whose distribution is known.

        Args:
            mean: d.
            covariance: Σ.
        """
        second = covariance + np.outer(mean, mean)
        signal, length = float(mean @ mean), float(np.trace(second))
        along, spread = float(mean @ second @ mean), float((second * second).sum())
        return cls(signal, length, -signal, signal, length, along, spread)

    def reference(self, n: int) -> float:
        """Expected squared length of the mean of n clean differences, |d|² + tr Σ / n."""
        return self.signal + (self.length - self.signal) / n

    def projected(self, n: int) -> float:
        """T: expected square of the inner product of the mean of n differences with another difference."""
        return self.along * (1 - 1 / n) + self.spread / n

    def projection(self, epsilon: float, *, reference: int) -> float:
        """Expected projection of a corrupted fit on the direction of ``reference`` other pairs."""
        return self._overlap(epsilon) / math.sqrt(max(self.reference(reference), 1e-30))

    def null_edge(self, *, pairs: int, reference: int) -> float:
        """Upper edge of that projection under shuffled labels."""
        return Z * math.sqrt(max(self.projected(reference), 0.0) / pairs / max(self.reference(reference), 1e-30))

    def cosine(self, epsilon: float, *, pairs: int, reference: int) -> float:
        """Expected cosine of a fit to ``pairs`` corrupted pairs with the direction of ``reference`` other pairs (as a
        ratio of expectations)."""
        kept = 1 - epsilon
        mean = kept**2 * self.signal + 2 * kept * epsilon * self.across + epsilon**2 * self.other
        length = mean + (kept * self.length + epsilon * self.other_length - mean) / pairs
        return self.projection(epsilon, reference=reference) / math.sqrt(max(length, 1e-30))

    def break_even(self, *, pairs: int, reference: int | None = None) -> float:
        """ε*, see the top of this module; below 0 where even clean pairs don't tell, above 1 where corruption never
        hides them.

        Args:
            pairs: that are corrupted and fitted, n_A.
            reference: that give the reference direction, n_B; None for the true direction.
        """
        square = self.along if reference is None else self.projected(reference)
        edge, slope = Z * math.sqrt(max(square, 0.0) / pairs), self.signal - self.across
        if slope <= 0:
            return math.inf if self.signal > edge else -math.inf
        return (self.signal - edge) / slope

    def _overlap(self, epsilon: float) -> float:
        return (1 - epsilon) * self.signal + epsilon * self.across


@dataclass(frozen=True, eq=False)
class Curve:
    """How a mean difference changes with the share of corrupted pairs, measured and as theory has it.

    Args:
        epsilons: shares.
        pairs: how many.
        halves: sizes of the half that is fitted and of the one that gives the reference.
        cosine: with the direction of the same pairs, uncorrupted.
        independent: with the direction of the other half, uncorrupted.
        projection: on that direction, in units of the stream.
        expected_cosine, expected_independent, expected_projection: the same in theory.
        null_edge: upper edge of the projection under shuffled labels, measured.
        break_even: ε*, measured; its interval is over pairs.
        expected_break_even: ε* by theory from the pairs' moments, with its own interval.
        gap: theory less measured, paired.
        with_all: ε* by theory where all pairs are fitted and the direction is known.
        moments: of the pairs.
    """

    epsilons: tuple[float, ...]
    pairs: int
    halves: tuple[int, int]
    cosine: tuple[Interval, ...]
    independent: tuple[Interval, ...]
    projection: tuple[Interval, ...]
    expected_cosine: tuple[float, ...]
    expected_independent: tuple[float, ...]
    expected_projection: tuple[float, ...]
    null_edge: float
    break_even: Interval
    expected_break_even: Interval
    gap: Interval
    with_all: float
    moments: Moments

    @property
    def agrees(self) -> bool:
        """Whether theory's break-even lies in the measured one's interval."""
        return self.break_even.low <= self.expected_break_even.estimate <= self.break_even.high


def corruption_curve(
    clean: Float[np.ndarray, "pair d_model"],
    corrupted: Float[np.ndarray, "pair choice d_model"] | None = None,
    *,
    epsilons: tuple[float, ...],
    repeats: int = 400,
    seed: int = 0,
) -> Curve:
    """Corrupt pairs again and again and see what becomes of their mean difference.

    Args:
        clean: difference of each pair, best less worst; pairs of different prompts.
        corrupted: what each may become, one of them at random; None for a flip, its negative.
        epsilons: probabilities that a pair is corrupted.
        repeats: random splits into halves, and random corruptions.
        seed: of both.

    Returns:
        The curve. Intervals are over pairs: estimate ± t(n - 1) times the standard error of a delete-one jackknife,
        with the same splits and corruptions throughout. (A bootstrap would not do: a pair that is drawn twice adds to
        the length of a mean what tr Σ / n adds, once more.)

    Raises:
        TooFewPairsError: fewer than eight pairs.
        ConfigError: fewer than two epsilons, or one that is no probability; they must rise.

    Reference: the theory is at the top of the module; the jackknife is Efron & Tibshirani 1993, chapter 11.
    """
    for what, rows_of, axes in (("clean", clean, 2), ("corrupted", corrupted, 3)):
        if (rows_of is not None or what == "clean") and not (
            isinstance(rows_of, np.ndarray) and rows_of.ndim == axes and rows_of.size
        ):
            shape = list(rows_of.shape) if isinstance(rows_of, np.ndarray) else shown(rows_of)
            raise ConfigError(f"{what} must be a numpy array with {axes} dimensions, got {shape}")
    if corrupted is not None and (corrupted.shape[0], corrupted.shape[2]) != clean.shape:
        raise ConfigError(f"corrupted has shape {list(corrupted.shape)}, clean {list(clean.shape)}; see the docstring")
    check_seed(seed)
    check_integer("repeats", repeats)
    epsilons = tuple(check_number("an epsilon", e) for e in check_list("epsilons", epsilons, "(0.0, 0.5)"))
    n = len(clean)
    if n < FEWEST:
        raise TooFewPairsError(f"{n} contrast pairs are too few to corrupt some of them; give {FEWEST} or more")
    steps = np.array(epsilons, dtype=np.float64)
    if len(steps) < 2 or (np.diff(steps) <= 0).any() or steps[0] < 0 or steps[-1] > 1:
        raise ConfigError(f"epsilons must be two or more rising probabilities such as (0.0, 0.25, 0.5), got {epsilons}")
    rows = clean if corrupted is None else np.concatenate([clean, corrupted.reshape(-1, clean.shape[1])])
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all() or not rows[:n].any(1).all():
        raise ConfigError("differences of pairs must be finite and not zero; leave out pairs whose texts are the same")
    gram = rows @ rows.T
    choices = 0 if corrupted is None else corrupted.shape[1]
    trial = _Trial.drawn(n, choices, repeats, seed)
    whole, moments = _measured(gram, trial, steps, np.ones(n, bool)), _moments(gram, n, choices)
    halves = (n - n // 2, n // 2)
    theory = moments.break_even(pairs=halves[0], reference=halves[1])
    left_out, theory_left_out = [], []
    for i in range(n):
        kept = np.arange(n) != i
        left_out.append(_measured(gram, trial, steps, kept).flat())
        rest = _moments(_without(gram, i, n, choices), n - 1, choices)
        theory_left_out.append(rest.break_even(pairs=halves[0], reference=halves[1]))
    deleted, deleted_theory = np.array(left_out), np.array(theory_left_out)
    intervals = [_jackknife(value, column) for value, column in zip(whole.flat(), deleted.T, strict=True)]
    count = len(steps)
    given = [float(e) for e in steps]
    return Curve(
        epsilons=tuple(given),
        pairs=n,
        halves=halves,
        cosine=tuple(intervals[:count]),
        independent=tuple(intervals[count : 2 * count]),
        projection=tuple(intervals[2 * count : 3 * count]),
        expected_cosine=tuple(_same_pairs(gram, n, choices, e) for e in given),
        expected_independent=tuple(moments.cosine(e, pairs=halves[0], reference=halves[1]) for e in given),
        expected_projection=tuple(moments.projection(e, reference=halves[1]) for e in given),
        null_edge=whole.edge,
        break_even=intervals[-1],
        expected_break_even=_jackknife(theory, deleted_theory),
        gap=_difference(theory, whole.break_even, deleted_theory, deleted[:, -1]),
        with_all=moments.break_even(pairs=n),
        moments=moments,
    )


@dataclass(frozen=True, eq=False)
class _Trial:
    """Everything that is random, drawn once."""

    in_b: Bool[np.ndarray, "repeat pair"]
    luck: Float[np.ndarray, "repeat pair"]
    choice: Int[np.ndarray, "repeat pair"]
    signs: Float[np.ndarray, "shuffle pair"]

    @classmethod
    def drawn(cls, n: int, choices: int, repeats: int, seed: int) -> "_Trial":
        rng = np.random.default_rng(check_seed(seed))
        order = rng.permuted(np.tile(np.arange(n), (repeats, 1)), axis=1)
        return cls(
            in_b=order < n // 2,
            luck=rng.random((repeats, n)),
            choice=rng.integers(0, max(1, choices), (repeats, n)),
            signs=rng.choice([-1.0, 1.0], (SHUFFLES, n)),
        )


@dataclass(frozen=True, eq=False)
class _Found:
    cosine: Float[np.ndarray, " epsilon"]
    independent: Float[np.ndarray, " epsilon"]
    projection: Float[np.ndarray, " epsilon"]
    edge: float
    break_even: float

    def flat(self) -> Float[np.ndarray, " figure"]:
        return np.concatenate([self.cosine, self.independent, self.projection, [self.break_even]])


def _measured(
    gram: Float[np.ndarray, "row row"],
    trial: _Trial,
    epsilons: Float[np.ndarray, " epsilon"],
    kept: Bool[np.ndarray, " pair"],
) -> _Found:
    """Averages over the trial's splits and corruptions, of the pairs that are kept."""
    n = len(kept)
    everyone = np.broadcast_to(kept, trial.in_b.shape).astype(np.float64)
    half_a, half_b = everyone * ~trial.in_b, everyone * trial.in_b
    everyone, half_a, half_b = (w / w.sum(1, keepdims=True) for w in (everyone, half_a, half_b))
    onto_b = half_b @ gram[:n]  # inner products of the reference with every difference
    onto_b /= np.sqrt((onto_b[:, :n] * half_b).sum(1, keepdims=True))
    onto_all = everyone @ gram[:n]
    onto_all /= np.sqrt((onto_all[:, :n] * everyone).sum(1, keepdims=True))
    cosine, independent, projection = [], [], []
    for epsilon in epsilons:
        bad = trial.luck < epsilon
        weights = _weights(half_a, bad, trial.choice, len(gram))
        along = (weights * onto_b).sum(1)
        projection.append(along.mean())
        independent.append((along / _lengths(weights, gram)).mean())
        weights = _weights(everyone, bad, trial.choice, len(gram))
        cosine.append(((weights * onto_all).sum(1) / _lengths(weights, gram)).mean())
    null = (onto_b[:, :n] * half_a) @ trial.signs.T
    edge = Z * float(np.sqrt((null**2).mean()))
    found = np.array(projection)
    return _Found(np.array(cosine), np.array(independent), found, edge, _crossing(epsilons, found, edge))


def _weights(
    clean: Float[np.ndarray, "repeat pair"],
    bad: Bool[np.ndarray, "repeat pair"],
    choice: Int[np.ndarray, "repeat pair"],
    rows: int,
) -> Float[np.ndarray, "repeat row"]:
    """What each row of the Gram matrix counts for in the corrupted mean."""
    repeats, n = clean.shape
    if rows == n:
        return clean * (1 - 2.0 * bad)
    weights = np.zeros((repeats, rows))
    weights[:, :n] = clean * ~bad
    which = n + np.arange(n) * ((rows - n) // n) + choice
    np.put_along_axis(weights, which, clean * bad, axis=1)
    return weights


def _lengths(weights: Float[np.ndarray, "repeat row"], gram: Float[np.ndarray, "row row"]) -> np.ndarray:
    lengths: np.ndarray = np.sqrt(np.maximum(((weights @ gram) * weights).sum(1), 1e-30))
    return lengths


def _crossing(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"], level: float) -> float:
    """Where a falling line through points meets a level; its first and last pieces go on beyond them."""
    piece = next((i for i in range(len(x) - 1) if y[i + 1] <= level), len(x) - 2)
    rise = y[piece + 1] - y[piece]
    if rise >= 0:
        return math.inf if y[0] > level else -math.inf
    return float(x[piece] + (level - y[piece]) * (x[piece + 1] - x[piece]) / rise)


def _moments(gram: Float[np.ndarray, "row row"], n: int, choices: int) -> Moments:
    """Unbiased moments of pairs from their inner products."""
    own = gram[:n, :n]
    off = own - np.diag(np.diag(own))
    signal, length = off.sum() / (n * (n - 1)), np.trace(own) / n
    squares, sums = (off**2).sum(1), off.sum(1)
    along = (sums**2 - squares).sum() / (n * (n - 1) * (n - 2))
    spread = squares.sum() / (n * (n - 1))
    if choices == 0:
        across, other, other_length = -signal, signal, length
    else:
        mean = np.kron(np.eye(n), np.full((1, choices), 1 / choices))  # of each pair's choices
        cross = gram[:n, n:] @ mean.T
        both = mean @ gram[n:, n:] @ mean.T
        across = (cross.sum() - np.trace(cross)) / (n * (n - 1))
        other = (both.sum() - np.trace(both)) / (n * (n - 1))
        other_length = np.diag(gram)[n:].mean()
    return Moments(*(float(v) for v in (signal, length, across, other, other_length, along, spread)))


def _same_pairs(gram: Float[np.ndarray, "row row"], n: int, choices: int, epsilon: float) -> float:
    """Expected cosine with the clean direction of the same pairs, over corruptions of these very pairs (as a ratio of
    expectations)."""
    own = gram[:n, :n]
    if choices == 0:
        cross, both, lengths = -own, own, np.diag(own)
    else:
        mean = np.kron(np.eye(n), np.full((1, choices), 1 / choices))
        cross, both = gram[:n, n:] @ mean.T, mean @ gram[n:, n:] @ mean.T
        lengths = np.diag(gram)[n:].reshape(n, choices).mean(1)
    kept = 1 - epsilon
    expected = kept**2 * own + kept * epsilon * (cross + cross.T) + epsilon**2 * both
    variance = kept * np.diag(own) + epsilon * lengths - np.diag(expected)
    length = expected.sum() / n**2 + variance.sum() / n**2
    clean = own.sum() / n**2
    overlap = (kept * own.sum() + epsilon * cross.sum()) / n**2
    return float(overlap / math.sqrt(max(length * clean, 1e-60)))


def _without(gram: Float[np.ndarray, "row row"], i: int, n: int, choices: int) -> Float[np.ndarray, "rest rest"]:
    gone = [i, *range(n + i * choices, n + (i + 1) * choices)]
    return np.delete(np.delete(gram, gone, 0), gone, 1)


def _difference(
    first: float, second: float, first_left_out: Float[np.ndarray, " pair"], second_left_out: Float[np.ndarray, " pair"]
) -> Interval:
    """The first less the second; unknown where either is infinite."""
    if not all(np.isfinite(v).all() for v in (first, second, first_left_out, second_left_out)):
        return Interval(math.nan, -math.inf, math.inf)
    return _jackknife(first - second, first_left_out - second_left_out)


def _jackknife(estimate: float, left_out: Float[np.ndarray, " pair"]) -> Interval:
    from scipy.special import stdtrit

    n = len(left_out)
    if not (math.isfinite(estimate) and np.isfinite(left_out).all()):
        return Interval(float(estimate), -math.inf, math.inf)
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    reach = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Interval(float(estimate), float(estimate) - reach, float(estimate) + reach)


__all__ = ["FEWEST", "Curve", "Moments", "corruption_curve"]
