"""Every notebook runs from top to bottom, and what is committed beside it is that notebook with its outputs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(ROOT.glob("[0-9]*.py"))

pytest.importorskip("jupytext")
if "notebooks" not in {p.name for p in ROOT.parent.iterdir()}:
    pytest.skip("no notebooks in this copy", allow_module_level=True)


def test_there_are_six() -> None:
    assert [path.name[:2] for path in SCRIPTS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_pair_says_the_same_and_has_its_outputs(script: Path) -> None:
    import jupytext

    source, committed = jupytext.read(script), jupytext.read(script.with_suffix(".ipynb"))

    def cells(notebook: Any) -> list[tuple[str, str]]:
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    assert cells(source) == cells(committed), f"run `python notebooks/execute.py {script.name[:2]}`"
    outputs = [output for cell in committed.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    figures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert figures and all("image/png" in figure.data for figure in figures)
    assert script.with_suffix(".ipynb").stat().st_size < 3_000_000


def executed(script: Path, folder: Path) -> None:
    """Without pictures, which need a browser. nbclient raises where a cell does."""
    command = [sys.executable, str(ROOT / "execute.py"), "--check", str(folder), script.name]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / f"{script.stem}.ipynb").is_file()


# One to four minutes of a core each: all but the first run with `make test-slow`.
def to_run(scripts: list[Path]) -> list[Any]:
    return [pytest.param(s, id=s.stem, marks=[] if s == SCRIPTS[0] else [pytest.mark.slow]) for s in scripts]


# Two classes, because xdist gives a class to one worker as a whole: the halves run side by side.


class TestOddOnesRun:
    @pytest.mark.parametrize("script", to_run(SCRIPTS[0::2]))
    def test_from_top_to_bottom(self, script: Path, tmp_path: Path) -> None:
        executed(script, tmp_path)


class TestEvenOnesRun:
    @pytest.mark.parametrize("script", to_run(SCRIPTS[1::2]))
    def test_from_top_to_bottom(self, script: Path, tmp_path: Path) -> None:
        executed(script, tmp_path)
