"""Pages in a real browser, without a network: figures are drawn, sliders move, nothing that a model wrote runs."""

from collections.abc import Iterator
from pathlib import Path

import plotly.graph_objects as go
import pytest
from browser import Browser, Page, browser, needs_browser
from test_plots import write_run

from sims_lens import plots
from sims_lens.plots.samples import sample_browser
from sims_lens.plots.sliders import slider
from sims_lens.plots.theme import titled
from sims_lens.report import write_report
from sims_lens.run import Run

pytestmark = needs_browser

HOSTILE = "<b>x</b><script>alert(1)</script><img src=x onerror='alert(2)'> &lt; \"q\" $a$ and $b$"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "run", heldout=6, prompt=HOSTILE, response=HOSTILE)


def opened(chromium: Browser, figure: go.Figure, path: Path) -> Page:
    """The figure as a page of its own, in a notebook's width."""
    figure.write_html(path, include_plotlyjs=True)
    page = chromium.open(path, width=790)
    page.until("document.querySelector('.js-plotly-plot .slider-rail-touch-rect')")
    return page


def move(page: Page, share: float) -> None:
    """Click on the slider's rail, at a share of its length."""
    script = "const box = document.querySelector('.slider-rail-touch-rect').getBoundingClientRect();"
    left, top, width, height = page.run(f"{script} return [box.left, box.top, box.width, box.height];")
    page.press(left + share * (width - 1), top + height / 2)


def label(page: Page) -> str:
    return str(page.run("return document.querySelector('.slider-label').textContent;"))


def assert_quiet(page: Page) -> None:
    """No error, no warning, no request and no dialog."""
    assert (page.console, page.requests, page.dialogs) == ([], [], [])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_report_draws_every_figure(dark: bool, run: Run, chromium: Browser, tmp_path: Path) -> None:
    page = chromium.open(write_report(run, tmp_path / "report.html"), dark=dark)
    places = page.run("return document.querySelectorAll('.figure').length;")
    assert places >= 7
    page.until(f"document.querySelectorAll('.figure .nsewdrag').length >= {places}")
    drawn = page.run(
        "return [...document.querySelectorAll('.figure')].map(f => {"
        "  const box = f.querySelector('.main-svg').getBoundingClientRect();"
        "  const marks = f.querySelectorAll('.overplot path, .overplot image').length;"
        "  return [f.id, box.width, box.height, marks, f.querySelector('.gtitle').textContent];"
        "});"
    )
    for name, width, height, marks, title in drawn:
        assert width > 300 and height > 300 and marks > 0 and title, name
    assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth;")
    assert HOSTILE in page.run("return document.body.textContent;")
    assert_quiet(page)


def test_the_browser_itself_would_have_said(chromium: Browser, tmp_path: Path) -> None:
    """The checks above can fail: errors, requests, policies and dialogs are seen."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<meta http-equiv='Content-Security-Policy' content=\"style-src 'none'\"><body style='color: red'>"
        "<script>alert('hello'); fetch('https://example.org/x').catch(() => 0); throw new Error('thrown');</script>"
    )
    page = chromium.open(path)
    page.until("performance.getEntriesByType('resource').length")
    assert page.dialogs == ["hello"] and page.requests == ["https://example.org/x"]
    said = "\n".join(page.console)
    assert "thrown" in said and "Content Security Policy" in said and "ERR_NAME_NOT_RESOLVED" in said


def test_a_heat_map_changes_with_its_slider(run: Run, chromium: Browser, tmp_path: Path) -> None:
    figures = {str(i): plots.layer_similarity(run, i) for i in (1, 2, 3)}
    page = opened(chromium, slider(figures, label="iteration"), tmp_path / "heat.html")
    state = (
        "const gd = document.querySelector('.js-plotly-plot'), full = gd._fullLayout;"
        "return [gd.querySelector('.gtitle').textContent, gd.querySelector('.hm image').getAttribute('href'),"
        "  gd._fullData[0].z[0][5], full.xaxis.range, full.yaxis.range, full.sliders[0].active,"
        "  gd.querySelector('.nsewdrag').getBoundingClientRect().toJSON()];"
    )
    before = page.run(state)
    assert label(page) == "iteration: 1" and before[0].endswith("Iteration 1") and before[5] == 0
    page.run("await new Promise(done => setTimeout(done, 700));")
    assert page.run(state) == before  # nothing plays by itself
    move(page, 1.0)
    page.until("document.querySelector('.slider-label').textContent === 'iteration: 3'")
    page.until("document.querySelector('.gtitle').textContent.endsWith('Iteration 3')")
    after = page.run(state)
    assert after[1] != before[1] and after[2] == pytest.approx(figures["3"].data[0].z[0][5])
    assert after[3:5] == before[3:5] and after[6] == before[6]
    move(page, 0.0)
    page.until("document.querySelector('.gtitle').textContent.endsWith('Iteration 1')")
    assert page.run(state) == before
    assert_quiet(page)


def test_bars_change_their_categories_and_marks(chromium: Browser, tmp_path: Path) -> None:
    def layer(index: int) -> go.Figure:
        names, values = [f"t{index}{k}" for k in range(4)], [index + 1.0, 2.0, -1.0, 0.5]
        figure = titled(go.Figure(), f"Layer {index}", "s").add_bar(y=names, x=values, orientation="h")
        if index == 1:
            figure.add_vline(x=1.0).add_annotation(x=1, y=0, text="only here", showarrow=False)
        return figure.update_yaxes(autorange="reversed")

    page = opened(chromium, slider({str(k): layer(k) for k in range(3)}), tmp_path / "bars.html")
    state = (
        "const gd = document.querySelector('.js-plotly-plot');"
        "const texts = (c) => [...gd.querySelectorAll(c)].map(e => e.textContent);"
        "return [texts('.ytick text').sort(), texts('.annotation-text'),"
        "  gd.querySelectorAll('.shapelayer path').length, gd._fullLayout.xaxis.range, gd._fullLayout.yaxis.range];"
    )
    first = page.run(state)
    assert first[:3] == [["t00", "t01", "t02", "t03"], [], 0]
    for share, index in ((0.5, 1), (1.0, 2)):
        move(page, share)
        page.until(f"document.querySelector('.gtitle').textContent === 'Layer {index}'")
        found = page.run(state)
        assert found[0] == [f"t{index}{k}" for k in range(4)]
        assert found[1:3] == ([["only here"], 1] if index == 1 else [[], 0])
        assert found[3:] == first[3:]
    assert_quiet(page)


def test_the_slider_overlaps_nothing(run: Run, chromium: Browser, tmp_path: Path) -> None:
    for name, figure in (("win", plots.win_rate(run)), ("side", plots.side_effects(run))):
        page = opened(chromium, slider({"a": figure, "b": figure}), tmp_path / f"{name}.html")
        boxes = page.run(
            "const box = (s) => [...document.querySelectorAll(s)].map(e => e.getBoundingClientRect().toJSON());"
            "return [box('.slider-group'), [...box('.gtitle'), ...box('.gtitle-subtitle'), ...box('.annotation-text'),"
            " ...box('.legend'), ...box('.nsewdrag')]];"
        )
        (ours,), others = boxes
        assert len(others) >= 4
        for other in others:
            assert other["bottom"] <= ours["top"] + 1 or other["top"] >= ours["bottom"] - 1, (ours, other)
        assert ours["right"] <= 760


def test_the_sample_browser_steps_and_runs_nothing(run: Run, chromium: Browser, tmp_path: Path) -> None:
    page = opened(chromium, sample_browser(run), tmp_path / "samples.html")
    state = (
        "const texts = [...document.querySelectorAll('.cell-text')].map(e => e.textContent);"
        "return [document.querySelector('.gtitle-subtitle').textContent, texts];"
    )
    page.until("document.querySelectorAll('.cell-text').length >= 25")
    first = page.run(state)
    assert label(page) == "prompt (of 6): 1" and first[0].startswith(f"{HOSTILE} 0")
    move(page, 1.0)
    page.until("document.querySelector('.slider-label').textContent === 'prompt (of 6): 6'")
    page.until("document.querySelector('.gtitle-subtitle').textContent.includes('$ 5')")
    page.until(f"({{run: () => {{ {state} }} }}).run()[1].join('') !== {first[1]!r}.join('')")
    last = page.run(state)
    for (subtitle, texts), index in ((first, 0), (last, 5)):
        assert subtitle.startswith(f"{HOSTILE} {index}")
        for iteration in range(4):
            (drawn,) = [s for s in run.samples(iteration) if (s.prompt, s.draw) == (index, 0)]
            shown = drawn.text.strip() + ("" if drawn.ended else "…")
            assert any(text.replace(" ", "") == shown.replace(" ", "") for text in texts), (shown, texts)
            assert f"{drawn.score:.3g}" in texts and f"{drawn.nll:.2f}" in texts
    assert not page.run("return document.querySelectorAll('.js-plotly-plot img, .js-plotly-plot script').length;")
    overflow = page.run(
        "return [...document.querySelectorAll('.column-cell')].filter(c => {"
        "  const text = c.querySelector('.cell-text').getBoundingClientRect();"
        "  const cell = c.querySelector('.cell-rect').getBoundingClientRect();"
        "  return text.width && (text.right > cell.right + 1 || text.bottom > cell.bottom + 1);"
        "}).length;"
    )
    assert overflow == 0
    assert_quiet(page)
