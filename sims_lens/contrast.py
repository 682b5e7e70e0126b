"""From ranked responses to contrast pairs: the best response to a prompt against the worst."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sims_lens.data import ContrastPair, Sample, by_prompt


@dataclass(frozen=True)
class Contrast:
    """Contrast pairs, and how many prompts gave none.

    Args:
        pairs: one per prompt at most, in the order of prompts.
        dropped: prompts without a pair, by reason: "tie" (all scores equal), "margin" (best and worst too close),
            "empty" (fewer than two responses with a token in them).
    """

    pairs: tuple[ContrastPair, ...]
    dropped: dict[str, int] = field(default_factory=dict)


def best_against_worst(samples: Sequence[Sample], *, min_margin: float = 0.0) -> Contrast:
    """Pair the best-ranked response to each prompt with the worst.

    Args:
        samples: with scores, of any number of prompts.
        min_margin: the smallest difference of scores that still counts, exclusive.

    Reference: SIMS (arXiv 2507.08967): best and worst of K by the ranker. Of equal scores the first draw is taken.
    """
    pairs: list[ContrastPair] = []
    dropped = {"tie": 0, "margin": 0, "empty": 0}
    for group in by_prompt(samples):
        ranked = [s for s in group if s.tokens and s.score is not None]
        if len(ranked) < 2:
            dropped["empty"] += 1
            continue
        pair = ContrastPair(
            prompt=ranked[0].prompt,
            best=max(ranked, key=lambda s: s.score or 0.0),
            worst=min(ranked, key=lambda s: s.score or 0.0),
        )
        if pair.margin == 0.0:
            dropped["tie"] += 1
        elif pair.margin <= min_margin:
            dropped["margin"] += 1
        else:
            pairs.append(pair)
    return Contrast(tuple(pairs), dropped)
