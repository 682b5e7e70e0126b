"""What is swept: every direction at every site and layer."""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.checks import shown
from sims_lens.errors import ConfigError, PlanError
from sims_lens.hooks import check_fits
from sims_lens.plan import Intervention, Provenance, SteeringPlan
from sims_lens.run import Run
from sims_lens.scope import TokenScope
from sims_lens.sites import check_layer, check_site
from sims_lens.supervised import SteeringFit
from sims_lens.transforms import Addition, Transform, dump

COEFFICIENTS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Those that :func:`sims_lens.calibrate` tries of a plan of the loop's strength, 0.2: from hardly felt to broken."""


def listed(value: Any, name: str, example: str) -> list[Any]:
    """A list of what was given: any sequence but a text, or an array or tensor of one dimension."""
    found = value.tolist() if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1 else value
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ConfigError(f"{name} must be a list, such as {example}, got {' '.join(repr(value).split())[:80]}")
    return list(found)


_LARGEST = sys.float_info.max


def checked_grid(coefficients: Any) -> tuple[float, ...]:
    """The coefficients in their order, if they are different numbers and not all 0."""
    grid = listed(coefficients, "coefficients", "[0.1, 0.2]")
    for value in grid:
        if isinstance(value, bool) or not isinstance(value, Real) or not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
            raise ConfigError(f"a coefficient must be a finite number, got {shown(value)}")
    if not any(grid) or len(set(grid)) < len(grid):
        raise ConfigError(f"coefficients must be different numbers, such as {COEFFICIENTS}, got {coefficients!r}")
    return tuple(sorted(float(value) for value in grid))


def candidates_of(
    adapter: Any,
    source: Any,
    layers: Sequence[int] | None,
    sites: Sequence[str] | None,
    units: str,
    scope: TokenScope,
) -> tuple[list[tuple[str, str, int]], SteeringPlan, str]:
    """Every direction at every site and layer; a plan with what each does at coefficient 1; the coefficients' units."""
    if units not in ("residual_norm", "absolute"):
        raise ConfigError(f"units must be 'residual_norm' or 'absolute', got {units!r}")
    for layer in layers or ():
        check_layer(layer, adapter.n_layers, adapter.name)
    for site in sites or ():
        check_site(site)
    if layers is not None and not len(layers) or sites is not None and not len(sites):
        raise ConfigError("layers and sites must name at least one each, or be left out for all that there are")
    places: list[tuple[str, str, int]] = []
    made: list[Intervention] = []
    for directions, transforms, provenance in _sources(source):
        wanted = [layer for layer in directions.layers if layers is None or layer in layers]
        if not wanted:
            raise PlanError(f"{directions.name} has layers {list(directions.layers)}, none of {list(layers or ())}")
        part: list[Intervention] = []
        for site, layer in product(dict.fromkeys(sites or (directions.site,)), wanted):
            places.append((directions.name, site, layer))
            part.append(_intervention(directions, transforms.get(layer), site, layer, units, scope))
        check_fits(adapter, SteeringPlan(tuple(part), provenance))
        made += part
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise PlanError(f"two directions are called {twice[0]!r} at layer {twice[2]} {twice[1]}; give each a name")
    others = [not isinstance(i.transform, Addition) for i in made]
    kind = "strength" if all(others) else "mixed" if any(others) else units
    source_name = f"layer_sweep, {', '.join(dict.fromkeys(name for name, _, _ in places))}"
    return places, SteeringPlan(tuple(made), replace(adapter.provenance, source=source_name)), kind


def _intervention(
    directions: Directions, transform: Transform | None, site: str, layer: int, units: str, scope: TokenScope
) -> Intervention:
    if transform is not None:
        return Intervention(layer, site, transform, 1.0, scope=scope)
    vector = directions.at(layer)
    norm = float(vector.norm())
    if not norm > 0:
        raise PlanError(f"{directions.name} is zero at layer {layer}: it has no direction; leave the layer out")
    if units == "absolute":
        return Intervention(layer, site, Addition(vector), 1.0, scope=scope)
    known = None
    if directions.residual_norm is not None and site == directions.site:
        known = float(directions.residual_norm[directions.layers.index(layer)])
    return Intervention(
        layer,
        site,
        Addition(vector / norm),
        1.0,
        units="residual_norm",
        scope=scope,
        residual_norm=known if known is not None and math.isfinite(known) and known > 0 else None,
    )


def _sources(source: Any) -> Iterator[tuple[Directions, dict[int, Transform], Provenance]]:
    """Each of the source's directions, with the transforms that are no additions by layer, and where it came from."""
    if isinstance(source, (list, tuple)) and source and all(isinstance(d, Directions) for d in source):
        for each in source:
            yield each, {}, Provenance()
        return
    found = iter(directions_of(source))  # in the order of the leaves, and named after the keys on the way to them
    for leaf in _leaves(source):
        own = directions_of(leaf)
        if isinstance(leaf, Run):
            for _ in own[:-1]:
                next(found)
            newest = next(found)
            yield replace(newest, name=own[-1].name if leaf is source else _key(newest.name)), {}, leaf.plan.provenance
            continue
        for site in [each.site for each in own]:
            yield next(found), _transforms(leaf, site), getattr(leaf, "provenance", Provenance())


def _key(name: str) -> str:
    """The name that a user gave to a run: ``directions_of`` puts the iteration behind it."""
    return name.rpartition(", iteration ")[0] or name


def _leaves(source: Any) -> Iterator[Any]:
    if isinstance(source, Mapping) and all(isinstance(key, str) for key in source):
        for value in source.values():
            yield from _leaves(value)
    else:
        yield source


def _transforms(leaf: Any, site: str) -> dict[int, Transform]:
    """What a fit or a plan does at a site by something else than an addition."""
    if isinstance(leaf, SteeringFit):
        fitted = zip(leaf.layers, leaf.transforms, strict=True)
        return {layer: transform for layer, transform in fitted if not isinstance(transform, Addition)}
    found: dict[int, Transform] = {}
    if isinstance(leaf, SteeringPlan):
        at = [i for i in leaf.interventions if i.site == site]
        for i in at:
            if isinstance(i.transform, Addition):
                continue
            if sum(other.layer == i.layer for other in at) > 1:
                raise PlanError(f"{i.describe()} is not alone there; give each as a plan of its own, by name")
            found[i.layer] = i.transform
    return found


def plan_at(candidates: SteeringPlan, index: int, coefficient: float) -> SteeringPlan:
    """A cell, as a plan: one candidate at a coefficient."""
    one = candidates.interventions[index]
    return replace(candidates, interventions=(replace(one, coefficient=float(coefficient)),))


def digest_of(plan: SteeringPlan) -> str:
    """Of what the interventions do; not of residual norms, which are measured."""
    sha256 = hashlib.sha256()
    for index, i in enumerate(plan.interventions):
        what, tensors = dump(i.transform, str(index))
        sha256.update(json.dumps([what, i.layer, i.site, i.units], sort_keys=True).encode())
        for tensor in tensors.values():
            sha256.update(tensor.detach().cpu().numpy().astype("<f4").tobytes())
    return sha256.hexdigest()


__all__ = ["COEFFICIENTS", "candidates_of", "checked_grid", "digest_of", "listed", "plan_at"]
