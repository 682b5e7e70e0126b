"""What steering costs elsewhere: lm-evaluation-harness on a steered model, and the base model on the same documents.

>>> sorted(__all__)[0]
'Capability'
"""

from sims_lens.harness.measuring import PACKAGED, TASKS, Capability, CapabilityScore, capability
from sims_lens.harness.model import lm_eval_model
from sims_lens.harness.texts import SteeredTexts

__all__ = ["PACKAGED", "TASKS", "Capability", "CapabilityScore", "SteeredTexts", "capability", "lm_eval_model"]
