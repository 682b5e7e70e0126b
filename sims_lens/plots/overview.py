"""The figures of any result, in the order in which one reads them."""

from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go

from sims_lens.analysis.ablation import DirectionalAblation, LeaveOneOut
from sims_lens.analysis.circuits import ComponentEffects, DirectionReaders
from sims_lens.analysis.interactions import Interaction
from sims_lens.analysis.logit_attribution import LogitAttribution
from sims_lens.analysis.norms import VectorNorms
from sims_lens.analysis.readouts import Readout
from sims_lens.analysis.similarity import DirectionSimilarity
from sims_lens.analysis.sweep import LayerSweep
from sims_lens.analysis.tokens import TokenScores
from sims_lens.auditing import Audit
from sims_lens.calibration import Calibration
from sims_lens.comparison import Comparison
from sims_lens.errors import SimsError
from sims_lens.harness import Capability
from sims_lens.lab import CorruptedPairs, FailureLedger, Misled, MultiTurn, OutOfDistribution, Steerability
from sims_lens.plots.ablation import directional_ablation, leave_one_out, logit_attribution
from sims_lens.plots.audit import reliability_card
from sims_lens.plots.calibration import calibration
from sims_lens.plots.capability import capability
from sims_lens.plots.circuits import attribution_check, component_effects, direction_readers
from sims_lens.plots.comparison import comparison
from sims_lens.plots.fit import fit_quality
from sims_lens.plots.geometry import norm_profile, projection_profile, shared_subspace, similarity, similarity_profile
from sims_lens.plots.interactions import interaction
from sims_lens.plots.lab import corrupted_pairs, failures, misled, multi_turn, out_of_distribution, steerability
from sims_lens.plots.readouts import readout, readout_drift, readout_layers, readout_measured
from sims_lens.plots.run import effect, iteration_similarity, layer_similarity, side_effects, vector_norms, win_rate
from sims_lens.plots.sweep import frontier, layer_sweep
from sims_lens.plots.tokens import token_heatmap
from sims_lens.run import Run
from sims_lens.supervised import SteeringFit

_FIGURES: dict[type, tuple[Callable[[Any], go.Figure], ...]] = {
    Run: (win_rate, effect, side_effects, vector_norms, iteration_similarity, layer_similarity),
    SteeringFit: (fit_quality,),
    Audit: (reliability_card,),
    Calibration: (calibration,),
    Capability: (capability,),
    Comparison: (comparison,),
    Interaction: (interaction,),
    LayerSweep: (layer_sweep, frontier),
    VectorNorms: (norm_profile, projection_profile),
    DirectionSimilarity: (similarity_profile, similarity, shared_subspace),
    Readout: (readout_layers, readout, readout_drift, readout_measured),
    TokenScores: (token_heatmap,),
    LeaveOneOut: (leave_one_out,),
    DirectionalAblation: (directional_ablation,),
    ComponentEffects: (component_effects, attribution_check),
    DirectionReaders: (direction_readers, attribution_check),
    LogitAttribution: (logit_attribution,),
    CorruptedPairs: (corrupted_pairs,),
    Misled: (misled,),
    OutOfDistribution: (out_of_distribution,),
    MultiTurn: (multi_turn,),
    Steerability: (steerability,),
    FailureLedger: (failures,),
}


def figures(result: object) -> list[go.Figure]:
    """Every figure that a result has by itself; one that would have nothing to show is left out.

    Args:
        result: a run, or what an analysis, an audit or a calibration returned.

    Raises:
        SimsError: there are no figures of such an object.
    """
    if type(result) not in _FIGURES:
        known = ", ".join(sorted(kind.__name__ for kind in _FIGURES))
        raise SimsError(f"there are no figures of a {type(result).__name__}; there are of {known}")
    drawn = []
    for draw in _FIGURES[type(result)]:
        try:
            drawn.append(draw(result))
        except SimsError:  # a scree of one direction, a drift of one iteration
            continue
    return drawn


__all__ = ["figures"]
