"""A layer sweep: the map of layers and coefficients, and what effect is to be had at what cost."""

import math
from collections.abc import Sequence
from typing import Any, Final

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.analysis.sweep import FIGURES, LayerSweep, SweepCell
from sims_lens.errors import ConfigError, RunError
from sims_lens.plots.theme import BAND, DIVERGING, GREEN, HEIGHT, PURPLE, TEXT, colours, plotly_text, titled
from sims_lens.stats import Interval

_DARK, _LIGHT = "#26282C", "#F4F4F2"
"""A mark of both stands out from every colour of the map, and from either page in the legend."""

_NAMES: Final = {
    "effect": "effect",
    "win_rate": "win rate",
    "perplexity_ratio": "perplexity ratio",
    "kl": "KL (nats per token)",
}
_MOST_TICKS: Final = 16
_ROW: Final = 34
"""Pixels of a row of the map."""


def layer_sweep(
    sweep: LayerSweep, *, value: str = "effect", direction: str | None = None, site: str | None = None
) -> go.Figure:
    """A figure of every cell, layers to the right and coefficients upwards; one map for each direction and site.

    The lines are where the budget ends, interpolated between the cells on a log scale: KL solid, perplexity ratio
    dashed. The bull's eye is the best cell within the budget. Where the cells raced, a dot marks those that were
    measured on everything. The mouse shows all figures of a cell with their intervals. Colours of effects, KL and
    ratios are stretched over what lies within the budget or near it; beyond that they stay at the end of the scale.

    Args:
        sweep: of :func:`sims_lens.layer_sweep`.
        value: what the colours show: "effect", "win_rate", "perplexity_ratio" or "kl".
        direction: only this one.
        site: only this one.

    Raises:
        ConfigError: there is no such value.
        RunError: the sweep has no such direction or site.
    """
    if value not in FIGURES:
        raise ConfigError(f"value must be one of {', '.join(FIGURES)}, got {value!r}")
    panels = [p for p in sweep.panels if direction in (None, p[0]) and site in (None, p[1])]
    if not panels:
        there = "; ".join(", ".join(panel) for panel in sweep.panels)
        raise RunError(f"the sweep has no direction {direction!r} at site {site!r}; it has {there or 'no cells'}")
    shown = [cell for cell in sweep.cells if (cell.direction, cell.site) in panels]
    layers, coefficients = sorted({c.layer for c in shown}), sorted({c.coefficient for c in shown})
    heads = [plotly_text(", ".join(panel)) for panel in panels] if len(sweep.panels) > 1 else None
    plot = _ROW * len(coefficients) + (44 if heads else 0)
    height = plot * len(panels) + 84 + 104 + (28 if heads else 0)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        subplot_titles=heads,
        vertical_spacing=44 / (plot * len(panels)) if len(panels) > 1 else 0.0,
    )
    titled(figure, _title(value), _subtitle(sweep), height=max(height, 330))
    for row, panel in enumerate(panels, start=1):
        at = {(c.layer, c.coefficient): c for c in shown if (c.direction, c.site) == panel}
        grid = [[at.get((layer, coefficient)) for layer in layers] for coefficient in coefficients]
        figure.add_heatmap(
            x=list(range(len(layers))),
            y=list(range(len(coefficients))),
            z=[[None if c is None else _finite(getattr(c, value).estimate) for c in line] for line in grid],
            text=[["" if c is None else hover(sweep, c) for c in line] for line in grid],
            hovertemplate="%{text}<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            row=row,
            col=1,
        )
        _add_limits(figure, sweep, grid, row)
        _add_marks(figure, sweep, grid, row)
    figure.update_xaxes(**_ticks(layers), showgrid=False, zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(coefficients))), ticktext=[f"{c:g}" for c in coefficients], showgrid=False
    )
    figure.update_yaxes(title_text=f"coefficient{_units(sweep, '<br>')}", title_standoff=6)
    figure.update_xaxes(title_text="layer", row=len(panels))
    figure.update_annotations(font={"size": 13, "color": TEXT})
    figure.update_layout(coloraxis=_scale(sweep, shown, value), margin={"r": 16, "t": 112 if heads else 84, "b": 104})
    return figure


def frontier(sweep: LayerSweep) -> go.Figure:
    """Effect against KL for every cell, with 95% intervals: which effect is to be had at which cost.

    The line joins the cells that no other one beats, those with a larger effect than every cell of a smaller KL. Hollow
    cells are beyond one of the budget's limits; what the limit on KL forbids is shaded. The colours are layers, or
    where there are several directions or sites, those. Broken cells may lie far below: the frame leaves them out, and
    says how many.

    Args:
        sweep: of :func:`sims_lens.layer_sweep`.

    Raises:
        RunError: no cell has a KL that could be drawn.
    """
    drawn = [c for c in sweep.cells if 0 < c.kl.estimate < math.inf and math.isfinite(c.effect.estimate)]
    if not drawn:
        raise RunError("the sweep has no cell with a KL above 0 to draw; see sweep.table()")
    figure = go.Figure()
    titled(
        figure,
        "What an effect costs",
        "A point is a cell, with its 95% intervals; hollow: beyond the budget (shaded: by its KL).",
        height=HEIGHT + 90,
    )
    panels = sweep.panels
    for index, (panel, colour) in enumerate(zip(panels, colours(len(panels)), strict=True)):
        cells = [c for c in drawn if (c.direction, c.site) == panel]
        marker: dict[str, Any] = {"size": 8, "symbol": ["circle" if sweep.allows(c) else "circle-open" for c in cells]}
        if len(panels) == 1:
            marker |= {"color": [c.layer for c in cells], "coloraxis": "coloraxis"}
        else:
            marker |= {"color": colour}
        figure.add_scatter(
            x=[c.kl.estimate for c in cells],
            y=[c.effect.estimate for c in cells],
            error_x=_bars([c.kl for c in cells]),
            error_y=_bars([c.effect for c in cells]),
            name=plotly_text(", ".join(panel)),
            legendgroup=f"panel {index}",
            showlegend=len(panels) > 1,
            mode="markers",
            marker=marker,
            text=[hover(sweep, c) for c in cells],
            hovertemplate="%{text}<extra></extra>",
        )
    front = [c for c in sweep.frontier() if c.kl.estimate > 0]
    figure.add_scatter(
        x=[c.kl.estimate for c in front],
        y=[c.effect.estimate for c in front],
        name="beaten by none",
        mode="lines",
        line={"color": TEXT, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    best = sweep.best
    if best is not None and best in drawn:
        figure.add_scatter(x=[best.kl.estimate], y=[best.effect.estimate], **_target())
    bottom, top = _frame(sweep, drawn)
    inside = [c for c in drawn if c.effect.estimate >= bottom]
    low, high = (bound(math.log10(c.kl.estimate) for c in inside) for bound in (min, max))
    ends = [low - 0.12, max(high, math.log10(sweep.budget.kl) if math.isfinite(sweep.budget.kl) else high) + 0.12]
    if outside := len(drawn) - len(inside):
        figure.add_annotation(
            text=f"{outside} cell{'s' if outside > 1 else ''} below the frame",
            x=0.01,
            y=0.0,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
        )
    if math.isfinite(sweep.budget.kl):
        limit = sweep.budget.kl
        figure.add_vrect(x0=limit, x1=10 ** ends[1], fillcolor=BAND, line_width=0, layer="below")
        figure.add_vline(x=limit, line={"color": TEXT, "width": 1.6, "dash": "dash"}, layer="below")
    figure.add_hline(y=0.0, line={"color": TEXT, "width": 1.5, "dash": "dot"}, layer="below")
    figure.update_xaxes(type="log", range=ends, dtick="D2", tickformat="~g", title_text="KL (nats per token)")
    figure.update_yaxes(title_text=_wrapped(sweep.measure), range=[bottom, top])
    if len(panels) == 1:
        figure.update_layout(
            coloraxis={"colorscale": "Viridis", "colorbar": {"title": {"text": "layer"}, "thickness": 14}}
        )
    return figure


def _frame(sweep: LayerSweep, cells: Sequence[SweepCell]) -> tuple[float, float]:
    """The effects that the frontier shows: all within the budget, and as far below zero as the largest is above."""
    top = max(c.effect.high for c in cells)
    least = min((c.effect.low for c in cells if sweep.allows(c)), default=0.0)
    bottom = max(min(c.effect.low for c in cells), min(least, -max(top, 0.0)))
    if not any(c.effect.estimate >= bottom for c in cells) or top <= bottom:  # all are broken: show them
        bottom = min(c.effect.low for c in cells)
    room = 0.06 * (max(top, 0.0) - min(bottom, 0.0)) or 1.0
    return min(bottom, 0.0) - room, max(top, 0.0) + room


def hover(sweep: LayerSweep, cell: SweepCell) -> str:
    """All that is known of a cell, as lines of HTML."""
    where = f"{cell.direction}, layer {cell.layer} {cell.site}"
    lines = [f"{plotly_text(where)}, coefficient {cell.coefficient:g}"]
    lines += [f"{_NAMES[name]} {_shown(getattr(cell, name), signed=name == 'effect')}" for name in FIGURES]
    standing = "within the budget" if sweep.allows(cell) else "beyond the budget"
    return "<br>".join([*lines, f"{cell.count} of {sweep.total} {sweep.unit}s, {standing}"])


def _shown(interval: Interval, *, signed: bool) -> str:
    number = "{:+.3g}" if signed else "{:.3g}"
    estimate, low, high = (number.format(v) for v in (interval.estimate, interval.low, interval.high))
    return f"{estimate} [{low}, {high}]"


def _title(value: str) -> str:
    return {
        "effect": "Where to steer, and how strongly",
        "win_rate": "Win rate of each layer and coefficient",
        "perplexity_ratio": "What each layer and coefficient costs: perplexity",
        "kl": "What each layer and coefficient costs: divergence",
    }[value]


def _subtitle(sweep: LayerSweep) -> str:
    how = "fixed pairs of texts" if sweep.unit == "pair" else "sampled responses"
    return f"{plotly_text(sweep.behaviour)}, {how}. Lines: where the fluency budget ends."


def _units(sweep: LayerSweep, gap: str) -> str:
    if sweep.units == "residual_norm" and "at the site" in sweep.unit_of_coefficients:
        return f"{gap}(× median norm{gap}at the site)"
    unit = {"residual_norm": "(× residual norm)", "strength": "(strength)", "mixed": "(mixed units)"}
    return f"{gap}{unit[sweep.units]}" if sweep.units in unit else ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ticks(layers: Sequence[int]) -> dict[str, Any]:
    """A tick for each layer, or for every second, fifth, ... where they are many."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10**6) if len(layers) / s <= _MOST_TICKS)
    at = [k for k in range(len(layers)) if k % step == 0]
    return {"tickvals": at, "ticktext": [str(layers[k]) for k in at]}


def _scale(sweep: LayerSweep, cells: Sequence[SweepCell], value: str) -> dict[str, Any]:
    """The colours: diverging about no effect, or rising with the cost up to a few times the limit."""
    known = [getattr(c, value).estimate for c in cells if math.isfinite(getattr(c, value).estimate)] or [0.0]
    title = {"kl": "KL (nats)", "perplexity_ratio": "perplexity<br>ratio"}.get(value, _NAMES[value])
    bar: dict[str, Any] = {"title": {"text": title}, "thickness": 14, "len": 0.96}
    if value == "effect":
        within = [abs(c.effect.estimate) for c in cells if sweep.allows(c) and c.coefficient]
        end = max(within, default=0.0) or max(map(abs, known)) or 1.0
        return {"colorscale": DIVERGING, "cmin": -end, "cmid": 0.0, "cmax": end, "colorbar": bar}
    if value == "win_rate":
        return {"colorscale": DIVERGING, "cmin": 0.0, "cmid": 0.5, "cmax": 1.0, "colorbar": bar}
    least, limit = (0.0, 4 * sweep.budget.kl) if value == "kl" else (1.0, 1 + 4 * (sweep.budget.perplexity_ratio - 1))
    return {"colorscale": "Viridis", "cmin": min(least, *known), "cmax": min(limit, max(known)), "colorbar": bar}


def _add_limits(figure: go.Figure, sweep: LayerSweep, grid: Sequence[Sequence[SweepCell | None]], row: int) -> None:
    """Contours at the budget's limits; cost rises by factors, so between two cells it is interpolated by its log."""
    limits = (
        ("KL", "kl", sweep.budget.kl, GREEN, "solid"),
        ("perplexity ratio", "perplexity_ratio", sweep.budget.perplexity_ratio, PURPLE, "dash"),
    )
    for name, value, limit, colour, dash in limits:
        if not math.isfinite(limit):
            continue
        label = f"{name} {limit:g}"
        line = {"color": colour, "width": 3, "dash": dash}
        shown = {"name": label, "legendgroup": label, "row": row, "col": 1}
        figure.add_scatter(x=[None], y=[None], mode="lines", line=line, showlegend=row == 1, **shown)
        if min(len(grid), len(grid[0])) < 2:
            continue  # there is nothing to interpolate
        z = [[None if c is None else _excess(getattr(c, value).estimate, limit) for c in cells] for cells in grid]
        figure.add_contour(
            z=z,
            contours={"start": 0.0, "end": 0.0, "size": 1.0, "coloring": "none"},
            line={**line, "smoothing": 0.0},
            showscale=False,
            showlegend=False,
            hoverinfo="skip",
            **shown,
        )


def _excess(value: float, limit: float) -> float:
    """How far a cost is beyond its limit, in logs, within what a contour needs.

    >>> _excess(0.5, 0.5), _excess(0.0, 0.5)
    (0.0, -6.0)
    """
    return max(-6.0, min(6.0, math.log(value / limit))) if value > 0 else -6.0


def _add_marks(figure: go.Figure, sweep: LayerSweep, grid: Sequence[Sequence[SweepCell | None]], row: int) -> None:
    """Dots on the cells that were measured on everything, where not all were; a bull's eye on the best one."""
    placed = [(x, y, c) for y, cells in enumerate(grid) for x, c in enumerate(cells) if c is not None]
    best = sweep.best
    whole = [(x, y) for x, y, c in placed if c.count == sweep.total and c.coefficient and c != best]
    if any(c.count < sweep.total for c in sweep.cells):
        figure.add_scatter(
            x=[x for x, _ in whole],
            y=[y for _, y in whole],
            name=f"on all {sweep.total} {sweep.unit}s",
            legendgroup="whole",
            showlegend=row == 1,
            mode="markers",
            marker={"color": _DARK, "size": 5, "line": {"color": _LIGHT, "width": 1}},
            hoverinfo="skip",
            row=row,
            col=1,
        )
    for x, y, c in placed:
        if c == best:
            figure.add_scatter(x=[x], y=[y], **_target(), row=row, col=1)


def _target() -> dict[str, Any]:
    return {
        "name": "best within the budget",
        "mode": "markers",
        "marker": {"color": _LIGHT, "size": 14, "symbol": "circle-dot", "line": {"color": _DARK, "width": 2.5}},
        "hoverinfo": "skip",
    }


def _bars(intervals: Sequence[Interval]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [_finite(i.high - i.estimate) for i in intervals],
        "arrayminus": [_finite(i.estimate - i.low) for i in intervals],
        "thickness": 1,
        "width": 0,
        "color": "rgba(122, 125, 130, 0.45)",
    }


def _wrapped(text: str) -> str:
    """A long axis title on two lines."""
    head, bracket, rest = plotly_text(text).partition(" (")
    return f"{head}<br>({rest}" if bracket and len(text) > 40 else f"{head}{bracket}{rest}"


__all__ = ["frontier", "hover", "layer_sweep"]
