"""The figure of what a plan does to capability."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.harness import Capability
from sims_lens.plots.theme import BLUE, TEXT, VERMILLION, check_result, error_bars, plotly_text, titled


def capability(result: Capability) -> go.Figure:
    """Steered less base for every task, one panel for each metric, because metrics have no common unit.

    Args:
        result: of :func:`sims_lens.capability`.
    """
    check_result(result, Capability)
    names = list(dict.fromkeys(s.name for s in result.scores))
    tasks = list(dict.fromkeys(s.task for s in result.scores))
    heads = [f"{plotly_text(name)}{_direction(result, name)}" for name in names]
    figure = make_subplots(rows=1, cols=len(names), subplot_titles=heads, shared_yaxes=True, horizontal_spacing=0.05)
    titled(
        figure,
        "What steering does to capability",
        "Steered less base on the same documents, 95% intervals. Red: worse, and the interval leaves out 0.",
        width=max(620, 230 * len(names) + 220),
        height=190 + 34 * len(tasks),
    )
    for column, name in enumerate(names, start=1):
        for s in (s for s in result.scores if s.name == name):
            bars = error_bars([s.difference])
            colour = VERMILLION if s.harmed else BLUE
            figure.add_scatter(
                x=[s.difference.estimate],
                y=[plotly_text(s.task)],
                mode="markers",
                marker={"color": colour, "size": 9},
                error_x=bars | {"color": colour},
                showlegend=False,
                hovertemplate=(
                    f"{plotly_text(s.task)}, {plotly_text(s.name)}, {s.documents} documents<br>"
                    f"base {s.base.estimate:.3g}, steered {s.steered.estimate:.3g}<br>"
                    f"difference %{{x:+.3g}} [{s.difference.low:+.3g}, {s.difference.high:+.3g}]<extra></extra>"
                ),
                row=1,
                col=column,
            )
        figure.add_vline(x=0, line={"color": TEXT, "width": 1.5, "dash": "dash"}, row=1, col=column)
        figure.update_xaxes(nticks=5, row=1, col=column)
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=[plotly_text(t) for t in tasks[::-1]])
    figure.update_annotations(font_size=13)
    figure.update_layout(margin={"t": 112, "b": 48})
    return figure


def _direction(result: Capability, name: str) -> str:
    ways = {s.higher_is_better for s in result.scores if s.name == name}
    if ways == {True}:
        return " (higher is better)"
    return " (lower is better)" if ways == {False} else ""


__all__ = ["capability"]
