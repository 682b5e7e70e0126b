"""Frozen data that travels through the loop: samples, scored samples, contrast pairs."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One response of a model.

    Args:
        prompt: index of the prompt among those that were sampled together.
        draw: which of the K responses to it.
        tokens: response token ids, without the one that ended it.
        text: the tokens as text.
        ended: True where the model ended the response itself, False where the token limit did.
        score: what the ranker gave it, where it has been ranked.
        independent: score of a second ranker that the loop never learns from, where there is one.
        nll: mean negative log-likelihood of its tokens under the unsteered model, nats per token, where measured.
        kl: mean over its positions of KL(steered || base), the divergence of the next-token distribution that it was
            drawn from from the unsteered model's, nats per token, where measured; 0 for the base model itself.
        kl_95: the 95th percentile over its positions of the same; None also where it has no token.
    """

    prompt: int
    draw: int
    tokens: tuple[int, ...]
    text: str
    ended: bool
    score: float | None = None
    independent: float | None = None
    nll: float | None = None
    kl: float | None = None
    kl_95: float | None = None


@dataclass(frozen=True)
class ContrastPair:
    """A better and a worse response to one prompt.

    Args:
        prompt: index of the prompt.
        best, worst: the two samples; ``best.score > worst.score``.
        best_iteration, worst_iteration: in which iteration each was drawn, that is, under the plan *before* it; 0
            where the pair is not from a memory bank and both are of the iteration at hand. ``draw`` counts within an
            iteration.
    """

    prompt: int
    best: Sample
    worst: Sample
    best_iteration: int = 0
    worst_iteration: int = 0

    @property
    def crosses(self) -> bool:
        """Whether the two were drawn in different iterations, and so under different plans."""
        return self.best_iteration != self.worst_iteration

    @property
    def margin(self) -> float:
        """Score of the best less score of the worst, in the ranker's units."""
        assert self.best.score is not None and self.worst.score is not None
        return self.best.score - self.worst.score


def by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples grouped by prompt, draws in order.

    >>> [len(g) for g in by_prompt([Sample(1, 0, (), "", True), Sample(0, 0, (), "", True)])]
    [1, 1]
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    return [sorted(groups[i], key=lambda s: s.draw) for i in sorted(groups)]
