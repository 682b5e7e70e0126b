"""Figures of the laboratory. What a user has named (groups, oracles) is escaped; rankers and texts stay out of them."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sims_lens.lab.conversation import MultiTurn
from sims_lens.lab.distribution import OutOfDistribution
from sims_lens.lab.failures import FailureLedger
from sims_lens.lab.misled import Misled
from sims_lens.lab.noise import CorruptedPairs
from sims_lens.lab.steerability import Steerability
from sims_lens.plots.theme import (
    BAND,
    BLUE,
    EDGE,
    GREEN,
    HEIGHT,
    ORANGE,
    TEXT,
    VERMILLION,
    WIDTH,
    error_bars,
    plotly_text,
    titled,
)
from sims_lens.stats import Interval

_KINDS = {
    "flips": ("labels that are wrong", "What wrong labels do to the direction"),
    "negatives": ("negatives that are mistaken", "What mistaken negatives do to the direction"),
    "poison": ("negatives that are poisoned", "What poisoned negatives do to the direction"),
}


_OUTCOMES = {
    "hacked": "the oracle is gamed",
    "hollow": "only the oracle gains",
    "harmless": "both gain",
    "harmful": "harm, and no gain",
    "hidden": "only the honest one gains",
    "nothing": "no gain",
    "stopped": "all rolled back",
}


def corrupted_pairs(result: CorruptedPairs) -> go.Figure:
    """Cosine, and projection on an independent half's direction, by the share of corrupted pairs; lines are theory.

    The break-even is where the projection falls into the null of shuffled labels. A third panel has the effect on
    held-out prompts, where that was measured; its dotted line is what the cosine alone would make of the effect without
    corruption.

    Args:
        result: of :func:`sims_lens.lab.oracle_noise` or :func:`sims_lens.lab.poisoned_negatives`.
    """
    curve, (axis, title) = result.curve, _KINDS[result.kind]
    panels = 3 if result.effects else 2
    heads = ["cosine with the clean direction", "projection on the other half", "effect at one norm"][:panels]
    figure = make_subplots(rows=1, cols=panels, subplot_titles=heads, horizontal_spacing=0.09)
    where = f"{curve.pairs} pairs, layer {result.layer}. Dots: measured, 95% intervals over pairs; lines: theory."
    titled(figure, title, where, width=330 * panels + 60, height=HEIGHT + 20)
    for column, name, colour, label in (
        (1, "cosine", BLUE, "of the same pairs"),
        (1, "independent", ORANGE, "of an independent half"),
        (2, "projection", ORANGE, "of an independent half"),
    ):
        shown: Sequence[Interval] = getattr(curve, name)
        figure.add_scatter(
            x=curve.epsilons,
            y=[i.estimate for i in shown],
            error_y=error_bars(shown) | {"color": colour},
            mode="markers",
            marker={"color": colour, "size": 7},
            name=label,
            showlegend=column == 1,
            hovertemplate=f"{name} at %{{x:g}}: %{{y:.3f}}<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_scatter(
            x=curve.epsilons,
            y=getattr(curve, f"expected_{name}"),
            mode="lines",
            line={"color": colour, "width": 1.6},
            showlegend=False,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    figure.add_hrect(y0=-curve.null_edge, y1=curve.null_edge, fillcolor=BAND, line_width=0, layer="below", row=1, col=2)
    even = curve.break_even
    if 0 <= even.estimate <= curve.epsilons[-1]:
        figure.add_vline(x=even.estimate, line={"color": TEXT, "dash": "dash"}, row=1, col=2)
        figure.add_vrect(
            x0=max(even.low, curve.epsilons[0]),
            x1=min(even.high, curve.epsilons[-1]),
            fillcolor=BAND,
            line_width=0,
            layer="below",
            row=1,
            col=2,
        )
        figure.layout.annotations[1].text += f"<br>break-even {even.estimate:.2f} [{even.low:.2f}, {even.high:.2f}]"
    if result.effects:
        _corrupted_effects(figure, result)
    for column in range(1, panels + 1):
        room = 0.06 * (curve.epsilons[-1] - curve.epsilons[0])
        span = [curve.epsilons[0] - room, curve.epsilons[-1] + room]
        figure.update_xaxes(title_text=f"share of {axis}", range=span, row=1, col=column)
        figure.add_hline(y=0, line={"color": TEXT, "width": 1}, row=1, col=column)
    figure.update_yaxes(title_text="cosine", row=1, col=1)
    figure.update_yaxes(title_text="units of the residual stream", row=1, col=2)
    figure.update_annotations(font_size=13)
    return figure.update_layout(margin={"t": 122})


def _corrupted_effects(figure: go.Figure, result: CorruptedPairs) -> None:
    curve, effects = result.curve, result.effects
    figure.add_scatter(
        x=[e.epsilon for e in effects],
        y=[e.difference.estimate for e in effects],
        error_y=error_bars([e.difference for e in effects]) | {"color": GREEN},
        mode="markers",
        marker={"color": GREEN, "size": 8},
        name="held-out prompts",
        hovertemplate="effect at %{x:g}: %{y:+.3g}<extra></extra>",
        row=1,
        col=3,
    )
    figure.add_scatter(
        x=[e.epsilon for e in effects for _ in e.each],
        y=[value for e in effects for value in e.each],
        mode="markers",
        marker={"color": GREEN, "size": 5, "symbol": "line-ew-open"},
        name="each fit",
        customdata=[cosine for e in effects for cosine in e.cosines],
        hovertemplate="one fit at %{x:g}: %{y:+.3g}, cosine %{customdata:.2f}<extra></extra>",
        row=1,
        col=3,
    )
    if effects[0].epsilon == 0.0 and curve.epsilons[0] == 0.0:
        clean = effects[0].difference.estimate
        figure.add_scatter(
            x=curve.epsilons,
            y=[clean * cosine for cosine in curve.expected_cosine],
            mode="lines",
            line={"color": GREEN, "width": 1.6, "dash": "dot"},
            name="if it went with the cosine",
            hoverinfo="skip",
            row=1,
            col=3,
        )
    figure.update_yaxes(title_text="effect (ranker's units)", row=1, col=3)


def misled(result: Misled) -> go.Figure:
    """Effect by the oracle that each loop learns from, and by the honest ranker, iteration by iteration.

    An iteration that the guard rolled back is hollow. The two rankers have one scale where the oracle is the honest one
    and a bonus.

    Args:
        result: of :func:`sims_lens.lab.misled` or :func:`sims_lens.lab.reward_hacking`.
    """
    names = list(result.runs)
    per_row = min(3, len(names))
    rows = -(-len(names) // per_row)
    heads = [f"{plotly_text(name)}: {_OUTCOMES[result.runs[name].outcome]}" for name in names]
    figure = make_subplots(
        rows=rows, cols=per_row, subplot_titles=heads, horizontal_spacing=0.09, vertical_spacing=0.4 / rows
    )
    titled(
        figure,
        "What the loop gains by a wrong oracle, and by the honest one",
        f"Effect on {result.prompts} held-out prompts, 95% intervals. Hollow: rolled back by the guard.",
        width=max(WIDTH, 300 * per_row),
        height=150 + 270 * rows,
    )
    for index, name in enumerate(names):
        run = result.runs[name]
        where = {"row": 1 + index // per_row, "col": 1 + index % per_row}
        for key, label, colour, shift in (
            ("proxy", "by the oracle", ORANGE, -0.06),
            ("honest", "by the honest ranker", BLUE, 0.06),
        ):
            effects = [getattr(i, key).difference for i in run.iterations]
            figure.add_scatter(
                x=[i.index + shift for i in run.iterations],
                y=[e.estimate for e in effects],
                error_y=error_bars(effects) | {"color": colour},
                mode="lines+markers",
                line={"color": colour, "width": 1.4},
                marker={
                    "size": 9,
                    "color": colour,
                    "symbol": ["circle-open" if i.action == "roll back" else "circle" for i in run.iterations],
                },
                name=label,
                legendgroup=key,
                showlegend=index == 0,
                hovertemplate=f"{label}: %{{y:+.3g}}<extra></extra>",
                **where,
            )
        figure.add_hline(y=0, line={"color": TEXT, "width": 1}, **where)
        last = max((i.index for i in run.iterations), default=1)
        figure.update_xaxes(title_text="iteration", dtick=1, range=[0.6, last + 0.4], **where)
    figure.update_yaxes(title_text="effect", col=1)
    figure.update_annotations(font_size=13)
    return figure.update_layout(margin={"t": 112})


def out_of_distribution(result: OutOfDistribution) -> go.Figure:
    """Effect and perplexity by group of prompts, with 95% intervals; dotted: the first group's effect.

    Args:
        result: of :func:`sims_lens.lab.out_of_distribution`.
    """
    names = list(result.evaluations)[::-1]
    labels = [f"{plotly_text(name)} ({result.prompts[name]})" for name in names]
    figure = make_subplots(
        rows=1, cols=2, shared_yaxes=True, subplot_titles=["effect", "perplexity"], horizontal_spacing=0.06
    )
    titled(
        figure,
        "Does it steer other prompts?",
        "Change of the mean score against the base model, and perplexity as a multiple of its; 95% intervals.",
        height=180 + 46 * len(names),
    )
    effects = [result.evaluations[name].difference for name in names]
    colour = [BLUE if name == result.reference else ORANGE for name in names]
    for column, shown, text in ((1, effects, "%{x:+.3g}"), (2, [result.perplexity[n] for n in names], "%{x:.2f}")):
        figure.add_scatter(
            x=[i.estimate for i in shown],
            y=labels,
            error_x=error_bars(shown) | {"color": TEXT},
            mode="markers",
            marker={"color": colour, "size": 10},
            showlegend=False,
            hovertemplate=f"%{{y}}: {text}<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_vline(x=column - 1, line={"color": TEXT, "width": 1}, row=1, col=column)
    reference = result.evaluations[result.reference].difference.estimate
    figure.add_vline(x=reference, line={"color": BLUE, "width": 1, "dash": "dot"}, row=1, col=1)
    figure.update_xaxes(title_text="effect (ranker's units)", row=1, col=1)
    figure.update_xaxes(title_text="times the base model's", row=1, col=2)
    figure.update_annotations(font_size=13)
    return figure.update_layout(margin={"t": 104, "b": 64})


def multi_turn(result: MultiTurn) -> go.Figure:
    """Effect, and divergence from the base model, by turn of the chat, with 95% intervals.

    Args:
        result: of :func:`sims_lens.lab.multi_turn`.
    """
    turns = list(range(1, len(result.evaluations) + 1))
    figure = make_subplots(rows=1, cols=2, subplot_titles=["effect", "KL per token"], horizontal_spacing=0.14)
    titled(
        figure,
        "Does it last when the user goes on?",
        f"{result.conversations} conversations; each arm with its own answers so far; 95% intervals.",
    )
    for column, shown, colour in (
        (1, [e.difference for e in result.evaluations], BLUE),
        (2, [e.kl for e in result.evaluations], ORANGE),
    ):
        figure.add_scatter(
            x=turns,
            y=[i.estimate for i in shown],
            error_y=error_bars(shown) | {"color": colour},
            mode="lines+markers",
            line={"color": colour},
            marker={"size": 9},
            showlegend=False,
            hovertemplate="turn %{x}: %{y:.3g}<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_hline(y=0, line={"color": TEXT, "width": 1}, row=1, col=column)
        figure.update_xaxes(title_text="turn", dtick=1, range=[0.7, turns[-1] + 0.3], row=1, col=column)
    figure.update_yaxes(title_text="effect (ranker's units)", row=1, col=1)
    figure.update_yaxes(title_text="nats per token", row=1, col=2)
    figure.update_annotations(font_size=13)
    return figure.update_layout(margin={"t": 104, "b": 64})


def steerability(result: Steerability) -> go.Figure:
    """Every prompt's slope over the coefficient, in order, beside the curves that they are slopes of.

    Args:
        result: of :func:`sims_lens.lab.steerability`.
    """
    order = np.argsort(result.slopes)
    unit = plotly_text(result.unit)
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=[f"each {unit}'s curve", "their slopes, in order"],
        horizontal_spacing=0.13,
    )
    anti = result.anti
    titled(
        figure,
        f"Anti-steerable: {100 * anti.estimate:.0f}% [{100 * anti.low:.0f}, {100 * anti.high:.0f}]",
        f"{len(order)} {unit}s. Bars: 95% intervals of the slopes, by the scatter around the line.",
        width=WIDTH + 60,
    )
    change = result.values - result.values.mean(axis=1, keepdims=True)
    falling = result.slopes < 0
    for index in order[::-1]:
        figure.add_scatter(
            x=result.coefficients,
            y=change[index],
            mode="lines",
            line={"color": VERMILLION if falling[index] else BLUE, "width": 1},
            opacity=0.35,
            showlegend=False,
            hovertemplate=f"{unit} {index}: %{{y:+.3g}} at %{{x:g}}<extra></extra>",
            row=1,
            col=1,
        )
    figure.add_scatter(
        x=result.coefficients,
        y=change.mean(axis=0),
        mode="lines",
        line={"color": TEXT, "width": 3},
        showlegend=False,
        hovertemplate="mean: %{y:+.3g} at %{x:g}<extra></extra>",
        row=1,
        col=1,
    )
    from scipy.special import stdtrit

    reach = float(stdtrit(len(result.coefficients) - 2, 0.975))
    figure.add_scatter(
        x=list(range(1, len(order) + 1)),
        y=result.slopes[order],
        error_y={"type": "data", "array": reach * result.errors[order], "thickness": 1, "width": 0, "color": EDGE},
        mode="markers",
        marker={"color": [VERMILLION if bad else BLUE for bad in falling[order]], "size": 5},
        showlegend=False,
        customdata=order,
        hovertemplate=f"{unit} %{{customdata}}: %{{y:+.3g}}<extra></extra>",
        row=1,
        col=2,
    )
    figure.add_hline(y=0, line={"color": TEXT, "width": 1}, row=1, col=2)
    figure.update_xaxes(title_text="coefficient (times the plan's)", row=1, col=1)
    figure.update_xaxes(title_text=f"{unit}s", row=1, col=2)
    figure.update_yaxes(title_text=f"value less the {unit}'s mean", row=1, col=1)
    figure.update_yaxes(title_text="slope per unit of coefficient", row=1, col=2)
    figure.update_annotations(font_size=13)
    return figure.update_layout(margin={"t": 104, "b": 64})


def failures(result: FailureLedger) -> go.Figure:
    """Share of responses with each kind of failure, steered and base, with 95% intervals.

    Args:
        result: of :func:`sims_lens.lab.failures`.
    """
    panels = [[f for f in result.kinds[::-1] if (f.kind == "no EOS") is cut] for cut in (False, True)]
    figure = make_subplots(rows=2, cols=1, row_heights=[len(panels[0]), 1.4], vertical_spacing=0.16)
    titled(
        figure,
        "What goes wrong, by kind",
        f"Share of {result.responses} responses to {result.prompts} prompts; 95% intervals over prompts.",
        height=240 + 46 * len(result.kinds),
    )
    for row, kinds in enumerate(panels, start=1):
        for key, label, colour in (("steered", "steered", ORANGE), ("base", "base model", BLUE)):
            shown = [getattr(f, key) for f in kinds]
            figure.add_bar(
                y=[f.kind for f in kinds],
                x=[i.estimate for i in shown],
                error_x=error_bars(shown, width=4) | {"color": TEXT},
                orientation="h",
                marker={"color": colour, "opacity": 0.85},
                name=label,
                legendgroup=key,
                showlegend=row == 1,
                hovertemplate=f"%{{y}}, {label}: %{{x:.1%}}<extra></extra>",
                row=row,
                col=1,
            )
        figure.update_xaxes(tickformat=".0%", rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="share of responses", row=2, col=1)
    return figure.update_layout(barmode="group", legend={"traceorder": "reversed"}, margin={"b": 96})


__all__ = ["corrupted_pairs", "failures", "misled", "multi_turn", "out_of_distribution", "steerability"]
