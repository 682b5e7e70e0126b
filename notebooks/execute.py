"""Run the notebooks from top to bottom and keep their outputs: ``python notebooks/execute.py [NAME ...]``.

Each notebook is a script in jupytext's percent format, the source, and an ``.ipynb`` beside it with the outputs of the
last run, so that a code host shows the pictures. ``--check DIR`` runs the scripts too, but writes to DIR and leaves the
notebooks alone: what the tests do.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent
TIMEOUT = 900
"""Seconds for one cell: far more than any takes."""


def scripts(names: list[str]) -> list[Path]:
    """The notebooks' sources, those whose name begins with one of ``names``."""
    found = sorted(path for path in HERE.glob("[0-9]*.py"))
    return [path for path in found if not names or any(path.name.startswith(name) for name in names)]


def execute(script: Path, *, renderer: str) -> Any:
    """The notebook with fresh outputs. It runs in an empty folder, without a network."""
    os.environ |= {"PLOTLY_RENDERER": renderer, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    notebook = jupytext.read(script)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=where).execute()
    return settled(notebook)


def settled(notebook: Any) -> Any:
    """Without what changes from run to run and shows nothing on a code host: progress bars, ids, times."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        kept = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                continue
            kept.append(output)
        if cell.cell_type == "code":
            cell["outputs"] = kept
    notebook.metadata.pop("widgets", None)
    return notebook


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 03; all of them by default")
    parser.add_argument("--check", type=Path, metavar="DIR", help="write to DIR, without pictures")
    given = parser.parse_args()
    renderer = "plotly_mimetype" if given.check else "plotly_mimetype+png"  # pictures need a Chromium
    for script in scripts(given.names):
        began = time.perf_counter()
        notebook = execute(script, renderer=renderer)
        folder = given.check or HERE
        jupytext.write(notebook, folder / f"{script.stem}.ipynb", fmt="ipynb")
        print(f"{script.stem}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
