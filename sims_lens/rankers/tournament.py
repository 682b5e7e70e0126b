"""Tournaments: who meets whom, and what the verdicts say about each. Pure functions of arrays.

P[i, j] is the probability that i beats j; a pair that was not asked is NaN, and so is the diagonal.
"""

from itertools import combinations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sims_lens.errors import RankerError

PRIOR_PRECISION = 0.001

Matrix = Float[np.ndarray, "k k"] | Float[Tensor, "k k"]


def schedule(k: int, calls: int | None, seed: int) -> list[tuple[int, int]]:
    """Which pairs meet: all of them, or a seeded sparse schedule in which everyone is linked to everyone.

    The sparse schedule is a path through a random order, which makes it connected with the fewest pairs, then pairs
    between those who have met the fewest others. So with k pairs everyone meets two others, and the numbers of meetings
    stay within one or two of each other.

    Args:
        k: how many take part.
        calls: how many pairs, each counted once whichever way round it is asked; None, or more than there are, for
            all k (k - 1) / 2.
        seed: of the sparse schedule.

    Returns:
        Unordered pairs, as (lower, higher), sorted.

    Raises:
        RankerError: fewer pairs than it takes to link everyone, k - 1.

    >>> schedule(3, None, 0)
    [(0, 1), (0, 2), (1, 2)]
    """
    pairs = list(combinations(range(k), 2))
    if calls is None or calls >= len(pairs):
        return pairs
    if calls < k - 1:
        raise RankerError(
            f"{calls} {'pair does' if calls == 1 else 'pairs do'} not link {k} responses, so some would have no common "
            f"scale; ask for at least {k - 1}"
        )
    rng = np.random.default_rng(seed)
    order = [int(i) for i in rng.permutation(k)]
    chosen = {(min(i, j), max(i, j)) for i, j in zip(order, order[1:], strict=False)}
    met = np.zeros(k, dtype=int)
    for pair in chosen:
        met[list(pair)] += 1
    left = [pairs[i] for i in rng.permutation(len(pairs)) if pairs[i] not in chosen]
    while len(chosen) < calls:
        pair = min(left, key=lambda p: (max(met[p[0]], met[p[1]]), met[p[0]] + met[p[1]]))  # ties in random order
        left.remove(pair)
        chosen.add(pair)
        met[list(pair)] += 1
    return sorted(chosen)


def averaged_over_orders(matrix: Matrix) -> Float[np.ndarray, "k k"]:
    """P[i, j] from verdicts of one order each: the mean of asking with i first and with j first.

    Whatever a judge adds to the one that is shown first, whichever it is, cancels: P[i, j] + P[j, i] = 1.

    Args:
        matrix: M[i, j] is P(i is better | i shown first, j second).

    Returns:
        (M[i, j] + 1 - M[j, i]) / 2; NaN where one of the two orders was not asked.
    """
    single = np.asarray(matrix, dtype=np.float64)
    return (single + 1.0 - single.T) / 2.0


def mean_win_rate(p: Matrix) -> Float[np.ndarray, " k"]:
    """The mean probability of beating an opponent, over the opponents that were asked about.

    With a sparse schedule this depends on who was met: :func:`bradley_terry` takes their strength into account.

    Args:
        p: P[i, j], with NaN for pairs that were not asked.

    Returns:
        In 0 to 1; 0.5 for one who met nobody.

    Reference: Wu et al. 2024, "Self-Play Preference Optimization" (arXiv 2405.00675), the estimate of P(y beats pi | x)
        over K sampled responses. Theirs counts y itself as an opponent (at 0.5), which changes no order.
    """
    found = _without_diagonal(p)
    asked = ~np.isnan(found)
    total = np.where(asked, found, 0.0).sum(axis=1)
    met = asked.sum(axis=1)
    return np.where(met > 0, total / np.maximum(met, 1), 0.5)


def bradley_terry(p: Matrix) -> Float[np.ndarray, " k"]:
    """Log-strengths s under P(i beats j) = sigmoid(s_i - s_j), fitted to soft verdicts by Newton's method.

    Maximises sum over asked i, j of P[i, j] * log sigmoid(s_i - s_j), less ``PRIOR_PRECISION / 2 * |s|^2``. This
    normal prior of standard deviation 32 keeps the strengths finite where someone wins every time or a part of the
    schedule is not linked to the rest; it hardly moves any other.

    Args:
        p: P[i, j], with NaN for pairs that were not asked.

    Returns:
        Log-strengths with mean zero.

    Reference: Bradley & Terry 1952; Hunter 2004, "MM algorithms for generalized Bradley-Terry models", for the
        likelihood. Newton instead of MM, which is slow where verdicts are nearly certain.
    """
    verdicts = _without_diagonal(p)
    wins = np.nan_to_num(verdicts, nan=0.0)
    k = len(wins)

    def objective(s: Float[np.ndarray, " k"]) -> float:
        gap = s[:, None] - s[None, :]
        return float(-(wins * np.logaddexp(0.0, -gap)).sum() - PRIOR_PRECISION / 2 * s @ s)

    strengths = np.zeros(k)
    best = objective(strengths)
    for _ in range(200):
        chance = 1.0 / (1.0 + np.exp(strengths[None, :] - strengths[:, None]))
        gradient = (wins * (1.0 - chance)).sum(axis=1) - (wins.T * chance).sum(axis=1) - PRIOR_PRECISION * strengths
        if np.abs(gradient).max(initial=0.0) < 1e-10:
            break
        weight = (wins + wins.T) * chance * (1.0 - chance)
        curvature = np.diag(weight.sum(axis=1) + PRIOR_PRECISION) - weight
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and objective(strengths + size * step) < best:  # Newton overshoots on near-certain verdicts
            size /= 2.0
        strengths = strengths + size * step
        best = objective(strengths)
    return strengths - strengths.mean() if k else strengths


def cyclic_triples(p: Matrix) -> tuple[int, int]:
    """How many triples go round in a circle (i beats j, j beats k, k beats i), and how many could have.

    Args:
        p: P[i, j], with NaN for pairs that were not asked. i beats j where P[i, j] is above a half; with an exact tie
            no circle closes.

    Returns:
        Cyclic triples, and triples whose three pairs were all asked. A judge that tosses coins makes a quarter of them
        cyclic.

    Reference: Kendall & Babington Smith 1940, "On the method of paired comparisons".
    """
    found = _without_diagonal(p)
    beats = (np.nan_to_num(found, nan=0.0) > 0.5).astype(np.int64)
    asked = (~np.isnan(found)).astype(np.int64)
    return int(np.trace(beats @ beats @ beats)) // 3, int(np.trace(asked @ asked @ asked)) // 6


def _without_diagonal(p: Matrix) -> Float[np.ndarray, "k k"]:
    copied = np.asarray(p, dtype=np.float64).copy()
    np.fill_diagonal(copied, np.nan)
    return copied


__all__ = ["averaged_over_orders", "bradley_terry", "cyclic_triples", "mean_win_rate", "schedule"]
