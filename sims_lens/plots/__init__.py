"""Pictures: pure functions from a result to a Plotly figure. They never show and never write.

>>> sorted(__all__)[0]
'TEMPLATE'
"""

from sims_lens.plots.ablation import directional_ablation, leave_one_out, logit_attribution
from sims_lens.plots.audit import reliability_card
from sims_lens.plots.bank import pair_selection
from sims_lens.plots.calibration import calibration
from sims_lens.plots.capability import capability
from sims_lens.plots.circuits import attribution_check, component_effects, direction_readers
from sims_lens.plots.comparison import comparison
from sims_lens.plots.fit import fit_quality
from sims_lens.plots.geometry import (
    norm_profile,
    projection_profile,
    shared_subspace,
    similarity,
    similarity_profile,
    trajectory,
)
from sims_lens.plots.interactions import interaction
from sims_lens.plots.lab import corrupted_pairs, failures, misled, multi_turn, out_of_distribution, steerability
from sims_lens.plots.overview import figures
from sims_lens.plots.readouts import readout, readout_drift, readout_layers, readout_measured
from sims_lens.plots.run import effect, iteration_similarity, layer_similarity, side_effects, vector_norms, win_rate
from sims_lens.plots.samples import sample_browser
from sims_lens.plots.sliders import slider
from sims_lens.plots.sweep import frontier, layer_sweep
from sims_lens.plots.theme import TEMPLATE
from sims_lens.plots.tokens import token_heatmap

__all__ = [
    "TEMPLATE",
    "attribution_check",
    "calibration",
    "capability",
    "comparison",
    "component_effects",
    "corrupted_pairs",
    "direction_readers",
    "directional_ablation",
    "effect",
    "failures",
    "figures",
    "fit_quality",
    "frontier",
    "interaction",
    "iteration_similarity",
    "layer_similarity",
    "layer_sweep",
    "leave_one_out",
    "logit_attribution",
    "misled",
    "multi_turn",
    "norm_profile",
    "out_of_distribution",
    "pair_selection",
    "projection_profile",
    "readout",
    "readout_drift",
    "readout_layers",
    "readout_measured",
    "reliability_card",
    "sample_browser",
    "shared_subspace",
    "side_effects",
    "similarity",
    "similarity_profile",
    "slider",
    "steerability",
    "token_heatmap",
    "trajectory",
    "vector_norms",
    "win_rate",
]
