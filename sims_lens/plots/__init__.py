"""Pictures: pure functions from a result to a Plotly figure. They never show and never write.

>>> sorted(__all__)[0]
'TEMPLATE'
"""

from sims_lens.plots.audit import reliability_card
from sims_lens.plots.bank import pair_selection
from sims_lens.plots.calibration import calibration
from sims_lens.plots.interactions import interaction
from sims_lens.plots.run import effect, iteration_similarity, layer_similarity, side_effects, vector_norms, win_rate
from sims_lens.plots.theme import TEMPLATE

__all__ = [
    "TEMPLATE",
    "calibration",
    "effect",
    "interaction",
    "iteration_similarity",
    "layer_similarity",
    "pair_selection",
    "reliability_card",
    "side_effects",
    "vector_norms",
    "win_rate",
]
