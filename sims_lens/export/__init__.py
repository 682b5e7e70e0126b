"""Steered models for other tools: every export is compared with the native run, logit by logit, before it is there.

A format that can't hold a plan is refused, with what it can't hold, the difference in logits that leaving it out would
make, and the remedy. What is written is read back and run against the steered model first; :class:`Exported` says how
near it came.

>>> sorted(__all__)[:3]
['Exported', 'ablation_everywhere', 'bake']
"""

from sims_lens.export.baked import ablation_everywhere, bake, folded
from sims_lens.export.check import Exported
from sims_lens.export.gguf import from_gguf, to_gguf
from sims_lens.export.lm_eval import from_lm_eval, to_lm_eval
from sims_lens.export.vectors import from_layers, from_steerkit, to_layers, to_steerkit
from sims_lens.export.vllm import from_vllm, to_vllm

__all__ = [
    "Exported",
    "ablation_everywhere",
    "bake",
    "folded",
    "from_gguf",
    "from_layers",
    "from_lm_eval",
    "from_steerkit",
    "from_vllm",
    "to_gguf",
    "to_layers",
    "to_lm_eval",
    "to_steerkit",
    "to_vllm",
]
