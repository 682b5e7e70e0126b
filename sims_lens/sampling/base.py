"""The seam for engines that sample: in this process, over a cluster, from a server."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sims_lens.data import Sample
from sims_lens.plan import SteeringPlan


@dataclass
class TokenCount:
    """Tokens that an engine has processed: ``prefill`` of prompts, ``decode`` of responses."""

    prefill: int = 0
    decode: int = 0


@runtime_checkable
class Sampler(Protocol):
    """Draws ``n`` responses to each prompt from a model under a plan."""

    count: TokenCount

    def sample(self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int) -> Iterator[Sample]:
        """Yield ``len(prompts) * n`` samples, in any order. A sample depends on its prompt, draw, plan and seed."""
        ...
