"""The seams for engines that sample: in this process, over a cluster, from a server."""

from collections.abc import Iterator, Sequence
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


@runtime_checkable
class ReadingSampler(Sampler, Protocol):
    """A sampler that can also measure what it draws, so that nothing has to be run twice."""

    def reads(self, plan: SteeringPlan, site: str) -> bool:
        """Whether it can do so now, under a plan, at a site."""
        ...

    def sample_and_read(
        self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int, site: str
    ) -> "Iterator[tuple[Sample, Reading | None]]":
        """Like :meth:`Sampler.sample`, with the stream at a site over each response's tokens, under the plan."""
        ...

    def sample_and_measure(
        self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int, measured: int | None = None
    ) -> Iterator[Sample]:
        """Like :meth:`Sampler.sample`, with ``nll`` and ``kl`` of the first ``measured`` samples of each prompt."""
        ...
