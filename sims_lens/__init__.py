"""sims_lens: self-improving model steering for TransformerLens.

The names below are the whole public door. They load on first use, so that ``import sims_lens`` stays light.

>>> import sims_lens as sims
>>> sims.SIMSConfig(iterations=2).iterations
2
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sims_lens import analysis, export, lab, plots, widgets
    from sims_lens.activations import capture, capture_moments, capture_tokens, residual_norms
    from sims_lens.adapter import restride
    from sims_lens.analysis import (
        LayerSweep,
        component_effects,
        direction_readers,
        direction_similarity,
        directional_ablation,
        interaction,
        layer_sweep,
        leave_one_out,
        model_axes,
        readout,
        token_scores,
        vector_norms,
    )
    from sims_lens.analysis.logit_attribution import logit_attribution
    from sims_lens.auditing import audit
    from sims_lens.behaviour import PairBehaviour, SampledBehaviour
    from sims_lens.calibration import Calibration, FluencyBudget, calibrate
    from sims_lens.capture_store import StoredTokens
    from sims_lens.comparison import Comparison, DPOConfig, compare, open_comparison
    from sims_lens.config import (
        ContrastConfig,
        EvaluationConfig,
        GuardConfig,
        RankingConfig,
        SamplingConfig,
        SIMSConfig,
        SteeringConfig,
    )
    from sims_lens.errors import SimsError
    from sims_lens.estimators import (
        PCA,
        HouseholderRotation,
        LogisticProbe,
        MassMean,
        MeanDifference,
        RandomDirection,
        ShuffledLabels,
        WhitenedMeanDifference,
        fit_quality,
    )
    from sims_lens.evaluate import Evaluation
    from sims_lens.export import responses_of
    from sims_lens.harness import Capability, capability, lm_eval_model
    from sims_lens.hooks import Steering, attach, resolve, steering
    from sims_lens.hub import from_hub, model_card, push_to_hub
    from sims_lens.loop import improve
    from sims_lens.models import load
    from sims_lens.plan import SteeringPlan
    from sims_lens.prompts import everyday, read_prompts, tone_pairs
    from sims_lens.prompts.sets import load_pairs, load_prompts
    from sims_lens.rankers import CachedRanker, EndpointJudge, Ensemble, PairRM, ReadingEase, RewardModel, Vader
    from sims_lens.rankers.self_judge import SelfJudge
    from sims_lens.report import write_report
    from sims_lens.run import Run, open_run
    from sims_lens.sampling import LocalSampler
    from sims_lens.scale import RayRanker, RaySampler, VLLMSampler, read_stream, stream
    from sims_lens.scope import TokenScope
    from sims_lens.stats import bootstrap_mean
    from sims_lens.supervised import SteeringFit, fit, read_pairs
    from sims_lens.transforms import HPR, Ablation, Addition, Amplification, Clamp, Gated, Rotation

_HOME = {
    "capture": "activations",
    "capture_moments": "activations",
    "capture_tokens": "activations",
    "StoredTokens": "capture_store",
    "residual_norms": "activations",
    "restride": "adapter",
    "LayerSweep": "analysis",
    "analysis": "analysis",
    "component_effects": "analysis",
    "direction_readers": "analysis",
    "direction_similarity": "analysis",
    "directional_ablation": "analysis",
    "interaction": "analysis",
    "layer_sweep": "analysis",
    "leave_one_out": "analysis",
    "logit_attribution": "analysis",
    "model_axes": "analysis",
    "readout": "analysis",
    "token_scores": "analysis",
    "vector_norms": "analysis",
    "audit": "auditing",
    "PairBehaviour": "behaviour",
    "SampledBehaviour": "behaviour",
    "Calibration": "calibration",
    "FluencyBudget": "calibration",
    "calibrate": "calibration",
    "Comparison": "comparison",
    "DPOConfig": "comparison",
    "compare": "comparison",
    "open_comparison": "comparison",
    "ContrastConfig": "config",
    "EvaluationConfig": "config",
    "GuardConfig": "config",
    "RankingConfig": "config",
    "SIMSConfig": "config",
    "SamplingConfig": "config",
    "SteeringConfig": "config",
    "SimsError": "errors",
    "HouseholderRotation": "estimators",
    "LogisticProbe": "estimators",
    "MassMean": "estimators",
    "MeanDifference": "estimators",
    "PCA": "estimators",
    "RandomDirection": "estimators",
    "ShuffledLabels": "estimators",
    "WhitenedMeanDifference": "estimators",
    "fit_quality": "estimators",
    "Evaluation": "evaluate",
    "export": "export",
    "responses_of": "export",
    "Capability": "harness",
    "capability": "harness",
    "lm_eval_model": "harness",
    "Steering": "hooks",
    "attach": "hooks",
    "resolve": "hooks",
    "steering": "hooks",
    "from_hub": "hub",
    "model_card": "hub",
    "push_to_hub": "hub",
    "improve": "loop",
    "lab": "lab",
    "load": "models",
    "SteeringPlan": "plan",
    "plots": "plots",
    "everyday": "prompts",
    "read_prompts": "prompts",
    "tone_pairs": "prompts",
    "load_pairs": "prompts.sets",
    "load_prompts": "prompts.sets",
    "CachedRanker": "rankers",
    "EndpointJudge": "rankers",
    "Ensemble": "rankers",
    "PairRM": "rankers",
    "ReadingEase": "rankers",
    "RewardModel": "rankers",
    "Vader": "rankers",
    "SelfJudge": "rankers.self_judge",
    "write_report": "report",
    "Run": "run",
    "open_run": "run",
    "LocalSampler": "sampling",
    "RayRanker": "scale",
    "RaySampler": "scale",
    "VLLMSampler": "scale",
    "read_stream": "scale",
    "stream": "scale",
    "TokenScope": "scope",
    "bootstrap_mean": "stats",
    "SteeringFit": "supervised",
    "fit": "supervised",
    "read_pairs": "supervised",
    "Ablation": "transforms",
    "Addition": "transforms",
    "Amplification": "transforms",
    "Clamp": "transforms",
    "Gated": "transforms",
    "HPR": "transforms",
    "Rotation": "transforms",
    "widgets": "widgets",
}

_NAMESPACES = ("analysis", "export", "lab", "plots", "widgets")
"""Public names that are modules: ``sims.plots.win_rate(run)``."""

__all__ = [
    "Ablation",
    "Addition",
    "Amplification",
    "CachedRanker",
    "Calibration",
    "Capability",
    "Clamp",
    "Comparison",
    "ContrastConfig",
    "DPOConfig",
    "EndpointJudge",
    "Ensemble",
    "Evaluation",
    "EvaluationConfig",
    "FluencyBudget",
    "Gated",
    "GuardConfig",
    "HPR",
    "HouseholderRotation",
    "LayerSweep",
    "LocalSampler",
    "LogisticProbe",
    "MassMean",
    "MeanDifference",
    "PCA",
    "PairBehaviour",
    "PairRM",
    "RandomDirection",
    "RankingConfig",
    "RayRanker",
    "RaySampler",
    "ReadingEase",
    "RewardModel",
    "Rotation",
    "Run",
    "SIMSConfig",
    "SampledBehaviour",
    "SamplingConfig",
    "SelfJudge",
    "ShuffledLabels",
    "SimsError",
    "Steering",
    "SteeringConfig",
    "SteeringFit",
    "SteeringPlan",
    "StoredTokens",
    "TokenScope",
    "VLLMSampler",
    "Vader",
    "WhitenedMeanDifference",
    "analysis",
    "attach",
    "audit",
    "bootstrap_mean",
    "calibrate",
    "capability",
    "capture",
    "capture_moments",
    "capture_tokens",
    "compare",
    "component_effects",
    "direction_readers",
    "direction_similarity",
    "directional_ablation",
    "everyday",
    "export",
    "fit",
    "fit_quality",
    "from_hub",
    "improve",
    "interaction",
    "lab",
    "layer_sweep",
    "leave_one_out",
    "lm_eval_model",
    "load",
    "load_pairs",
    "load_prompts",
    "logit_attribution",
    "model_axes",
    "model_card",
    "open_comparison",
    "open_run",
    "plots",
    "push_to_hub",
    "read_pairs",
    "read_prompts",
    "read_stream",
    "readout",
    "residual_norms",
    "resolve",
    "responses_of",
    "restride",
    "steering",
    "stream",
    "token_scores",
    "tone_pairs",
    "vector_norms",
    "widgets",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sims_lens' has no attribute {name!r}; see sims_lens.__all__")
    module = import_module(f"sims_lens.{_HOME[name]}")
    value = module if name in _NAMESPACES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
