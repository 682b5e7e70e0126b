"""Vectors by layer, as repeng, steering-vectors and steerkit hold them: in and out, without depending on any of them.

================  ====================================  ===============================================================
library           what it holds                         how to make one of ``layers = to_layers(model, plan)``
================  ====================================  ===============================================================
repeng            ``ControlVector.directions``, numpy   ``ControlVector(type, {l: layers[l].numpy() for l in layers})``
steering-vectors  ``SteeringVector.layer_activations``  ``SteeringVector(layers)``
steerkit          a safetensors file per block          :func:`to_steerkit`
================  ====================================  ===============================================================

All three count blocks from 0 and add at a block's output, to every token that isn't padding.

Reference: vgel/repeng, ``repeng/control.py`` (``ControlModule`` wraps block ``layer_id``); steering-vectors,
    ``steering_vector.py`` (a forward hook on the matching layer); arvkevi/steerkit, ``probe.py`` (schema 3).
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import adapt
from sims_lens.checks import check_number, check_path
from sims_lens.errors import ExportError, PlanError
from sims_lens.export.check import (
    TOLERANCE,
    Exported,
    Nearest,
    accept,
    block_additions,
    prepare,
    reference,
    refuse_losses,
    write_file,
)
from sims_lens.plan import Provenance, SteeringPlan
from sims_lens.scope import ALL
from sims_lens.sites import SITES, hook_name

_SITES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
"""steering-vectors' ``layer_type`` and the site that it is."""

_STEERKIT = "steerkit probe"
_METHOD = "diff_of_means"


def to_layers(model: Any, plan: SteeringPlan, *, tolerance: float = TOLERANCE) -> dict[int, Float[Tensor, " d_model"]]:
    """The vector that a plan adds at the output of each block, checked against the native run.

    Args:
        model: what the plan is for.
        plan: additions at block outputs on all tokens; several at one block are summed.
        tolerance: largest difference between logits.

    Returns:
        Vectors by block, counted from 0, in absolute units: to be added with a coefficient of 1.

    Raises:
        ExportError: the plan isn't such vectors.
        PlanError: the plan doesn't fit the model.
    """
    plan = prepare(model, plan)
    native, held = reference(model, plan), block_additions(model, plan)
    refuse_losses(model, native, held, "vector per block")
    accept(native.error(model, held.plan), tolerance, "vector per block")
    return {layer: vector for (layer, _), vector in held.plan.vectors().items()}


def from_layers(source: Any, *, coefficient: float = 1.0) -> SteeringPlan:
    """The plan of a repeng ``ControlVector``, a steering-vectors ``SteeringVector``, or a mapping by block.

    Args:
        source: an object with ``directions`` or ``layer_activations``, or what those hold.
        coefficient: what the vectors are multiplied by; a trained ``ControlVector`` has unit vectors.

    Returns:
        A plan that adds at every token, as those libraries do by default; ``plan.on("generation")`` is ours.

    Raises:
        ExportError: it isn't such an object, or a vector in it can't be used.
    """
    kind = getattr(source, "layer_type", "decoder_block")
    if kind not in _SITES:
        raise ExportError(f"layer_type {kind!r} is not one of {', '.join(_SITES)}, where a plan can act")
    layers = getattr(source, "directions", None) or getattr(source, "layer_activations", None) or source
    if not isinstance(layers, Mapping) or not all(type(layer) is int for layer in layers):
        raise ExportError(
            f"expected vectors by layer number, or an object with directions or layer_activations; "
            f"got {type(source).__name__}"
        )
    tensors = {
        layer: torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector
        for layer, vector in layers.items()
    }
    try:
        return SteeringPlan.addition(tensors, coefficient=coefficient, site=_SITES[kind], scope=ALL)
    except PlanError as error:
        raise ExportError(f"a {type(source).__name__} can't be read: {error}") from error


def to_steerkit(model: Any, plan: SteeringPlan, path: str | Path, *, tolerance: float = TOLERANCE) -> Exported:
    """Write a plan as a steerkit probe, for ``Probe.load(path).steer(...)``.

    Args:
        model: what the plan is for.
        plan: additions at the output of one block on all tokens.
        path: of the safetensors file.
        tolerance: largest difference between logits.

    Raises:
        ExportError: the format can't hold the plan, or the file read back isn't the same.
        PlanError: the plan doesn't fit the model.
    """

    def nearest(resolved: SteeringPlan) -> Nearest:
        held = block_additions(model, resolved)
        if len(held.plan.layers) < 2:
            return held
        kept = held.plan.layers[-1]
        reason = f"a second block beside {kept}, there is one at most (export plan.restrict([layer]) for each)"
        more = [(hook_name(layer, "resid_post"), reason) for layer in held.plan.layers[:-1]]
        return Nearest(held.plan.restrict([kept]), (*held.lost, *more))

    return write_file(
        model,
        plan,
        path,
        what=_STEERKIT,
        nearest=nearest,
        write=partial(_write_probe, adapt(model).provenance),
        read=from_steerkit,
        tolerance=tolerance,
    )


def _write_probe(made_on: Provenance, plan: SteeringPlan, path: Path) -> None:
    from safetensors.torch import save_file

    ((layer, site), vector), *_ = plan.vectors().items()
    norm = float(vector.double().norm())
    if norm == 0.0:
        raise ExportError(f"a {_STEERKIT} holds a unit direction, and the vector at block {layer} is zero")
    metadata = {
        "schema_version": "3",
        "layer": str(layer),
        "n_total_layers": str(made_on.n_layers),
        "normalized_depth": f"{(layer + 1) / (made_on.n_layers + 1):.6f}",
        "model_id": made_on.model,
        "hook_site": site,
        "hook_name": hook_name(layer, site),
        "default_method": _METHOD,
        "auto_alpha": repr(norm),
        "bias_json": json.dumps({_METHOD: 0.0}),
        "metrics_json": "{}",
        "created_at": "",
        "extras_json": "{}",
    }
    save_file({f"direction.{_METHOD}": (vector.double() / norm).float().contiguous()}, path, metadata=metadata)


def from_steerkit(path: str | Path, *, method: str | None = None, coefficient: float | None = None) -> SteeringPlan:
    """Read a steerkit probe as the plan of its ``steer``: an addition at every token.

    Args:
        path: of the safetensors file.
        method: which of its directions; its default one unless told.
        coefficient: steerkit's alpha; the calibrated one of the file unless told.

    Raises:
        ExportError: the file is damaged, has no such direction, or no coefficient and none was given.
    """
    from safetensors import SafetensorError, safe_open

    path = check_path(path, ExportError)
    if not path.is_file():
        raise ExportError(f"there is no {_STEERKIT} at {path}")
    if coefficient is not None:
        check_number("coefficient", coefficient, error=ExportError)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{path} is not a readable safetensors file ({error})") from error
    try:
        name = f"direction.{method or metadata['default_method']}"
        layer, site = int(metadata["layer"]), metadata["hook_site"]
        alpha = coefficient if coefficient is not None else float(metadata.get("auto_alpha") or "nan")
        vector = tensors[name]
    except (KeyError, ValueError) as error:
        has = sorted(n.removeprefix("direction.") for n in tensors if n.startswith("direction."))
        raise ExportError(f"{path} is not a {_STEERKIT} with what was asked for ({error}); it has {has}") from error
    if not np.isfinite(alpha):
        raise ExportError(f"{path} has no calibrated strength; pass coefficient=")
    if site not in SITES or metadata.get("hook_name", hook_name(layer, site)) != hook_name(layer, site):
        raise ExportError(f"{path} is for {metadata.get('hook_name') or site!r}, not a site of a block: {SITES}")
    try:
        made_on = Provenance(model=metadata.get("model_id", ""), source=_STEERKIT)
        return SteeringPlan.addition(
            {layer: vector}, coefficient=float(alpha), site=site, scope=ALL, provenance=made_on
        )
    except PlanError as error:
        raise ExportError(f"{path} can't be read: {error}") from error
