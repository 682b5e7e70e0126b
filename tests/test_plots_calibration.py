"""The curve draws what was measured: points, intervals, limits, the choice and its report."""

import math
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest

from sims_lens.calibration import Calibration, FluencyBudget, Point
from sims_lens.errors import RunError
from sims_lens.evaluate import Evaluation
from sims_lens.plots import TEMPLATE, calibration
from sims_lens.stats import Interval


def point(factor: float, *, name: str = "layer 3", effect: float | None = None, ratio: float | None = None) -> Point:
    def around(value: float) -> Interval:
        return Interval(value, value - 0.05, value + 0.08)

    evaluation = replace(
        Evaluation(**{f.name: around(0.5) for f in fields(Evaluation) if f.default is MISSING}),
        difference=around(factor if effect is None else effect),
        kl=around(0.2 * factor),
    )
    return Point(name, factor, 0.2 * factor, evaluation, around(1 + 0.3 * factor if ratio is None else ratio))


def result(**changes: Any) -> Calibration:
    curve = [point(f) for f in (0.5, 1.0, 2.0)] + [point(f, name="layer 5", effect=0.5 * f) for f in (0.5, 1.0)]
    found = Calibration("m", "r", "residual_norm", FluencyBudget(1.5, 0.5), tuple(curve), None, (30, 20), 2, 0, {})
    return replace(found, **{"report": point(1.0, effect=0.9), **changes})


def traces(figure: Any, name: str) -> list[Any]:
    """The traces of a name, panel by panel."""
    return [t for t in figure.data if t.name == name]


def test_every_point_is_drawn_with_its_interval() -> None:
    found = result()
    figure = calibration(found)
    for name in found.candidates:
        points = [p for p in found.curve if p.candidate == name]
        for trace, value in zip(
            traces(figure, name),
            (lambda p: p.effect, lambda p: p.perplexity_ratio, lambda p: p.evaluation.kl),
            strict=True,
        ):
            intervals = [value(p) for p in points]
            assert list(trace.y) == [i.estimate for i in intervals]
            assert list(trace.error_y.array) == pytest.approx([i.high - i.estimate for i in intervals])
            assert list(trace.error_y.arrayminus) == pytest.approx([i.estimate - i.low for i in intervals])
            assert list(trace.x) == pytest.approx([p.coefficient for p in points], rel=0.03)
            assert [row[1:3] for row in trace.customdata] == [[p.factor, p.coefficient] for p in points]
            assert list(trace.marker.symbol) == ["circle" if found.budget.allows(p) else "circle-open" for p in points]
    assert "circle-open" in traces(figure, "layer 3")[0].marker.symbol
    assert [t.name for t in figure.data if t.showlegend] == ["layer 3", "chosen", "report split", "layer 5"]
    assert figure.layout.template.layout.font == TEMPLATE.layout.font


def test_limits_are_lines_with_shade_above_them() -> None:
    figure = calibration(result())
    shapes = figure.layout.shapes
    dashed = {s.yref: s.y0 for s in shapes if s.line.dash == "dash"}
    shaded = {s.yref: (s.y0, s.y1) for s in shapes if s.type == "rect"}
    assert dashed == {"y2": 1.5, "y3": 0.5} and {k: v[0] for k, v in shaded.items()} == dashed
    assert shaded["y2"][1] > 1 + 0.3 * 2 + 0.08 and figure.layout.yaxis2.range == (None, shaded["y2"][1])
    free = calibration(result(budget=FluencyBudget(math.inf, 0.5)))
    assert {s.yref for s in free.layout.shapes if s.line.dash == "dash"} == {"y3"}


def test_the_choice_is_ringed_and_its_report_stands_beside_it() -> None:
    found = result()
    assert found.chosen is not None and found.report is not None and found.chosen.factor == 1.0
    rings, reports = traces(calibration(found), "chosen"), traces(calibration(found), "report split")
    assert [t.y[0] for t in rings] == [1.0, found.chosen.perplexity_ratio.estimate, 0.2]
    assert [t.y[0] for t in reports] == [0.9, found.report.perplexity_ratio.estimate, 0.2]
    chosen = traces(calibration(found), "layer 3")[0]
    assert all(t.x[0] == chosen.x[1] for t in rings) and all(1 < t.x[0] / chosen.x[1] < 1.1 for t in reports)
    none = calibration(result(budget=FluencyBudget(1.01, 0.01), report=None))
    assert not traces(none, "chosen") and not traces(none, "report split")


def test_the_axis_is_the_coefficient_where_candidates_share_its_unit() -> None:
    assert "median residual norm" in calibration(result()).layout.xaxis3.title.text
    negative = result(curve=tuple(replace(p, coefficient=-p.coefficient) for p in result().curve))
    for found in (result(units="mixed"), negative):
        figure = calibration(found)
        assert figure.layout.xaxis3.title.text.startswith("factor")
        assert list(traces(figure, "layer 3")[0].x) == pytest.approx([0.5, 1.0, 2.0], rel=0.03)
    assert figure.layout.xaxis.type == "log"


def test_silence_and_strange_names() -> None:
    silent = replace(point(4.0, name="<b>x</b>"), perplexity_ratio=Interval(math.inf, math.inf, math.inf))
    figure = calibration(result(curve=(point(1.0, name="<b>x</b>"), silent), report=None))
    assert "<b>x" not in str(figure.to_dict()) and [len(t.x) for t in traces(figure, "&lt;b&gt;x&lt;/b&gt;")] == [
        2,
        1,
        2,
    ]
    assert math.isfinite(figure.layout.yaxis2.range[1])
    with pytest.raises(RunError, match="no points to draw"):
        calibration(result(curve=(), report=None))
