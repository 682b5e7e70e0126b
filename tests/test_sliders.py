"""Figures with a slider: each step is the figure that was given, on axes that stay. And the browser of samples."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from test_plots import STEERED, write_run

from sims_lens import plots
from sims_lens.errors import ConfigError, RunError
from sims_lens.plots.samples import sample_browser, wrapped
from sims_lens.plots.sliders import plotly_text, slider
from sims_lens.plots.theme import titled
from sims_lens.run import Run

HOSTILE = "<b>x</b></td><script>alert(1)</script><img src=x onerror=alert(2)> &lt; \"q\" 'a' $e^x$ and $5"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "run", heldout=6)


def step(figure: go.Figure, index: int) -> go.Figure:
    """The figure as it is at a step of its slider: what Plotly's ``update`` makes of it."""
    traces, layout = figure.layout.sliders[0].steps[index].args
    moved = go.Figure(figure)
    for key, values in traces.items():
        for trace, value in zip(moved.data, values, strict=True):
            trace[key] = value
    for key, value in layout.items():
        moved.layout[key] = value
    return moved


def bars(*names: str, values: Any = None, title: str = "t", **layout: Any) -> go.Figure:
    values = list(range(1, len(names) + 1)) if values is None else values
    return titled(go.Figure(), title, "s").add_bar(x=list(names), y=values).update_layout(layout)


FAMILIES: dict[str, Callable[[Run], dict[str, go.Figure]]] = {
    "heat-maps": lambda run: {str(i): plots.layer_similarity(run, i) for i in (1, 2, 3)},
    "bars": lambda run: {"a": bars("x", "y"), "b": bars("z", "x", "w", title="u"), "c": bars("q")},
    "numpy": lambda run: {str(n): bars("x", "y", values=np.array([n, 2.0 * n])) for n in (1, 2)},
    "marks": lambda run: {
        "none": bars("x"),
        "two": bars("x").add_hline(y=0.5).add_vline(x=0).add_annotation(text="here", x=0, y=1),
        "one": bars("x").add_annotation(text="there", x=0, y=0, showarrow=False),
    },
    "small multiples": lambda run: {"a": plots.side_effects(run), "b": plots.side_effects(run)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_is_the_figure_that_was_given(family: str, run: Run) -> None:
    given = FAMILIES[family](run)
    before = copy.deepcopy({name: figure.to_json() for name, figure in given.items()})
    made = slider(given, label="iteration")
    assert {name: figure.to_json() for name, figure in given.items()} == before
    control = made.layout.sliders[0]
    assert [s.label for s in control.steps] == [str(name) for name in given]
    assert {s.method for s in control.steps} == {"update"} and not made.frames and control.active == 0
    for index, figure in enumerate(given.values()):
        moved = step(step(made, len(given) - 1), index)  # from another step: nothing of that one is left
        assert len(moved.data) == len(figure.data)
        for ours, theirs in zip(moved.data, figure.data, strict=True):
            for key in ("x", "y", "z", "name", "text", "customdata", "hovertemplate"):
                if key in theirs:
                    np.testing.assert_array_equal(np.array(ours[key]), np.array(theirs[key]))
        assert moved.layout.title.text == figure.layout.title.text
        assert moved.layout.title.subtitle.text == figure.layout.title.subtitle.text
        for what in ("annotations", "shapes"):
            assert [m.to_plotly_json() for m in moved.layout[what]] == [m.to_plotly_json() for m in figure.layout[what]]
        assert moved.layout.template == plots.TEMPLATE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_axes_stay(family: str, run: Run) -> None:
    made = slider(FAMILIES[family](run))
    for axis in [*made.select_xaxes(), *made.select_yaxes()]:
        assert axis.range is not None
    moving = {key for s in made.layout.sliders[0].steps for key in s.args[1]}
    assert not {key for key in moving if key.endswith((".range", ".type", "autorange"))}


def test_the_range_holds_every_step_with_its_error_bars() -> None:
    def curve(top: float) -> go.Figure:
        return titled(go.Figure(), "t", "s").add_scatter(
            x=[1, 2], y=[0.0, top], error_y={"array": [0, 5], "arrayminus": [2, 0]}
        )

    low, high = slider({"a": curve(1.0), "b": curve(10.0)}).layout.yaxis.range
    assert -4 < low < -2 and 15 < high < 17


def test_ranges_that_figures_ask_for_are_joined_and_turned_as_they_are() -> None:
    asked = {"a": bars("x", yaxis_range=[0, 2]), "b": bars("x", yaxis_range=[-1, 1])}
    assert slider(asked).layout.yaxis.range == (-1, 2)
    for turned in ({"yaxis_autorange": "reversed"}, {"yaxis_range": [3, 0]}):
        low, high = slider({"a": bars("x", **turned), "b": bars("x", values=[3], **turned)}).layout.yaxis.range
        assert low > high == 0


def test_bars_stand_on_zero_and_stacked_ones_have_room() -> None:
    assert slider({"a": bars("x"), "b": bars("x", values=[4])}).layout.yaxis.range[0] == 0

    def stacked(value: float) -> go.Figure:
        return bars("x", values=[value], barmode="relative").add_bar(x=["x"], y=[value]).add_bar(x=["x"], y=[-1])

    low, high = slider({"a": stacked(1), "b": stacked(4)}).layout.yaxis.range
    assert high > 8 and -2 < low < -1


def test_a_log_axis_is_shared_in_decades() -> None:
    low, high = slider(
        {str(v): bars("x", values=[v], yaxis_type="log") for v in (1.0, 1000.0)}
    ).layout.yaxis.range  # fmt: skip
    assert -0.3 < low < 0 and 3 < high < 3.3


def test_categories_change_in_place() -> None:
    made = slider({"a": bars("x", "y"), "b": bars("z", "x", "w")})
    assert made.layout.xaxis.range == (-0.5, 2.5)
    assert [step(made, k).layout.xaxis.categoryarray for k in (0, 1)] == [("x", "y"), ("z", "x", "w")]
    turned = slider({"a": bars("x", xaxis_autorange="reversed"), "b": bars("x", "y")})
    assert turned.layout.xaxis.range == (1.5, -0.5)


def test_colours_mean_the_same_at_every_step() -> None:
    def heat(top: float, **options: Any) -> go.Figure:
        return titled(go.Figure(), "t", "s").add_heatmap(z=[[0.0, top]], **options)

    def ends(figure: go.Figure) -> set[tuple[float, float]]:
        return {(m.data[0].zmin, m.data[0].zmax) for m in (step(figure, 0), step(figure, 1))}

    assert ends(slider({"a": heat(1.0), "b": heat(-3.0)})) == {(-3.0, 1.0)}
    assert ends(slider({"a": heat(1.0, zmid=0), "b": heat(-3.0, zmid=0)})) == {(-3.0, 3.0)}
    assert ends(slider({"a": heat(1, zmin=-2, zmax=2), "b": heat(1, zmin=-1, zmax=5)})) == {(-2, 5)}


def test_the_slider_has_room_of_its_own(run: Run) -> None:
    for given in (plots.win_rate(run), plots.side_effects(run)):
        made = slider({"a": given, "b": given})
        more = made.layout.height - given.layout.height
        top = given.layout.margin.t or plots.TEMPLATE.layout.margin.t
        assert more == made.layout.margin.t - top > 60
        assert made.layout.sliders[0].pad.b == top - plots.TEMPLATE.layout.margin.t + 8
        assert made.layout.width == given.layout.width == 750


def test_one_figure_needs_no_slider(run: Run) -> None:
    assert not slider({"a": plots.win_rate(run)}).layout.sliders


@pytest.mark.usefixtures("unchecked")
def test_figures_that_do_not_match_are_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="'b' has the traces 3 scatter, figure 'a' has 1 bar"):
        slider({"a": bars("x"), "b": plots.win_rate(run)})
    for nothing in ({}, [bars("x")]):
        with pytest.raises(ConfigError, match="needs figures by name"):
            slider(nothing)  # type: ignore[arg-type]


def test_names_are_plain_text() -> None:
    made = slider({HOSTILE: bars("x"), "b": bars("x")}, label=HOSTILE).layout.sliders[0]
    for text in (made.steps[0].label, made.currentvalue.prefix):
        assert "<" not in text and "$" not in text and "&amp;lt;" in text and '"q"' in text
    assert plotly_text("a < b") == "a &lt; b"


# The browser of samples


def cells(figure: go.Figure, index: int) -> list[tuple[str, ...]]:
    """The rows of the table at a step."""
    return list(zip(*step(figure, index).data[0].cells["values"], strict=True))


def test_every_prompt_shows_every_iteration(run: Run) -> None:
    figure = sample_browser(run)
    assert len(figure.layout.sliders[0].steps) == 6
    for place, index in enumerate(run.indices("heldout")):
        assert run.prompts[index] in step(figure, place).layout.title.subtitle.text
        rows = cells(figure, place)
        assert [row[0] for row in rows] == ["base model", "iteration 1", "iteration 2", "iteration 3"]
        drawn = [next(s for s in run.samples(i) if (s.prompt, s.draw) == (index, 0)) for i in range(4)]
        best = max(s.score or 0.0 for s in drawn)
        for row, sample in zip(rows, drawn, strict=True):
            assert row[1].replace("<br>", " ") == sample.text.strip() + ("" if sample.ended else "…")
            score = f"{sample.score:.3g}"
            assert row[2] == (f"<b>{score}</b>" if sample.score == best else score)
            assert row[3:] == (f"{sample.nll:.2f}", f"{sample.kl:.2f}")


def test_prompts_can_be_chosen_and_ordered(run: Run) -> None:
    chosen = run.indices("heldout")[3:0:-1]
    figure = sample_browser(run, prompts=chosen)
    shown = [step(figure, k).layout.title.subtitle.text for k in range(3)]
    assert all(run.prompts[index] in text for index, text in zip(chosen, shown, strict=True))
    base, last = ({s.prompt: s.score for s in run.samples(i) if s.draw == 0} for i in (0, 3))
    order = sorted(run.indices("heldout"), key=lambda i: last[i] - base[i], reverse=True)
    figure = sample_browser(run, order="effect")
    for place, index in enumerate(order):
        assert run.prompts[index] in step(figure, place).layout.title.subtitle.text


def test_what_is_not_there_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="prompt 999 has no heldout responses"):
        sample_browser(run, prompts=[999])
    with pytest.raises(RunError, match="'heldout' and 'train'"):
        sample_browser(run, split="validation")
    with pytest.raises(ConfigError, match="prompt, effect"):
        sample_browser(run, order="score")
    with pytest.raises(RunError, match="no train responses"):
        sample_browser(write_run(tmp_path / "run", finished=0, heldout=4), split="train")
    assert sample_browser(write_run(tmp_path / "other", finished=0, heldout=4)).data


def test_the_training_responses_are_under_the_plan_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "samples", lambda self, i, split: run_samples(run, i))
    rows = cells(sample_browser(run, split="train"), 0)
    assert [row[0] for row in rows] == ["base model", "iteration 1", "iteration 2"]
    expected = [next(s for s in run_samples(run, i) if s.draw == 0).text for i in (1, 2, 3)]
    assert [row[1].replace("<br>", " ").rstrip("…") for row in rows] == [text.strip() for text in expected]


def run_samples(run: Run, iteration: int) -> Any:
    from sims_lens.store import RunStore

    return RunStore(run.path).iteration(iteration).read_samples("heldout")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", heldout=4, prompt=HOSTILE, response=HOSTILE, ranker=HOSTILE, model=HOSTILE)
    figure = sample_browser(run)
    texts = [figure.layout.title.subtitle.text, *(cell for row in cells(figure, 0) for cell in row)]
    for text in texts:
        rest = text.replace("<br>", "").replace("<b>", "").replace("</b>", "")
        assert "<" not in rest and "$" not in rest
    assert '"q"' in texts[0] and "&amp;lt;" in texts[0]


def test_odd_and_long_responses_have_their_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=1, heldout=4, response="\ud800\x00 שלום 🌊\n\n" + "w" * 9000)
    figure = sample_browser(run)
    text = cells(figure, 0)[0][1]
    assert text.endswith("[…]") and text.count("<br>") == 11 and "שלום 🌊" in text and "\x00" not in text
    figure.to_json().encode()
    assert figure.layout.height < 1300


def test_text_is_wrapped_by_what_it_takes() -> None:
    assert wrapped("", 100, 3) == [] and wrapped("one", 100, 3, end="…") == ["one…"]
    assert wrapped("a\n\nb", 100, 3) == ["a", "", "b"]
    assert max(len(line) for line in wrapped("W" * 100, 110, 99)) == 10
    assert max(len(line) for line in wrapped("海" * 100, 125, 99)) == 10
    assert "".join(wrapped("abcdef " * 30, 80, 99)).replace(" ", "") == "abcdef" * 30


def test_the_table_has_colours_of_its_own(run: Run) -> None:
    table = sample_browser(run).data[0]
    assert table.cells.font.color == "#1D1F23" and set(table.cells.fill.color[0]) == {"#E6E8EA", "#F6F6F4"}
    assert STEERED and table.header.font.color == "#F4F4F2"
