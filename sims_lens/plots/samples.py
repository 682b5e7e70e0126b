"""What the base model and every iteration say to a prompt, one prompt at a time."""

import unicodedata
from collections.abc import Sequence
from typing import Final

import plotly.graph_objects as go

from sims_lens.checks import check_list
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, RunError
from sims_lens.plots.sliders import slider
from sims_lens.plots.theme import TEMPLATE, WIDTH, check_result, plotly_text, titled
from sims_lens.run import Run

ORDERS: Final = ("prompt", "effect")

_COLUMNS: Final = ("", "response", "score", "NLL", "KL")
_SHARES: Final = (96, 420, 56, 44, 44)
_FONT, _LINE, _CELL_PAD = 12, 16, 12
_RESPONSE_WIDTH, _RESPONSE_LINES = 400, 12
_PROMPT_WIDTH, _PROMPT_LINES = 650, 3
_NARROWEST: Final = 4.0
"""Pixels that a narrow character or a space takes."""

_TITLE: Final = 17
"""From the top to the title, in pixels."""

_TALLEST: Final = 1000
"""Of the table, in pixels; what is longer scrolls inside it."""

# A card of its own: on a transparent table no one colour of text reads well on a light and on a dark page.
_HEAD_FILL, _FILLS = "#3A3D42", ("#E6E8EA", "#F6F6F4")
_HEAD_INK, _INK, _EDGE = "#F4F4F2", "#1D1F23", "#CDD0D3"


def sample_browser(
    run: Run, *, split: str = "heldout", prompts: Sequence[int] | None = None, order: str = "prompt"
) -> go.Figure:
    """The first response of the base model and of every iteration to a prompt, with score, NLL and KL; a slider steps
    through the prompts.

    The highest score is bold. An ellipsis ends a response that the token limit cut off, ``[…]`` one that is too long
    to be shown whole. NLL is that of the response under the base model, KL the divergence from it, both in nats per
    token. Whatever a model wrote is shown as plain text.

    Args:
        run: a run whose base model is measured.
        split: "heldout"; or "train", the responses that each iteration learnt from, drawn with the plan before it.
        prompts: indices of prompts in ``run.prompts``; all of the split where None.
        order: "prompt", as they come; "effect", those first whose score the last iteration raised most.

    Raises:
        ConfigError: the order is unknown.
        RunError: the split is unknown, or a prompt has no responses in it.
    """
    check_result(run, Run)
    if order not in ORDERS:
        raise ConfigError(f"order {order!r} is not one of {', '.join(ORDERS)}")
    if split not in ("heldout", "train"):
        raise RunError(f"split {split!r} is not one of 'heldout' and 'train'")
    drawn = _first_draws(run, split)
    there = list(dict.fromkeys(index for samples in drawn.values() for index in samples))
    if split == "heldout":
        there = [index for index in run.indices(split) if index in there]
    chosen = there if prompts is None else list(check_list("prompts", prompts, "[0, 1]", RunError))
    if missing := [index for index in chosen if index not in there]:
        raise RunError(f"prompt {missing[0]!r} has no {split} responses; see run.indices({split!r})")
    if not chosen:
        raise RunError(f"{run.path} has no {split} responses to show yet")
    if order == "effect":
        chosen = sorted(chosen, key=lambda index: -_gain([samples.get(index) for samples in drawn.values()]))
    rows = {index: {name: samples.get(index) for name, samples in drawn.items()} for index in chosen}
    cells = {index: _cells(of) for index, of in rows.items()}
    height = min(_TALLEST, max(_height(columns) for columns in cells.values()))
    figures = {
        str(place): _table(run.prompts[index], cells[index], height) for place, index in enumerate(chosen, start=1)
    }
    return slider(figures, label=f"prompt (of {len(chosen)})")


def _first_draws(run: Run, split: str) -> dict[str, dict[int, Sample]]:
    """The first response to each prompt, by who gave it."""
    last = len(run.iterations)
    if split == "heldout":
        source = {"base model" if i == 0 else f"iteration {i}": i for i in range(last + 1)}
    else:  # the plan before the first iteration steers nothing
        source = {"base model" if i == 1 else f"iteration {i - 1}": i for i in range(1, last + 1)}
    return {
        name: {s.prompt: s for s in sorted(run.samples(i, split), key=lambda s: s.prompt) if s.draw == 0}
        for name, i in source.items()
    }


def _gain(samples: Sequence[Sample | None]) -> float:
    """Score of the last response less that of the first one."""
    scores = [s.score for s in samples if s is not None and s.score is not None]
    return scores[-1] - scores[0] if len(scores) > 1 else 0.0


def _cells(samples: dict[str, Sample | None]) -> list[list[str]]:
    """The table's columns."""
    scores = [s.score for s in samples.values() if s is not None and s.score is not None]
    best = max(scores) if len(set(scores)) > 1 else None
    columns: list[list[str]] = [[] for _ in _COLUMNS]
    for name, sample in samples.items():
        row = [name, "–", "", "", ""]
        if sample is not None:
            lines = wrapped(sample.text, _RESPONSE_WIDTH, _RESPONSE_LINES, end="" if sample.ended else "…")
            score = _number(sample.score, "3g")
            row[1] = "<br>".join(plotly_text(line) for line in lines) or "(empty)"
            row[2] = f"<b>{score}</b>" if sample.score is not None and sample.score == best else score
            row[3:] = [_number(sample.nll, "2f"), _number(sample.kl, "2f")]
        for column, cell in zip(columns, row, strict=True):
            column.append(cell)
    return columns


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:.{form}}"


def _height(columns: Sequence[Sequence[str]]) -> int:
    lines = [cell.count("<br>") + 1 for cell in columns[1]]
    return sum(_LINE * count + _CELL_PAD for count in lines) + 34


def _table(prompt: str, columns: Sequence[Sequence[str]], height: int) -> go.Figure:
    asked = wrapped(prompt, _PROMPT_WIDTH, _PROMPT_LINES)
    subtitle = "<br>".join([plotly_text(line) for line in asked] + ["&nbsp;"] * (_PROMPT_LINES - len(asked)))
    top, bottom = TEMPLATE.layout.margin.t + _LINE * (_PROMPT_LINES - 1), 16
    figure = titled(go.Figure(), "What they say to a prompt", subtitle, width=WIDTH, height=height + top + bottom)
    fills = [_FILLS[k % 2] for k in range(len(columns[0]))]
    sides = ["left", "left", "right", "right", "right"]
    family = TEMPLATE.layout.font.family
    figure.add_table(
        columnwidth=list(_SHARES),
        header={
            "values": list(_COLUMNS),
            "align": sides,
            "height": 28,
            "fill": {"color": _HEAD_FILL},
            "line": {"color": _HEAD_FILL},
            "font": {"color": _HEAD_INK, "size": _FONT, "family": family},
        },
        cells={
            "values": [list(column) for column in columns],
            "align": sides,
            "height": _LINE + _CELL_PAD,
            "fill": {"color": [fills]},
            "line": {"color": _EDGE},
            "font": {"color": _INK, "size": _FONT, "family": family},
        },
    )
    figure.update_layout(title_y=1 - _TITLE / figure.layout.height)  # the theme's share of the height would be too low
    return figure.update_layout(margin={"l": 12, "r": 12, "t": top, "b": bottom})


# Text in lines: Plotly wraps cells at spaces only, and subtitles not at all


def wrapped(text: str, width: float | int, most: int, *, end: str = "") -> list[str]:
    """Text in lines of about ``width`` pixels, at most ``most`` of them, with a mark where it was cut.

    Args:
        text: any; its line breaks are kept, other control characters become a replacement character.
        width: of a line, in pixels at 12 px type; estimated from the kinds of characters.
        most: lines.
        end: what comes after the text when it is shown whole.

    >>> wrapped("one two three four", 60, 2)
    ['one two', 'three […]']
    """
    text = text.strip().encode("utf-8", "replace").decode()  # a lone surrogate can't be written to a page
    room = int(most * width / _NARROWEST)
    lines: list[str] = []
    for paragraph in text[:room].splitlines():
        shown = "".join(c if unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in paragraph)
        lines += _fill(shown.replace("\t", "    "), width)
    if len(lines) > most or len(text) > room:
        *kept, last = lines[:most]
        while last and _length(f"{last} […]") > width:
            last = last[:-1].rstrip()
        return [*kept, f"{last} […]".strip()]
    return [*lines[:-1], lines[-1] + end] if lines else []


def _fill(text: str, width: float | int) -> list[str]:
    """One paragraph in lines, broken at spaces, and within a word that is longer than a line."""
    lines, line, used = [], "", 0.0
    for word in text.split(" "):
        length = _length(word)
        if line and used + _NARROWEST + length <= width:
            line, used = f"{line} {word}", used + _NARROWEST + length
            continue
        if line:
            lines.append(line)
        line, used = "", 0.0
        for character in word:
            advance = _advance(character)
            if used + advance > width:
                lines.append(line)
                line, used = "", 0.0
            line, used = line + character, used + advance
    return [*lines, line]


def _length(text: str) -> float:
    """About how many pixels a text takes at 12 px, rather more than less."""
    return sum((_advance(character) for character in text), 0.0)


def _advance(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 12.5
    if character in "mwMW@%—…":
        return 11.0
    if character in "iIjlt.,:;'|!()[] ":
        return _NARROWEST
    return 8.4 if character.isupper() or character in "<>=+~#&" else 7.0


__all__ = ["sample_browser", "wrapped"]
