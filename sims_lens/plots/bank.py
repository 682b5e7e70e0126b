"""Figures of contrast sampling: which pairs each iteration was fitted to."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.bank import PairDiagnostics
from sims_lens.checks import check_list
from sims_lens.errors import RunError
from sims_lens.plots.theme import BLUE, GREEN, HEIGHT, ORANGE, check_result, titled

_FILL = "rgba(0, 114, 178, 0.22)"


def pair_selection(diagnostics: Sequence[PairDiagnostics]) -> go.Figure:
    """Margins of the pairs by iteration, and below them how many pairs are new and how many join two iterations.

    Boxes span the middle half of the margins, whiskers the middle 90%. With a bank that grows the margins rise even
    when nothing is learnt: best and worst are the extremes of more responses.

    Args:
        diagnostics: of :func:`sims_lens.bank.diagnose`, one per iteration.

    Raises:
        RunError: there are none.
    """
    for each in check_list("diagnostics", diagnostics, "[iteration.diagnostics for iteration in run.iterations]"):
        check_result(each, PairDiagnostics)
    if not diagnostics:
        raise RunError("there are no pairs to draw yet; give one PairDiagnostics per finished iteration")
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.62, 0.38], vertical_spacing=0.09)
    titled(
        figure,
        "Which pairs the iterations learn from",
        "Margins: middle half and middle 90% of the pairs. They rise with a growing bank by chance alone.",
        height=HEIGHT + 100,
    )
    x = [d.iteration for d in diagnostics]
    low, lower, middle, upper, high = zip(*(d.margins for d in diagnostics), strict=True)
    figure.add_box(
        x=x,
        lowerfence=low,
        q1=lower,
        median=middle,
        q3=upper,
        upperfence=high,
        name="margin",
        showlegend=False,
        line={"color": BLUE, "width": 1.8},
        fillcolor=_FILL,
        width=0.36,
        hoverinfo="skip",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=[d.margin for d in diagnostics],
        customdata=[[*d.margins, d.pairs] for d in diagnostics],
        name="mean margin",
        mode="markers",
        marker={"color": BLUE, "size": 8, "symbol": "diamond"},
        hovertemplate="iteration %{x}, %{customdata[5]} pairs<br>mean margin %{y:.3g}<br>median %{customdata[2]:.3g}"
        "<br>middle half %{customdata[1]:.3g} to %{customdata[3]:.3g}"
        "<br>middle 90% %{customdata[0]:.3g} to %{customdata[4]:.3g}<extra></extra>",
        row=1,
        col=1,
    )
    for name, values, colour, dash in (
        ("new since the iteration before", [d.turnover for d in diagnostics], ORANGE, "solid"),
        ("best and worst of different iterations", [d.cross_share for d in diagnostics], GREEN, "dash"),
    ):
        figure.add_scatter(
            x=x,
            y=values,
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"size": 7},
            hovertemplate=f"iteration %{{x}}<br>{name}: %{{y:.0%}}<extra></extra>",
            row=2,
            col=1,
        )
    step = -(-len(x) // 10)
    shown = x[::-step][::-1]
    figure.update_xaxes(range=[x[0] - 0.5, x[-1] + 0.5], tickvals=shown)
    figure.update_xaxes(title_text="iteration", row=2)
    figure.update_yaxes(title_text="margin (ranker's units)", rangemode="tozero", row=1)
    figure.update_yaxes(title_text="share of pairs", range=[-0.04, 1.04], tickvals=[0, 0.5, 1], tickformat=".0%", row=2)
    return figure


__all__ = ["pair_selection"]
