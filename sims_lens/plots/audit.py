"""The reliability card: how far a ranker can be trusted, at a glance."""

import textwrap
from typing import Final

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.auditing import MEASURES, Audit, Measure
from sims_lens.errors import RankerError
from sims_lens.plots.theme import BLUE, EDGE, ORANGE, TEXT, VERMILLION, WIDTH, error_bars, plotly_text, titled
from sims_lens.stats import Interval

_ROW, _LINE, _BETWEEN = 26, 17, 66  # pixels: of a measure, of a line of the subtitle, between two panels
_SUBTITLE: Final = 100  # characters in a line
_GOOD, _OPEN, _BAD, _PLAIN = (
    "beyond chance, or no bias",
    "may be chance",
    "worse than chance, or a bias",
    "no chance level",
)
_LOOKS: Final = {
    _GOOD: (BLUE, "circle"),
    _OPEN: (ORANGE, "diamond"),
    _BAD: (VERMILLION, "square"),
    _PLAIN: (TEXT, "circle"),
}


def reliability_card(audit: Audit) -> go.Figure:
    """Every measure of an audit with its 95% interval, the mark of chance beside it, and the verdict above.

    Measures that don't apply are left out. The name of the ranker isn't in the picture, see :mod:`sims_lens.plots.run`.

    Args:
        audit: what :func:`sims_lens.auditing.audit` returned.

    Raises:
        RankerError: the audit has no measure to draw.
    """
    there = [(measure, interval) for measure in MEASURES if (interval := getattr(audit, measure.field)) is not None]
    panels = [[row for row in there if row[0].scale == scale] for scale in ("rate", "correlation")]
    panels = [rows for rows in panels if rows]
    if not panels:
        raise RankerError("this audit has measured nothing that could be drawn; give prompts with different responses")
    plot = _ROW * sum(len(rows) for rows in panels) + _BETWEEN * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=[len(rows) for rows in panels],
        vertical_spacing=_BETWEEN / plot if len(panels) > 1 else 0.0,
    )
    lines = [
        *map(plotly_text, textwrap.wrap(f"{audit.reason[:1].upper()}{audit.reason[1:]}.", _SUBTITLE)),
        f"{audit.prompts} prompts; 95% intervals over prompts; dotted: what a coin would get",
    ]
    top, bottom = 60 + _LINE * len(lines), 92
    title = f"Reliability of the ranker: {audit.verdict}"
    titled(figure, title, "<br>".join(lines), width=WIDTH, height=top + plot + bottom)
    shown: set[str] = set()
    for number, rows in enumerate(panels, start=1):
        where = {"row": number, "col": 1}
        for standing in _LOOKS:
            chosen = [(y, *row) for y, row in enumerate(rows) if _standing(*row) == standing]
            if chosen:
                figure.add_trace(_intervals(chosen, standing, standing not in shown), **where)
                shown.add(standing)
        for y, (measure, _) in enumerate(rows):
            if measure.chance is not None:
                figure.add_shape(
                    type="line",
                    x0=measure.chance,
                    x1=measure.chance,
                    y0=y - 0.5,
                    y1=y + 0.5,
                    line={"color": TEXT, "width": 1.6, "dash": "dot"},
                    layer="below",
                    name=f"chance of {measure.field}",
                    **where,
                )
        labels = {"tickvals": list(range(len(rows))), "ticktext": [measure.label for measure, _ in rows]}
        figure.update_yaxes(range=[len(rows) - 0.5, -0.5], showgrid=False, ticks="", **labels, **where)
        rate = rows[0][0].scale == "rate"
        figure.update_xaxes(
            title_text="share of comparisons" if rate else "correlation within prompts",
            range=[-0.02, 1.02] if rate else [-1.04, 1.04],
            tickvals=[0, 0.25, 0.5, 0.75, 1] if rate else [-1, -0.5, 0, 0.5, 1],
            showgrid=True,
            linecolor=EDGE,
            **where,
        )
    return figure.update_layout(
        margin={"t": top, "b": bottom, "l": 8}, legend={"xref": "container", "x": 0.012}, showlegend=True
    )


def _intervals(rows: list[tuple[int, Measure, Interval]], standing: str, legend: bool) -> go.Scatter:
    colour, symbol = _LOOKS[standing]
    intervals = [interval for _, _, interval in rows]
    return go.Scatter(
        x=[interval.estimate for interval in intervals],
        y=[y for y, _, _ in rows],
        error_x={**error_bars(intervals, width=4), "color": colour, "thickness": 2},
        customdata=[[measure.label, interval.low, interval.high] for _, measure, interval in rows],
        name=standing,
        legendgroup=standing,
        showlegend=legend,
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 9},
        hovertemplate="%{customdata[0]}<br>%{x:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]<extra></extra>",
    )


def _standing(measure: Measure, interval: Interval) -> str:
    """On which side of chance an interval lies, and whether that is where a good ranker's does."""
    if measure.chance is None:
        return _PLAIN
    above, below = interval.low > measure.chance, interval.high < measure.chance
    if measure.good == "chance":
        return _BAD if above or below else _GOOD
    if not above and not below:
        return _OPEN
    return _GOOD if above == (measure.good == "high") else _BAD


__all__ = ["reliability_card"]
