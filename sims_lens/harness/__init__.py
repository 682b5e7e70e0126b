"""What steering costs elsewhere: lm-evaluation-harness on a steered model, and the base model on the same documents.

>>> sorted(__all__)[0]
'SteeredTexts'
"""

from sims_lens.harness.model import lm_eval_model
from sims_lens.harness.texts import SteeredTexts

__all__ = ["SteeredTexts", "lm_eval_model"]
