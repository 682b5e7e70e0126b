"""Directions by name and layer: what every analysis of vectors takes, whatever the vectors come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.checks import check_dimensions, check_integer, check_list
from sims_lens.errors import PlanError
from sims_lens.plan import SteeringPlan
from sims_lens.run import Run
from sims_lens.sites import check_site
from sims_lens.supervised import SteeringFit
from sims_lens.transforms import Addition, checked_vector


@dataclass(frozen=True, eq=False)
class Directions:
    """A direction for each of some layers, with what is known about its noise.

    Args:
        name: in tables and figures, for instance "iteration 2".
        layers: ascending.
        vectors: the directions, float32, at the norm that they were fitted with.
        site: where in the block they were read, or act.
        iteration: of a run, counted from 1; 0 where there is none.
        split_half: cosine of fits to two halves of the pairs, per layer; None where it is not known.
        shuffled: fits of the same pairs with best and worst swapped at random.
        residual_norm: median norm of the residual stream there, first position left out.
    """

    name: str
    layers: tuple[int, ...]
    vectors: Float[Tensor, "layer d_model"] = field(repr=False)
    site: str = "resid_post"
    iteration: int = 0
    split_half: Float[Tensor, " layer"] | None = field(default=None, repr=False)
    shuffled: Float[Tensor, "control layer d_model"] | None = field(default=None, repr=False)
    residual_norm: Float[Tensor, " layer"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_site(self.site)
        check_dimensions(f"the vectors of {self.name}", self.vectors, 2, PlanError)
        for layer in check_list("layers", self.layers, "(17,)", PlanError):
            check_integer("a layer", layer, 0, error=PlanError)
        if len(self.layers) != len(self.vectors) or sorted(set(self.layers)) != list(self.layers):
            raise PlanError(f"{self.name}: layers must be ascending, one per vector; got {list(self.layers)}")
        if not len(self.layers):
            raise PlanError(f"{self.name} has no directions")

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The direction of a layer.

        Raises:
            PlanError: there is none.
        """
        if layer not in self.layers:
            raise PlanError(f"{self.name} has no direction at layer {layer!r}; it has layers {list(self.layers)}")
        return self.vectors[self.layers.index(layer)]


def directions_of(source: Any, name: str = "") -> tuple[Directions, ...]:
    """The directions of anything that has some.

    Args:
        source: a :class:`~sims_lens.run.Run` (one for each iteration), a :class:`~sims_lens.supervised.SteeringFit`, a
            :class:`~sims_lens.plan.SteeringPlan` (one for each site: the sum of its additions there, or the unit
            direction of another transform), vectors by layer ``{14: vector}``, a tensor ``[layer d_model]``,
            :class:`Directions`; or several of these by name, ``{"mine": run, "theirs": fit}``.
        name: what to call them; a name of their own where "".

    Raises:
        PlanError: it is nothing of the kind, or a vector is not finite and 1-d.
        RunError: a run has no finished iteration.
    """
    if isinstance(source, Directions):
        return (replace(source, name=name),) if name else (source,)
    if isinstance(source, Run):
        return tuple(_named(d, name) for d in _of_run(source))
    if isinstance(source, SteeringFit):
        vectors = [t.vector if isinstance(t, Addition) else t.direction for t in source.transforms]  # type: ignore[attr-defined]
        order = sorted(range(len(source.layers)), key=source.layers.__getitem__)
        halves = source.quality.split_half
        found = Directions(
            name=name or source.estimator,
            layers=tuple(source.layers[k] for k in order),
            vectors=torch.stack([vectors[k] for k in order]),
            site=source.site,
            split_half=torch.tensor([halves[k] for k in order]),
            residual_norm=source.residual_norm[order],
        )
        return (found,)
    if isinstance(source, SteeringPlan):
        return tuple(_named(d, name) for d in _of_plan(source))
    if isinstance(source, Tensor):
        if source.ndim != 2:
            raise PlanError(f"a tensor of directions has shape [layer, d_model], got {list(source.shape)}")
        return directions_of(dict(enumerate(source)), name)
    if isinstance(source, Mapping) and source and all(type(key) is int for key in source):
        layers = tuple(sorted(source))
        vectors = [checked_vector(source[layer], f"the vector of layer {layer}") for layer in layers]
        if len({len(v) for v in vectors}) > 1:
            raise PlanError(f"vectors must have one size, got {sorted({len(v) for v in vectors})}")
        return (Directions(name=name or "vectors", layers=layers, vectors=torch.stack(vectors)),)
    if isinstance(source, Mapping) and source and all(isinstance(key, str) for key in source):
        return tuple(
            _named(d, name) if name else d for key, value in source.items() for d in _under(key, directions_of(value))
        )
    raise PlanError(
        f"directions come from a Run, a SteeringFit, a SteeringPlan, {{layer: vector}}, a tensor [layer, d_model], or "
        f"several of them by name; got {type(source).__name__}"
    )


def _named(found: Directions, name: str) -> Directions:
    return replace(found, name=f"{name}, {found.name}") if name else found


def _under(key: str, found: tuple[Directions, ...]) -> tuple[Directions, ...]:
    """One source's directions take its name; several of a source keep theirs behind it."""
    return (replace(found[0], name=key),) if len(found) == 1 else tuple(_named(d, key) for d in found)


def _of_run(run: Run) -> list[Directions]:
    _ = run.plan  # says what to do where no iteration is finished
    return [
        Directions(
            name=f"iteration {i.index}",
            layers=tuple(range(len(i.vectors))),
            vectors=i.vectors.float(),
            site=run.config.steering.site,
            iteration=i.index,
            split_half=i.tensors["split_half"],
            shuffled=i.tensors["shuffled"].float(),
            residual_norm=i.tensors["median_norm"],
        )
        for i in run.iterations
    ]


def _of_plan(plan: SteeringPlan) -> list[Directions]:
    found: dict[str, dict[int, Tensor]] = {}
    for i in plan.interventions:
        if not isinstance(i.transform, Addition):
            direction = getattr(i.transform, "direction", None)
            if direction is None:
                raise PlanError(f"{i.describe()} has no direction")
            vector = direction
        elif i.units == "absolute" or i.residual_norm is not None:
            vector = i.strength * i.transform.vector
        else:
            vector = i.coefficient * i.transform.vector
        at = found.setdefault(i.site, {})
        at[i.layer] = at[i.layer] + vector if i.layer in at else vector
    return [
        Directions(
            name="plan" if len(found) == 1 else f"plan at {site}",
            layers=tuple(sorted(at)),
            vectors=torch.stack([at[layer] for layer in sorted(at)]),
            site=site,
        )
        for site, at in found.items()
    ]


__all__ = ["Directions", "directions_of"]
