"""Where to steer, and how strongly: every layer at every coefficient, each with its effect and what it costs.

Two modes. *Teacher-forced*: by how much the log-probability margin on fixed pairs of texts rises; nothing is sampled,
and a cell costs a fraction of a forward pass over the pairs. *Generation*: by how much a ranker's score of sampled
responses rises. The first finds where to look, the second says whether the model then says so.

Most cells of a sweep are plainly weak or plainly broken, which a few pairs show. So the pairs are given out in rounds,
each as large as all before it, and a cell gets the next one only while it can still be the best within the budget: a
race.
"""

import hashlib
import html
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import product
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sims_lens.adapter import adapt, check_lengths
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.behaviour import PairBehaviour, TextPair, encode_pairs
from sims_lens.calibration import FluencyBudget
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import ConfigError, PlanError, RankerError, ResultError, RunError
from sims_lens.evaluate import side_effects
from sims_lens.forced import BATCH_TOKENS, ForcedBatch, force
from sims_lens.hooks import check_fits, check_unsteered, resolve, steering
from sims_lens.plan import NOTHING, Intervention, Provenance, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import check_prompts
from sims_lens.rankers import CheckedRanker, bound_ranker
from sims_lens.rankers.fingerprint import canonical
from sims_lens.run import Run
from sims_lens.sampling import LocalSampler
from sims_lens.scope import TokenScope
from sims_lens.sites import check_layer, check_site
from sims_lens.stats import DRAWS, Interval, bca, win_probability
from sims_lens.store import Folder, read_json, write_json
from sims_lens.supervised import SteeringFit
from sims_lens.transforms import Addition, Transform, dump
from sims_lens.typed import known_fields, read_as

if TYPE_CHECKING:
    import pandas as pd

COEFFICIENTS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Those that :func:`sims_lens.calibrate` tries of a plan of the loop's strength, 0.2: from hardly felt to broken."""

FIGURES = ("effect", "win_rate", "perplexity_ratio", "kl")
"""What each cell has an interval of."""

_FORMAT, _VERSION = "sims_lens.sweep", 1
_FIRST = {"pair": 4, "prompt": 8}
"""Units in the first round: few, because most cells are out after it, but enough for a Student interval to be of use.
Decoding for 4 prompts takes about as long as for 8."""
_SAVE_SECONDS = 5.0
_STREAM = ("resid_pre", "resid_post")


@dataclass(frozen=True)
class SweepCell:
    """One direction at one site of one layer with one coefficient, against the unsteered model.

    Args:
        direction: its name.
        site: where in the block.
        layer: the block, counted from 0.
        coefficient: in the sweep's units.
        effect: teacher-forced, the mean rise of the pairs' log-probability margin, nats per token; in generation mode
            the mean score less that of the unsteered responses to the same prompt, in the ranker's units.
        win_rate: share of the pairs whose margin rises, ties half; or the probability that a steered response scores
            higher than an unsteered one to the same prompt.
        perplexity_ratio: teacher-forced, perplexity of the *fixed texts* under the steered model over that under the
            unsteered one: how much worse the steered model predicts them. In generation mode, perplexity of the
            steered responses over that of the unsteered ones, both under the unsteered model.
        kl: mean KL(steered || unsteered) of the next-token distributions, nats per token, on the fixed texts or on the
            steered responses.
        count: of how many pairs, or prompts.
    """

    direction: str
    site: str
    layer: int
    coefficient: float
    effect: Interval
    win_rate: Interval
    perplexity_ratio: Interval
    kl: Interval
    count: int

    def to_json(self) -> dict[str, Any]:
        """A plain dict; the inverse of :meth:`from_json`."""
        return {
            name: value.to_json() if isinstance(value, Interval) else value
            for name in self.__dataclass_fields__
            for value in [getattr(self, name)]
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SweepCell":
        """The cell that :meth:`to_json` described.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, data)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LayerSweep:
    """What :func:`layer_sweep` measured. ``sweep.plan`` steers with the best cell; ``print(sweep)`` shows them all.

    Args:
        model: name of the model.
        behaviour: name of the behaviour, or of the ranker.
        measure: what an effect is, with its unit.
        mode: "teacher-forced" or "generation".
        units: of the coefficients: "residual_norm"; "absolute", a factor of the vectors as they were given;
            "strength", that of transforms other than additions; or "mixed".
        scope: name of the tokens that are steered.
        budget: what counts as fluent.
        cells: every cell, by direction and site, layer and coefficient.
        total: how many pairs or prompts there are; a cell that fell out of the race has been measured on fewer.
        samples: responses to each prompt; 0 in teacher-forced mode.
        adaptive: whether the cells raced.
        seed: of the order of the pairs or prompts, of sampling and of the intervals.
        seconds: what the sweep took; where it went on from a folder, the last part of it.
        steering: for each direction, site and layer in the order of the cells, what is done there at coefficient 1;
            None where this was read from JSON without it.
    """

    model: str
    behaviour: str
    measure: str
    mode: str
    units: str
    scope: str
    budget: FluencyBudget
    cells: tuple[SweepCell, ...]
    total: int
    samples: int
    adaptive: bool
    seed: int
    seconds: float = field(default=0.0, compare=False)
    steering: SteeringPlan | None = field(default=None, repr=False, compare=False)

    @property
    def unit(self) -> str:
        """What was counted: "pair" or "prompt"."""
        return "pair" if self.mode == "teacher-forced" else "prompt"

    @property
    def best(self) -> SweepCell | None:
        """The cell with the largest effect within the budget, by the estimates; None where nothing within it beats not
        steering. Being the best of many it looks better than it is: quote figures of other pairs or prompts."""
        allowed = [cell for cell in self.cells if self.allows(cell) and cell.effect.estimate > 0]
        return max(allowed, key=lambda cell: cell.effect.estimate, default=None)

    @property
    def plan(self) -> SteeringPlan:
        """The plan of the best cell.

        Raises:
            PlanError: there is none, or this was read from JSON without its plan.
        """
        if self.best is None:
            raise PlanError(f"no cell was chosen: {self._reason()}")
        return self.plan_of(self.best)

    @property
    def unit_of_coefficients(self) -> str:
        """In words. "residual_norm" is the stream's median norm only where the stream is what is steered; at another
        site it is that of the output there."""
        if self.units == "residual_norm":
            stream = all(site in _STREAM for _, site in self.panels)
            return "x median residual norm" if stream else "x median norm at the site"
        return {"absolute": "x the vector as given", "strength": "the transform's own strength"}.get(
            self.units, "of mixed units"
        )

    @property
    def panels(self) -> tuple[tuple[str, str], ...]:
        """Each direction and site that was swept."""
        return tuple(dict.fromkeys((cell.direction, cell.site) for cell in self.cells))

    def plan_of(self, cell: SweepCell) -> SteeringPlan:
        """The plan that a cell measured.

        Raises:
            PlanError: it is no cell of this sweep, or this was read from JSON without its plan.
        """
        if self.steering is None:
            raise PlanError("JSON holds no plan; load its file and pass it: LayerSweep.from_json(data, plan=...)")
        places = list(dict.fromkeys((c.direction, c.site, c.layer) for c in self.cells))
        where = (cell.direction, cell.site, cell.layer)
        if where not in places:
            raise PlanError(f"this sweep has no {cell.direction!r} at layer {cell.layer} {cell.site}")
        return _at(self.steering, places.index(where), cell.coefficient)

    def at(self, layer: int, coefficient: float, *, direction: str | None = None, site: str | None = None) -> SweepCell:
        """One cell; of several directions or sites the first one, unless one is named.

        Raises:
            RunError: there is none.
        """
        for cell in self.cells:
            here = (cell.layer, cell.coefficient) == (layer, coefficient)
            if here and direction in (None, cell.direction) and site in (None, cell.site):
                return cell
        raise RunError(f"the sweep has no cell at layer {layer!r}, coefficient {coefficient!r}; see sweep.table()")

    def allows(self, cell: SweepCell) -> bool:
        """Whether both of a cell's figures are within the budget, by the estimates."""
        ratio, kl = cell.perplexity_ratio.estimate, cell.kl.estimate
        return ratio <= self.budget.perplexity_ratio and kl <= self.budget.kl

    def frontier(self) -> tuple[SweepCell, ...]:
        """The cells that no other one beats: each has a larger effect than every cell of a smaller KL; by KL."""
        front: list[SweepCell] = []
        for cell in sorted(self.cells, key=lambda c: (c.kl.estimate, -c.effect.estimate)):
            if cell.effect.estimate > max([0.0, *(c.effect.estimate for c in front[-1:])]):
                front.append(cell)
        return tuple(front)

    def layer_profile(self) -> "pd.DataFrame":
        """Where steering works: for each direction, site and layer the row of :meth:`table` with the largest effect
        within the budget. Layers without a cell within the budget are left out."""
        table = self.table()
        allowed = table[table.within]
        keys = ["direction", "site", "layer"]
        return allowed.loc[allowed.groupby(keys, sort=False).effect.idxmax()].reset_index(drop=True)

    def table(self) -> "pd.DataFrame":
        """One row per cell: each figure with the ends of its interval, the count, whether it is within the budget, and
        whether it is the best."""
        import pandas as pd

        rows, best = [], self.best
        for cell in self.cells:
            row: dict[str, Any] = {"direction": cell.direction, "site": cell.site, "layer": cell.layer}
            row["coefficient"] = cell.coefficient
            for name in FIGURES:
                interval = getattr(cell, name)
                row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            rows.append({**row, "count": cell.count, "within": self.allows(cell), "best": cell == best})
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """A plain dict without the plans, which ``sweep.steering.save(path)`` writes."""
        skipped = ("budget", "cells", "steering")
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skipped}
        return {**plain, "budget": asdict(self.budget), "cells": [cell.to_json() for cell in self.cells]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, plan: SteeringPlan | None = None) -> "LayerSweep":
        """The inverse of :meth:`to_json`.

        Args:
            data: what that returned.
            plan: ``sweep.steering``, for instance ``SteeringPlan.load(path)``.

        Raises:
            ResultError: it is no such thing.
        """
        found: LayerSweep = read_as(cls, {**known_fields(cls, data), "steering": None})
        for panel in found.panels:
            cells = {(c.layer, c.coefficient) for c in found.cells if (c.direction, c.site) == panel}
            if len(cells) < len({layer for layer, _ in cells}) * len({coefficient for _, coefficient in cells}):
                raise ResultError(f"a cell of {', '.join(panel)} is missing: not every layer has every coefficient")
        return replace(found, steering=plan)

    def _reason(self) -> str:
        """Why nothing was chosen."""
        allowed = [cell for cell in self.cells if self.allows(cell) and cell.coefficient]
        if not allowed:
            return "nothing is within the budget; give smaller coefficients or a larger budget"
        return (
            f"none of the {len(allowed)} cells within the budget raises {self.behaviour}; try coefficients of the "
            "other sign, or another direction"
        )

    def _about(self) -> list[str]:
        samples = f", {self.samples} sample{'s' if self.samples > 1 else ''} each" if self.samples else ""
        spent = sum(cell.count for cell in self.cells if cell.coefficient)
        full = self.total * sum(1 for cell in self.cells if cell.coefficient)
        share = f"; {100 * spent / full:.0f}% of them measured, where it mattered" if spent < full else ""
        return [
            f"Sweep of {self.model}: {self.behaviour}, {self.mode}, {len(self.cells)} cells, {self.total} "
            f"{self.unit}s{samples}{share}",
            f"effect: {self.measure}; coefficient: {self.unit_of_coefficients}; on {self.scope}",
            f"budget: perplexity ratio up to {self.budget.perplexity_ratio:g}, KL up to {self.budget.kl:g} nats per "
            "token",
        ]

    def _grid(self, panel: tuple[str, str]) -> list[list[str]]:
        """Effects as text, a row for each layer and a column for each coefficient."""
        cells = [c for c in self.cells if (c.direction, c.site) == panel]
        coefficients = sorted({c.coefficient for c in cells})
        at = {(c.layer, c.coefficient): c for c in cells}
        rows = [["layer", *(f"{coefficient:g}" for coefficient in coefficients)]]
        for layer in sorted({c.layer for c in cells}):
            rows.append([str(layer), *(self._mark(at[layer, coefficient]) for coefficient in coefficients)])
        return rows

    def _mark(self, cell: SweepCell) -> str:
        number = f"{cell.effect.estimate:+.3f}" if abs(cell.effect.estimate) < 100 else f"{cell.effect.estimate:+.3g}"
        number = number if self.allows(cell) else f"({number})"
        return f"{number}{'~' if cell.count < self.total else ''}{' *' if cell == self.best else ''}"

    def _conclusion(self) -> str:
        best = self.best
        if best is None:
            return f"Best: none; {self._reason()}."
        figures = ", ".join(
            f"{name.replace('_', ' ')} {getattr(best, name)}" for name in ("win_rate", "perplexity_ratio", "kl")
        )
        return (
            f"Best: {best.direction}, layer {best.layer} {best.site}, coefficient {best.coefficient:g}: effect "
            f"{best.effect}, {figures}, on {best.count} {self.unit}s."
        )

    def __repr__(self) -> str:
        lines = self._about()
        for panel in self.panels:
            rows = self._grid(panel)
            widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
            lines += ["", f"{panel[0]}, {panel[1]}"]
            lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", _LEGEND.format(unit=self.unit), self._conclusion()])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{'<br>'.join(map(html.escape, self._about()))}</b></p>"]
        for panel in self.panels:
            head, *rows = [[html.escape(cell) for cell in row] for row in self._grid(panel)]
            body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
            parts.append(
                f"<p>{html.escape(', '.join(panel))}</p><table><thead><tr><th>{'</th><th>'.join(head)}</th></tr>"
                f"</thead><tbody>{body}</tbody></table>"
            )
        return "".join([*parts, f"<p>{_LEGEND.format(unit=self.unit)}<br>{html.escape(self._conclusion())}</p>"])


_LEGEND = "(in brackets): beyond the budget; ~ measured on fewer {unit}s; * the best"


def layer_sweep(
    model: Any,
    source: Any,
    *,
    coefficients: Sequence[float] | Float[np.ndarray, " coefficient"] | Float[Tensor, " coefficient"] = COEFFICIENTS,
    units: str = "residual_norm",
    layers: Sequence[int] | None = None,
    sites: Sequence[str] | None = None,
    behaviour: PairBehaviour | Sequence[TextPair] | None = None,
    ranker: object | None = None,
    prompts: Sequence[str] | None = None,
    samples: int = 1,
    sampling: SamplingConfig | None = None,
    scope: TokenScope | str = "generation",
    budget: FluencyBudget | None = None,
    adaptive: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerSweep:
    """Measure directions at every layer with every coefficient: effect, win rate and fluency, with intervals.

    Teacher-forced with ``behaviour=``, in generation mode with ``ranker=`` and ``prompts=``. In both the intervals are
    95% bootstrap intervals over prompts, those of each cell by itself; pairs of one prompt are drawn together.

    With ``adaptive`` the pairs (prompts) come in rounds, each as large as all before it. After each round a cell goes
    on unless it is surely beyond the budget, surely worse than not steering, or surely behind the best one within the
    budget on the pairs that both have had ("surely": by a 95% Student interval, which holds for few pairs). The best
    one goes on with its four neighbours in any case. So the best cell and what may equal it are measured on everything,
    the others on as much as it took to tell: their intervals are wider, and the effects of those that fell out lean
    downwards a little, because a run of bad luck ends the race too. Without it every cell gets everything.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        source: what is swept, anything that :func:`~sims_lens.analysis.directions.directions_of` takes: a
            :class:`~sims_lens.run.Run` (the newest iteration's directions), a
            :class:`~sims_lens.supervised.SteeringFit`, a plan, vectors by layer, or several by name; also a list of
            :class:`~sims_lens.analysis.directions.Directions`. A transform other than an addition is swept as it is.
        coefficients: to try, positive or negative; 0 is the unsteered model and costs nothing. Of a transform other
            than an addition they are the strength.
        units: of additions. "residual_norm": of a vector at norm 1, in multiples of the median residual norm, that
            which the source was fitted with where it has one; at a site other than the stream's ("resid_pre",
            "resid_post") of the median norm of the output there. "absolute": of the vector as it was given.
        layers: only these; all that a direction has where None.
        sites: apply the same directions at each of these; each one's own where None.
        behaviour: pairs of texts; those of the run, where the source is one and there is no ranker.
        ranker: any that ``sims.improve`` accepts. A prompt's unsteered responses are ranked with each lot of steered
            ones: put a pointwise ranker that costs much into a ``CachedRanker``.
        prompts: on which responses are drawn; a run's held-out prompts, where the source is one.
        samples: responses to each prompt in each cell.
        sampling: how they are drawn, with the same random numbers in every cell.
        scope: the tokens that are steered.
        budget: what counts as fluent. Teacher-forced, its two limits are held against figures of the fixed texts.
        adaptive: spend pairs (prompts) where they matter.
        out: a folder. What is finished is kept there, and a sweep that was interrupted goes on from it with the same
            result, bit for bit. The ranker must be one that can be known again: by its attribute ``settings``, or by
            its code and the plain values that it uses.
        seed: of the order of pairs or prompts, of sampling and of the bootstrap.
        progress: show a progress bar.

    Raises:
        ConfigError: a setting is out of range, or it is not clear what to measure.
        ModelError: a plan is attached to the model.
        PlanError: a direction does not fit the model, is zero, or is not at the layers that were named.
        PromptError: prompts or texts are empty, duplicate, or longer than the context.
        RankerError: the ranker failed, or with ``out`` can't be known again.
        RunError: ``out`` holds another sweep, or is damaged.

    Reference: racing as in Maron & Moore 1994, "Hoeffding races", with Student intervals in place of Hoeffding's.
    """
    began = time.perf_counter()
    check_unsteered(model)
    limits = FluencyBudget() if budget is None else budget
    if not isinstance(limits, FluencyBudget):
        raise ConfigError(f"budget must be a FluencyBudget, such as FluencyBudget(1.5, 0.5), got {budget!r}")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"seed must be an integer from 0 up, got {seed!r}")
    adapter, steered, grid = adapt(model), TokenScope.of(scope), _checked_coefficients(coefficients)
    layers = None if layers is None else _listed(layers, "layers", "[17]")
    sites = None if sites is None else _listed(sites, "sites", '["resid_post"]')
    if isinstance(source, Run) and ranker is None and behaviour is None:
        behaviour = PairBehaviour(source.text_pairs())
    if isinstance(source, Run) and ranker is not None and prompts is None:
        prompts = [source.prompts[i] for i in source.indices("heldout")]
    places, plan, kind = _candidates(adapter, source, layers, sites, units, steered)
    bench = _bench(model, behaviour, ranker, prompts, samples, sampling, steered, seed)
    levels = _levels(bench, adaptive, seed)
    settings: dict[str, Any] = {}
    if out is not None:
        settings = {
            "model": {**asdict(adapter.provenance), "kind": adapter.kind, "dtype": str(adapter.cfg.dtype)},
            "directions": {"places": [list(place) for place in places], "sha256": _digest(plan)},
            "coefficients": list(grid),
            "units": units,
            "scope": steered.name,
            "budget": asdict(limits),
            "adaptive": adaptive,
            "seed": seed,
            **bench.settings(),
        }
    ledger = _Ledger(None if out is None else Path(out), json.loads(json.dumps(settings)))
    plan = ledger.steering(lambda: resolve(model, plan), plan)
    bench.ledger = ledger
    race = _Race(places, list(product(range(len(places)), [c for c in grid if c])), bench.prompt_of, limits)
    with Progress(len(race.cells) * len(bench.prompt_of) * bench.responses, show=progress) as bar:
        _run(race, levels, bench, ledger, plan, bar)
    sweep = LayerSweep(
        model=adapter.name,
        behaviour=bench.name,
        measure=bench.measure_name,
        mode=bench.mode,
        units=kind,
        scope=steered.name,
        budget=limits,
        cells=_cells(race, places, grid, seed),
        total=len(bench.prompt_of),
        samples=bench.responses if bench.unit == "prompt" else 0,
        adaptive=adaptive,
        seed=seed,
        seconds=time.perf_counter() - began,
        steering=plan,
    )
    ledger.finish(sweep)
    return sweep


# What is swept


def _listed(value: Any, name: str, example: str) -> list[Any]:
    """A list of what was given: any sequence but a text, or an array or tensor of one dimension."""
    found = value.tolist() if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1 else value
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise ConfigError(f"{name} must be a list, such as {example}, got {' '.join(repr(value).split())[:80]}")
    return list(found)


def _checked_coefficients(coefficients: Any) -> tuple[float, ...]:
    grid = _listed(coefficients, "coefficients", "[0.1, 0.2]")
    for value in grid:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ConfigError(f"a coefficient must be a finite number, got {value!r}")
    if not any(grid) or len(set(grid)) < len(grid):
        raise ConfigError(f"coefficients must be different numbers, such as {COEFFICIENTS}, got {coefficients!r}")
    return tuple(sorted(float(value) for value in grid))


def _candidates(
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


def _at(candidates: SteeringPlan, index: int, coefficient: float) -> SteeringPlan:
    one = candidates.interventions[index]
    return replace(candidates, interventions=(replace(one, coefficient=float(coefficient)),))


def _digest(plan: SteeringPlan) -> str:
    """Of what the interventions do; not of residual norms, which are measured."""
    sha256 = hashlib.sha256()
    for index, i in enumerate(plan.interventions):
        what, tensors = dump(i.transform, str(index))
        sha256.update(json.dumps([what, i.layer, i.site, i.units], sort_keys=True).encode())
        for tensor in tensors.values():
            sha256.update(tensor.detach().cpu().numpy().astype("<f4").tobytes())
    return sha256.hexdigest()


# What it is measured on


class _Forced:
    """Fixed pairs of texts, teacher-forced.

    What this and :class:`_Sampled` have in common: ``prompt_of`` says of which prompt each unit is, ``chunks`` which
    units are measured together, and ``measure`` how.
    """

    mode, unit, responses = "teacher-forced", "pair", 2

    def __init__(self, model: Any, behaviour: PairBehaviour, scope: TokenScope) -> None:
        self.model, self.behaviour, self.scope = model, behaviour, scope
        self.name, self.measure_name = behaviour.name, f"rise of the {behaviour.measure_name}"
        prompts, texts = encode_pairs(adapt(model), behaviour.pairs)
        self.rows = [(prompts[prompt], texts[text]) for prompt, *both in behaviour.pairs for text in both]
        known = {prompt: index for index, prompt in enumerate(prompts)}
        self.prompt_of = np.array([known[prompt] for prompt, _, _ in behaviour.pairs])
        self.ledger = _Ledger(None, {})
        self._last: tuple[tuple[int, ...], ForcedBatch, Tensor, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, beside the model and the directions."""
        return {"mode": self.mode, "pairs": _hash(self.rows), "behaviour": self.name, "batch_tokens": BATCH_TOKENS}

    def chunks(self, units: Sequence[int]) -> list[list[int]]:
        """Pairs of about one length, so many that their texts fill a batch of :func:`force`."""

        def width(pair: int) -> int:
            return max(len(self.rows[2 * pair][1]), len(self.rows[2 * pair + 1][1]))

        found: list[list[int]] = []
        for pair in sorted(units, key=lambda pair: (width(pair), pair)):
            if not found or width(pair) * 2 * (len(found[-1]) + 1) > BATCH_TOKENS:
                found.append([])
            found[-1].append(pair)
        return found

    def measure(
        self, chunk: tuple[int, ...], plans: Mapping[int, SteeringPlan]
    ) -> Iterator[tuple[int, Float[np.ndarray, "unit figure"]]]:
        """For each cell: effect, win, rise of the NLL and KL of each unit.

        The unsteered model's figures are kept for the next call on the same pairs.
        """
        with torch.no_grad():
            if self._last is None or self._last[0] != chunk:
                self._last = None  # its memory is needed for the next one
                rows = [self.rows[2 * pair + text] for pair in chunk for text in (0, 1)]
                (batch,) = force(self.model, rows, scope=self.scope, together=2, batch_tokens=10**9)
                self._last = chunk, batch, batch.logits.float().logsumexp(-1), batch.mean(batch.logprobs(batch.logits))
            _, batch, normaliser, base = self._last
            order = [batch.rows.index(row) for row in range(len(batch.rows))]
            for cell, plan in plans.items():
                with steering(self.model, plan):
                    logits = batch.run(layer=plan.layers[0])
                means, kl = _against(batch, logits, normaliser)
                change, kl = (means - base)[order].double().cpu(), kl[order].double().cpu()
                positive, negative = change[0::2], change[1::2]
                effect = positive - negative
                win = (effect > 0) + 0.5 * (effect == 0)
                yield cell, torch.stack([effect, win, -(positive + negative) / 2, (kl[0::2] + kl[1::2]) / 2], 1).numpy()


def _against(
    batch: ForcedBatch, logits: Float[Tensor, "row pos d_vocab"], normaliser: Float[Tensor, "row pos"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Mean log-probability of each row's tokens, and mean KL from the unsteered model, nats per token.

    Row by row, so that what a row needs stays in the processor's cache and padding costs nothing. With s and b the two
    models' logits, KL = sum_v p(v) (s_v - b_v) - logsumexp s + logsumexp b: one softmax, and no log-probabilities.

    Args:
        batch: the rows, with the unsteered model's logits.
        logits: the steered model's.
        normaliser: logsumexp of the unsteered model's.
    """
    means, divergences = [], []
    for row, length in enumerate(batch.counted.sum(-1).tolist()):
        steered, base = logits[row, :length].float(), batch.logits[row, :length].float()
        total = steered.logsumexp(-1)
        chosen = steered.gather(-1, batch.targets[row, :length, None])[:, 0] - total
        moved = torch.linalg.vecdot(steered.softmax(-1), steered - base)
        means.append(chosen.mean())
        divergences.append((moved - total + normaliser[row, :length]).clamp(min=0).mean())
    return torch.stack(means), torch.stack(divergences)


class _Sampled:
    """Responses to prompts, scored by a ranker."""

    mode, unit = "generation", "prompt"

    def __init__(
        self,
        model: Any,
        ranker: CheckedRanker,
        prompts: Sequence[str],
        samples: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> None:
        self.model, self.ranker, self.prompts, self.seed = model, ranker, list(prompts), seed
        self.responses, self.sampling, self.sampler = samples, sampling, LocalSampler(model, sampling)
        self.name, self.measure_name = ranker.name, f"rise of the mean score ({ranker.name}'s units)"
        self.prompt_of = np.arange(len(self.prompts))
        self.ledger = _Ledger(None, {})
        self._last: tuple[tuple[int, ...], list[list[Sample]]] | None = None

    def settings(self) -> dict[str, Any]:
        """See :class:`_Forced`."""
        try:
            ranker = canonical(self.ranker)
        except RankerError as error:
            raise RankerError(
                f"{error}; or leave out= away: a folder is for one ranker, by what it depends on"
            ) from error
        return {
            "mode": self.mode,
            "prompts": _hash(self.prompts),
            "ranker": ranker,
            "samples": self.responses,
            "sampling": asdict(self.sampling),
        }

    def chunks(self, units: Sequence[int]) -> list[list[int]]:
        """The sampler makes its own batches."""
        return [sorted(units)]

    def measure(
        self, chunk: tuple[int, ...], plans: Mapping[int, SteeringPlan]
    ) -> Iterator[tuple[int, Float[np.ndarray, "unit figure"]]]:
        """See :class:`_Forced`; NaN where a prompt's responses have no text."""
        asked = [self.prompts[unit] for unit in chunk]
        if self._last is None or self._last[0] != chunk:
            base = self.ledger.samples(chunk, lambda: self._drawn(asked, NOTHING))
            self._last = chunk, by_prompt(base)
        theirs = self._last[1]
        for cell, plan in plans.items():
            ours = by_prompt(self._drawn(asked, plan))
            together = [[s.text for s in (*a, *b)] for a, b in zip(ours, theirs, strict=True)]
            scores = self.ranker.rank_all(list(zip(asked, together, strict=True)))
            rows = []
            for a, b, given in zip(ours, theirs, scores, strict=True):
                won, lost = np.array(given[: len(a)]), np.array(given[len(a) :])
                rise = _mean([s.nll for s in a]) - _mean([s.nll for s in b])
                rows.append([won.mean() - lost.mean(), win_probability(won, lost), rise, _mean([s.kl for s in a])])
            yield cell, np.array(rows)

    def _drawn(self, asked: Sequence[str], plan: SteeringPlan) -> list[Sample]:
        """Responses with their fluency; one without a token has none."""
        drawn = list(self.sampler.sample(asked, n=self.responses, plan=plan, seed=self.seed))
        found = side_effects(self.model, asked, drawn, plan)
        return [s if s.tokens else replace(s, nll=None, kl=None) for s in found]


_Bench: TypeAlias = _Forced | _Sampled


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def _bench(
    model: Any,
    behaviour: object,
    ranker: object,
    prompts: Sequence[str] | None,
    samples: int,
    sampling: SamplingConfig | None,
    scope: TokenScope,
    seed: int,
) -> _Bench:
    if (behaviour is None) == (ranker is None):
        given = "neither" if ranker is None else "both"
        raise ConfigError(f"layer_sweep needs one of behaviour= (pairs of texts) and ranker=, got {given}")
    if behaviour is not None:
        if prompts is not None:
            raise ConfigError("prompts= are for ranker=; a behaviour brings its own")
        if isinstance(behaviour, (list, tuple)):
            behaviour = PairBehaviour(behaviour)
        if not isinstance(behaviour, PairBehaviour):
            raise ConfigError(
                f"behaviour must be a PairBehaviour or a list of (prompt, positive, negative), got "
                f"{type(behaviour).__name__}; what is sampled goes into ranker= and prompts="
            )
        return _Forced(model, behaviour, scope)
    if prompts is None:
        raise ConfigError("ranker= needs prompts= to draw responses to")
    if type(samples) is not int or samples < 1:
        raise ConfigError(f"samples must be an integer of at least 1, got {samples!r}")
    texts, how = check_prompts(prompts), sampling or SamplingConfig()
    check_lengths(adapt(model), texts, how.max_new_tokens)
    return _Sampled(model, bound_ranker(ranker, model), texts, samples, how, seed)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogatepass")).hexdigest()


# The race


def _levels(bench: _Bench, adaptive: bool, seed: int) -> list[list[int]]:
    """The units of each round: a seeded order of the prompts, cut at 4 (8), 8, 16, ... of them."""
    prompts = np.unique(bench.prompt_of)
    if not adaptive:
        return [list(range(len(bench.prompt_of)))]
    order = np.random.default_rng(seed).permutation(prompts)
    ends = [min(_FIRST[bench.unit], len(order))]
    while ends[-1] < len(order):
        ends.append(min(2 * ends[-1], len(order)))
    rounds = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [np.flatnonzero(np.isin(bench.prompt_of, each)).tolist() for each in rounds]


class _Race:
    """What has been measured, and who can still win.

    Args:
        places: direction, site and layer of each candidate.
        cells: candidate and coefficient of each cell.
        prompt_of: the prompt of each unit.
        budget: what counts as fluent.
    """

    def __init__(
        self,
        places: Sequence[tuple[str, str, int]],
        cells: Sequence[tuple[int, float]],
        prompt_of: Int[np.ndarray, " unit"],
        budget: FluencyBudget,
    ) -> None:
        self.cells, self.prompt_of, self.budget = list(cells), prompt_of, budget
        self.found = np.full((len(cells), len(prompt_of), len(FIGURES)), np.nan)
        self.seen = np.zeros((len(cells), len(prompt_of)), dtype=bool)
        self.done: set[tuple[int, int]] = set()  # cell and round
        self.neighbours = _neighbours(places, cells)

    def going(self) -> set[int]:
        """The cells that can still be the best within the budget, and the best one so far with its neighbours."""
        every = range(len(self.cells))
        effect, rise, kl = (np.array([_student(*self.sums(self.found[c, :, k])) for c in every]) for k in (0, 2, 3))
        limits = (rise, math.log(self.budget.perplexity_ratio)), (kl, self.budget.kl)
        within = np.logical_and.reduce([value[:, 0] <= limit for value, limit in limits])
        beyond = np.logical_or.reduce([value[:, 1] > limit for value, limit in limits])
        hopeful = (effect[:, 2] >= 0) & ~beyond
        leading = np.where(within & (effect[:, 0] > 0), effect[:, 0], -np.inf)
        if not np.isfinite(leading).any():
            return set(np.flatnonzero(hopeful).tolist())
        best = int(leading.argmax())
        behind = self.found[:, :, 0] - self.found[best, :, 0]  # on the units that both have
        reaches = np.array([_student(*self.sums(behind[c]))[2] >= 0 for c in every])
        return {*np.flatnonzero(hopeful & reaches).tolist(), best, *self.neighbours[best]}

    def behind(self, going: set[int], level: int) -> dict[int, list[int]]:
        """For each round up to this one, the cells among ``going`` that have not had it."""
        missing = {k: [cell for cell in sorted(going) if (cell, k) not in self.done] for k in range(level + 1)}
        return {k: cells for k, cells in missing.items() if cells}

    def sums(
        self, values: Float[np.ndarray, " unit"]
    ) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
        """Sum of values over each prompt's units, and their number, for the prompts that have any."""
        known = ~np.isnan(values)
        sizes = np.bincount(self.prompt_of[known], minlength=int(self.prompt_of.max()) + 1)
        sums = np.bincount(self.prompt_of[known], weights=values[known], minlength=len(sizes))
        return sums[sizes > 0], sizes[sizes > 0].astype(float)


def _neighbours(places: Sequence[tuple[str, str, int]], cells: Sequence[tuple[int, float]]) -> list[list[int]]:
    """Of each cell, those at the next layer and the next coefficient of the same direction and site."""
    index = {(*places[place], coefficient): k for k, (place, coefficient) in enumerate(cells)}
    grid = sorted({coefficient for _, coefficient in cells})
    layers: dict[tuple[str, str], list[int]] = {}
    for name, site, layer in places:
        layers.setdefault((name, site), []).append(layer)
    found = []
    for place, coefficient in cells:
        name, site, layer = places[place]
        column, row = sorted(layers[name, site]), grid.index(coefficient)
        at = column.index(layer)
        near = [(name, site, column[k], coefficient) for k in (at - 1, at + 1) if 0 <= k < len(column)]
        near += [(name, site, layer, grid[k]) for k in (row - 1, row + 1) if 0 <= k < len(grid)]
        found.append([index[place] for place in near])
    return found


def _run(
    race: _Race, levels: Sequence[Sequence[int]], bench: _Bench, ledger: "_Ledger", plan: SteeringPlan, bar: Progress
) -> None:
    """Round by round, until no cell that can still be the best lacks one."""
    everything = set(range(len(race.cells)))
    chunks = [[tuple(chunk) for chunk in bench.chunks(level)] for level in levels]
    for level, new in enumerate(levels):
        measured: set[int] = set()
        going = race.going() if level else everything
        while behind := race.behind(going, level):
            bar.phase(f"{len(going)} cells on {sum(map(len, levels[: level + 1]))} {bench.unit}s")
            for k, cells in behind.items():
                for index, chunk in enumerate(chunks[k]):
                    for _ in _measured(bench, ledger, race, plan, (k, index), chunk, cells):
                        bar.advance(len(chunk) * bench.responses if k == level else 0)
                race.done |= {(cell, k) for cell in cells}
                measured |= set(cells) if k == level else set()
            going = race.going()  # again: the best one may be another one now, with other neighbours
        bar.advance((len(everything) - len(measured)) * len(new) * bench.responses)


def _measured(
    bench: _Bench,
    ledger: "_Ledger",
    race: _Race,
    candidates: SteeringPlan,
    name: tuple[int, int],
    chunk: tuple[int, ...],
    cells: Sequence[int],
) -> Iterator[int]:
    """Measure some cells on some units, those that the ledger does not have, and yield each as it is done."""
    units = list(chunk)
    known = ledger.read(name, len(chunk))
    missing = {cell: _at(candidates, *race.cells[cell]) for cell in cells if cell not in known}
    try:
        for cell, values in ((c, known[c]) for c in cells if c in known):
            race.found[cell, units], race.seen[cell, units] = values, True
            yield cell
        for cell, values in bench.measure(chunk, missing) if missing else ():
            race.found[cell, units], race.seen[cell, units] = values, True
            ledger.add(cell, values)
            yield cell
    finally:
        ledger.flush()


def _cells(
    race: _Race, places: Sequence[tuple[str, str, int]], grid: Sequence[float], seed: int
) -> tuple[SweepCell, ...]:
    """Every cell with its figures; coefficient 0 is known without measuring."""
    index = {cell: k for k, cell in enumerate(race.cells)}
    found = []
    for place, where in enumerate(places):
        for coefficient in grid:
            if not coefficient:
                nothing, half, one = (Interval(value, value, value) for value in (0.0, 0.5, 1.0))
                found.append(SweepCell(*where, 0.0, nothing, half, one, nothing, len(race.prompt_of)))
                continue
            cell = index[place, coefficient]
            effect, win, rise, kl = (_bootstrap(*race.sums(race.found[cell, :, k]), seed) for k in range(len(FIGURES)))
            count = int(race.seen[cell].sum())
            found.append(SweepCell(*where, coefficient, effect, win, rise.map(_exp), kl, count))
    return tuple(found)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _student(sums: Float[np.ndarray, " prompt"], sizes: Float[np.ndarray, " prompt"]) -> tuple[float, float, float]:
    """Mean over units with its Student interval, clustered by prompt; infinite where there are no units.

    The bootstrap's interval is too narrow for a handful of prompts; this one holds for few, too.
    """
    if not len(sums):
        return math.inf, math.inf, math.inf
    mean = float(sums.sum() / sizes.sum())
    if len(sums) == 1:
        return mean, -math.inf, math.inf
    error = math.sqrt(len(sums) / (len(sums) - 1) * float(((sums - mean * sizes) ** 2).sum())) / float(sizes.sum())
    half = _quantile(len(sums) - 1) * error
    return mean, mean - half, mean + half


def _quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t: Abramowitz & Stegun 26.7.5, within 1% from 3 degrees of freedom on.

    >>> round(_quantile(10), 2)
    2.23
    """
    z, n = 1.959964, degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _bootstrap(sums: Float[np.ndarray, " prompt"], sizes: Float[np.ndarray, " prompt"], seed: int) -> Interval:
    """:func:`~sims_lens.stats.bootstrap_mean` of units that come in prompts: the prompts are what is drawn."""
    if not len(sums):
        return Interval(math.inf, math.inf, math.inf)
    drawn = _draws(len(sums), seed)
    mean = float(sums.sum() / sizes.sum())
    return bca(mean, (drawn @ sums) / (drawn @ sizes), sums - mean * sizes)


@lru_cache(maxsize=32)
def _draws(count: int, seed: int) -> Float[np.ndarray, "draw prompt"]:
    """How often each prompt is in each bootstrap sample: the same samples as ``bootstrap_mean`` draws."""
    chosen = np.random.default_rng(seed).integers(0, count, size=(DRAWS, count))
    flat = (chosen + count * np.arange(DRAWS)[:, None]).ravel()
    return np.bincount(flat, minlength=DRAWS * count).reshape(DRAWS, count).astype(float)


# What is kept


class _Ledger:
    """The folder of a sweep: its settings, its directions, and the figures of each lot of units as they come.

    ::

        sweep.json                what was asked for; written first
        directions.safetensors    what is done at each direction, site and layer, with the residual norms
        figures/00-000.json       round and lot: for each cell, for each unit, its figures
        unsteered.partial/        generation mode: the unsteered responses
        result.json               :class:`LayerSweep`

    Args:
        path: the folder; None keeps nothing.
        settings: what the figures depend on.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self._name: tuple[int, int] | None = None
        self._held: dict[int, list[list[float]]] = {}
        self._changed, self._saved = False, time.monotonic()
        if path is None:
            return
        header = path / "sweep.json"
        if not header.is_file():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise RunError(f"{path} exists and holds no sweep; choose another folder")
            write_json(header, {"format": _FORMAT, "version": _VERSION, "settings": settings})
            return
        found = read_json(header)
        if not isinstance(found, dict) or found.get("format") != _FORMAT or found.get("version") != _VERSION:
            raise RunError(f"{header} is not of a sweep that this sims_lens reads; choose another folder")
        there = read_as(dict[str, Any], found.get("settings", {}), f"settings in {header}")
        for key in sorted({*there, *settings}):
            if there.get(key) != settings.get(key):
                raise RunError(f"{path} holds a sweep with other {key}; use the same to go on, or another folder")

    def steering(self, make: Callable[[], SteeringPlan], plan: SteeringPlan) -> SteeringPlan:
        """The plan with its residual norms, which are measured once and read back after that."""
        if self.path is None:
            return make()
        file = self.path / "directions.safetensors"
        if not file.is_file():
            make().save(file)
        norms = [i.residual_norm for i in SteeringPlan.load(file).interventions]
        both = zip(plan.interventions, norms, strict=True)
        return replace(plan, interventions=tuple(replace(i, residual_norm=norm) for i, norm in both))

    def samples(self, chunk: tuple[int, ...], make: Callable[[], list[Sample]]) -> list[Sample]:
        """The unsteered responses to some prompts."""
        if self.path is None:
            return make()
        return Folder(self.path / "unsteered").samples(f"from-{chunk[0]:04d}", make)

    def read(self, name: tuple[int, int], count: int) -> dict[int, Float[np.ndarray, "unit figure"]]:
        """The figures that are there for a lot of ``count`` units, by cell."""
        self._name, self._held = name, {}
        file = self._file()
        if file is not None and file.is_file():
            try:
                self._held = {int(cell): values for cell, values in read_json(file).items()}
                found = {cell: np.array(values, dtype=float) for cell, values in self._held.items()}
                if any(values.shape != (count, len(FIGURES)) for values in found.values()):
                    raise ValueError(f"a cell has no {count} units")
            except (AttributeError, TypeError, ValueError, OverflowError) as error:
                if isinstance(error, RunError):
                    raise
                raise RunError(f"{file} is damaged ({error}); delete it and go on") from error
            return found
        return {}

    def add(self, cell: int, values: Float[np.ndarray, "unit figure"]) -> None:
        """Keep a cell's figures of the lot that was read last; on disk within some seconds."""
        if self.path is None:
            return
        self._held[cell] = values.tolist()
        self._changed = True
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last time."""
        file = self._file()
        if file is not None and self._changed:
            write_json(file, {str(cell): values for cell, values in self._held.items()})
            self._changed, self._saved = False, time.monotonic()

    def finish(self, sweep: LayerSweep) -> None:
        """Keep the result."""
        if self.path is not None:
            write_json(self.path / "result.json", sweep.to_json())

    def _file(self) -> Path | None:
        if self.path is None or self._name is None:
            return None
        level, index = self._name
        return self.path / "figures" / f"{level:02d}-{index:03d}.json"


__all__ = ["COEFFICIENTS", "FIGURES", "LayerSweep", "SweepCell", "layer_sweep"]
