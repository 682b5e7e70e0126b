"""Which prompts are worth their responses: rank them by how far their scores spread, and spend K where it pays.

A prompt whose responses all score alike gives no contrast, however many are drawn. Where scores spread, more draws
push the best and the worst further apart, but by less each time: with K independent, normal scores of standard
deviation SD the expected distance of best and worst is SD * R(K), R(2) = 1.13, R(4) = 2.06, R(8) = 2.85, R(16) = 3.53.

Nothing here is random, and an even K is the baseline to beat. The gain is bounded: in a simulation with normal scores
and a mean of four responses a prompt, knowing every SD raised the mean margin by 1, 6 and 14% where the SDs of the
prompts vary by a coefficient of 0.25, 0.53 and 0.95; estimates from four responses each gave -3, +2 and +10% as they
are, and 0, +3 and +7% shrunk (:func:`shrunk_spread`). So allocate by shrunken spreads, and expect little where prompts
are alike.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from sims_lens.contrast import usable
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import ConfigError

PRIOR_FREEDOM = 4.0


def spread(samples: Sequence[Sample]) -> dict[int, float]:
    """Standard deviation of the scores of each prompt's responses, in the ranker's units.

    Args:
        samples: with scores, of any number of prompts. Only comparisons within a prompt enter.

    Returns:
        Prompt index to spread (n - 1 in the denominator); 0 for a prompt with fewer than two scored responses with a
        token in them, which can give no pair.
    """
    return {prompt: float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0 for prompt, scores in _scores(samples)}


def shrunk_spread(samples: Sequence[Sample], *, prior: int | float = PRIOR_FREEDOM) -> dict[int, float]:
    """:func:`spread`, drawn towards the prompts' common one, the more so the fewer responses it rests on.

    A prompt whose four scores happen to agree is not one without a spread. Each prompt's variance is averaged with
    the pooled one: ``(f * s^2 + prior * pooled) / (f + prior)``, f = n - 1 its degrees of freedom.

    Args:
        samples: with scores, of any number of prompts.
        prior: degrees of freedom that the pooled variance counts for. 4 loses nothing where prompts are alike and
            keeps most of the gain where they are not (simulation at the top of this module); 0 is :func:`spread`.

    Reference: Smyth 2004 (limma), the moderated variance, with the prior's degrees of freedom fixed instead of
        estimated.
    """
    if not (math.isfinite(prior) and prior >= 0):
        raise ConfigError(f"prior must be a number from 0 up, got {prior!r}")
    freedom = {prompt: max(0, len(scores) - 1) for prompt, scores in _scores(samples)}
    variance = {prompt: value**2 for prompt, value in spread(samples).items()}
    total = sum(freedom.values())
    pooled = sum(freedom[p] * variance[p] for p in variance) / total if total else 0.0
    return {
        p: math.sqrt((freedom[p] * variance[p] + prior * pooled) / (freedom[p] + prior)) if freedom[p] + prior else 0.0
        for p in variance
    }


def rank_prompts(samples: Sequence[Sample]) -> list[int]:
    """Prompt indices by falling spread; of equal ones the lower index first.

    >>> scores = {0: (1.0, 1.0), 1: (0.0, 3.0), 2: (0.0, 1.0)}
    >>> rank_prompts([Sample(i, k, (1,), "", True, s) for i, row in scores.items() for k, s in enumerate(row)])
    [1, 2, 0]
    """
    spreads = spread(samples)
    return sorted(spreads, key=lambda prompt: (-spreads[prompt], prompt))


@lru_cache(maxsize=1024)
def expected_range(k: int) -> float:
    """R(k): expected largest less smallest of k independent standard normals, by numerical integration.

    Reference: Tippett 1925, Biometrika 17: R(k) = integral of 1 - F(x)^k - (1 - F(x))^k, F the normal distribution.

    >>> [round(expected_range(k), 3) for k in (1, 2, 4, 8)]
    [0.0, 1.128, 2.059, 2.847]
    """
    cdf, step = _normal_cdf()
    return float(np.sum(1.0 - cdf**k - (1.0 - cdf) ** k) * step)  # both ends are 0, so this is the trapezoid rule


def allocate(
    spreads: Mapping[int, float],
    *,
    budget: int | float,
    k_min: int = 2,
    k_max: int = 16,
    cost: Mapping[int, int | float] | None = None,
) -> dict[int, int]:
    """How many responses to draw to each prompt, so that best and worst lie as far apart as the budget allows.

    Maximises the sum over prompts of SD * R(K), see :func:`expected_range`. Each prompt gets ``k_min``; then every
    further response goes where it adds most for its cost, SD * (R(K + 1) - R(K)) / cost; of equal gains first to the
    prompt with fewest responses, then to the lowest index. R is concave, so without ``cost`` this greedy rule is
    optimal; with it, it is within one response's worth of the optimum.

    Args:
        spreads: SD of each prompt's scores, of :func:`shrunk_spread`.
        budget: in all: responses, or whatever ``cost`` counts, tokens say.
        k_min: fewest responses to a prompt; two make a pair.
        k_max: most responses to a prompt. Past 16 a doubling adds less than a fifth to the range.
        cost: of one response to each prompt, for instance its mean length in tokens; 1 each by default.

    Returns:
        Prompt index to K. Without ``cost`` the K sum to exactly ``budget``, or to ``k_max`` each where it exceeds
        that; with it they cost at most ``budget`` and no prompt below ``k_max`` could have one more for what is left.

    Raises:
        ConfigError: the budget does not pay for ``k_min`` each, or a number is out of range.

    Reference: Fox 1966, "Discrete optimization via marginal analysis" (Management Science 13).

    >>> allocate({0: 1.0, 1: 0.1}, budget=8)
    {0: 6, 1: 2}
    """
    price = {prompt: 1.0 if cost is None else _price(cost, prompt) for prompt in spreads}
    for prompt, value in spreads.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"the spread of prompt {prompt} must be a number from 0 up, got {value!r}")
    if not 1 <= k_min <= k_max:
        raise ConfigError(f"k_min and k_max must be 1 <= k_min <= k_max, got {k_min} and {k_max}")
    floor = k_min * sum(price.values())
    if not budget >= floor:
        raise ConfigError(
            f"a budget of {budget:g} does not pay for {k_min} responses to each of {len(spreads)} prompts ({floor:g}); "
            "raise it, or leave out the prompts that rank_prompts puts last"
        )
    ranges = [expected_range(k) for k in range(k_max + 1)]
    given = dict.fromkeys(spreads, k_min)
    left = float(budget) - floor

    def offer(prompt: int) -> tuple[float, int, int]:
        k = given[prompt]
        return (-spreads[prompt] * (ranges[k + 1] - ranges[k]) / price[prompt], k, prompt)

    heap = [offer(prompt) for prompt in spreads] if k_min < k_max else []
    heapq.heapify(heap)
    while heap:
        *_, prompt = heapq.heappop(heap)
        if price[prompt] > left:
            continue  # what is left only shrinks: this prompt can have no more
        given[prompt] += 1
        left -= price[prompt]
        if given[prompt] < k_max:
            heapq.heappush(heap, offer(prompt))
    return given


def _scores(samples: Sequence[Sample]) -> list[tuple[int, Float[np.ndarray, " response"]]]:
    return [
        (group[0].prompt, np.array([s.score for s in usable(group)], dtype=np.float64)) for group in by_prompt(samples)
    ]


def _price(cost: Mapping[int, int | float], prompt: int) -> float:
    value = cost.get(prompt, math.nan)
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"the cost of a response to prompt {prompt} must be a positive number, got {value!r}")
    return float(value)


@lru_cache(maxsize=1)
def _normal_cdf() -> tuple[Float[np.ndarray, " point"], float]:
    grid = np.linspace(-8.0, 8.0, 1601)
    return np.array([0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in grid]), float(grid[1] - grid[0])


__all__ = ["PRIOR_FREEDOM", "allocate", "expected_range", "rank_prompts", "shrunk_spread", "spread"]
