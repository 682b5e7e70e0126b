"""The microscope: where a direction lives, what it reads and writes, what carries its effect.

Each analysis returns a labelled result with a tidy table; ``sims.plots`` draws it.
"""

from sims_lens.analysis.ablation import (
    AblatedControl,
    DirectionalAblation,
    LeaveOneOut,
    Part,
    ablation_plan,
    directional_ablation,
    leave_one_out,
    parts_of,
)
from sims_lens.analysis.axes import model_axes, stream_directions, unembedding
from sims_lens.analysis.circuits import (
    ComponentEffect,
    ComponentEffects,
    DirectionReaders,
    component_effects,
    direction_readers,
)
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.analysis.interactions import Interaction, interaction
from sims_lens.analysis.logit_attribution import (
    LogitAttribution,
    ResidualComponents,
    logit_attribution,
    residual_components,
)
from sims_lens.analysis.norms import VectorNorms, vector_norms
from sims_lens.analysis.permutation import PermutationTest, pair_differences, permutation_p, run_differences
from sims_lens.analysis.readouts import Readout, logit_effects, readout
from sims_lens.analysis.similarity import (
    DirectionSimilarity,
    ceiling,
    direction_similarity,
    principal_angles,
    random_cosine,
)
from sims_lens.analysis.sweep import LayerSweep, SweepCell, layer_sweep
from sims_lens.analysis.tokens import TokenScores, token_scores

__all__ = [
    "AblatedControl",
    "ComponentEffect",
    "ComponentEffects",
    "DirectionReaders",
    "DirectionSimilarity",
    "DirectionalAblation",
    "Directions",
    "Interaction",
    "LayerSweep",
    "LeaveOneOut",
    "LogitAttribution",
    "Part",
    "PermutationTest",
    "Readout",
    "ResidualComponents",
    "SweepCell",
    "TokenScores",
    "VectorNorms",
    "ablation_plan",
    "ceiling",
    "component_effects",
    "direction_readers",
    "direction_similarity",
    "directional_ablation",
    "directions_of",
    "interaction",
    "layer_sweep",
    "leave_one_out",
    "logit_attribution",
    "logit_effects",
    "model_axes",
    "pair_differences",
    "parts_of",
    "permutation_p",
    "principal_angles",
    "random_cosine",
    "readout",
    "residual_components",
    "run_differences",
    "stream_directions",
    "token_scores",
    "unembedding",
    "vector_norms",
]
