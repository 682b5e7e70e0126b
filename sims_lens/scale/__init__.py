"""Sampling where one process is not enough.

>>> __all__
['Serve', 'VLLMSampler', 'VLLMServer']
"""

from sims_lens.scale.serving import Serve, VLLMServer
from sims_lens.scale.vllm import VLLMSampler

__all__ = ["Serve", "VLLMSampler", "VLLMServer"]
