"""The figure of a fit: at which layers are the two classes told apart?"""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.plots.theme import BLUE, GREEN, ORANGE, TEXT, VERMILLION, check_result, error_bars, plotly_text, titled
from sims_lens.stats import Interval
from sims_lens.supervised import SteeringFit


def fit_quality(result: SteeringFit) -> go.Figure:
    """How well each layer's direction tells the classes apart on pairs that the fit has not seen.

    Above, accuracy (a positive text against its own negative), AUC (against those of other pairs) and the split-half
    cosine, all at most 1; below, the effect size, which goes on rising where the others are at their ceiling. What is
    told apart best is not yet what steers best: :func:`sims_lens.layer_sweep` measures that.

    Args:
        result: of :func:`sims_lens.fit`.
    """
    check_result(result, SteeringFit)
    quality, layers = result.quality, list(result.layers)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.64, 0.36], vertical_spacing=0.07)
    pairs = f"{result.pairs} contrast pair" + ("" if result.pairs == 1 else "s")
    titled(
        figure,
        "Where the classes are told apart",
        f"{plotly_text(result.estimator)}, {pairs}, held out; 95% intervals. Dotted: chance, and the layer that "
        "<i>best</i> takes.",
        height=520,
    )
    for name, values, colour, beside in (
        ("accuracy", quality.accuracy, BLUE, 0.0),
        ("AUC", quality.auc, ORANGE, 0.2),  # or one would hide the other, where both are at their ceiling
    ):
        _line(figure, name, layers, [i.estimate for i in values], colour, row=1, intervals=values, beside=beside)
    _line(figure, "split-half cosine", layers, quality.split_half, GREEN, row=1)
    _line(figure, "effect size", layers, quality.effect_size, VERMILLION, row=2)
    dotted = {"color": TEXT, "width": 1.4, "dash": "dot"}
    figure.add_hline(y=0.5, line=dotted, row=1, col=1)
    if any(math.isfinite(i.estimate) for i in quality.accuracy):
        figure.add_vline(x=result.best()[0], line=dotted, row="all", col=1)
    figure.update_yaxes(title_text="share, or cosine", row=1)
    figure.update_yaxes(title_text="effect size (d)", rangemode="tozero", row=2)
    figure.update_xaxes(title_text=f"layer ({plotly_text(result.site)})", row=2)
    return figure.update_xaxes(dtick=max(1, round(len(layers) / 12)), range=[layers[0] - 0.7, layers[-1] + 0.7])


def _line(
    figure: go.Figure,
    name: str,
    layers: Sequence[int],
    values: Sequence[float],
    colour: str,
    *,
    row: int,
    intervals: Sequence[Interval] = (),
    beside: float = 0.0,
) -> None:
    """One measure over the layers; with its intervals, where it has any."""
    figure.add_scatter(
        x=[layer + beside for layer in layers],
        customdata=layers,
        y=[value if math.isfinite(value) else None for value in values],
        error_y=error_bars(intervals, width=3) if intervals else None,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 6},
        hovertemplate=f"layer %{{customdata}}: {name} %{{y:.3f}}<extra></extra>",
        row=row,
        col=1,
    )


__all__ = ["fit_quality"]
