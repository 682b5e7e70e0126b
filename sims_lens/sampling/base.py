"""The seams for engines that sample: in this process, over a cluster, from a server."""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol, runtime_checkable

from sims_lens.cost import TokenCount
from sims_lens.data import Sample
from sims_lens.plan import SteeringPlan
from sims_lens.sampling.reading import Reading


@runtime_checkable
class Sampler(Protocol):
    """Draws ``n`` responses to each prompt from a model under a plan."""

    count: TokenCount

    def sample(self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int) -> Iterator[Sample]:
        """Yield ``len(prompts) * n`` samples, in any order. A sample depends on its prompt, draw, plan and seed."""
        ...


Drawn = Collection[tuple[int, int]]
"""Samples by their prompt, counted among those that are asked, and draw."""


@runtime_checkable
class ReadingSampler(Sampler, Protocol):
    """A sampler that can also measure what it draws, so that nothing has to be run twice; and leave out, with
    ``skip``, samples that were drawn before. Another sampler's ``sample`` may have ``skip`` too."""

    def reads(self, plan: SteeringPlan, site: str) -> bool:
        """Whether it can do so now, under a plan, at a site."""
        ...

    def sample_and_read(
        self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int, site: str, skip: Drawn = ()
    ) -> "Iterator[tuple[Sample, Reading | None]]":
        """Like :meth:`Sampler.sample`, with the stream at a site over each response's tokens, under the plan."""
        ...

    def sample_and_measure(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        plan: SteeringPlan,
        seed: int,
        measured: int | None = None,
        skip: Drawn = (),
    ) -> Iterator[Sample]:
        """Like :meth:`Sampler.sample`, with ``nll`` and ``kl`` of the first ``measured`` samples of each prompt."""
        ...
