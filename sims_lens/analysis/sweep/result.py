"""What a sweep found: its cells, the best of them, a plan."""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sims_lens.analysis.sweep.candidates import plan_at
from sims_lens.calibration import FluencyBudget, unlimited
from sims_lens.errors import PlanError, ResultError, RunError
from sims_lens.plan import SteeringPlan
from sims_lens.stats import Interval
from sims_lens.typed import known_fields, read_as

if TYPE_CHECKING:
    import pandas as pd

FIGURES = ("effect", "win_rate", "perplexity_ratio", "kl")
"""What each cell has an interval of."""
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
        return plan_at(self.steering, places.index(where), cell.coefficient)

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
        return {**plain, "budget": self.budget.to_json(), "cells": [cell.to_json() for cell in self.cells]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, plan: SteeringPlan | None = None) -> "LayerSweep":
        """The inverse of :meth:`to_json`.

        Args:
            data: what that returned.
            plan: ``sweep.steering``, for instance ``SteeringPlan.load(path)``.

        Raises:
            ResultError: it is no such thing.
        """
        found: LayerSweep = read_as(cls, {**unlimited(known_fields(cls, data)), "steering": None})
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

__all__ = ["FIGURES", "LayerSweep", "SweepCell"]
