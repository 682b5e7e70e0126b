"""The figure of a comparison: what each method gains, for what it costs."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.comparison import Comparison, Method
from sims_lens.plots.theme import (
    BAND,
    BLUE,
    GREEN,
    HEIGHT,
    ORANGE,
    PURPLE,
    SKY,
    TEXT,
    VERMILLION,
    check_result,
    error_bars,
    plotly_text,
    titled,
)

_STYLE = {
    "loop": (BLUE, "circle"),
    "one-shot": (ORANGE, "square"),
    "best of N": (GREEN, "triangle-up"),
    "rejection": (GREEN, "triangle-up-open"),
    "instruction": (VERMILLION, "star"),
    "supervised": (PURPLE, "pentagon"),
    "DPO": (VERMILLION, "hexagon"),
    "random": (TEXT, "x"),
    "shuffled": (TEXT, "diamond"),
}
_JOINED = ("loop", "best of N")


def comparison(result: Comparison) -> go.Figure:
    """Effect against the floating-point operations that it takes, and against the divergence from the base model.

    Operations are those of learning and of answering all held-out prompts, a judge's own not counted. Divergence is KL
    in nats per response. In the band one more shuffled-label plan of the loop's norm would lie with 95% probability.
    """
    check_result(result, Comparison)
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.05)
    seeds = f"{len(result.seeds)} seeds" if len(result.seeds) > 1 else "one seed"
    reading = "; grey: one more plan of the loop's norm that has learnt nothing (95%)" if result.null_band else ""
    titled(
        figure,
        "What it gains, for what it takes",
        f"{result.heldout} held-out prompts, {seeds}, 95% intervals over both{reading}",
        width=980,
        height=HEIGHT + 120,
    )
    for family in dict.fromkeys(method.family for method in result.methods):
        for dose in dict.fromkeys(m.dose for m in result.family(family)):
            group = [m for m in result.family(family) if m.dose == dose]
            _draw(figure, result, family, dose, group)
    band = result.null_band
    if band is not None:
        figure.add_hrect(y0=band.low, y1=band.high, fillcolor=BAND, line_width=0, layer="below", row="all", col="all")
    figure.add_hline(y=0.0, line={"color": TEXT, "dash": "dash", "width": 1}, row="all", col="all")
    figure.update_xaxes(type="log", title_text="floating-point operations, learning included", row=1, col=1)
    figure.update_xaxes(title_text="KL from the base model (nats per response)", rangemode="tozero", row=1, col=2)
    figure.update_yaxes(title_text="change of the mean score (ranker's units)", row=1, col=1)
    figure.update_layout(margin={"b": 120})
    return figure


def _draw(figure: go.Figure, result: Comparison, family: str, dose: str, group: list[Method]) -> None:
    colour, symbol = _STYLE.get(family, (SKY, "circle"))
    name = plotly_text(f"{family}, equal {dose}" if dose else family)
    effects = [m.effect.interval for m in group]
    divergences = [m.divergence.interval for m in group]
    symbol += "-open" if dose == "norm" and family == "one-shot" else ""
    text = [
        f"{plotly_text(m.name)}<br>effect {e.estimate:+.3g} [{e.low:+.3g}, {e.high:+.3g}]"
        f"<br>win rate {m.win_rate}<br>KL {m.kl.mean():.2f} per token"
        for m, e in zip(group, effects, strict=True)
    ]
    for col, x in ((1, [result.total(m).flops for m in group]), (2, [d.estimate for d in divergences])):
        figure.add_scatter(
            x=x,
            y=[e.estimate for e in effects],
            error_y=error_bars(effects, width=4),
            name=name,
            legendgroup=name,
            showlegend=col == 1,
            mode="lines+markers" if family in _JOINED else "markers",
            line={"color": colour, "width": 2},
            marker={"color": colour, "size": 10, "symbol": symbol},
            text=text,
            hovertemplate="%{text}<extra></extra>",
            row=1,
            col=col,
        )


__all__ = ["comparison"]
