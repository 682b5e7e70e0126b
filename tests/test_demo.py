"""What the README promises of ``make demo``, on the embedded model: minutes, so behind a marker."""

import json
from pathlib import Path

import pytest

import sims_lens as sims
from sims_lens.cli import main


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "run"), "--json", str(tmp_path / "demo.json")]) == 0
    run = sims.open_run(tmp_path / "run")
    assert repr(run) in capsys.readouterr().out
    last, base = run.iterations[-1].evaluation, run.base
    assert len(run.indices("train")) >= 50 and len(run.indices("heldout")) >= 40 and run.indices("validation")
    assert last.win_rate.estimate >= 0.80 and last.win_rate.low > 0.70
    assert last.nll.estimate <= 2.4
    assert abs(last.distinct_2.estimate - base.distinct_2.estimate) <= 0.1
    assert len(run.controls) == 5 and run.beats_controls
    assert json.loads((tmp_path / "demo.json").read_text())["beats_controls"] is True
