"""Steered models for other tools: every export is compared with the native run, logit by logit, before it is there.

A format that can't hold a plan is refused, with what it can't hold, the difference in logits that leaving it out would
make, and the remedy. What is written is read back and run against the steered model first; :class:`Exported` says how
near it came. Responses, not plans, go to AlpacaEval and Arena-Hard-Auto (:mod:`sims_lens.export.responses`).

>>> sorted(__all__)[:3]
['Exported', 'Responses', 'ablation_everywhere']
"""

from sims_lens.export.baked import ablation_everywhere, bake, folded
from sims_lens.export.check import Exported
from sims_lens.export.gguf import from_gguf, to_gguf
from sims_lens.export.lm_eval import from_lm_eval, to_lm_eval
from sims_lens.export.responses import (
    Responses,
    arena_hard_questions,
    from_alpaca_eval,
    from_arena_hard,
    responses_of,
    run_responses,
    to_alpaca_eval,
    to_arena_hard,
)
from sims_lens.export.vectors import from_layers, from_steerkit, to_layers, to_steerkit
from sims_lens.export.vllm import from_vllm, to_vllm

__all__ = [
    "Exported",
    "Responses",
    "ablation_everywhere",
    "arena_hard_questions",
    "bake",
    "folded",
    "from_alpaca_eval",
    "from_arena_hard",
    "from_gguf",
    "from_layers",
    "from_lm_eval",
    "from_steerkit",
    "from_vllm",
    "responses_of",
    "run_responses",
    "to_alpaca_eval",
    "to_arena_hard",
    "to_gguf",
    "to_layers",
    "to_lm_eval",
    "to_steerkit",
    "to_vllm",
]
