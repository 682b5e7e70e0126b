"""The pictures of the concept pages, drawn in code: ``python docs/pictures.py`` writes docs/figures/concept_*.svg."""

from collections.abc import Callable
from html import escape
from pathlib import Path

FIGURES = Path(__file__).parent / "figures"
INK, GREY, PALE, STEERED, BASE, GOOD = "#1f2933", "#7b8794", "#eef2f6", "#D55E00", "#0072B2", "#009E73"


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 14,
    color: str = INK,
    anchor: str = "middle",
    code: bool = False,
    bold: bool = False,
) -> str:
    """Words with their baseline at y."""
    family = "Menlo, Consolas, 'DejaVu Sans Mono', monospace" if code else "Helvetica, Arial, 'DejaVu Sans', sans-serif"
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
        f'font-family="{family}"{weight}>{escape(words)}</text>'
    )


def box(
    x: float, y: float, width: float, height: float, *, fill: str = "white", line: str = GREY, dashed: bool = False
) -> str:
    """A rectangle by its upper left corner."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="{fill}" stroke="{line}" stroke-width="1.5"{dash}/>'
    )


def line(*points: tuple[float, float], color: str = INK, width: float = 2, head: bool = False) -> str:
    """A line through points, with an arrow head at its end if asked for."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = f' marker-end="url(#head-{color[1:]})"' if head else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{end}/>'


def dot(x: float, y: float, color: str = STEERED) -> str:
    """A place where the stream is read and written."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="6.5" fill="{color}" stroke="white" stroke-width="2"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    """An SVG on white ground, which says in words what it shows."""
    heads = "".join(
        f'<marker id="head-{c[1:]}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" '
        f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{c}"/></marker>'
        for c in (INK, GREY, STEERED, BASE, GOOD)
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<defs>{heads}</defs>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def site() -> str:
    """A block with its four sites, and what a plan puts behind one of them."""
    y = 90
    parts = [
        text(20, 30, "Block 17 of a model: the residual stream, and the four sites", anchor="start", bold=True),
        line((20, y), (745, y), width=3, head=True),
        text(20, y - 14, "stream", size=12, color=GREY, anchor="start"),
    ]
    for left, name, out in ((170, "attention", "attn_out"), (400, "MLP", "mlp_out")):
        parts += [
            line((left, y), (left, 165), (left + 15, 165), color=GREY, head=True),
            box(left + 17, 145, 90, 40, fill=PALE),
            text(left + 62, 170, name),
            line((left + 107, 165), (left + 175, 165), (left + 175, y + 14), color=GREY, head=True),
            f'<circle cx="{left + 175}" cy="{y}" r="11" fill="white" stroke="{INK}" stroke-width="2"/>',
            text(left + 175, y + 5, "+", size=16),
            dot(left + 142, 165),
            text(left + 142, 192, out, size=13, code=True, color=STEERED),
        ]
    for x, name in ((110, "resid_pre"), (655, "resid_post")):
        parts += [dot(x, y), text(x, y - 16, name, size=13, code=True, color=STEERED)]
    parts += [
        text(20, 240, "A plan at resid_post adds three hook points behind the model's own:", anchor="start", bold=True),
        line((20, 300), (745, 300), width=3, head=True),
    ]
    names = (
        (130, "hook_resid_post", "the model's own", INK),
        (300, "hook_pre", "as it came", BASE),
        (470, "hook_delta", "what is added", STEERED),
        (640, "hook_post", "as it goes on", BASE),
    )
    for x, name, what, color in names:
        parts += [
            dot(x, 300, color),
            text(x, 282, name, size=13, code=True, color=color),
            text(x, 328, what, size=12, color=GREY),
        ]
    parts.append(
        text(385, 360, "blocks.17.steer_resid_post.hook_delta, set to zero: bitwise the unsteered logits", size=13)
    )
    return picture(770, 380, "The four sites of a block, and the hook points of a plan", parts)


def scope() -> str:
    """Tokens by region, and which of them each scope holds."""
    tokens = ["[pad]", "[pad]", "How", "was", "your", "day", "?", "[asst]", "It", "was", "fine", "."]
    regions = ["pad"] * 2 + ["prompt"] * 5 + ["last"] + ["response"] * 4
    holds = {
        "all": {"prompt", "last", "response"},
        "prompt": {"prompt", "last"},
        "last_prompt": {"last"},
        "response": {"response"},
        "generation": {"last", "response"},
    }
    left, wide = 130, 52
    parts = []
    for start, stop, name in ((0, 2, "padding"), (2, 7, "prompt"), (7, 8, "last prompt"), (8, 12, "response")):
        low, high = left + start * wide + 4, left + stop * wide - 4
        parts += [line((low, 42), (high, 42), color=GREY), text((low + high) / 2, 30, name, size=12, color=GREY)]
    for column, token in enumerate(tokens):
        parts.append(text(left + (column + 0.5) * wide, 66, token, size=13, code=True))
    for row, (name, within) in enumerate(holds.items()):
        y = 84 + row * 40
        parts.append(text(left - 12, y + 19, name, size=13, code=True, anchor="end", bold=name == "generation"))
        for column, region in enumerate(regions):
            inside = region in within
            fill = STEERED if inside else PALE
            parts.append(box(left + column * wide + 3, y, wide - 6, 28, fill=fill, line="white"))
    arrow = left + 7.5 * wide
    parts += [
        line((arrow, 290), (arrow, 306), (arrow + wide, 306), (arrow + wide, 292), color=BASE, head=True),
        text(
            arrow - 12,
            311,
            "the last prompt token's output is the first response token",
            size=12,
            color=BASE,
            anchor="end",
        ),
    ]
    return picture(770, 328, "Which tokens each scope holds", parts)


def plan() -> str:
    """Where plans come from, what one holds, and where it goes."""
    parts = [
        box(265, 40, 260, 230, fill="white", line=STEERED),
        text(395, 28, "SteeringPlan", code=True, bold=True, color=STEERED),
    ]
    rows = (
        ("site", "blocks.17 resid_post"),
        ("transform", "Addition(v)"),
        ("coefficient", "0.25 × residual norm"),
        ("scope", "generation"),
        ("decay", "none"),
    )
    for row, (name, value) in enumerate(rows):
        y = 68 + row * 26
        parts += [
            text(280, y, name, size=13, color=GREY, anchor="start"),
            text(510, y, value, size=13, anchor="end", code=True),
        ]
    parts += [
        line((280, 188), (510, 188), color=GREY, width=1),
        text(280, 210, "and where it came from:", size=13, color=GREY, anchor="start"),
        text(280, 232, "model, revision, processing,", size=13, anchor="start"),
        text(280, 252, "settings, ranker", size=13, anchor="start"),
    ]
    for row, (name, what) in enumerate(
        (
            ("improve(...)", "from prompts"),
            ("fit(...)", "from pairs"),
            ("addition(...)", "by hand"),
            ("load, from_hub", "from a file"),
        )
    ):
        y = 52 + row * 56
        parts += [
            box(20, y, 165, 44, fill=PALE),
            text(102, y + 19, name, size=13, code=True),
            text(102, y + 37, what, size=12, color=GREY),
            line((186, y + 22), (258, y + 22), color=GREY, head=True),
        ]
    for row, (name, what) in enumerate(
        (
            ("steering(model, plan)", "hook points"),
            ("a + 0.5 * b, .on()", "algebra"),
            ("calibrate, layer_sweep", "how strongly, where"),
            ("save, export", "one file; other tools"),
        )
    ):
        y = 52 + row * 56
        parts += [
            box(600, y, 190, 44, fill=PALE),
            text(695, y + 19, name, size=13, code=True),
            text(695, y + 37, what, size=12, color=GREY),
            line((526, y + 22), (594, y + 22), color=GREY, head=True),
        ]
    return picture(810, 290, "A steering plan: what makes it, what it holds, what takes it", parts)


def ranker() -> str:
    """Responses, scores, the pair, and the audit beside them."""
    parts = [
        box(20, 96, 120, 60, fill=PALE),
        text(80, 122, "prompt", size=13),
        text(80, 140, "K responses", size=12, color=GREY),
    ]
    scores = (
        ("It was fun! We saw a film.", 81.0),
        ("Good, and yours?", 74.5),
        ("It passed in its usual manner.", 52.0),
        ("An eventful culmination …", 18.0),
    )
    for row, (words, score) in enumerate(scores):
        y = 34 + row * 50
        color = GOOD if row == 0 else STEERED if row == 3 else GREY
        parts += [
            line((141, 126), (166, y + 18), color=GREY, width=1),
            box(168, y, 240, 36, line=color),
            text(180, y + 23, words, size=13, anchor="start"),
            line((409, y + 18), (452, y + 18), color=GREY, head=True),
            text(490, y + 23, f"{score:.1f}", size=14, color=color, code=True, bold=row in (0, 3)),
        ]
    parts += [
        text(490, 24, "ranker, say", size=13, bold=True),
        line((525, 52), (590, 52), (590, 98), color=GOOD, head=True),
        line((525, 202), (590, 202), (590, 156), color=STEERED, head=True),
        box(535, 100, 110, 54, fill="white", line=INK),
        text(590, 122, "pair", size=13, bold=True),
        text(590, 141, "best, worst", size=12, color=GREY),
        line((646, 127), (684, 127), head=True),
        text(690, 124, "direction", size=13, anchor="start"),
        text(690, 141, "(fit)", size=12, color=GREY, anchor="start"),
        box(20, 240, 745, 62, dashed=True),
        text(36, 263, "audit, before anything is learnt:", size=13, anchor="start", bold=True),
        text(
            36,
            287,
            "Does it prefer real answers to spoilt ones? Does it say the same again, in the other order, no cycles?",
            size=13,
            anchor="start",
        ),
    ]
    return picture(785, 316, "A ranker's scores make contrast pairs; an audit asks whether it deserves trust", parts)


def guard() -> str:
    """The questions in their order, and what each leads to."""
    rows = (
        ("Does the ranker stand by what it said?", "no", "roll back, stop", STEERED),
        ("Does the direction turn against the one before?", "yes", "roll back, stop", STEERED),
        ("Over budget: KL, perplexity, diversity?", "yes", "smaller step, measured again; then roll back", STEERED),
        ("Shown to be worse, than the best so far or the base?", "yes", "roll back", STEERED),
        ("Effect shown to be above 0?", "yes", "accept", GOOD),
    )
    parts = [text(20, 28, "After each iteration, on held-out prompts:", anchor="start", bold=True)]
    for row, (question, answer, outcome, color) in enumerate(rows):
        y = 44 + row * 52
        parts += [
            box(20, y, 375, 36, fill=PALE),
            text(34, y + 23, question, anchor="start"),
            line((396, y + 18), (462, y + 18), color=color, head=True),
            text(428, y + 12, answer, size=12, color=color),
            text(470, y + 23, outcome, color=color, anchor="start", bold=True),
            line((208, y + 37), (208, y + 50), color=GREY, head=True),
        ]
    y = 44 + len(rows) * 52
    parts += [
        text(208, y + 18, "go on from it, unaccepted", color=BASE, bold=True),
        text(
            20,
            y + 46,
            "Two iterations in a row that gain nothing end the run. Its plan is the accepted one of largest effect.",
            size=13,
            color=GREY,
            anchor="start",
        ),
    ]
    return picture(785, y + 62, "What the guard asks, in its order", parts)


PICTURES: dict[str, Callable[[], str]] = {"site": site, "scope": scope, "plan": plan, "ranker": ranker, "guard": guard}


def main() -> None:
    """Write them all."""
    for name, draw in PICTURES.items():
        (FIGURES / f"concept_{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
