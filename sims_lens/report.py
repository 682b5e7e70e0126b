"""A run as one page: self-contained, offline, safe to open whatever the model wrote.

Everything that a prompt, a model, a ranker or a config says is escaped, and no such text enters a script. The page's
content security policy lets nothing load, and lets exactly the two scripts run whose hashes it names: Plotly, and the
one that draws the figures. Markup that slipped through all the same could not run.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from sims_lens.cost import JUDGING, Cost, judge_tokens, total
from sims_lens.data import Sample
from sims_lens.errors import RunError
from sims_lens.evaluate import Evaluation
from sims_lens.run import Run, open_run
from sims_lens.store import RunStore, write_bytes

if TYPE_CHECKING:
    import plotly.graph_objects as go

SHOWN = 20

_WITH_CONTROLS = (
    "The shuffled-label controls are vectors of the same norm, fitted to the same pairs with best and worst swapped at "
    "random. The band is where one more of them would lie with 95% probability: an effect that does not lie above it "
    "is no evidence of learning."
)
_WITHOUT_CONTROLS = (
    "No shuffled-label controls are measured here. Without them it is open whether the effect comes from what was "
    "learnt or from the norm of the vector alone."
)


def write_report(run: Run | str | Path, path: str | Path | None = None, *, analyses: "Sequence[object]" = ()) -> Path:
    """Write a run as one HTML page that needs no network: figures, tables, responses side by side, config.

    An unfinished run gives a page about what is there.

    Args:
        run: a run, or its directory.
        path: where to write; ``report.html`` in the run's directory by default. Its folder is made if need be.
        analyses: what the page shows besides: results such as those of :func:`sims_lens.layer_sweep`, each with its
            figures (:func:`sims_lens.plots.figures`) and its table; or figures.

    Returns:
        Where it was written.

    Raises:
        RunError: there is no run, it is damaged, or ``path`` is a folder.
    """
    if not isinstance(run, (Run, str, Path)):
        raise RunError(f"a report is of a run or its directory, not a {type(run).__name__}; pass it in analyses=[...]")
    if not isinstance(analyses, (list, tuple)):
        raise RunError(f"analyses must be a list of results or figures, got a {type(analyses).__name__}; write [it]")
    if not isinstance(run, Run):
        run = open_run(run)
    path = Path(path) if path is not None else run.path / "report.html"
    if path.is_dir():
        raise RunError(f"{path} is a folder; name a file, for instance {path / 'report.html'}")
    write_bytes(path, render(run, analyses).encode("utf-8", "replace"))
    return path


def render(run: Run, analyses: Sequence[object] = ()) -> str:
    """The page as text.

    Args:
        run: finished or not.
        analyses: see :func:`write_report`.
    """
    figures: dict[str, go.Figure] = {}
    body = "\n".join(_sections(run, figures, analyses))
    return _page(f"{run.model.model or 'A model'}, steered by {run.ranker}", body, figures)


def write_figures(drawn: "Iterable[go.Figure]", path: str | Path, *, title: str) -> Path:
    """Write figures as one HTML page that needs no network, under the same policy as a report: no other script runs.

    Args:
        drawn: the figures, one below the other.
        path: where to write.
        title: of the page, plain text.

    Returns:
        Where it was written.
    """
    figures: dict[str, go.Figure] = {}
    body = "\n".join(_place(f"figure-{k}", figure, figures) for k, figure in enumerate(drawn))
    write_bytes(Path(path), _page(title, body, figures).encode("utf-8", "replace"))
    return Path(path)


def _page(title: str, body: str, figures: "dict[str, go.Figure]") -> str:
    """A whole page; ``body`` is HTML, and each figure has its place in it."""
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), _drawing(figures)] if figures else []
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            body,
            "</main>",
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _place(name: str, figure: "go.Figure", figures: "dict[str, go.Figure]") -> str:
    """Where a figure will be drawn; it goes into ``figures`` by the id of its place."""
    figures[name] = figure
    label = escape(figure.layout.title.text or "", quote=True)
    size = f"max-width: {figure.layout.width}px; height: {figure.layout.height}px"
    figure_html = f'<div class="figure" id="{name}" role="img" aria-label="{label}" style="{size}"></div>'
    return f'<div class="scroll">{figure_html}</div>'


def _sections(run: Run, figures: "dict[str, go.Figure]", analyses: Sequence[object]) -> Iterator[str]:
    """The page's parts in order; each figure that they place goes into ``figures``, by the id of its place."""
    from sims_lens import plots

    def place(name: str, figure: "go.Figure") -> str:
        return _place(name, figure, figures)

    yield _heading(run)
    yield "<h2>What was learnt</h2>"
    head, *rows = run.cells()
    yield _table(head, rows)
    yield (
        '<p class="note">Means over held-out prompts; brackets are 95% intervals over prompts. <em>Difference</em> is '
        "the mean score less the base model’s on the same prompts, <em>win rate</em> the chance that a steered "
        "response scores higher than a base response (ties half). NLL is that of the response under the base model, "
        "KL the divergence from the base model’s next-token distribution, both in nats per token; distinct-2 is the "
        "share of distinct word pairs, repeated the share of word 4-grams seen before in the response, length in "
        "tokens, EOS the share of responses that the model ended itself.</p>"
    )
    if run.iterations:
        yield "<noscript><p>The figures need JavaScript; the tables hold their numbers.</p></noscript>"
        yield place("win-rate", plots.win_rate(run))
        yield place("effect", plots.effect(run))
        yield f'<p class="note">{_WITH_CONTROLS if run.controls else _WITHOUT_CONTROLS}</p>'
        yield "<h2>Side effects</h2>"
        yield place("side-effects", plots.side_effects(run))
    yield from _responses(run)
    if run.audit:
        yield "<h2>Can the ranker be trusted?</h2>"
        yield place("reliability", plots.reliability_card(run.audit))
    if run.iterations:
        yield "<h2>The directions</h2>"
        yield place("vector-norms", plots.vector_norms(run))
        yield place("iteration-similarity", plots.iteration_similarity(run))
        yield place("layer-similarity", plots.layer_similarity(run))
    for number, result in enumerate(analyses, start=1):
        drawn = [result] if hasattr(result, "to_plotly_json") else plots.figures(result)
        if number == 1:
            yield "<h2>Under the microscope</h2>"
        for k, figure in enumerate(drawn, start=1):
            yield place(f"analysis-{number}-{k}", figure)
        if hasattr(result, "_repr_html_") and not hasattr(result, "to_plotly_json"):
            yield f'<details><summary>The numbers</summary><div class="scroll">{result._repr_html_()}</div></details>'
    if any(i.decision for i in run.iterations):
        yield from _guard(run)
    if run.choice:
        yield from _choice(run)
    if run.iterations:
        yield from _pairs(run)
        yield place("pair-selection", plots.pair_selection([i.pairs for i in run.iterations]))
    yield from _cost(run)
    yield from _configuration(run)


def _heading(run: Run) -> str:
    prompts = ", ".join(
        f"{len(run.indices(split))} {name}"
        for split, name in (("train", "training"), ("validation", "validation"), ("heldout", "held-out"))
        if run.indices(split)
    )
    steering = run.config.steering
    layers = ", ".join(str(layer) for layer in run.plan.layers) if run.iterations else "not chosen yet"
    state = "complete" if run.complete else f"unfinished: {len(run.iterations)} of {run.config.iterations} iterations"
    if not run.complete and len(run.iterations) == run.config.iterations:
        state = "unfinished: controls not measured yet"
    facts = (
        ("Model", f"{run.model.model or 'not named'}"),
        ("Ranker", run.ranker),
        ("Prompts", prompts),
        ("Steered", f"layer {layers}, {steering.site}, {steering.scope} tokens"),
        ("Strength", f"{run.strength_text()}, {steering.compose}"),
        ("Run", f"{state}, seed {run.config.seed}"),
    )
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd dir='auto'>{escape(text)}</dd></div>" for name, text in facts)
    return (
        '<header><p class="kicker">Self-improving steering</p>'
        f"<h1>{escape(run.model.model or 'A model')}, steered by {escape(run.ranker)}</h1>"
        f'<p class="verdict">{escape(run.verdict())}</p><dl>{listed}</dl></header>'
    )


def _responses(run: Run) -> Iterator[str]:
    """First draws of the base model and under the run's plan, side by side."""
    last = run.best.index if run.best else 0
    base = {s.prompt: s for s in run.samples(0) if s.draw == 0}
    steered = {s.prompt: s for s in run.samples(last) if s.draw == 0} if last else {}
    shown = [index for index in run.indices("heldout") if index in base and (not last or index in steered)]
    yield "<h2>Responses</h2>"
    yield (
        f'<p class="note">The first draw for each held-out prompt, in the order of the prompts, none left out. The '
        f"number is the ranker’s score{'; the higher one is bold' if last else ''}. An ellipsis marks a response that "
        "the token limit cut off.</p>"
    )
    head = ("prompt", "base model", *((f"after iteration {last}",) if last else ()))

    def table(indices: Sequence[int]) -> str:
        rows = []
        for i in indices:
            drawn = [base[i], *((steered[i],) if last else ())]
            best = max(s.score or 0.0 for s in drawn)
            tied = len({s.score for s in drawn}) == 1
            cells = "".join(_response(s, bold=not tied and (s.score or 0.0) == best) for s in drawn)
            rows.append(f'<tr><th scope="row" dir="auto">{escape(run.prompts[i])}</th>{cells}</tr>')
        return _scrolling(head, rows, kind="responses")

    yield table(shown[:SHOWN])
    if len(shown) > SHOWN:
        yield f"<details><summary>{len(shown) - SHOWN} more</summary>{table(shown[SHOWN:])}</details>"


def _response(sample: Sample, *, bold: bool) -> str:
    score = "" if sample.score is None else f"{sample.score:.3g}"
    tag = "strong" if bold else "span"
    text = escape(sample.text) + ("" if sample.ended else '<span class="cut">…</span>')
    return f'<td><{tag} class="score">{score}</{tag}><div class="text" dir="auto">{text}</div></td>'


def _choice(run: Run) -> Iterator[str]:
    chosen = run.plan.layers if run.iterations else ()
    yield "<h2>How the layer was chosen</h2>"
    yield (
        f'<p class="note">Each candidate was steered at full strength on {len(run.indices("validation"))} validation '
        "prompts. The highest win rate wins, among the layers whose text stays within "
        f"{run.config.steering.max_nll_increase:g} nats per token of the base model’s NLL.</p>"
    )
    head = ("layer", "win rate [95%]", "difference [95%]", "NLL", "KL", "")
    yield _table(head, [_choice_row(layer, run.choice[layer], chosen) for layer in sorted(run.choice)])


def _guard(run: Run) -> Iterator[str]:
    limits = run.config.guard
    acts = "" if limits.mode == "act" else " It only reports here: every iteration was kept."
    yield "<h2>The guard</h2>"
    yield (
        '<p class="note">What each iteration was held against on the held-out prompts, and what was decided.'
        f"{acts} KL: the 95th percentile of a response’s tokens, nats. Perplexity and distinct word pairs: against the "
        "base model’s. Turn: cosine with the direction before. Ranker: how far it stands by its first verdicts.</p>"
    )
    head = (
        "iteration",
        "tries",
        f"KL ≤ {limits.kl_95:g}",
        f"perplexity ≤ {limits.perplexity_ratio:g}",
        f"pairs ≥ {limits.diversity:g}",
        f"turn ≥ {limits.turn:g}",
        "ranker",
        "decision",
    )
    rows = []
    for i in run.iterations:
        if i.decision is None:
            continue
        checks = i.decision.checks
        kl, ratio = (found.estimate if found else None for found in (checks.kl_95, checks.perplexity_ratio))
        figures = (kl, ratio, checks.diversity, checks.turn)
        told = ("–" if value is None else f"{value:.2f}" for value in figures)
        agreed = "–" if checks.agreement is None else f"{100 * checks.agreement:.0f}%"
        rows.append((str(i.index), str(i.tries), *told, agreed, i.decision.action))
    yield _table(head, rows)
    reasons = (f"<li>Iteration {i.index}: {escape(i.decision.reason)}</li>" for i in run.iterations if i.decision)
    yield f"<ul>{''.join(reasons)}</ul>"
    if run.stopped and all(i.decision is None or i.decision.reason != run.stopped for i in run.iterations):
        yield f"<p>{escape(run.stopped)}</p>"


def _choice_row(layer: int, e: Evaluation, chosen: Iterable[int]) -> tuple[str, ...]:
    return (
        str(layer),
        str(e.win_rate),
        f"{e.difference.estimate:+.3g} [{e.difference.low:+.3g}, {e.difference.high:+.3g}]",
        f"{e.nll.estimate:.2f}",
        f"{e.kl.estimate:.2f}",
        "chosen" if layer in chosen else "",
    )


def _pairs(run: Run) -> Iterator[str]:
    reasons = sorted({reason for i in run.iterations for reason in i.dropped})
    yield "<h2>Contrast pairs</h2>"
    yield (
        '<p class="note">The best against the worst response to each training prompt. A prompt is dropped when all its '
        "scores are equal (tie), when best and worst are too close (margin), or when fewer than two responses have a "
        "token in them (empty).</p>"
    )
    yield _table(
        ("iteration", "pairs", *(f"dropped: {reason}" for reason in reasons), "mean margin (ranker’s units)"),
        [
            (str(i.index), str(i.pairs.pairs), *(str(i.dropped.get(r, 0)) for r in reasons), f"{i.pairs.margin:.3g}")
            for i in run.iterations
        ],
    )


def _cost(run: Run) -> Iterator[str]:
    if not run.cost:
        return
    yield "<h2>Cost</h2>"
    yield (
        '<p class="note">Operations of the model’s matrix products, a multiply and an add counted as two; a judge that '
        "is another model is not in them. Memory is what the whole process had taken at most.</p>"
    )

    def row(phase: str, spent: Cost, judge: int) -> tuple[str, ...]:
        own = (0, 0) if phase in JUDGING else (spent.prefill, spent.decode)
        tokens = (f"{count:,}" for count in (*own, judge))
        return phase, f"{spent.seconds:.1f}", *tokens, f"{spent.flops / 1e12:,.2f}", f"{spent.peak / 1e9:.1f}"

    rows = [row(phase, spent, judge_tokens({phase: spent})) for phase, spent in run.cost.items()]
    own = total({phase: spent for phase, spent in run.cost.items() if phase not in JUDGING})
    whole = replace(total(run.cost), prefill=own.prefill, decode=own.decode)
    rows.append(row("all", whole, judge_tokens(run.cost)))
    head = ("phase", "seconds", "tokens read (prefill)", "tokens written (decode)", "tokens of a judge")
    yield _table((*head, "TFLOP", "peak memory, GB"), rows)


def _configuration(run: Run) -> Iterator[str]:
    versions = RunStore(run.path).header().get("versions", {})
    origin = {name: value for name, value in asdict(run.model).items() if value}
    yield "<h2>Configuration</h2>"
    yield f'<p class="note">Config {run.config.digest}: with this model, ranker and prompts it makes the run again.</p>'
    for name, value, shown in (
        ("Config", run.config.to_json(), " open"),
        ("Model", origin, ""),
        ("Versions", versions, ""),
    ):
        text = escape(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
        yield f"<details{shown}><summary>{name}</summary><pre>{text}</pre></details>"
    yield f'<footer><p class="note">Written by sims_lens from {escape(str(run.path))}</p></footer>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells, the first of each row its header."""
    body = []
    for first, *cells in rows:
        body.append(f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(c)}</td>" for c in cells)}</tr>')
    return _scrolling(head, body, kind="numbers")


def _scrolling(head: Sequence[str], rows: Sequence[str], *, kind: str) -> str:
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _drawing(figures: "dict[str, go.Figure]") -> str:
    """The script that draws the figures into their places; their sizes come from there."""
    described = {}
    for name, figure in figures.items():
        described[name] = figure.to_dict()
        described[name]["layout"] = {
            key: value for key, value in described[name]["layout"].items() if key not in ("width", "height")
        } | {"autosize": True}
    # plotly's own encoder writes <, > and / as escapes, so that no text in it can end the script
    from plotly.io.json import to_json_plotly

    options = '{"responsive": true, "displayModeBar": false}'
    return (
        f"const figures = {to_json_plotly(described)};\n"
        "for (const [name, figure] of Object.entries(figures))\n"
        f"  Plotly.newPlot(name, figure.data, figure.layout, {options});\n"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


_STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1d1f23; --soft: #5b6068; --line: #dcdedf; --tint: #f3f4f3;
  --accent: #0067a0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e4e6e8; --soft: #a2a8b0; --line: #34383e; --tint: #1d2024; --accent: #6cc0f0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; margin: 0 0 .8rem;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.25rem; font-weight: 650; margin: 3rem 0 .8rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
p { margin: 0 0 1rem; max-width: 46rem; overflow-wrap: anywhere; }
.kicker { margin: 0 0 .3rem; color: var(--accent); font-size: .85rem; font-weight: 600; letter-spacing: .02em; }
.verdict { font-size: 1.1rem; line-height: 1.5; }
.note { color: var(--soft); font-size: .88rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: .7rem 1.6rem;
  margin: 1.6rem 0 0; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; line-height: 1.45; }
th, td { padding: .42rem .65rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th:first-child { padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
.numbers { font-variant-numeric: tabular-nums; font-size: .8rem; }
.numbers td, .numbers th { white-space: nowrap; padding-inline: .4rem; }
.numbers th:first-child { padding-left: 0; }
.numbers td:last-child, .numbers th:last-child { padding-right: 0; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.responses { min-width: 640px; table-layout: fixed; }
.responses th:first-child { width: 26%; }
.responses td, .responses tbody th { overflow-wrap: anywhere; }
.responses tbody th, .text { white-space: pre-wrap; }
.score { display: block; font-variant-numeric: tabular-nums; color: var(--soft); font-size: .8rem; }
strong.score { color: var(--ink); font-weight: 700; }
.cut { color: var(--soft); }
.figure { width: 100%; min-width: 600px; margin: 0 0 .4rem; }
.figure .infolayer text, .figure .cartesianlayer text, .figure .annotation text { fill: var(--soft) !important; }
.figure .infolayer .gtitle { fill: var(--ink) !important; font-weight: 600 !important; }
details { margin: 0 0 .8rem; }
summary { cursor: pointer; color: var(--accent); }
pre { margin: .6rem 0 0; padding: .9rem 1rem; overflow-x: auto; background: var(--tint); border-radius: 6px;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
@media (max-width: 560px) { main { padding: 28px 16px 48px; } h1 { font-size: 1.5rem; } }
@media print { main { max-width: none; padding: 0; } .figure, tr { break-inside: avoid; } }
"""

__all__ = ["render", "write_figures", "write_report"]
