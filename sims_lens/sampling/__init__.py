"""Drawing responses from a model, steered or not."""

from sims_lens.sampling.base import Sampler
from sims_lens.sampling.local import LocalSampler

__all__ = ["LocalSampler", "Sampler"]
