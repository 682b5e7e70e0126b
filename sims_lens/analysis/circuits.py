"""What carries a plan's effect downstream, and who reads its direction: ablation and patching, component by component.

A plan adds something to the residual stream; heads and MLPs further up read it, and write what moves the logits. For a
behaviour on pairs of texts (:class:`~sims_lens.behaviour.PairBehaviour`) :func:`component_effects` asks of each head
and each MLP how much of the effect is lost when it gives what it gave in the unsteered run, and how much appears when
it alone gives what it gave in the steered one. :func:`direction_readers` asks who reads the addition itself, rather
than what others have made of it. Both come with a first-order estimate by gradient that costs a few passes for all
components together, and say how well it agrees with the exact answer.

Reference: Vig et al. 2020, "Investigating Gender Bias in Language Models Using Causal Mediation Analysis"; Wang et al.
2022, "Interpretability in the Wild" (path patching); Nanda 2023, "Attribution Patching"; Syed et al. 2023,
"Attribution Patching Outperforms Automated Circuit Discovery" (edges).
"""

import html
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import Row
from sims_lens.adapter import adapt
from sims_lens.analysis.patching import (
    HEAD,
    MLP,
    Component,
    Outputs,
    Record,
    added_below,
    attribute,
    check_components,
    check_readers,
    differs,
    frozen,
    gradients,
    listening_deltas,
    margins,
    pair_rows,
    reading_without,
    record,
    run_with,
    unembedding_without,
)
from sims_lens.behaviour import PairBehaviour, TextPair
from sims_lens.checks import check_seed
from sims_lens.errors import ConfigError, PlanError
from sims_lens.forced import ForcedBatch, force
from sims_lens.hooks import check_unsteered, resolve, steering
from sims_lens.plan import SteeringPlan
from sims_lens.progress import Progress
from sims_lens.scope import TokenScope
from sims_lens.stats import CONFIDENCE, DRAWS, Interval, bca, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 10
_RANKED = 5
"""Components from which on a rank correlation is given."""


@dataclass(frozen=True)
class Amount:
    """A change of the margin.

    Args:
        nats: mean over the pairs, nats per token, with its 95% interval.
        share: of the plan's whole effect, a ratio of means, the pairs resampled together; None where the interval of
            the effect reaches 0.
    """

    nats: Interval
    share: Interval | None

    def __str__(self) -> str:
        return _signed(self.nats) + ("" if self.share is None else f" = {_percent(self.share)}")


@dataclass(frozen=True)
class ComponentEffect:
    """What one component carries.

    Args:
        component: a head or an MLP.
        gradient: ``lost`` as a gradient predicts it.
        lost: by how much the steered margin falls when the component alone gives what it gives in the other run; None
            where it was not patched.
        restored: by how much the unsteered margin rises when the component alone gives what it gives in the steered
            run; None where it was not patched.
        active: False where it gives the same in both runs: its effects are 0 without a run.
    """

    component: Component
    gradient: Amount
    lost: Amount | None = None
    restored: Amount | None = None
    active: bool = True


@dataclass(frozen=True)
class _Found:
    """What the two results have in common.

    Args:
        model: its name.
        behaviour: its name.
        sites: the steered sites, (layer, site).
        n_layers: of the model.
        n_heads: in each layer.
        pairs: how many.
        base: mean margin unsteered, nats per token.
        steered: mean margin steered.
        effect: the difference, paired.
        components: every head and MLP from the lowest steered layer on, by layer, heads first.
        agreement: Spearman's rank correlation of ``gradient`` with ``lost`` over the components that were patched and
            are not inactive; its interval is over the pairs. NaN below five components.
        seconds: spent on the gradient and on exact patching.
    """

    model: str
    behaviour: str
    sites: tuple[tuple[int, str], ...]
    n_layers: int
    n_heads: int
    pairs: int
    base: Interval
    steered: Interval
    effect: Interval
    components: tuple[ComponentEffect, ...] = field(repr=False)
    agreement: Interval
    seconds: dict[str, float] = field(repr=False, compare=False)

    def of(self, name: str) -> ComponentEffect:
        """A component by name, "L5H3" or "L5 MLP".

        Raises:
            PlanError: it was not looked at.
        """
        for each in self.components:
            if repr(each.component) == name:
                return each
        ends = self.components[0].component, self.components[-1].component
        raise PlanError(f"{name!r} is none of the components, {ends[0]!r} to {ends[1]!r}")

    def top(self, count: int = _SHOWN) -> tuple[ComponentEffect, ...]:
        """The components with the largest ``lost`` in magnitude, patched ones only."""
        patched = [each for each in self.components if each.lost is not None and each.active]
        patched.sort(key=lambda each: -abs(each.lost.nats.estimate))  # type: ignore[union-attr]
        return tuple(patched[:count])

    def table(self) -> "pd.DataFrame":
        """One row per component: ``lost``, ``restored`` and ``gradient``, in nats per token and as a share, with
        intervals; NaN where it was not patched, and for shares of an effect whose interval reaches 0."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for each in self.components:
            where = each.component
            row: dict[str, Any] = {"component": repr(where), "layer": where.layer, "kind": where.kind}
            row |= {"head": where.head if where.kind == HEAD else pd.NA, "active": each.active}
            for name in self._columns():
                amount: Amount | None = getattr(each, name)
                for suffix in ("", "_share"):
                    interval = None if amount is None else amount.share if suffix else amount.nats
                    ends = (np.nan,) * 3 if interval is None else interval.to_json()
                    row |= dict(zip((f"{name}{suffix}{end}" for end in ("", "_low", "_high")), ends, strict=True))
            rows.append(row)
        return pd.DataFrame(rows).set_index("component").astype({"head": "Int64"})

    def _columns(self) -> tuple[str, ...]:
        return "lost", "restored", "gradient"

    def _head(self) -> list[str]:
        sites = ", ".join(f"layer {layer} {site}" for layer, site in self.sites)
        active = [each for each in self.components if each.active]
        patched = sum(each.lost is not None for each in active)
        lines = [
            f"{type(self).__name__} of {self.model}, steered at {sites}, on {self.pairs} pairs of {self.behaviour}",
            f"effect {_signed(self.effect)} nats per token: the margin goes from {self.base.estimate:+.3g} to "
            f"{self.steered.estimate:+.3g}",
        ]
        if _reaches_zero(self.effect):
            lines.append("the effect's interval reaches 0: there are no shares of it")
        lines += self._direct()
        ranked = "too few components to rank" if math.isnan(self.agreement.estimate) else f"Spearman {self.agreement}"
        lines.append(
            f"{len(active)} of {len(self.components)} components {'gives' if len(active) == 1 else 'give'} something "
            f"else, {patched} {'was' if patched == 1 else 'were'} patched; gradient against exact: {ranked}"
        )
        return lines

    def _direct(self) -> list[str]:
        return []

    def _cells(self) -> list[tuple[str, ...]]:
        cells = [("component", *(f"{name} [95%]" if name != "gradient" else name for name in self._columns()))]
        for each in self.top():
            row = [repr(each.component)]
            for name in self._columns():
                amount = getattr(each, name)
                brief = f"{amount.nats.estimate:+.3g}" if amount.share is None else _percent(amount.share, ends=False)
                row.append(brief if name == "gradient" else str(amount))
            cells.append(tuple(row))
        return cells

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
        lines = self._head()
        for row in cells if len(cells) > 1 else []:
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        above = "<br>".join(html.escape(line) for line in self._head())
        return f"<p>{above}</p><table><tr>{top}</tr>{body}</table>"


@dataclass(frozen=True, repr=False)
class ComponentEffects(_Found):
    """Which components carry a plan's effect; made by :func:`component_effects`.

    Args:
        direct: the effect that is left when every component gives what it gives unsteered, so that what was added
            reaches the logits through the last norm alone.
    """

    direct: Amount

    def _direct(self) -> list[str]:
        return [f"straight to the logits, every component as if unsteered: {self.direct}"]


@dataclass(frozen=True, repr=False)
class DirectionReaders(_Found):
    """Who reads what a plan adds; made by :func:`direction_readers`. ``restored`` is not measured.

    Args:
        direct: the effect that is lost when the last norm alone reads the stream without what was added.
    """

    direct: Amount

    def _columns(self) -> tuple[str, ...]:
        return "lost", "gradient"

    def _direct(self) -> list[str]:
        return [f"lost when the logits alone don't read it: {self.direct}"]


def component_effects(
    model: Any,
    plan: SteeringPlan,
    pairs: PairBehaviour | Sequence[TextPair],
    *,
    exact: str | int = "all",
    seed: int = 0,
    progress: bool = True,
) -> ComponentEffects:
    """Which heads and MLPs carry a plan's effect: patch each between the steered and the unsteered run.

    Of every head and every MLP from the lowest steered layer on, at all tokens that the plan may touch:

    - ``lost``: the steered run, with this component's output from the unsteered run. What is above it responds.
    - ``restored``: the unsteered run, with this component's output from the steered run.
    - ``gradient``: ``lost`` to first order, ``(steered - unsteered output) . d margin / d output``, with the gradient
      of the steered run: one forward and one backward pass for all components. Gradients averaged over runs with a
      part of what the plan adds agree less with ``lost``, see ``benchmarks/attribution.py``.

    The losses of single components do not add up to the effect: what one writes another reads, so a path through both
    is lost twice; and where two do the same work, or a backup head steps in, each alone seems to do nothing. A large
    loss shows that a component matters here, a small one does not show that it doesn't. Of 100 intervals of 95%, five
    miss.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        plan: what steers.
        pairs: the behaviour, or two or more ``(prompt, positive text, negative text)``; not those that the plan was
            fitted on.
        exact: "all", or how many components to patch: those with the largest ``gradient`` in magnitude.
        seed: of the bootstrap over pairs.
        progress: show a progress bar.

    Raises:
        PlanError: the plan does not fit the model, or holds nothing.
        PromptError: a pair can't be used.
        ConfigError: exact is neither "all" nor a count; pairs are another kind of behaviour, or fewer than two.
        ModelError: the model has not the hook points, or a plan is attached to it.
    """
    check_unsteered(model)
    study = _Study(model, plan, pairs, exact, seed)
    check_components(study.adapter)

    def prepare(batch: ForcedBatch) -> "_Comparison":
        base, steered = study.both(batch)
        return _Comparison(base, steered, change=base.outputs)

    def direct(batch: ForcedBatch, found: "_Comparison") -> Tensor:
        kept = record(batch, study.layer, change=frozen(found.base.outputs)).logits
        return margins(batch, kept) - margins(batch, batch.logits)

    return ComponentEffects(**study.run(prepare, direct, restore=True, progress=progress))


def direction_readers(
    model: Any,
    plan: SteeringPlan,
    pairs: PairBehaviour | Sequence[TextPair],
    *,
    exact: str | int = 8,
    seed: int = 0,
    progress: bool = True,
) -> DirectionReaders:
    """Who reads what a plan adds: path patching of the steps from the steered sites to each head and MLP.

    ``lost`` is what the steered margin loses when one head (queries, keys and values) or one MLP reads the stream
    without what the plan has added below it, all else being as it is: what others make of the addition is still
    there, and what is above the reader responds. A component that carries the effect without reading the direction
    itself loses nothing here and much in :func:`component_effects`.

    ``gradient`` is exact in the reader and first order above it: one run gives every reader's output without the
    addition, while the stream stays the steered one; the change of that output is multiplied by the gradient of the
    margin with respect to it, as in :func:`component_effects`. So it costs a few passes for all readers together.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        plan: what steers.
        pairs: the behaviour, or two or more ``(prompt, positive text, negative text)``; not those that the plan was
            fitted on.
        exact: how many readers to check by patching, those with the largest ``gradient`` in magnitude; or "all".
        seed: of the bootstrap over pairs.
        progress: show a progress bar.

    Raises:
        PlanError: the plan does not fit the model, or holds nothing.
        PromptError: a pair can't be used.
        ConfigError: exact is neither "all" nor a count; pairs are another kind of behaviour, or fewer than two.
        ModelError: attention and MLP of the model's blocks have no norms of their own, or a plan is attached to it.
    """
    check_unsteered(model)
    study = _Study(model, plan, pairs, exact, seed)
    check_components(study.adapter)
    check_readers(study.adapter)

    def prepare(batch: ForcedBatch) -> "_Comparison":
        base, steered = study.both(batch)
        with torch.no_grad(), steering(model, study.plan) as attached, listening_deltas(model, attached) as deltas:
            batch.run(layer=study.layer)
            layers = range(study.layer, study.adapter.n_layers)
            with reading_without(study.adapter, layers, deltas):
                # Every component is held at its steered output, so that each reads the steered stream less the delta.
                without = record(batch, study.layer, change=frozen(steered.outputs)).outputs
        for layer in layers:
            for kind in (HEAD, MLP):
                if added_below(study.adapter, deltas, layer, kind) is None:
                    without.kind(kind)[layer] = steered.outputs.kind(kind)[layer]
        return _Comparison(base, steered, change=without, deltas=dict(deltas))

    def direct(batch: ForcedBatch, found: "_Comparison") -> Tensor:
        with unembedding_without(study.adapter, found.deltas):
            without = batch.run(layer=study.adapter.n_layers, stream=found.steered.streams[study.adapter.n_layers - 1])
        return margins(batch, found.steered.logits) - margins(batch, without)

    return DirectionReaders(**study.run(prepare, direct, restore=False, progress=progress))


@dataclass(frozen=True, eq=False)
class _Comparison:
    """A batch's two runs, and the outputs that components get in the steered one in place of their own."""

    base: Record
    steered: Record
    change: Outputs
    deltas: dict[tuple[int, str], Tensor] = field(default_factory=dict)


class _Study:
    """What both analyses do with their batches."""

    def __init__(self, model: Any, plan: SteeringPlan, pairs: Any, exact: str | int, seed: int) -> None:
        check_seed(seed)
        if not isinstance(pairs, PairBehaviour):
            if not isinstance(pairs, Sequence) or isinstance(pairs, str):
                raise ConfigError(
                    f"give a PairBehaviour, or pairs of texts: a {type(pairs).__name__} has no margin on fixed texts, "
                    "and so no gradient"
                )
            pairs = PairBehaviour(pairs)
        if len(pairs.pairs) < 2:
            raise ConfigError(
                f"intervals over pairs need two or more, got {len(pairs.pairs)}; give more (prompt, positive, negative)"
            )
        if exact != "all" and (type(exact) is not int or exact < 1):
            raise ConfigError(f"exact must be 'all' or how many components to patch, from 1 up; got {exact!r}")
        self.model, self.adapter, self.plan = model, adapt(model), resolve(model, plan)
        if not self.plan.interventions:
            raise PlanError("the plan holds no interventions: nothing has an effect; give one that steers")
        self.behaviour, self.exact, self.seed = pairs, exact, seed
        self.layer = min(self.plan.layers)
        self.scope: TokenScope = reduce(or_, (i.scope for i in self.plan.interventions))
        self.rows: list[Row] = pair_rows(self.adapter, self.behaviour.pairs)

    def batches(self) -> Iterator[tuple[ForcedBatch, list[int]]]:
        """Batches, with the numbers of their pairs."""
        for batch in force(self.model, self.rows, scope=self.scope, together=2):
            yield batch, [row // 2 for row in batch.rows[0::2]]

    def both(self, batch: ForcedBatch) -> tuple[Record, Record]:
        """The unsteered and the steered run."""
        with torch.no_grad():
            base = record(batch, self.layer)
            with steering(self.model, self.plan):
                return base, record(batch, self.layer)

    def run(
        self,
        prepare: Callable[[ForcedBatch], _Comparison],
        direct: Callable[[ForcedBatch, _Comparison], Tensor],
        *,
        restore: bool,
        progress: bool,
    ) -> dict[str, Any]:
        """The fields of a result."""
        pairs = len(self.behaviour.pairs)
        n_layers = self.adapter.n_layers
        components = [
            Component(layer, kind, head)
            for layer in range(self.layer, n_layers)
            for kind, heads in ((HEAD, range(int(self.adapter.cfg.n_heads))), (MLP, [-1]))
            for head in heads
        ]
        base, steered, left = torch.zeros(3, pairs).unbind()
        gradient = torch.zeros(len(components), pairs)
        active = torch.zeros(len(components), dtype=torch.bool)
        started = time.perf_counter()
        most = len(components) if self.exact == "all" else min(int(self.exact), len(components))
        with Progress(pairs * (most + 1), show=progress) as bar:
            bar.phase("gradient")
            for batch, where in self.batches():
                found = prepare(batch)
                base[where] = margins(batch, batch.logits).cpu()
                steered[where] = margins(batch, found.steered.logits).cpu()
                with steering(self.model, self.plan):
                    slope = gradients(batch, self.layer)
                    with torch.no_grad():
                        left[where] = direct(batch, found).cpu()
                gradient[:, where] = -attribute(batch, slope, found.change, found.steered.outputs).cpu()
                active |= torch.tensor([differs(batch, c, found.change, found.steered.outputs) for c in components])
                bar.advance(len(where))
            halfway = time.perf_counter()
            order = [int(k) for k in gradient.mean(1).abs().argsort(descending=True) if active[k]]
            chosen = sorted(order[:most])
            lost, restored = torch.zeros(2, len(components), pairs).unbind()
            bar.phase("patching")
            for batch, where in self.batches():
                found = prepare(batch)
                with torch.no_grad():
                    if restore:
                        for k in chosen:
                            below = None if not self.layer else found.base.streams.get(components[k].layer - 1)
                            logits = run_with(batch, components[k], found.steered.outputs, stream=below)
                            restored[k, where] = margins(batch, logits).cpu() - base[where]
                    with steering(self.model, self.plan):
                        for k in chosen:
                            below = found.steered.streams.get(components[k].layer - 1)
                            logits = run_with(batch, components[k], found.change, stream=below)
                            lost[k, where] = steered[where] - margins(batch, logits).cpu()
                            bar.advance(len(where))
            bar.advance((most - len(chosen)) * pairs)
        ended = time.perf_counter()
        effect = (steered - base).double().numpy()
        weights, whole = _resampled(pairs, self.seed), bootstrap_mean(effect, seed=self.seed)
        shared = None if _reaches_zero(whole) else effect
        amounts = {
            name: _amounts(values.double().numpy(), shared, weights)
            for name, values in {"lost": lost, "restored": restored, "gradient": gradient}.items()
        }
        patched = {k for k in range(len(components)) if k in set(chosen) or not active[k]}
        return {
            "model": self.adapter.name,
            "behaviour": self.behaviour.name,
            "sites": tuple(sorted({(i.layer, i.site) for i in self.plan.interventions})),
            "n_layers": n_layers,
            "n_heads": int(self.adapter.cfg.n_heads),
            "pairs": pairs,
            "base": bootstrap_mean(base.double().numpy(), seed=self.seed),
            "steered": bootstrap_mean(steered.double().numpy(), seed=self.seed),
            "effect": whole,
            "direct": _amounts(left.double().numpy()[None], shared, weights)[0],
            "components": tuple(
                ComponentEffect(
                    component,
                    gradient=amounts["gradient"][k],
                    lost=amounts["lost"][k] if k in patched else None,
                    restored=amounts["restored"][k] if k in patched and restore else None,
                    active=bool(active[k]),
                )
                for k, component in enumerate(components)
            ),
            "agreement": _rank_correlation(gradient[chosen].double().numpy(), lost[chosen].double().numpy(), weights),
            "seconds": {"gradient": halfway - started, "exact": ended - halfway},
        }


def _resampled(pairs: int, seed: int) -> Float[np.ndarray, "draw pair"]:
    """How often each pair is drawn, over the number of pairs; the first row is the sample itself."""
    rng = np.random.default_rng(check_seed(seed))
    drawn = rng.multinomial(pairs, [1 / pairs] * pairs, size=DRAWS) / pairs
    return np.concatenate([np.full((1, pairs), 1 / pairs), drawn])


def _amounts(
    values: Float[np.ndarray, "component pair"],
    effect: Float[np.ndarray, " pair"] | None,
    weights: Float[np.ndarray, "draw pair"],
) -> list[Amount]:
    """Means over the pairs, and their shares of the effect; None for no shares."""
    means = (weights @ values.T).T
    if effect is None:
        return [Amount(bca(float(m[0]), m[1:], own), None) for m, own in zip(means, values, strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = means / (weights @ effect)
    return [
        Amount(bca(float(m[0]), m[1:], own), bca(float(share[0]), share[1:], own - share[0] * effect))
        for m, share, own in zip(means, shares, values, strict=True)
    ]


def _percentiles(draws: Float[np.ndarray, " draw"]) -> Interval:
    """The first draw is the estimate, the others make its interval."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws[1:], [tail, 100 - tail])
    return Interval(float(draws[0]), float(low), float(high))


def _rank_correlation(
    a: Float[np.ndarray, "component pair"],
    b: Float[np.ndarray, "component pair"],
    weights: Float[np.ndarray, "draw pair"],
) -> Interval:
    """Spearman's over components, of means over pairs."""
    import pandas as pd

    if len(a) < _RANKED:
        return Interval(np.nan, np.nan, np.nan)
    ranks = [pd.DataFrame(weights @ values.T).rank(axis=1).to_numpy() for values in (a, b)]
    x, y = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return _percentiles((x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1)))


def _reaches_zero(interval: Interval) -> bool:
    return interval.low <= 0 <= interval.high


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]"


def _percent(interval: Interval, *, ends: bool = True) -> str:
    estimate, low, high = (
        f"{round(value, 2) + 0.0:.0%}" for value in (interval.estimate, interval.low, interval.high)
    )  # + 0.0: no "-0%"
    return f"{estimate} [{low}, {high}]" if ends else estimate


__all__ = [
    "Amount",
    "ComponentEffect",
    "ComponentEffects",
    "DirectionReaders",
    "component_effects",
    "direction_readers",
]
