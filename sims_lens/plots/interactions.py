"""The figure of several behaviours at once."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.analysis.interactions import TOGETHER, Interaction
from sims_lens.plots.theme import TEXT, colours, error_bars, plotly_text, titled


def interaction(result: Interaction) -> go.Figure:
    """Effect of each plan alone and of all together, by every ranker, with the sum of the effects alone as a mark.

    One panel per ranker, because rankers have no common unit.

    Args:
        result: of :func:`sims_lens.analysis.interaction`.
    """
    rankers = list(result.evaluations)
    names = [*result.plans, TOGETHER]
    heads = [f"by {plotly_text(ranker)}" for ranker in rankers]
    figure = make_subplots(rows=1, cols=len(rankers), subplot_titles=heads, horizontal_spacing=0.12)
    titled(
        figure,
        "What the plans do alone, and together",
        "Effect on each ranker's score against the base model, 95% intervals. Dashed: the sum of the effects alone.",
        width=max(520, 330 * len(rankers) + 120),
    )
    for column, ranker in enumerate(rankers, start=1):
        found = result.evaluations[ranker]
        for name, colour in zip(names, colours(len(names)), strict=True):
            effect, shown = found[name].difference, plotly_text(name)
            figure.add_bar(
                x=[shown],
                y=[effect.estimate],
                error_y=error_bars([effect]) | {"color": TEXT},
                marker={"color": colour, "opacity": 0.85},
                showlegend=False,
                hovertemplate=f"{shown} by {plotly_text(ranker)}: %{{y:+.3g}} [{effect.low:+.3g}, {effect.high:+.3g}]"
                "<extra></extra>",
                row=1,
                col=column,
            )
        total = sum(found[name].difference.estimate for name in result.plans)
        middle = len(names) - 1
        figure.add_shape(
            type="line",
            x0=middle - 0.46,
            x1=middle + 0.46,
            y0=total,
            y1=total,
            line={"color": TEXT, "width": 2, "dash": "dash"},
            row=1,
            col=column,
        )
        figure.update_xaxes(type="category", row=1, col=column)
        figure.update_yaxes(zeroline=True, zerolinecolor=TEXT, row=1, col=column)
    figure.update_yaxes(title_text="effect (ranker's units)", row=1, col=1)
    figure.update_annotations(font_size=13)
    figure.update_layout(margin={"t": 118, "b": 56})
    return figure


__all__ = ["interaction"]
