"""The reliability card draws what the audit measured, beside what chance would give."""

from dataclasses import replace

import pytest
from planted import Judge, PairJudge, oracle, texts

from sims_lens.auditing import MEASURES, Audit, audit
from sims_lens.errors import RankerError
from sims_lens.plots import TEMPLATE
from sims_lens.plots.audit import reliability_card


@pytest.fixture(scope="module")
def result() -> Audit:
    return audit(PairJudge(first=0.8, flips=0.1), *texts(24, seed=1), reference=oracle)


def test_every_measure_is_drawn_with_its_interval_and_its_chance(result: Audit) -> None:
    figure = reliability_card(result)
    drawn = {}
    for trace in figure.data:
        for x, y, minus, plus in zip(trace.x, trace.y, trace.error_x.arrayminus, trace.error_x.array, strict=True):
            axis = figure.layout.yaxis if trace.yaxis in (None, "y") else figure.layout.yaxis2
            drawn[axis.ticktext[axis.tickvals.index(y)]] = (x, x - minus, x + plus)
    expected = [m for m in MEASURES if m.scale != "units"]
    assert set(drawn) == {m.label for m in expected}
    for measure in expected:
        interval = getattr(result, measure.field)
        assert drawn[measure.label] == pytest.approx((interval.estimate, interval.low, interval.high))
    marks = {shape.name.removeprefix("chance of "): shape.x0 for shape in figure.layout.shapes}
    assert marks == {m.field: m.chance for m in expected if m.chance is not None}


def test_the_verdict_is_in_the_title_and_the_name_is_not(result: Audit) -> None:
    figure = reliability_card(replace(result, ranker="<b>judge</b>"))
    assert result.verdict in figure.layout.title.text
    subtitle = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert result.reason[1:] in subtitle and "24 prompts" in subtitle
    assert "judge</b>" not in figure.to_json()
    assert figure.layout.template == reliability_card(result).layout.template
    assert figure.layout.template.layout.font == TEMPLATE.layout.font


def test_standing_is_in_the_legend_once(result: Audit) -> None:
    names = [trace.name for trace in reliability_card(result).data if trace.showlegend]
    assert len(names) == len(set(names)) and "worse than chance, or a bias" in names
    assert {t.name for t in reliability_card(audit(Judge(), *texts(24, seed=1))).data} == {
        "beyond chance, or no bias",
        "no chance level",
    }


def test_without_any_measure_there_is_no_card() -> None:
    with pytest.raises(RankerError, match="nothing that could be drawn"):
        reliability_card(audit(oracle, ["About x"], [["Yes."]]))
    one_panel = reliability_card(audit(lambda prompt, group: [0.0] * len(group), *texts(12, seed=1)))
    assert "yaxis2" not in one_panel.layout
