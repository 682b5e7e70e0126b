"""Drawing responses from a model, steered or not."""

from sims_lens.cost import TokenCount
from sims_lens.sampling.base import Drawn, ReadingSampler, Sampler
from sims_lens.sampling.local import LocalSampler
from sims_lens.sampling.reading import Reading, Readings

__all__ = ["Drawn", "LocalSampler", "Reading", "ReadingSampler", "Readings", "Sampler", "TokenCount"]
