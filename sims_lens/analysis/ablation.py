"""Ablation studies of a plan: which of its parts does the work, and does the model itself use its direction?

:func:`leave_one_out` takes the parts of a plan away, one at a time: what is lost without a part, what the part does by
itself, and what is lost when a random direction of the same norm stands in its place. A part whose direction matters
loses as much under replacement as when it is left out; one whose norm alone matters loses nothing.

:func:`directional_ablation` looks at the *unsteered* model: with the direction taken out of the residual stream, does
the behaviour fall? That is necessity, where steering shows sufficiency.
"""

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import capture_tokens
from sims_lens.adapter import Adapter, adapt
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.behaviour import Behaviour, PairBehaviour, TextPair, encode_pairs
from sims_lens.checks import check_integer, shown
from sims_lens.errors import ConfigError, PlanError, RunError
from sims_lens.estimators import unit
from sims_lens.forced import ForcedBatch, force
from sims_lens.hooks import check_fits, check_unsteered, resolve, steering
from sims_lens.plan import NOTHING, Intervention, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import everyday
from sims_lens.run import Run
from sims_lens.sampling import LocalSampler
from sims_lens.scope import GENERATION, TokenScope
from sims_lens.sites import check_layer
from sims_lens.stats import CONFIDENCE, DRAWS, Interval, bca, bootstrap_mean, holm, sign_flip_p
from sims_lens.transforms import Ablation, label

if TYPE_CHECKING:
    import pandas as pd

By = Literal["layer", "iteration", "intervention"]
Values = Float[np.ndarray, " unit"]

_STREAM_PROMPTS: Final = 16


# Leave one out


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
                row |= _columns(name, getattr(part, name))
            low, high = part.replaced_range or (np.nan, np.nan)
            row |= {"replaced_min": low, "replaced_max": high, "p": part.p, "p_holm": part.p_holm}
            rows.append(row)
        return pd.DataFrame(rows).set_index("part")

    def verdict(self) -> str:
        """What the parts do, in one or two sentences."""
        if _holds_zero(self.effect):
            return (
                f"The plan has no clear effect on {self.behaviour} ({_signed(self.effect)}): there is little to lose."
            )
        needed = [
            p.name for p in self.parts if p.p_holm < 1 - CONFIDENCE and p.lost.estimate * self.effect.estimate > 0
        ]
        harmful = [
            p.name for p in self.parts if p.p_holm < 1 - CONFIDENCE and p.lost.estimate * self.effect.estimate < 0
        ]
        if self.units < (enough := _units_needed(len(self.parts))):
            return (
                f"Too few {self.unit}s to tell which part the effect, {_signed(self.effect)}, needs: there "
                f"{'is' if self.units == 1 else 'are'} {self.units}, and no test of {_count(len(self.parts), 'part')} "
                f"can be significant below {enough}."
            )
        text = (
            f"The effect, {_signed(self.effect)}, falls without {_list(needed)}"
            if needed
            else (f"No part by itself is needed for the effect, {_signed(self.effect)}")
        )
        text += f", and grows without {_list(harmful)}." if harmful else "."
        most = max(self.parts, key=lambda p: abs(p.lost.estimate))
        if most.replaced is not None and most.name in needed:
            text += (
                f" A random direction of the same norm in place of {most.name} loses {_signed(most.replaced)} of the "
                f"{most.lost.estimate:+.3g} that leaving it out does."
            )
        return text

    def _head(self) -> str:
        return f"Leave one {self.by} out: {self.behaviour}, {self.measure_name}, {_count(self.units, self.unit)}" + (
            f", {_count(self.controls, 'random replacement')}" if self.controls else ""
        )

    def _cells(self) -> list[tuple[str, ...]]:
        head = ["part", "lost without it [95%]", "share", "alone", "p (Holm)"]
        head += ["lost if random [95%]", "range"] if self.controls else []
        cells = [tuple(head)]
        for p in self.parts:
            row = [p.name, _signed(p.lost), "" if p.share is None else _percent(p.share), f"{p.alone.estimate:+.3g}"]
            row.append(f"{p.p_holm:.2g}")
            if p.replaced is not None and p.replaced_range is not None:
                row += [_signed(p.replaced), _span(p.replaced_range)]
            cells.append(tuple(row))
        return cells

    def _below(self) -> list[str]:
        return [
            f"whole plan {_signed(self.effect)}; beyond the sum of its parts {_signed(self.beyond_sum)}",
            self.verdict(),
        ]

    def __repr__(self) -> str:
        return _text(self._head(), self._cells(), self._below())

    def _repr_html_(self) -> str:
        return _html(self._head(), self._cells(), self._below())


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
    behaviour = _checked(behaviour, controls, seed)
    parts = {name: resolve(model, part) for name, part in parts_of(source, by).items()}
    plans = [_Variants.of(parts, name, controls, seed) for name in parts]
    everything = [plan for v in plans for plan in (v.alone, v.without, *v.replaced)]
    measure = _Meter(model, behaviour, [_sum(parts.values()), *everything])
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
                share=None if _holds_zero(effect) else _ratio(whole - without, whole, seed=seed),
                p=p,
                p_holm=adjusted,
                replaced=None if random is None else bootstrap_mean(whole - random.mean(0), seed=seed),
                replaced_range=None if random is None else _range((whole - random).mean(1)),
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


# Directional ablation of the unsteered model


@dataclass(frozen=True)
class AblatedControl:
    """The behaviour without a random direction.

    Args:
        kind: "random": isotropic; "matched": with the direction's share of the stream's variance.
        value: of the behaviour.
        difference: paired, against the unsteered model.
        nll: rise of the texts' negative log-likelihood, nats per token; None where there are no texts.
        variance: share of the stream's variance along it, at the direction's layer.
    """

    kind: str
    value: Interval
    difference: Interval
    nll: Interval | None
    variance: float


@dataclass(frozen=True)
class DirectionalAblation:
    """The unsteered model with a direction taken out; made by :func:`directional_ablation`.

    Args:
        name: of the direction.
        layer: whose direction.
        site: where it was read, or acts.
        everywhere: taken out at every layer, or only at its own.
        scope: the tokens where it is taken out.
        baseline: the behaviour of the unsteered model.
        ablated: without the direction.
        difference: paired.
        nll: rise of the texts' negative log-likelihood, both texts of a pair alike, nats per token; None where there
            are no texts. A behaviour that falls because the model is broken shows here.
        variance: share of the stream's variance along the direction, at its layer; 1 / d_model is what a random
            direction has on average.
        controls: random directions, isotropic ones first.
        behaviour: its name.
        measure_name: what a value is, with its unit.
        unit: what a value is of; pairs of one prompt are averaged.
        units: how many.
        first_position: whether the first position is among the tokens: its massive activations then drive the
            difference and the NLL.
    """

    name: str
    layer: int
    site: str
    everywhere: bool
    scope: str
    baseline: Interval
    ablated: Interval
    difference: Interval
    nll: Interval | None
    variance: float
    controls: tuple[AblatedControl, ...]
    behaviour: str
    measure_name: str
    unit: str
    units: int
    first_position: bool

    def of_kind(self, kind: str) -> tuple[AblatedControl, ...]:
        """The controls of a kind, "random" or "matched"."""
        return tuple(c for c in self.controls if c.kind == kind)

    @property
    def falls(self) -> bool:
        """Whether the behaviour falls: the interval of the difference lies below zero."""
        return self.difference.high < 0

    @property
    def beats_controls(self) -> bool | None:
        """Whether it falls further than under every control; None without controls."""
        if not self.controls:
            return None
        return all(self.difference.estimate < c.difference.estimate for c in self.controls)

    def table(self) -> "pd.DataFrame":
        """One row for the unsteered model, the ablated one, and each control."""
        import pandas as pd

        rows: list[dict[str, Any]] = [{"ablated": "nothing", "kind": "base", **_columns("value", self.baseline)}]
        direction = AblatedControl("direction", self.ablated, self.difference, self.nll, self.variance)
        for found, name in [(direction, self.name), *((c, f"{c.kind} {k}") for c, k in self._numbered())]:
            row: dict[str, Any] = {"ablated": name, "kind": found.kind}
            for column in ("value", "difference", "nll"):
                row |= _columns(column, getattr(found, column))
            rows.append(row | {"variance": found.variance})
        return pd.DataFrame(rows).set_index("ablated")

    def _numbered(self) -> list[tuple[AblatedControl, int]]:
        return [(c, k) for kind in ("random", "matched") for k, c in enumerate(self.of_kind(kind), start=1)]

    def verdict(self) -> str:
        """Does the behaviour fall, and further than without a random direction? In plain sentences."""
        change = _signed(self.difference)
        if not self.falls:
            what = "rises" if self.difference.low > 0 else "does not fall"
            text = f"Without the direction the behaviour {what} ({change})."
            return text + " The model does not need the direction for it." + self._cost()
        text = f"Without the direction the behaviour falls by {_signed(self.difference, flip=True)}"
        if not self.controls:
            return f"{text}; there are no controls to compare it with.{self._cost()}"
        extremes = [
            f"a random direction{of} ({_fall(found)})"
            if len(found) == 1
            else f"{len(found)} random directions{of} (at most {_fall(found)})"
            for of, found in (("", self.of_kind("random")), (" of the same variance", self.of_kind("matched")))
            if found
        ]
        if self.beats_controls:
            many = len(self.controls) > len(extremes)
            others = f"any of {' and '.join(extremes)}" if many else " or ".join(extremes)
            return f"{text}, more than without {others}.{self._cost()}"
        return (
            f"{text}, but NOT more than without every random direction: {' and '.join(extremes)}. That is no evidence "
            f"for this direction.{self._cost()}"
        )

    def _below(self) -> list[str]:
        first = "The first position is ablated too: its massive activations drive part of the difference and the NLL."
        return [self.verdict(), *([first] if self.first_position else [])]

    def _cost(self) -> str:
        if self.nll is None:
            return ""
        found = [c.nll.estimate for c in self.controls if c.nll is not None]
        others = f"; {_span(found, 2)} under the control{'' if len(found) == 1 else 's'}" if found else ""
        return f" The texts' NLL changes by {_signed(self.nll)} nats per token{others}."

    def _head(self) -> str:
        where = "every layer" if self.everywhere else f"layer {self.layer} {self.site}"
        return (
            f"Directional ablation of {self.name}, layer {self.layer}, at {where} ({self.scope} tokens): "
            f"{self.behaviour}, {self.measure_name}, {_count(self.units, self.unit)}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        texts = self.nll is not None
        cells = [("taken out", "value [95%]", "difference [95%]", *(["NLL"] if texts else []), "variance")]
        cells.append(("nothing", _plain(self.baseline), "", *([""] if texts else []), ""))
        cells.append(
            (
                self.name,
                _plain(self.ablated),
                _signed(self.difference),
                *([f"{self.nll.estimate:+.2g}"] if self.nll is not None else []),
                f"{100 * self.variance:.2g}%",
            )
        )
        for kind in ("random", "matched"):
            if found := self.of_kind(kind):
                nll = [c.nll.estimate for c in found if c.nll is not None]
                cells.append(
                    (
                        f"{len(found)} {kind}",
                        f"{np.mean([c.value.estimate for c in found]):.3f}",
                        _span([c.difference.estimate for c in found]),
                        *([_span(nll, 2)] if texts else []),
                        f"{100 * np.mean([c.variance for c in found]):.2g}%",
                    )
                )
        return cells

    def __repr__(self) -> str:
        return _text(self._head(), self._cells(), self._below())

    def _repr_html_(self) -> str:
        return _html(self._head(), self._cells(), self._below())


def directional_ablation(
    model: Any,
    source: object,
    behaviour: Behaviour | Sequence[TextPair],
    *,
    layer: int | None = None,
    everywhere: bool = True,
    scope: TokenScope | str = "generation",
    controls: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> DirectionalAblation:
    """Take a direction out of the unsteered model's residual stream: does the behaviour fall?

    Two kinds of control. A random direction in d_model dimensions holds about 1/d_model of the stream's variance, next
    to nothing, so that any direction with more of it beats random ones. The *matched* controls are random directions
    bent towards those in which the stream varies, until they hold as much of its variance as the direction. Variance
    is that of the tokens of the scope, first positions left out; where responses are sampled, of one unsteered response
    to each prompt.

    Reference: Arditi et al. 2024, "Refusal in language models is mediated by a single direction" (arXiv 2406.11717).
        As there, the direction is taken out of all that is written to the stream. They do so at all tokens, which is
        the same as taking it out of the weights that write (``scope="all"``). With "all" or "prompt" the first position
        is ablated too, though, and its massive activations, which hold no information about the text but serve
        attention as a sink, then drive difference and NLL. So the default is the tokens that steering acts on.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        source: what has a direction, see :func:`~sims_lens.analysis.directions_of`; of a run its last iteration.
        behaviour: what to measure; a list of ``(prompt, positive text, negative text)`` is a
            :class:`~sims_lens.behaviour.PairBehaviour`.
        layer: whose direction; it need not be named where there is one only, or one that a run steers.
        everywhere: take it out at every layer; False for its own layer and site only.
        scope: tokens where it is taken out; by default the last of the prompt and the response, as in steering.
        controls: random directions of each kind.
        seed: of the controls and the intervals.
        progress: show a progress bar.

    Raises:
        PlanError: there are several directions or none, or they don't fit the model.
        ConfigError: ``controls`` is negative, the behaviour has fewer than two units, or the stream is the same at all
            tokens of the scope.
        ModelError: a plan is attached to the model.
    """
    check_unsteered(model)
    behaviour = _checked(behaviour, controls, seed)
    adapter = adapt(model)
    found, layer = _one_direction(source, layer)
    check_layer(layer, adapter.n_layers, adapter.name)
    scope = TokenScope.of(scope)

    def plan_of(direction: Tensor) -> SteeringPlan:
        where = None if everywhere else (layer, found.site)
        plan = ablation_plan(adapter.n_layers, direction, where=where, scope=scope)
        return plan.centred() if str(adapter.cfg.normalization_type).startswith("LN") else plan

    plan = plan_of(found.at(layer))
    check_fits(adapter, plan)
    direction: Tensor = plan.interventions[0].transform.direction  # type: ignore[attr-defined]
    rows = _scoped_rows(model, adapter, behaviour, scope, seed)
    first = [scope.prompt or (scope.last_prompt and len(prompt) == 1) for prompt, _ in rows]
    stream = _stream(model, rows, first, layer, found.site, scope)
    rng = np.random.default_rng([seed, layer])
    random = [torch.from_numpy(rng.standard_normal(adapter.d_model)).float() for _ in range(controls)]
    matched = _matched(stream, controls, rng, variance_share(stream, direction))
    drawn = [("random", vector) for vector in random] + [("matched", vector) for vector in matched]
    plans = [NOTHING, plan, *(plan_of(vector) for _, vector in drawn)]
    measure = _Meter(model, behaviour, plans)
    values: list[Values] = []
    nlls: list[Values | None] = []
    with Progress(len(plans), show=progress) as bar:
        bar.phase("directional ablation")
        for each in plans:
            value, nll = measure.with_nll(each)
            values.append(value)
            nlls.append(nll)
            bar.advance()
    base, ablated, *others = values

    def rise(index: int) -> Interval | None:
        before, after = nlls[0], nlls[index]
        return None if before is None or after is None else bootstrap_mean(after - before, seed=seed)

    return DirectionalAblation(
        name=found.name,
        layer=layer,
        site=found.site,
        everywhere=everywhere,
        scope=scope.name,
        baseline=bootstrap_mean(base, seed=seed),
        ablated=bootstrap_mean(ablated, seed=seed),
        difference=bootstrap_mean(ablated - base, seed=seed),
        nll=rise(1),
        variance=variance_share(stream, direction),
        controls=tuple(
            AblatedControl(
                kind=kind,
                value=bootstrap_mean(value, seed=seed),
                difference=bootstrap_mean(value - base, seed=seed),
                nll=rise(index),
                variance=variance_share(stream, vector),
            )
            for index, ((kind, vector), value) in enumerate(zip(drawn, others, strict=True), start=2)
        ),
        behaviour=behaviour.name,
        measure_name=behaviour.measure_name,
        unit=measure.unit,
        units=len(base),
        first_position=any(first),
    )


def ablation_plan(
    n_layers: int,
    direction: Float[Tensor, " d_model"],
    *,
    where: tuple[int, str] | None = None,
    scope: TokenScope | str = "all",
) -> SteeringPlan:
    """The plan that takes a direction out of the stream: everywhere, or at one layer and site.

    Everywhere means out of the embedding and of what each attention and each MLP writes, so that no block ever reads
    the direction: with scope "all" this is the same as orthogonalising the weights that write to the stream.

    Args:
        n_layers: of the model.
        direction: any norm but zero.
        where: (layer, site) for one place; None for everywhere.
        scope: which tokens.

    Raises:
        PlanError: the direction is zero or not finite.
    """
    ablate = Ablation(direction)
    check_integer("n_layers", n_layers, error=PlanError)
    if where is not None:
        if not isinstance(where, tuple) or len(where) != 2:
            raise PlanError(f"where must be (layer, site), such as (17, 'resid_post'), got {shown(where)}")
        return SteeringPlan.of({where[0]: ablate}, site=where[1], scope=scope)
    plan = SteeringPlan.of({0: ablate}, site="resid_pre", scope=scope)
    for site in ("attn_out", "mlp_out"):
        plan = plan + SteeringPlan.of(dict.fromkeys(range(n_layers), ablate), site=site, scope=scope)
    return plan


def variance_share(stream: Float[Tensor, "token d_model"], direction: Float[Tensor, " d_model"]) -> float:
    """Share of the variance of a stream that lies along a direction; the shares of a basis add up to 1."""
    centred = stream.double() - stream.double().mean(0)
    along = centred @ unit(direction.double())
    return float(along.square().sum() / centred.square().sum().clamp(min=1e-300))


def _matched(
    stream: Float[Tensor, "token d_model"], count: int, rng: np.random.Generator, share: float
) -> list[Tensor]:
    """Random directions that hold a share of the stream's variance.

    Along its i-th principal axis, of variance v_i, a direction has the entry g_i v_i^(p/2) with g normal: isotropic
    at p = 0, like a token of the stream at p = 1. The share rises with p, whatever g is, so bisection finds p. Where
    the stream does not vary, because its tokens are fewer than its dimensions, v is next to nothing.
    """
    centred = stream.double() - stream.double().mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-6 * values[0]
    variances, axes = (values[kept] / values[0]).square(), axes[kept]
    total = float(variances.sum())
    variances = torch.cat([variances, torch.tensor([1e-12]).double()])  # the last: all that is left of the space

    def entries(drawn: Tensor, power: float) -> Tensor:
        size = variances.log() * power / 2
        return unit(drawn * (size - size.max()).exp())

    found = []
    for _ in range(count):
        whole = torch.from_numpy(rng.standard_normal(stream.shape[1]))
        rest = whole - axes.T @ (axes @ whole)
        drawn = torch.cat([axes @ whole, rest.norm()[None]])
        low, high = -16.0, 16.0
        for _ in range(50):
            middle = (low + high) / 2
            held = float(entries(drawn, middle).square() @ variances) / total
            low, high = (low, middle) if held > share else (middle, high)
        found.append(unit(entries(drawn, low) @ torch.cat([axes, rest[None] / rest.norm().clamp(min=1e-12)])).float())
    return found


def _one_direction(source: object, layer: int | None) -> tuple[Directions, int]:
    several = directions_of(source)
    if not several:
        raise PlanError(f"the source has no directions: {shown(source)}")
    if len(several) > 1 and not isinstance(source, Run):
        raise PlanError(f"one direction is ablated at a time; name one of {', '.join(d.name for d in several)}")
    found = several[-1]
    layers = source.plan.layers if isinstance(source, Run) else found.layers
    if layer is None and len(layers) > 1:
        raise PlanError(f"{found.name} has directions at layers {list(layers)}; name the layer")
    layer = layers[0] if layer is None else layer
    if not bool(found.at(layer).any()):
        raise PlanError(f"the direction of {found.name} at layer {layer} is zero: there is nothing to ablate")
    return found, layer


def _scoped_rows(
    model: Any, adapter: Adapter, behaviour: Behaviour, scope: TokenScope, seed: int
) -> list[tuple[list[int], list[int]]]:
    """The behaviour's texts; or its prompts, with a response of the unsteered model where the scope holds responses."""
    if isinstance(behaviour, PairBehaviour):
        return _rows(adapter, behaviour)
    prompts: Sequence[str] = getattr(behaviour, "prompts", None) or everyday(_STREAM_PROMPTS)
    if not scope.response:
        return [(adapter.encode(prompt), []) for prompt in prompts]
    sampler = LocalSampler(model, getattr(behaviour, "sampling", None))
    drawn = sorted(sampler.sample(prompts, n=1, plan=NOTHING, seed=seed), key=lambda sample: sample.prompt)
    rows = [(adapter.encode(prompts[sample.prompt]), list(sample.tokens)) for sample in drawn]
    rows = [row for row in rows if row[1] or scope.last_prompt]
    if not rows:
        raise ConfigError(f"all responses are empty, so the scope {scope.name!r} holds no tokens; use scope='all'")
    return rows


def _stream(
    model: Any,
    rows: Sequence[tuple[list[int], list[int]]],
    first: Sequence[bool],
    layer: int,
    site: str,
    scope: TokenScope,
) -> Float[Tensor, "token d_model"]:
    """The unsteered stream at the tokens of a scope; without first positions, whose massive activations would be all of
    the variance."""
    tokens = capture_tokens(model, rows, layers=[layer], site=site, scope=scope)
    stream = torch.cat([row[int(skip) :, 0] for row, skip in zip(tokens, first, strict=True)])
    if len(stream) < 2 or float((stream - stream.mean(0)).norm()) <= 1e-4 * float(stream.norm()):
        raise ConfigError(
            f"the stream at layer {layer} {site} is the same at all {len(stream)} tokens of scope {scope.name!r}, so "
            "there is no variance to match; give more prompts, or another scope"
        )
    return stream


def _rows(adapter: Adapter, behaviour: PairBehaviour) -> list[tuple[list[int], list[int]]]:
    """The texts of the pairs, the positive one of each first."""
    prompts, texts = encode_pairs(adapter, behaviour.pairs)
    return [(prompts[pair[0]], texts[text]) for pair in behaviour.pairs for text in pair[1:]]


# What both share


class _Meter:
    """Measures a behaviour, one value per independent unit: pairs of one prompt are averaged.

    Pairs of texts are run teacher-forced, what the plans leave alone only once; that gives their NLL as well.

    Args:
        model: unsteered.
        behaviour: what is measured.
        plans: every plan that will be measured.
    """

    def __init__(self, model: Any, behaviour: Behaviour, plans: Iterable[SteeringPlan]) -> None:
        self.model, self.behaviour, self.unit = model, behaviour, behaviour.unit
        self._groups: list[list[int]] = []
        self._batches: list[ForcedBatch] = []
        if isinstance(behaviour, PairBehaviour):
            prompts: dict[str, list[int]] = {}
            for index, (prompt, _, _) in enumerate(behaviour.pairs):
                prompts.setdefault(prompt, []).append(index)
            if 1 < len(prompts) < len(behaviour.pairs):
                self._groups, self.unit = list(prompts.values()), "prompt"
            self._prepare(behaviour, [plan for plan in plans if plan.interventions])

    def _prepare(self, behaviour: PairBehaviour, plans: Sequence[SteeringPlan]) -> None:
        scopes = {i.scope for plan in plans for i in plan.interventions}
        rows = _rows(adapt(self.model), behaviour)
        replayed = any(plan.layers[0] for plan in plans)
        self._base = torch.empty(len(rows), dtype=torch.float64)
        for batch in force(self.model, rows, scope=reduce(or_, scopes, GENERATION), together=2):
            self._base[list(batch.rows)] = batch.mean(batch.logprobs(batch.logits)).double().cpu()
            # What no run needs is let go: the unsteered logits of all texts may take gigabytes.
            streams = batch.streams if replayed else ()
            self._batches.append(replace(batch, logits=batch.logits[..., :0].clone(), streams=streams))

    def __call__(self, plan: SteeringPlan) -> Values:
        """The behaviour under a plan."""
        return self.with_nll(plan)[0]

    def with_nll(self, plan: SteeringPlan) -> tuple[Values, Values | None]:
        """The behaviour under a plan, and the mean NLL of both texts of a pair; None where there are no texts."""
        if not self._batches:
            return self._reduced(self.behaviour.measure(self.model, plan).double().cpu().numpy()), None
        means = self._base
        if plan.interventions:
            means = torch.empty_like(self._base)
            with torch.no_grad(), steering(self.model, plan):
                for batch in self._batches:
                    logprobs = batch.logprobs(batch.run(layer=plan.layers[0]))
                    means[list(batch.rows)] = batch.mean(logprobs).double().cpu()
        pairs = means.reshape(-1, 2).numpy()
        return self._reduced(pairs[:, 0] - pairs[:, 1]), self._reduced(-pairs.mean(1))

    def _reduced(self, values: Float[np.ndarray, " value"]) -> Values:
        found = np.array([values[group].mean() for group in self._groups]) if self._groups else values
        if len(found) < 2:
            raise ConfigError(f"an interval needs two units of the behaviour or more, got {len(found)} {self.unit}")
        return found


def _checked(behaviour: object, controls: int, seed: int) -> Behaviour:
    if isinstance(behaviour, (list, tuple)):
        behaviour = PairBehaviour(behaviour)
    if not isinstance(behaviour, Behaviour):
        raise ConfigError(
            f"expected a behaviour such as sims.PairBehaviour([(prompt, positive, negative), ...]), got "
            f"{type(behaviour).__name__}"
        )
    for name, value in (("controls", controls), ("seed", seed)):
        if type(value) is not int or value < 0:
            raise ConfigError(f"{name} must be an integer from 0 up, got {value!r}")
    return behaviour


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


def _range(values: "Sequence[float] | np.ndarray") -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))


def _holds_zero(interval: Interval) -> bool:
    return interval.low <= 0 <= interval.high


def _columns(name: str, interval: Interval | None) -> dict[str, float]:
    found = Interval(np.nan, np.nan, np.nan) if interval is None else interval
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def _span(values: Sequence[float], digits: int = 3) -> str:
    ends = [f"{end:+.{digits}g}" for end in _range(values)]
    return " to ".join(dict.fromkeys(ends))


def _fall(controls: Sequence[AblatedControl]) -> str:
    """The largest fall among controls, as a positive number where there is one."""
    return f"{-min(c.difference.estimate for c in controls):.3g}"


def _plain(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _signed(interval: Interval, *, flip: bool = False) -> str:
    if flip:
        return f"{-interval.estimate:.3g} [{-interval.high:.3g}, {-interval.low:.3g}]"
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.estimate:.0f}% [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} (each by itself)"


def _text(head: str, cells: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    rows = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([head, *rows, *below])


def _html(head: str, cells: Sequence[Sequence[str]], below: Sequence[str]) -> str:
    titles, *rows = cells
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    end = "<br>".join(html.escape(line) for line in below)
    return f"<p>{html.escape(head)}</p><table><tr>{top}</tr>{body}</table><p>{end}</p>"


__all__ = [
    "AblatedControl",
    "DirectionalAblation",
    "LeaveOneOut",
    "Part",
    "ablation_plan",
    "directional_ablation",
    "leave_one_out",
    "parts_of",
    "random_like",
    "variance_share",
]
