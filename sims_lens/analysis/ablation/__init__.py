"""Ablation studies of a plan: which of its parts does the work, and does the model itself use its direction?

:func:`leave_one_out` takes the parts of a plan away, one at a time: what is lost without a part, what the part does by
itself, and what is lost when a random direction of the same norm stands in its place. A part whose direction matters
loses as much under replacement as when it is left out; one whose norm alone matters loses nothing.

:func:`directional_ablation` looks at the *unsteered* model: with the direction taken out of the residual stream, does
the behaviour fall? That is necessity, where steering shows sufficiency.
"""

from sims_lens.analysis.ablation.direction import (
    AblatedControl,
    DirectionalAblation,
    ablation_plan,
    directional_ablation,
    variance_share,
)
from sims_lens.analysis.ablation.parts import LeaveOneOut, Part, leave_one_out, parts_of, random_like

__all__ = [
    "AblatedControl",
    "DirectionalAblation",
    "LeaveOneOut",
    "Part",
    "ablation_plan",
    "directional_ablation",
    "leave_one_out",
    "parts_of",
    "random_like",
    "variance_share",
]
