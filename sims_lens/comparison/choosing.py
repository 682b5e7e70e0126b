"""What steering has to beat: choosing among several responses of the unsteered model. Pure functions of scored samples.

Both ways buy their effect with divergence from the base model, in a known amount: the law of the response that is
chosen depends on the ranks of its score only, so that KL(chosen || base) has a closed form. It is a divergence of whole
responses, in nats per response; that of a steered model is the sum of its tokens' divergences, expected over its own
responses.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from sims_lens.data import Sample, by_prompt


def best_of(samples: Sequence[Sample], n: int, *, count: int) -> list[Sample]:
    """Best-of-N: of each prompt's draws the best of the first n, of the next n, and so on.

    Args:
        samples: scored draws, at least ``n`` of each prompt.
        n: N.
        count: groups of each prompt, at most.

    Returns:
        The chosen ones, draws counted anew. Their ``kl`` is :func:`best_of_kl` over the number of tokens.

    Reference: Stiennon et al. 2020, "Learning to summarize from human feedback" (arXiv 2009.01325).
    """
    return [sample for sample, _ in _chosen(samples, n, count, math.inf)]


def best_of_kl(n: int) -> float:
    """KL(best of N || base), nats per response: log N - (N - 1) / N. Exact where scores don't tie, else an upper bound.

    Reference: Stiennon et al. 2020; Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy"
        (arXiv 2401.01879), Theorem 1.

    >>> round(best_of_kl(4), 3)
    0.636
    """
    return math.log(n) - (n - 1) / n


def rejection(samples: Sequence[Sample], n: int, *, threshold: float, count: int) -> tuple[list[Sample], float]:
    """Rejection sampling: of each prompt's draws the first that scores at least ``threshold``; where none of n does,
    the best of them.

    Args:
        samples: scored draws, at least ``n`` of each prompt.
        n: draws that a response may take.
        threshold: the score that is good enough.
        count: responses to each prompt, at most.

    Returns:
        The accepted ones, draws counted anew, and how many draws one took on average. Their ``kl`` is
        :func:`rejection_kl`, over the number of tokens, at the share of the prompt's draws that are good enough: an
        estimate.
    """
    found = _chosen(samples, n, count, threshold)
    return [sample for sample, _ in found], sum(tries for _, tries in found) / len(found)


def rejection_kl(accepted: float, n: int) -> float:
    """KL(accepted || base), nats per response, where a share ``accepted`` of draws is good enough and n may be taken.

    With q = 1 - accepted, the density of the outcome at the quantile u of the score is (1 - q^n) / accepted above q and
    n u^(n - 1) below it; the divergence is the mean of its logarithm.

    >>> rejection_kl(0.0, 4) == best_of_kl(4), rejection_kl(1.0, 4)
    (True, 0.0)
    """
    q = 1.0 - accepted
    within = 1.0 - q**n
    above = within * math.log(within / accepted) if accepted > 0 else 0.0
    if q <= 0:
        return above
    # the integral of n u^(n-1) log(n u^(n-1)) from 0 to q
    return above + q**n * (math.log(n) + (n - 1) * math.log(q)) - (n - 1) / n * q**n


def _chosen(samples: Sequence[Sample], n: int, count: int, threshold: float) -> list[tuple[Sample, int]]:
    chosen = []
    for group in by_prompt(samples):
        good = sum(_score(s) >= threshold for s in group) / len(group)
        spent = rejection_kl(good, n)
        for draw in range(min(count, len(group) // n)):
            tries = group[draw * n : (draw + 1) * n]
            taken = next((k for k, s in enumerate(tries) if _score(s) >= threshold), None)
            best = tries[taken] if taken is not None else max(tries, key=_score)
            kl = spent / max(1, len(best.tokens))
            chosen.append((replace(best, draw=draw, kl=kl, kl_95=None), n if taken is None else taken + 1))
    return chosen


def _score(sample: Sample) -> float:
    assert sample.score is not None
    return sample.score


__all__ = ["best_of", "best_of_kl", "rejection", "rejection_kl"]
