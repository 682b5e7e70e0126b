"""Does the unsteered model use a direction: what falls with it taken out of the residual stream?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import capture_tokens
from sims_lens.adapter import Adapter, adapt
from sims_lens.analysis.ablation.meter import UnitMeter, Values, checked_behaviour, rows_of
from sims_lens.analysis.ablation.text import (
    columns_of,
    counted,
    html_table,
    plain,
    signed,
    spanned,
    text_table,
)
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.behaviour import Behaviour, PairBehaviour, TextPair
from sims_lens.checks import check_integer, shown
from sims_lens.errors import ConfigError, PlanError
from sims_lens.estimators import unit
from sims_lens.hooks import check_fits, check_unsteered
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import everyday
from sims_lens.run import Run
from sims_lens.sampling import LocalSampler
from sims_lens.scope import TokenScope
from sims_lens.sites import check_layer
from sims_lens.stats import Interval, bootstrap_mean
from sims_lens.transforms import Ablation

if TYPE_CHECKING:
    import pandas as pd

_STREAM_PROMPTS: Final = 16


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

        rows: list[dict[str, Any]] = [{"ablated": "nothing", "kind": "base", **columns_of("value", self.baseline)}]
        direction = AblatedControl("direction", self.ablated, self.difference, self.nll, self.variance)
        for found, name in [(direction, self.name), *((c, f"{c.kind} {k}") for c, k in self._numbered())]:
            row: dict[str, Any] = {"ablated": name, "kind": found.kind}
            for column in ("value", "difference", "nll"):
                row |= columns_of(column, getattr(found, column))
            rows.append(row | {"variance": found.variance})
        return pd.DataFrame(rows).set_index("ablated")

    def _numbered(self) -> list[tuple[AblatedControl, int]]:
        return [(c, k) for kind in ("random", "matched") for k, c in enumerate(self.of_kind(kind), start=1)]

    def verdict(self) -> str:
        """Does the behaviour fall, and further than without a random direction? In plain sentences."""
        change = signed(self.difference)
        if not self.falls:
            what = "rises" if self.difference.low > 0 else "does not fall"
            text = f"Without the direction the behaviour {what} ({change})."
            return text + " The model does not need the direction for it." + self._cost()
        text = f"Without the direction the behaviour falls by {signed(self.difference, flip=True)}"
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
        others = f"; {spanned(found, 2)} under the control{'' if len(found) == 1 else 's'}" if found else ""
        return f" The texts' NLL changes by {signed(self.nll)} nats per token{others}."

    def _head(self) -> str:
        where = "every layer" if self.everywhere else f"layer {self.layer} {self.site}"
        return (
            f"Directional ablation of {self.name}, layer {self.layer}, at {where} ({self.scope} tokens): "
            f"{self.behaviour}, {self.measure_name}, {counted(self.units, self.unit)}"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        texts = self.nll is not None
        cells = [("taken out", "value [95%]", "difference [95%]", *(["NLL"] if texts else []), "variance")]
        cells.append(("nothing", plain(self.baseline), "", *([""] if texts else []), ""))
        cells.append(
            (
                self.name,
                plain(self.ablated),
                signed(self.difference),
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
                        spanned([c.difference.estimate for c in found]),
                        *([spanned(nll, 2)] if texts else []),
                        f"{100 * np.mean([c.variance for c in found]):.2g}%",
                    )
                )
        return cells

    def __repr__(self) -> str:
        return text_table(self._head(), self._cells(), self._below())

    def _repr_html_(self) -> str:
        return html_table(self._head(), self._cells(), self._below())


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
    behaviour = checked_behaviour(behaviour, controls, seed)
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
    measure = UnitMeter(model, behaviour, plans)
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
        return rows_of(adapter, behaviour)
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


def _fall(controls: Sequence[AblatedControl]) -> str:
    """The largest fall among controls, as a positive number where there is one."""
    return f"{-min(c.difference.estimate for c in controls):.3g}"


__all__ = ["AblatedControl", "DirectionalAblation", "ablation_plan", "directional_ablation", "variance_share"]
