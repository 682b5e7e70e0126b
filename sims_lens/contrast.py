"""From ranked responses to contrast pairs: the best response to a prompt against the worst, with length in view.

Longer responses often score higher, and then the difference of best and worst is partly a direction of length. The gap
is always reported (:func:`length_gap`); ``length`` chooses what is done about it:

- "report": nothing.
- "match": only responses of about equal length are paired (:func:`match_length`). It assumes nothing about how length
  acts, and costs margin, and prompts.
- "regress": scores less what length explains of them (:func:`regress_out_length`). It keeps every prompt whose scores
  are not all equal to begin with, and removes a linear effect only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from sims_lens.config import LengthControl
from sims_lens.data import ContrastPair, Sample, by_prompt
from sims_lens.errors import ConfigError
from sims_lens.stats import Interval, bootstrap_mean

LENGTH_TOLERANCE = 0.1
"""What "match" calls equal: lengths that differ by at most a tenth of the longer one. A share and not a number of
tokens, so that it means the same for short and long responses; 4 tokens of 40 are less than a clause."""


@dataclass(frozen=True)
class Contrast:
    """Contrast pairs, and how many prompts gave none.

    Args:
        pairs: in the order of prompts; one per prompt, or a few with falling margins where they come from a bank.
        dropped: prompts without a pair, by reason: "empty" (fewer than two responses with a token in them), "tie" (all
            scores equal), "margin" (best and worst too close), "length" (no two responses of about equal length whose
            scores are far enough apart), "size" (it has a pair, but those of other prompts came first).
    """

    pairs: tuple[ContrastPair, ...]
    dropped: dict[str, int] = field(default_factory=dict)


def best_against_worst(
    samples: Sequence[Sample],
    *,
    min_margin: float = 0.0,
    length: str = "report",
    tolerance: float = LENGTH_TOLERANCE,
) -> Contrast:
    """Pair the best-ranked response to each prompt with the worst.

    Args:
        samples: with scores, of any number of prompts.
        min_margin: the smallest difference of scores that still counts, exclusive.
        length: "report", "match" or "regress", see the top of this module. After "regress" the pairs carry the
            scores less the effect of length, and ``min_margin`` counts in those.
        tolerance: of "match".

    Raises:
        ConfigError: ``length`` is none of the three, or the tolerance is negative.

    Reference: SIMS (arXiv 2507.08967): best and worst of K by the ranker. Of equal scores the first draw is taken.
    """
    check_length_control(length, tolerance)
    if length == "match":
        return match_length(samples, tolerance=tolerance, min_margin=min_margin)
    scored = regress_out_length(samples) if length == "regress" else samples
    return _contrast(samples, scored, min_margin, None)


def match_length(
    samples: Sequence[Sample], *, tolerance: float = LENGTH_TOLERANCE, min_margin: float = 0.0
) -> Contrast:
    """The pair of largest margin among each prompt's responses of about equal length.

    Args:
        samples: with scores, of any number of prompts.
        tolerance: the largest difference of token lengths, as a share of the longer one; 0 for exactly equal.
        min_margin: the smallest difference of scores that still counts, exclusive.

    Returns:
        The pairs; prompts that have a pair only between responses of different lengths are dropped as "length".
    """
    check_length_control("match", tolerance)
    return _contrast(samples, samples, min_margin, tolerance)


def length_slope(groups: Sequence[Sequence[Sample]]) -> float:
    """Score per token: the slope of score on token length within groups, pooled over them.

    Each group has an intercept of its own, so that a prompt which asks for long answers, or scores high, adds nothing.

    Args:
        groups: scored samples; those of one prompt (and, where samples are of several iterations, of one iteration:
            otherwise a change of both over iterations would pass for an effect of length).

    Returns:
        The slope in the ranker's units per token; 0 where all lengths within groups are equal.

    Reference: the fixed-effects ("within") estimator.
    """
    covariance = variance = 0.0
    for group in groups:
        used = usable(group)
        if len(used) > 1:
            lengths = np.array([len(s.tokens) for s in used], dtype=np.float64)
            lengths -= lengths.mean()
            covariance += float(lengths @ np.array([s.score for s in used], dtype=np.float64))
            variance += float(lengths @ lengths)
    return covariance / variance if variance else 0.0


def regress_out_length(samples: Sequence[Sample], *, slope: float | None = None) -> list[Sample]:
    """The samples with scores less the linear effect of token length within prompts.

    ``score - slope * (length - mean length of the prompt's responses)``: the mean score of a prompt stays what it was,
    and within prompts score and length are uncorrelated afterwards.

    Args:
        samples: with scores, of any number of prompts.
        slope: score per token; None for :func:`length_slope` of these samples, one slope for all prompts. (A slope per
            prompt, from K responses, would be noise.)
    """
    groups = by_prompt(samples)
    slope = length_slope(groups) if slope is None else slope
    means = {group[0].prompt: float(np.mean([len(s.tokens) for s in usable(group)] or [0])) for group in groups}
    return [
        s if s.score is None else replace(s, score=s.score - slope * (len(s.tokens) - means[s.prompt])) for s in samples
    ]


def length_gap(pairs: Sequence[ContrastPair], *, seed: int = 0) -> Interval:
    """Mean token length of the best less that of the worst, with its 95% interval over prompts.

    Of several pairs of one prompt the mean is taken first. An interval that leaves out 0 says that the fitted direction
    is in part one of length.

    Args:
        pairs: contrast pairs; without any the gap is 0.
        seed: of the bootstrap.
    """
    gaps: dict[int, list[int]] = {}
    for pair in pairs:
        gaps.setdefault(pair.prompt, []).append(len(pair.best.tokens) - len(pair.worst.tokens))
    if not gaps:
        return Interval(0.0, 0.0, 0.0)
    return bootstrap_mean(np.array([np.mean(gap) for gap in gaps.values()]), seed=seed)


def usable(samples: Sequence[Sample]) -> list[Sample]:
    """Those that can be in a pair: ranked, and with a token in them."""
    return [s for s in samples if s.tokens and s.score is not None]


def extremes(
    samples: Sequence[Sample],
    *,
    count: int = 1,
    min_margin: float = 0.0,
    tolerance: float | None = None,
    weights: Sequence[float] | None = None,
) -> list[tuple[int, int]]:
    """Best and worst of one prompt's responses, then the next best and next worst of the rest, and so on.

    Greedy: each time the pair of largest margin among the responses that are still free. So no response is in two
    pairs: as the worse of one and the better of another it would cancel out of a mean difference.

    Args:
        samples: usable ones of one prompt; of equal scores the earlier in this order is taken.
        count: pairs, at most.
        min_margin: the smallest difference of scores that still counts, exclusive.
        tolerance: largest difference of lengths as a share of the longer one; None for any.
        weights: above 0, one per sample: a pair's margin is multiplied by both before pairs are compared.

    Returns:
        Positions (better, worse) in ``samples``, in the order in which they were chosen.
    """
    scores = np.array([s.score for s in samples], dtype=np.float64)
    down = np.argsort(-scores, kind="stable")
    up = np.argsort(scores, kind="stable")
    margins = scores[down][:, None] - scores[up][None, :]
    allowed = margins > min_margin
    if tolerance is not None:
        lengths = np.array([len(s.tokens) for s in samples], dtype=np.float64)
        longer = np.maximum(lengths[down][:, None], lengths[up][None, :])
        allowed &= np.abs(lengths[down][:, None] - lengths[up][None, :]) <= tolerance * longer
    if weights is not None:
        each = np.array(weights, dtype=np.float64)
        margins = margins * each[down][:, None] * each[up][None, :]
    value = np.where(allowed, margins, -np.inf)
    found: list[tuple[int, int]] = []
    while len(found) < count and value.size:
        row, column = np.unravel_index(int(np.argmax(value)), value.shape)
        if value[row, column] == -np.inf:
            break
        pair = [int(down[row]), int(up[column])]
        found.append((pair[0], pair[1]))
        value[np.isin(down, pair), :] = -np.inf
        value[:, np.isin(up, pair)] = -np.inf
    return found


def all_equal(samples: Sequence[Sample]) -> bool:
    """Whether a ranker has told none of these apart. After "regress" they would differ, by nothing except length."""
    return len({s.score for s in samples}) == 1


def no_pair(samples: Sequence[Sample], min_margin: float) -> str:
    """Why a prompt with these usable samples has given no pair: a reason of :class:`Contrast`."""
    if len(samples) < 2:
        return "empty"
    scores = [s.score or 0.0 for s in samples]
    margin = max(scores) - min(scores)
    if margin == 0.0:
        return "tie"
    return "margin" if margin <= min_margin else "length"


def reasons(length: str) -> dict[str, int]:
    """A count of 0 for every reason that can apply."""
    return {"tie": 0, "margin": 0, "empty": 0, **({"length": 0} if length == "match" else {})}


def check_length_control(length: str, tolerance: float) -> None:
    """Raise :class:`ConfigError` unless ``length`` is a control and ``tolerance`` is a number from 0 up."""
    if length not in get_args(LengthControl):
        raise ConfigError(f"length must be one of {', '.join(get_args(LengthControl))}, got {length!r}")
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"tolerance must be a share of the longer response, from 0 up, got {tolerance!r}")


def _contrast(
    samples: Sequence[Sample], scored: Sequence[Sample], min_margin: float, tolerance: float | None
) -> Contrast:
    """Pairs by the scores of ``scored``, none of a prompt whose ``samples`` are all equal."""
    pairs: list[ContrastPair] = []
    dropped = reasons("report" if tolerance is None else "match")
    for group, before in zip(by_prompt(scored), by_prompt(samples), strict=True):
        used, raw = usable(group), usable(before)
        found = [] if all_equal(raw) else extremes(used, min_margin=min_margin, tolerance=tolerance)
        pairs += [ContrastPair(prompt=used[b].prompt, best=used[b], worst=used[w]) for b, w in found]
        if not found:
            dropped[no_pair(raw if all_equal(raw) else used, min_margin)] += 1
    return Contrast(tuple(pairs), dropped)


__all__ = [
    "LENGTH_TOLERANCE",
    "Contrast",
    "LengthControl",
    "best_against_worst",
    "extremes",
    "length_gap",
    "length_slope",
    "match_length",
    "regress_out_length",
]
