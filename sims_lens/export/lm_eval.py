"""The file that lm-evaluation-harness steers with: ``--model steered --model_args pretrained=...,steer_path=FILE``.

``{"layers.14": {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}}``: one entry per module,
named as in the Hugging Face model's ``base_model``; ``action`` is ``"add"`` (coefficient times vector) or ``"clamp"``
(the projection on the vector's direction is set to the coefficient), at every token.

Reference: lm-evaluation-harness, ``lm_eval/models/hf_steered.py``. It unpickles the file, so nothing here reads one
    back: :func:`from_lm_eval` takes the mapping, and an export is checked against what that mapping means.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sims_lens.adapter import Adapter, adapt
from sims_lens.checks import check_path, shown
from sims_lens.errors import ExportError
from sims_lens.export.check import TOLERANCE, Exported, Nearest, block_output, restriction, write_file
from sims_lens.models import checkpoint_of
from sims_lens.plan import Intervention, SteeringPlan
from sims_lens.scope import ALL
from sims_lens.sites import hook_name
from sims_lens.transforms import Ablation, Addition, Clamp, checked_vector, label

_WHAT = "steering file for lm-eval"
_NAME = re.compile(r"(?:\w+\.)*(0|[1-9]\d{0,4})")


def to_lm_eval(model: Any, plan: SteeringPlan, path: str | Path, *, tolerance: float = TOLERANCE) -> Exported:
    """Write a plan for lm-eval's ``steered`` model.

    Args:
        model: what the plan is for, loaded with :func:`sims_lens.load`: lm-eval wants the names of the checkpoint.
        plan: at each block output either additions (they are summed), or one clamp or ablation of strength 1, on all
            tokens.
        path: of the file; its name ends in .pt or .pth.
        tolerance: largest difference between logits.

    Raises:
        ExportError: the format can't hold the plan, or doesn't mean the same.
        PlanError: the plan doesn't fit the model.
        ModelError: the model's checkpoint isn't known.
    """
    path = check_path(path, ExportError)
    if path.suffix not in (".pt", ".pth"):
        raise ExportError(f"{path.name!r}: lm-eval takes the file for something else unless its name ends in .pt")
    adapter = adapt(model)
    names = _block_names(checkpoint_of(model), adapter)
    entries: dict[str, dict[str, Any]] = {}

    def write(held: SteeringPlan, target: Path) -> None:
        entries.update({names[i.layer]: _entry(i) for i in held.interventions})
        torch.save(entries, target)

    return write_file(
        model,
        plan,
        path,
        what=_WHAT,
        nearest=partial(_nearest, adapt(model)),
        write=write,
        read=lambda _: from_lm_eval(entries),
        tolerance=tolerance,
    )


def from_lm_eval(entries: Mapping[str, Mapping[str, Any]]) -> SteeringPlan:
    """The plan that entries of lm-eval's ``steered`` format mean.

    Args:
        entries: as read with ``torch.load(path, weights_only=True)``; modules are blocks.

    Raises:
        ExportError: an entry can't be read, or is for one attention head.
        PlanError: a vector in it can't be used.
    """
    if not isinstance(entries, Mapping) or not entries:
        raise ExportError(f"a steering file for lm-eval must map module names to entries, got {shown(entries)}")
    return SteeringPlan(tuple(_intervention(name, entry) for name, entry in entries.items()))


def _nearest(adapter: Adapter, plan: SteeringPlan) -> Nearest:
    held: dict[int, Intervention] = {}
    lost = []
    for i in plan.interventions:
        layer = block_output(adapter, i)
        clamps = isinstance(i.transform, (Clamp, Ablation)) and i.strength == 1.0
        # A part of the stream can be added to for the whole, not clamped for it.
        at_output = layer is not None and (not clamps or i.site in ("resid_post", "resid_pre"))
        before = held.get(layer) if layer is not None else None
        if not (clamps or isinstance(i.transform, Addition)):
            reason: str | None = (
                f"{label(i.transform)} of strength {i.strength:g}, there only additions and whole clamps have a place "
                "(keep it native)"
            )
        elif layer is None or not at_output:
            reason = "not a block's output, the only place there (fit the plan at resid_post)"
        elif before and not (isinstance(before.transform, Addition) and isinstance(i.transform, Addition)):
            reason = "a second action at one block's output, there is one at most (restrict the plan)"
        else:
            reason = restriction(i)
            held[layer] = _at_output(layer, i, before)
        if reason:
            lost.append((hook_name(i.layer, i.site), reason))
    return Nearest(SteeringPlan(tuple(held.values())), tuple(lost))


def _at_output(layer: int, i: Intervention, before: Intervention | None) -> Intervention:
    transform = i.transform
    if isinstance(transform, Addition):
        vector = i.strength * transform.vector
        if before and isinstance(before.transform, Addition):
            vector = before.transform.vector + vector
        transform = Addition(vector)
    return Intervention(layer, "resid_post", transform, 1.0, scope=ALL)


def _entry(i: Intervention) -> dict[str, Any]:
    if isinstance(i.transform, Addition):
        action, vector, coefficient = "add", i.transform.vector, 1.0
    else:
        assert isinstance(i.transform, (Clamp, Ablation))
        value = i.transform.value if isinstance(i.transform, Clamp) else 0.0
        action, vector, coefficient = "clamp", i.transform.axis, value
    return {
        "steering_vector": vector.clone(),
        "steering_coefficient": coefficient,
        "action": action,
        "bias": None,
        "head_index": None,
    }


def _intervention(name: Any, entry: Any) -> Intervention:
    matched = _NAME.fullmatch(name) if isinstance(name, str) else None
    if not matched:
        raise ExportError(f"module {name!r} of an lm-eval steering file is not a block, such as 'layers.14'")
    layer, what = int(matched[1]), f"the steering_vector at {name}"
    if not isinstance(entry, Mapping) or not {"steering_vector", "action"} <= set(entry):
        raise ExportError(f"the entry at {name} needs a steering_vector and an action")
    if entry.get("head_index") is not None:
        raise ExportError(f"the entry at {name} is for attention head {entry['head_index']}, not for the whole stream")
    coefficient, bias = entry.get("steering_coefficient", 1.0), entry.get("bias")
    if isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
        raise ExportError(f"the steering_coefficient at {name} must be a number, got {coefficient!r}")
    vector = checked_vector(entry["steering_vector"], what)
    if entry["action"] == "add" and bias is None:
        return Intervention(layer, "resid_post", Addition(vector), float(coefficient), scope=ALL)
    if entry["action"] == "clamp":
        value = float(coefficient) + _along(vector, bias, name)
        return Intervention(layer, "resid_post", Clamp(vector, value), 1.0, scope=ALL)
    raise ExportError(f"the entry at {name} must add, without a bias, or clamp; got action {entry['action']!r}")


def _along(vector: Tensor, bias: Any, name: str) -> float:
    """What a bias, taken off before a clamp and put back after it, adds to the clamp's value."""
    if bias is None:
        return 0.0
    bias = checked_vector(bias, f"the bias at {name}")
    if bias.shape != vector.shape:
        raise ExportError(f"the bias at {name} has {len(bias)} entries, its vector {len(vector)}")
    return float(bias @ vector / vector.norm())


def _block_names(folder: Path, adapter: Adapter) -> list[str]:
    """Names of the blocks in the checkpoint's base model, such as ``layers.14``: of a skeleton without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        base = auto.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False)).base_model
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == adapter.n_layers:
            return [f"{name}.{layer}" for layer in range(adapter.n_layers)]
    raise ExportError(f"{adapter.name} has no list of {adapter.n_layers} blocks in its Hugging Face model")
