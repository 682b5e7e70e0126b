"""Intervention specs for vLLM behind TransformerLens' ``RemoteBridge`` (4.3 and later), as JSON.

``{"blocks.14.hook_out": {"op": "add", "value": [...]}}``: one spec per hook point, added at every token of prompt and
response. The specs go to the engine with ``collective_rpc("tl_set_interventions", args=(specs,))`` and stay in force
there until they are replaced.

Reference: TransformerLens 4.3.0, ``model_bridge/sources/vllm``: ``intervention_specs.py`` (operations suppress, scale,
    add and set, each per coordinate) and ``worker_extension.py``. A directional ablation mixes coordinates, so it has
    no spec: orthogonalise the weights with :func:`sims_lens.export.bake` and serve those. Its ``pos`` counts positions
    from the start of the sequence and is no token scope. Checked here is what the specs say, not what an engine does.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sims_lens.errors import ExportError, PlanError
from sims_lens.export.check import TOLERANCE, Exported, block_additions, read_bytes, write_file
from sims_lens.plan import SteeringPlan
from sims_lens.scope import ALL

_WHAT = "file of vLLM intervention specs"
_NAME = re.compile(r"blocks\.(0|[1-9]\d{0,4})\.hook_out")


def to_vllm(model: Any, plan: SteeringPlan, path: str | Path, *, tolerance: float = TOLERANCE) -> Exported:
    """Write a plan as intervention specs.

    Args:
        model: what the plan is for.
        plan: additions at block outputs on all tokens; several at one block are summed.
        path: of the JSON file.
        tolerance: largest difference between logits.

    Raises:
        ExportError: the format can't hold the plan, or the file read back isn't the same.
        PlanError: the plan doesn't fit the model.
    """

    def write(held: SteeringPlan, target: Path) -> None:
        target.write_text(json.dumps(specs(held)))

    return write_file(
        model,
        plan,
        path,
        what=_WHAT,
        nearest=partial(block_additions, model),
        write=write,
        read=from_vllm,
        tolerance=tolerance,
    )


def specs(plan: SteeringPlan) -> dict[str, dict[str, Any]]:
    """The intervention specs of a plan of additions at block outputs on all tokens, by hook point.

    >>> specs(SteeringPlan.addition({1: torch.ones(2)}, coefficient=0.5, scope="all"))
    {'blocks.1.hook_out': {'op': 'add', 'value': [0.5, 0.5]}}
    """
    return {
        f"blocks.{layer}.hook_out": {"op": "add", "value": vector.tolist()}
        for (layer, _), vector in plan.vectors().items()
    }


def from_vllm(path: str | Path) -> SteeringPlan:
    """Read intervention specs as a plan.

    Raises:
        ExportError: the file is damaged, or holds a spec that is no addition of a vector at a block's output.
    """
    data = read_bytes(path, _WHAT)
    try:
        specs = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not JSON ({error})") from error
    if not isinstance(specs, dict) or not specs:
        raise ExportError(f"{path} holds no intervention specs by hook point")
    try:
        return SteeringPlan.addition(dict(_vector(name, spec) for name, spec in specs.items()), scope=ALL)
    except (ExportError, PlanError) as error:
        raise ExportError(f"{path} is not a {_WHAT} that can be read: {error}") from error


def _vector(name: str, spec: Any) -> tuple[int, torch.Tensor]:
    matched = _NAME.fullmatch(name)
    if not matched:
        raise ExportError(f"{name[:60]!r} is not the output of a block, blocks.N.hook_out")
    if not isinstance(spec, dict) or set(spec) != {"op", "value"} or spec["op"] != "add":
        raise ExportError(f"the spec at {name} is not {{'op': 'add', 'value': [...]}}")
    value = spec["value"]
    if not isinstance(value, list) or not all(type(entry) in (int, float) for entry in value):
        raise ExportError(f"the value at {name} is not a list of numbers")
    try:
        return int(matched[1]), torch.tensor(value, dtype=torch.float32)
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ExportError(f"the value at {name} has numbers that are too large") from error
