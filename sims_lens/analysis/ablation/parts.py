"""Which part of a plan does the work: what is lost without it, or with a random direction in its place?"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sims_lens.analysis.ablation.meter import UnitMeter, Values, checked_behaviour
from sims_lens.analysis.ablation.text import (
    columns_of,
    counted,
    extremes,
    holds_zero,
    html_table,
    listed,
    percent,
    signed,
    spanned,
    text_table,
)
from sims_lens.behaviour import Behaviour, TextPair
from sims_lens.errors import PlanError, RunError
from sims_lens.estimators import unit
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.plan import NOTHING, Intervention, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.run import Run
from sims_lens.stats import CONFIDENCE, DRAWS, Interval, bca, bootstrap_mean, holm, sign_flip_p
from sims_lens.transforms import label

if TYPE_CHECKING:
    import pandas as pd

By = Literal["layer", "iteration", "intervention"]


@dataclass(frozen=True)
class Part:
    """What one part of a plan does. Intervals are over the behaviour's units, paired.

    Args:
        name: for instance "layer 14" or "iteration 2".
        plan: the part.
        alone: its effect by itself, against the unsteered model.
        without: the effect of the plan without it.
        lost: the effect of the whole plan less that: what the part adds to the others.
        share: ``lost`` over the effect of the whole; None where that effect's interval holds zero.
        p: of no loss, by sign flips of the units' losses, two-sided.
        p_holm: the same, adjusted for the number of parts (Holm).
        replaced: loss with a random direction of the part's norm in its place, mean over the controls; None without.
        replaced_range: the smallest and the largest loss among the controls.
    """

    name: str
    plan: SteeringPlan = field(repr=False)
    alone: Interval
    without: Interval
    lost: Interval
    share: Interval | None
    p: float
    p_holm: float
    replaced: Interval | None
    replaced_range: tuple[float, float] | None


@dataclass(frozen=True)
class LeaveOneOut:
    """A plan with its parts left out one at a time; made by :func:`leave_one_out`.

    Args:
        parts: in the order of the plan.
        base: the behaviour of the unsteered model.
        effect: of the whole plan, paired against the unsteered model.
        beyond_sum: that effect less the sum of the parts' effects alone. 0: they add up; negative: each does some of
            the others' work, or the measure saturates.
        by: what a part is: "layer", "iteration", "intervention", or "plan" where plans were given by name.
        behaviour: its name.
        measure_name: what a value is, with its unit.
        unit: what a value is of; pairs of one prompt are averaged.
        units: how many.
        controls: random replacements of each part.
    """

    parts: tuple[Part, ...]
    base: Interval
    effect: Interval
    beyond_sum: Interval
    by: str
    behaviour: str
    measure_name: str
    unit: str
    units: int
    controls: int

    def table(self) -> "pd.DataFrame":
        """One row per part: each figure with its ``_low`` and ``_high``."""
        import pandas as pd

        rows = []
        for part in self.parts:
            row: dict[str, Any] = {"part": part.name}
            for name in ("lost", "share", "without", "alone", "replaced"):
                row |= columns_of(name, getattr(part, name))
            low, high = part.replaced_range or (np.nan, np.nan)
            row |= {"replaced_min": low, "replaced_max": high, "p": part.p, "p_holm": part.p_holm}
            rows.append(row)
        return pd.DataFrame(rows).set_index("part")

    def verdict(self) -> str:
        """What the parts do, in one or two sentences."""
        if holds_zero(self.effect):
            return f"The plan has no clear effect on {self.behaviour} ({signed(self.effect)}): there is little to lose."
        needed = [
            p.name for p in self.parts if p.p_holm < 1 - CONFIDENCE and p.lost.estimate * self.effect.estimate > 0
        ]
        harmful = [
            p.name for p in self.parts if p.p_holm < 1 - CONFIDENCE and p.lost.estimate * self.effect.estimate < 0
        ]
        if self.units < (enough := _units_needed(len(self.parts))):
            return (
                f"Too few {self.unit}s to tell which part the effect, {signed(self.effect)}, needs: there "
                f"{'is' if self.units == 1 else 'are'} {self.units}, and no test of {counted(len(self.parts), 'part')} "
                f"can be significant below {enough}."
            )
        text = (
            f"The effect, {signed(self.effect)}, falls without {listed(needed)}"
            if needed
            else (f"No part by itself is needed for the effect, {signed(self.effect)}")
        )
        text += f", and grows without {listed(harmful)}." if harmful else "."
        most = max(self.parts, key=lambda p: abs(p.lost.estimate))
        if most.replaced is not None and most.name in needed:
            text += (
                f" A random direction of the same norm in place of {most.name} loses {signed(most.replaced)} of the "
                f"{most.lost.estimate:+.3g} that leaving it out does."
            )
        return text

    def _head(self) -> str:
        return f"Leave one {self.by} out: {self.behaviour}, {self.measure_name}, {counted(self.units, self.unit)}" + (
            f", {counted(self.controls, 'random replacement')}" if self.controls else ""
        )

    def _cells(self) -> list[tuple[str, ...]]:
        head = ["part", "lost without it [95%]", "share", "alone", "p (Holm)"]
        head += ["lost if random [95%]", "range"] if self.controls else []
        cells = [tuple(head)]
        for p in self.parts:
            row = [p.name, signed(p.lost), "" if p.share is None else percent(p.share), f"{p.alone.estimate:+.3g}"]
            row.append(f"{p.p_holm:.2g}")
            if p.replaced is not None and p.replaced_range is not None:
                row += [signed(p.replaced), spanned(p.replaced_range)]
            cells.append(tuple(row))
        return cells

    def _below(self) -> list[str]:
        return [
            f"whole plan {signed(self.effect)}; beyond the sum of its parts {signed(self.beyond_sum)}",
            self.verdict(),
        ]

    def __repr__(self) -> str:
        return text_table(self._head(), self._cells(), self._below())

    def _repr_html_(self) -> str:
        return html_table(self._head(), self._cells(), self._below())


def leave_one_out(
    model: Any,
    source: "SteeringPlan | Run | Mapping[str, SteeringPlan]",
    behaviour: Behaviour | Sequence[TextPair],
    *,
    by: str | None = None,
    controls: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> LeaveOneOut:
    """Measure a behaviour under a plan, without each of its parts, under each part alone, and with random ones.

    With n parts that is 2 + n (2 + controls) measurements. Everything is paired: the same units, and the same random
    numbers where responses are sampled.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        source: a plan, a run (its last plan), or plans by name whose sum is the whole.
        behaviour: what to measure, on texts or prompts that the plan was not fitted to; a list of ``(prompt, positive
            text, negative text)`` is a :class:`~sims_lens.behaviour.PairBehaviour`.
        by: what a part is, see :func:`parts_of`; "layer" for a plan or a run.
        controls: random directions, of the norm of the part's own and for the same transforms, put in its place.
        seed: of the controls and the intervals.
        progress: show a progress bar.

    Raises:
        PlanError: the source has no such parts, does not fit the model, or a transform's direction can't be replaced.
        ConfigError: ``controls`` is negative, or the behaviour has fewer than two units.
        ModelError: a plan is attached to the model.
    """
    check_unsteered(model)
    behaviour = checked_behaviour(behaviour, controls, seed)
    parts = {name: resolve(model, part) for name, part in parts_of(source, by).items()}
    plans = [_Variants.of(parts, name, controls, seed) for name in parts]
    everything = [plan for v in plans for plan in (v.alone, v.without, *v.replaced)]
    measure = UnitMeter(model, behaviour, [_sum(parts.values()), *everything])
    with Progress(2 + len(parts) * (2 + controls), show=progress) as bar:

        def values(plan: SteeringPlan, phase: str) -> Values:
            bar.phase(phase)
            found = measure(plan)
            bar.advance()
            return found

        base = values(NOTHING, "unsteered")
        whole = values(_sum(parts.values()), "whole plan") - base
        found = []
        for name, variant in zip(parts, plans, strict=True):
            alone = values(variant.alone, f"{name} alone") - base
            without = values(variant.without, f"without {name}") - base
            replaced = [values(plan, f"{name} at random") - base for plan in variant.replaced]
            found.append((name, alone, without, np.stack(replaced) if replaced else None))
    effect = bootstrap_mean(whole, seed=seed)
    tests = [sign_flip_p(whole - without, seed=seed) for _, _, without, _ in found]
    return LeaveOneOut(
        parts=tuple(
            Part(
                name=name,
                plan=parts[name],
                alone=bootstrap_mean(alone, seed=seed),
                without=bootstrap_mean(without, seed=seed),
                lost=bootstrap_mean(whole - without, seed=seed),
                share=None if holds_zero(effect) else _ratio(whole - without, whole, seed=seed),
                p=p,
                p_holm=adjusted,
                replaced=None if random is None else bootstrap_mean(whole - random.mean(0), seed=seed),
                replaced_range=None if random is None else extremes((whole - random).mean(1)),
            )
            for (name, alone, without, random), p, adjusted in zip(found, tests, holm(tests), strict=True)
        ),
        base=bootstrap_mean(base, seed=seed),
        effect=effect,
        beyond_sum=bootstrap_mean(whole - sum(alone for _, alone, _, _ in found), seed=seed),
        by="plan" if isinstance(source, Mapping) else by or "layer",
        behaviour=behaviour.name,
        measure_name=behaviour.measure_name,
        unit=measure.unit,
        units=len(base),
        controls=controls,
    )


def parts_of(
    source: "SteeringPlan | Run | Mapping[str, SteeringPlan]", by: str | None = None
) -> dict[str, SteeringPlan]:
    """The parts of a plan by name; attached together, in this order, they are the plan.

    Args:
        source: a plan, a run (its last plan), or plans by name, which are the parts.
        by: "layer" (the default), "intervention" (one transform at one site), or "iteration": what each iteration of a
            run added to the vector that is steered with. None for plans by name.

    Raises:
        PlanError: there is nothing to take apart, or not like that.
        RunError: a run has no finished iteration, or its iterations don't add up to its plan.
    """
    if isinstance(source, Mapping):
        if by is not None:
            raise PlanError(f"plans by name are the parts themselves; leave out by={by!r}, or give one plan")
        for name, plan in source.items():
            if not isinstance(name, str) or not isinstance(plan, SteeringPlan):
                raise PlanError(f"parts are plans by name, got {name!r}: {type(plan).__name__}")
        if not source:
            raise PlanError("there are no plans to leave out; give them by name, {'cheerful': a, 'plain': b}")
        return dict(source)
    by = by or "layer"
    if by not in get_args(By):
        raise PlanError(f"by must be one of {', '.join(get_args(By))}, got {by!r}")
    if by == "iteration":
        if not isinstance(source, Run):
            raise PlanError(
                f"a {type(source).__name__} does not know its iterations; give the run, or by='layer' or 'intervention'"
            )
        return _iterations(source)
    plan = source.plan if isinstance(source, Run) else source
    if not isinstance(plan, SteeringPlan):
        raise PlanError(f"expected a SteeringPlan, a Run or plans by name, got {type(source).__name__}")
    if not plan.interventions:
        raise PlanError("the plan steers nothing: there is nothing to leave out")
    if by == "layer":
        return {f"layer {layer}": plan.restrict([layer]) for layer in plan.layers}
    names = [f"layer {i.layer} {i.site} {label(i.transform)}" for i in plan.interventions]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    return {name: replace(plan, interventions=(i,)) for name, i in zip(names, plan.interventions, strict=True)}


def _iterations(run: Run) -> dict[str, SteeringPlan]:
    """What each iteration added: the terms of the sum at the top of :mod:`sims_lens.iteration`."""
    plan, settings = run.plan, run.config.steering
    if settings.compose == "replace":
        raise PlanError(
            "this run's iterations replaced each other (compose='replace'): its plan holds the last one only; use "
            "by='layer', or compare run.iterations[k].plan by themselves"
        )
    norms = {i.layer: i.residual_norm for i in plan.interventions if i.residual_norm is not None}
    if missing := set(plan.layers) - norms.keys():
        raise RunError(f"the plan of {run.path} has no residual norm at layer {min(missing)}; use by='layer'")
    if run.best is None:
        raise RunError(f"every iteration of {run.path} was rolled back: there is nothing to leave out")
    parts = {}
    for iteration, coefficient in zip(run.iterations, run.best.coefficients, strict=False):
        if not coefficient:
            continue  # rolled back
        vectors = {layer: iteration.vectors[layer].float() for layer in plan.layers}
        vectors = {layer: vector for layer, vector in vectors.items() if bool(vector.any())}
        part = SteeringPlan((), plan.provenance)
        if vectors:
            part = SteeringPlan.addition(
                vectors,
                coefficient=coefficient,
                units="residual_norm",
                site=settings.site,
                scope=settings.scope,
                residual_norms=norms,
                provenance=plan.provenance,
            )
        parts[f"iteration {iteration.index}"] = part
    added, wanted = _sum(parts.values()).vectors(), plan.vectors()
    for where, vector in wanted.items():
        off = float((added.get(where, torch.zeros_like(vector)) - vector).norm() / vector.norm().clamp(min=1e-30))
        if off > 1e-3:
            raise RunError(
                f"the iterations of {run.path} miss its plan at layer {where[0]} by {off:.2g} of its norm: the files "
                "are not of one run; use by='layer'"
            )
    return parts


@dataclass(frozen=True)
class _Variants:
    """The plans that are measured for one part."""

    alone: SteeringPlan
    without: SteeringPlan
    replaced: tuple[SteeringPlan, ...]

    @classmethod
    def of(cls, parts: Mapping[str, SteeringPlan], left_out: str, controls: int, seed: int) -> "_Variants":
        where = list(parts).index(left_out)
        replaced = []
        for control in range(controls):
            random = random_like(parts[left_out], np.random.default_rng([seed, where, control]))
            replaced.append(_sum(random if name == left_out else part for name, part in parts.items()))
        return cls(
            alone=parts[left_out],
            without=_sum(part for name, part in parts.items() if name != left_out),
            replaced=tuple(replaced),
        )


def random_like(plan: SteeringPlan, rng: np.random.Generator) -> SteeringPlan:
    """The plan with a random direction of the same norm in place of every direction; the transforms stay.

    Directions are isotropic; where the plan's own is centred (see :meth:`SteeringPlan.centred`), so is the random one,
    and where two interventions share a vector, their random ones are the same.

    Args:
        plan: of additions and other transforms with a direction.
        rng: draws the directions.

    Raises:
        PlanError: a transform's direction can't be replaced.
    """
    known: dict[bytes, Tensor] = {}

    def at_random(i: Intervention) -> Intervention:
        centred = SteeringPlan((i,)).is_centred

        def like(vector: Tensor) -> Tensor:
            key = vector.detach().numpy().tobytes()
            if key not in known:
                drawn = rng.standard_normal(len(vector))
                drawn -= drawn.mean() if centred and len(vector) > 1 else 0.0
                known[key] = unit(torch.from_numpy(drawn)).to(vector.dtype) * vector.norm()
            return known[key]

        try:
            return replace(i, transform=i.transform.mapped(like))  # type: ignore[attr-defined]
        except (AttributeError, PlanError) as error:
            raise PlanError(
                f"{i.describe()} has no direction that a random one could replace; pass controls=0"
            ) from error

    return replace(plan, interventions=tuple(at_random(i) for i in plan.interventions))


def _sum(parts: Iterable[SteeringPlan]) -> SteeringPlan:
    total: SteeringPlan | None = None
    for part in parts:
        total = part if total is None else total + part
    return NOTHING if total is None else total


def _ratio(part: Values, whole: Values, *, seed: int) -> Interval:
    """Ratio of two means with its bootstrap interval; both are resampled together."""
    rows = np.random.default_rng(seed).integers(0, len(whole), size=(DRAWS, len(whole)))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = part[rows].mean(1) / whole[rows].mean(1)
    ratio = float(part.mean() / whole.mean())
    return bca(ratio, drawn, part - ratio * whole)


def _units_needed(parts: int) -> int:
    """Units from which on a sign-flip test can be significant: of n, its smallest p is 2 / 2^n, times the parts."""
    return next(n for n in itertools.count(1) if parts * 2 / 2**n < 1 - CONFIDENCE)


__all__ = ["By", "LeaveOneOut", "Part", "leave_one_out", "parts_of", "random_like"]
