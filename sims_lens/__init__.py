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
    from sims_lens import plots
    from sims_lens.activations import capture, residual_norms
    from sims_lens.adapter import restride
    from sims_lens.auditing import audit
    from sims_lens.config import (
        ContrastConfig,
        EvaluationConfig,
        RankingConfig,
        SamplingConfig,
        SIMSConfig,
        SteeringConfig,
    )
    from sims_lens.errors import SimsError
    from sims_lens.evaluate import Evaluation
    from sims_lens.hooks import Steering, attach, resolve, steering
    from sims_lens.loop import improve
    from sims_lens.models import load
    from sims_lens.plan import SteeringPlan
    from sims_lens.prompts import everyday, read_prompts
    from sims_lens.rankers import CachedRanker, EndpointJudge, Ensemble, PairRM, ReadingEase, RewardModel, Vader
    from sims_lens.rankers.self_judge import SelfJudge
    from sims_lens.report import write_report
    from sims_lens.run import Run, open_run
    from sims_lens.sampling import LocalSampler
    from sims_lens.scope import TokenScope

_HOME = {
    "plots": "plots",
    "restride": "adapter",
    "audit": "auditing",
    "Steering": "hooks",
    "attach": "hooks",
    "resolve": "hooks",
    "steering": "hooks",
    "capture": "activations",
    "residual_norms": "activations",
    "ContrastConfig": "config",
    "EvaluationConfig": "config",
    "RankingConfig": "config",
    "SamplingConfig": "config",
    "SIMSConfig": "config",
    "SteeringConfig": "config",
    "SimsError": "errors",
    "Evaluation": "evaluate",
    "improve": "loop",
    "load": "models",
    "SteeringPlan": "plan",
    "everyday": "prompts",
    "read_prompts": "prompts",
    "CachedRanker": "rankers",
    "EndpointJudge": "rankers",
    "Ensemble": "rankers",
    "PairRM": "rankers",
    "ReadingEase": "rankers",
    "RewardModel": "rankers",
    "SelfJudge": "rankers.self_judge",
    "Vader": "rankers",
    "write_report": "report",
    "Run": "run",
    "open_run": "run",
    "LocalSampler": "sampling",
    "TokenScope": "scope",
}

__all__ = [
    "CachedRanker",
    "ContrastConfig",
    "EndpointJudge",
    "Ensemble",
    "Evaluation",
    "EvaluationConfig",
    "LocalSampler",
    "PairRM",
    "RankingConfig",
    "ReadingEase",
    "RewardModel",
    "Run",
    "SIMSConfig",
    "SamplingConfig",
    "SelfJudge",
    "SimsError",
    "Steering",
    "SteeringConfig",
    "SteeringPlan",
    "TokenScope",
    "Vader",
    "attach",
    "audit",
    "capture",
    "everyday",
    "improve",
    "load",
    "open_run",
    "plots",
    "read_prompts",
    "residual_norms",
    "resolve",
    "restride",
    "steering",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sims_lens' has no attribute {name!r}; see sims_lens.__all__")
    module = import_module(f"sims_lens.{_HOME[name]}")
    value = module if name == "plots" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
