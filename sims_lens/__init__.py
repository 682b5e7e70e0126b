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
    from sims_lens.adapter import restride
    from sims_lens.attach import Steering, attach, resolve, steering
    from sims_lens.capture import capture, residual_norms
    from sims_lens.config import ContrastConfig, EvaluationConfig, SamplingConfig, SIMSConfig, SteeringConfig
    from sims_lens.errors import SimsError
    from sims_lens.evaluate import Evaluation
    from sims_lens.loop import improve
    from sims_lens.models import load
    from sims_lens.plan import SteeringPlan
    from sims_lens.prompts import everyday, read_prompts
    from sims_lens.rankers import ReadingEase, Vader
    from sims_lens.report import write_report
    from sims_lens.run import Run, open_run
    from sims_lens.sampling import LocalSampler
    from sims_lens.scope import TokenScope

_HOME = {
    "plots": "plots",
    "restride": "adapter",
    "Steering": "attach",
    "attach": "attach",
    "resolve": "attach",
    "steering": "attach",
    "capture": "capture",
    "residual_norms": "capture",
    "ContrastConfig": "config",
    "EvaluationConfig": "config",
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
    "ReadingEase": "rankers",
    "Vader": "rankers",
    "write_report": "report",
    "Run": "run",
    "open_run": "run",
    "LocalSampler": "sampling",
    "TokenScope": "scope",
}

__all__ = [
    "ContrastConfig",
    "Evaluation",
    "EvaluationConfig",
    "LocalSampler",
    "ReadingEase",
    "Run",
    "SIMSConfig",
    "SamplingConfig",
    "SimsError",
    "Steering",
    "SteeringConfig",
    "SteeringPlan",
    "TokenScope",
    "Vader",
    "attach",
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
    # functions and submodules of one name (capture, plots): the function wins, a plain submodule is itself
    value = getattr(module, name, module)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
