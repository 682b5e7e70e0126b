"""Every result has its figures, and the report takes them with results' tables, all of it escaped."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from common import KINDS, plan_of, vector
from test_report import write_run

import sims_lens as sims
from sims_lens.plots.overview import _FIGURES

HOSTILE = "<img src=x onerror=alert(1)>"
PAIRS = [(f"Say {k}. {HOSTILE}", f"yes {k} {HOSTILE}", "no, never") for k in range(4)]


@pytest.fixture(scope="module")
def results(zoo: Any) -> list[object]:
    model = zoo("llama", KINDS[0])
    named = {HOSTILE: {0: vector(0), 1: vector(1)}, "other": {0: vector(2), 1: vector(3)}}
    behaviour = sims.PairBehaviour(PAIRS, name=HOSTILE)
    plan = plan_of(0, 1, scope="generation")
    return [
        sims.fit(model, PAIRS, progress=False),
        sims.layer_sweep(model, named, coefficients=(0.1, 0.2), behaviour=behaviour, progress=False),
        sims.vector_norms(model, named, progress=False),
        sims.direction_similarity(named, model=model),
        sims.readout(model, named, progress=False),
        sims.token_scores(model, PAIRS[0][:2], {0: vector(0)}),
        sims.leave_one_out(model, plan, behaviour, controls=1, progress=False),
        sims.component_effects(model, plan, behaviour, exact=4, progress=False),
        sims.direction_readers(model, plan, behaviour, exact=2, progress=False),
        sims.directional_ablation(model, named["other"], behaviour, layer=1, controls=1, progress=False),
        sims.logit_attribution(model, PAIRS[0][:2], plan, answer="y"),
    ]


def test_every_result_has_figures_with_titles_and_axes(results: list[object]) -> None:
    for result in results:
        drawn = sims.plots.figures(result)
        assert drawn, type(result)
        for figure in drawn:
            assert figure.layout.title.text and figure.layout.template.layout.colorway
            titled = [
                a.title.text or a.tickmode or a.tickvals for a in [*figure.select_xaxes(), *figure.select_yaxes()]
            ]
            assert any(titled), (type(result).__name__, figure.layout.title.text)
            assert "<img" not in figure.to_json().replace("\\u003c", "<"), figure.layout.title.text


def test_a_fit_is_drawn_with_its_intervals_and_without_what_is_not_known(zoo: Any) -> None:
    fitted = sims.fit(zoo("llama", KINDS[0]), PAIRS, progress=False)
    accuracy, auc, halves, effect = sims.plots.fit_quality(fitted).data
    for line, found in ((accuracy, fitted.quality.accuracy), (auc, fitted.quality.auc)):
        assert list(line.y) == [i.estimate for i in found]
        assert list(line.error_y.arrayminus) == pytest.approx([i.estimate - i.low for i in found])
    assert list(accuracy.x) == [0, 1, 2] == list(auc.customdata) and list(effect.y) == list(fitted.quality.effect_size)
    few = sims.plots.fit_quality(sims.fit(zoo("llama", KINDS[0]), PAIRS[:2], progress=False))
    assert all(y is None for line in few.data[:2] for y in line.y) and len(few.layout.shapes) == 1


def test_every_result_shows_itself_and_hides_no_markup(results: list[object]) -> None:
    for result in results:
        assert len(repr(result).splitlines()) < 60 and "object at 0x" not in repr(result)
        assert "<img" not in result._repr_html_(), type(result)  # type: ignore[attr-defined]
        if hasattr(result, "table"):
            assert len(result.table()), type(result)


def test_what_has_no_figures_is_refused() -> None:
    with pytest.raises(sims.SimsError, match="LayerSweep"):
        sims.plots.figures("a sweep")
    assert {"Run", "Audit", "Calibration"} <= {kind.__name__ for kind in _FIGURES}


def test_the_report_takes_results_and_figures(results: list[object], tmp_path: Path) -> None:
    finished_run = write_run(tmp_path / "run")
    figure = sims.plots.slider({"a": sims.plots.win_rate(finished_run), "b": sims.plots.win_rate(finished_run)})
    page = sims.write_report(finished_run, tmp_path / "page.html", analyses=[*results, figure, go.Figure(figure)])
    text = page.read_text()
    assert text.count('class="figure"') >= len(results) and f"analysis-{len(results) + 1}-1" in text
    assert "<img" not in text.replace("\\u003c", "<").replace("img-src", "")
    with pytest.raises(sims.SimsError, match="no figures"):
        sims.write_report(finished_run, tmp_path / "other.html", analyses=["text"])


def test_a_model_with_a_plan_attached_is_refused(zoo: Any) -> None:
    """Everything that compares with the unsteered model would compare with a steered one."""
    model, plan = zoo("llama", KINDS[-1]), plan_of(0, 1, scope="generation")
    behaviour = sims.PairBehaviour(PAIRS)
    calls = [
        lambda: sims.layer_sweep(model, plan, behaviour=behaviour, progress=False),
        lambda: sims.vector_norms(model, plan, progress=False),
        lambda: sims.readout(model, plan, texts=[PAIRS[0][:2]], progress=False),
        lambda: sims.token_scores(model, "Say.", plan, layer=0),
        lambda: sims.leave_one_out(model, plan, behaviour, progress=False),
        lambda: sims.component_effects(model, plan, behaviour, progress=False),
        lambda: sims.direction_readers(model, plan, behaviour, progress=False),
        lambda: sims.directional_ablation(model, plan, behaviour, layer=1, progress=False),
        lambda: sims.logit_attribution(model, "Say.", plan, answer="y"),
        lambda: sims.calibrate(model, plan, prompts=["a", "b"], ranker=len, progress=False),
        lambda: sims.interaction(model, {"a": plan, "b": plan}, {"x": len}, ["a"], progress=False),
        lambda: sims.widgets.Console(model, plan),
    ]
    for number, call in enumerate(calls):
        with sims.steering(model, plan), pytest.raises(sims.SimsError, match="a plan is attached"):
            call()
            pytest.fail(f"call {number} took a steered model")


def test_what_types_would_catch_gets_one_line_without_them(tmp_path: Path) -> None:
    """The tests check every argument's type; a user's session does not."""
    code = """
import sims_lens as sims
from sims_lens.hooks import resolve
class Fit:
    def plan(self, layer): ...
calls = [
    (lambda: sims.PairBehaviour(None), "a list of pairs"),
    (lambda: sims.plots.slider({"a": 3}), "draw it first"),
    (lambda: sims.write_report(3), "a run or its directory"),
    (lambda: sims.write_report("x", analyses="y"), "a list of results"),
    (lambda: resolve(None, Fit()), "make one with .plan(layer)"),
]
for call, said in calls:
    try:
        call()
    except sims.SimsError as error:
        assert said in str(error), error
    else:
        raise AssertionError(said)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
