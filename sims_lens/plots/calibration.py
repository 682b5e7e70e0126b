"""The curve of a calibration: effect and fluency against the strength, with the budget and the choice."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.calibration import Calibration, Point
from sims_lens.errors import RunError
from sims_lens.plots.theme import BAND, HEIGHT, TEXT, VERMILLION, check_result, colours, error_bars, plotly_text, titled
from sims_lens.stats import Interval

_APART: Final = 1.025
"""Between two candidates at one strength, and between the choice and its report: a factor, the axis being a log one."""

_PANELS: Final[tuple[tuple[str, Callable[[Point], Interval], str], ...]] = (
    ("effect", lambda p: p.effect, "+.3g"),
    ("perplexity ratio", lambda p: p.perplexity_ratio, ".2f"),
    ("KL (nats per token)", lambda p: p.evaluation.kl, ".2f"),
)


def calibration(found: Calibration) -> go.Figure:
    """Effect, perplexity ratio and KL of every candidate against its strength, with 95% intervals over prompts.

    Points beyond the budget are hollow; the parts of the lower panels that the budget forbids are shaded. A ring marks
    the choice, and the diamond beside it is the same plan on the report split, where nothing was chosen.

    The strength is the coefficient where the candidates' coefficients are of one unit and positive, and the factor
    otherwise. Names of candidates are shown as plain text.

    Args:
        found: what :func:`sims_lens.calibrate` returned.

    Raises:
        RunError: it has no points.
    """
    check_result(found, Calibration)
    if not found.curve:
        raise RunError("the calibration has no points to draw; see sims_lens.calibrate")
    by_coefficient = found.units != "mixed" and all(p.coefficient > 0 for p in found.curve)
    names = found.candidates
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, row_heights=[0.46, 0.27, 0.27], vertical_spacing=0.05)
    titled(
        figure,
        "How strongly to steer: effect and fluency",
        "95% intervals over prompts. Hollow: beyond the budget (shaded). Ring: the choice; diamond: its report.",
        height=HEIGHT + 220 + 20 * math.ceil(len(names) / 4),
    )

    def strength(point: Point) -> float:
        return point.coefficient if by_coefficient else point.factor

    for index, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True)):
        points = [p for p in found.curve if p.candidate == name]
        shift = _APART ** (index - (len(names) - 1) / 2)
        for row, (what, value, number) in enumerate(_PANELS, start=1):
            shown = [p for p in points if math.isfinite(value(p).estimate)]
            symbols = ["circle" if found.budget.allows(p) else "circle-open" for p in shown]
            figure.add_scatter(
                **_marks(shown, what, value, number, x=[strength(p) * shift for p in shown]),
                name=plotly_text(name),
                legendgroup=f"candidate {index}",
                showlegend=row == 1,
                mode="lines+markers",
                line={"color": colour, "width": 1.6},
                marker={"color": colour, "size": 8, "symbol": symbols},
                row=row,
                col=1,
            )
        if found.chosen is not None and found.chosen.candidate == name:
            _mark_choice(figure, found, strength(found.chosen) * shift)
    for row, limit in ((2, found.budget.perplexity_ratio), (3, found.budget.kl)):
        if math.isfinite(limit):
            value = _PANELS[row - 1][1]
            ends = [value(p).high for p in (*found.curve, *([found.report] if found.report else []))]
            _mark_limit(figure, limit, max(end for end in (limit, *ends) if math.isfinite(end)), row)
    figure.add_hline(y=0.0, line={"color": TEXT, "width": 1.5, "dash": "dot"}, layer="below", row=1, col=1)
    unit = {"residual_norm": "coefficient (× median residual norm)", "absolute": "coefficient"}.get(found.units, "")
    figure.update_xaxes(type="log", tickvals=_ticks([strength(p) for p in found.curve]), tickformat="~g")
    figure.update_xaxes(title_text=unit if by_coefficient else "factor (× the plan as given)", row=3)
    for row, (what, _, _) in enumerate(_PANELS, start=1):
        figure.update_yaxes(title_text=what, row=row)
    return figure


def _mark_choice(figure: go.Figure, found: Calibration, x: float) -> None:
    """A ring around the chosen point in each panel, and the report beside it."""
    assert found.chosen is not None
    for row, (what, value, number) in enumerate(_PANELS, start=1):
        figure.add_scatter(
            x=[x],
            y=[value(found.chosen).estimate],
            name="chosen",
            legendgroup="chosen",
            showlegend=row == 1,
            mode="markers",
            marker={"color": VERMILLION, "size": 16, "symbol": "circle-open", "line": {"width": 2}},
            hoverinfo="skip",
            row=row,
            col=1,
        )
        if found.report is not None:
            figure.add_scatter(
                **_marks([found.report], what, value, number, x=[x * _APART**2]),
                name="report split",
                legendgroup="report",
                showlegend=row == 1,
                mode="markers",
                marker={"color": VERMILLION, "size": 9, "symbol": "diamond"},
                row=row,
                col=1,
            )


def _mark_limit(figure: go.Figure, limit: float, highest: float, row: int) -> None:
    """A dashed line at the limit, and shade from there to the top of the axis, which leaves room above both."""
    top = highest + 0.1 * limit
    figure.add_hrect(y0=limit, y1=top, fillcolor=BAND, line_width=0, layer="below", row=row, col=1)
    figure.add_hline(y=limit, line={"color": TEXT, "width": 1.6, "dash": "dash"}, layer="below", row=row, col=1)
    figure.update_yaxes(range=[None, top], row=row)


def _marks(
    points: Sequence[Point], what: str, value: Callable[[Point], Interval], number: str, *, x: Sequence[float]
) -> dict[str, object]:
    """Where the points are, their intervals, and what is said when the mouse is over them."""
    intervals = [value(p) for p in points]
    ends = f"[%{{customdata[3]:{number}}}, %{{customdata[4]:{number}}}]"
    return {
        "x": list(x),
        "y": [i.estimate for i in intervals],
        "error_y": {**error_bars(intervals, width=4), "thickness": 1.4},
        "customdata": [
            [plotly_text(p.candidate), p.factor, p.coefficient, i.low, i.high]
            for p, i in zip(points, intervals, strict=True)
        ],
        "hovertemplate": "%{customdata[0]}, factor %{customdata[1]:.3g}, coefficient %{customdata[2]:.3g}"
        f"<br>{what} %{{y:{number}}} {ends}<extra></extra>",
    }


def _ticks(values: Sequence[float]) -> list[float]:
    """Ticks at 1, 2 and 5 of each decade that the values reach into.

    >>> _ticks([0.05, 0.8])
    [0.05, 0.1, 0.2, 0.5, 1.0]
    """
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [round(step * 10.0**decade, 12) for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]


__all__ = ["calibration"]
