"""Sampling where one process is not enough.

>>> __all__[:3]
['Actors', 'DataActors', 'KeptActors']
"""

from sims_lens.scale.actors import Actors
from sims_lens.scale.ray import DataActors, KeptActors, RayRanker, RaySampler
from sims_lens.scale.serving import Serve, VLLMServer
from sims_lens.scale.streaming import ShardSampler, Streamed, read_stream, stream
from sims_lens.scale.vllm import VLLMSampler

__all__ = [
    "Actors",
    "DataActors",
    "KeptActors",
    "RayRanker",
    "RaySampler",
    "Serve",
    "ShardSampler",
    "Streamed",
    "VLLMSampler",
    "VLLMServer",
    "read_stream",
    "stream",
]
