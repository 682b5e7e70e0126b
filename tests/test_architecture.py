"""Imports point down, the door is complete, and importing is light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sims_lens

ROOT = Path(sims_lens.__file__).parent

# What docs/architecture.md draws: a module imports only from levels below its own, or beside it in its own folder.
LEVELS = {
    0: ["errors", "sites", "scope", "data", "config", "cost", "stats", "progress", "terminal", "token_rows", "typed"]
    + ["checks", "files", "holders", "client"]
    + ["estimators", "prompts", "transforms"],
    1: ["plan", "contrast", "store", "moments", "guard", "planning"],
    2: ["adapter", "bank", "selection", "hub"],
    3: ["models", "twin", "capture_store"],
    4: ["activations"],
    5: ["hooks", "supervised", "forced"],
    6: ["sampling", "evaluate"],
    7: ["rankers", "strength", "harness"],
    8: ["auditing", "behaviour"],
    9: ["iteration", "run", "calibration", "course", "workbench"],
    10: ["loop", "analysis", "export"],
    11: ["comparison", "lab", "scale"],
    12: ["plots"],
    13: ["report", "widgets"],
    14: ["cli"],
    15: ["__main__"],
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}


def rooms() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    assert own in LEVEL, f"say in LEVELS where {own} belongs"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sims_lens."):
            other = node.module.split(".")[1]
            same_level_ok = LEVEL[own] == LEVEL[other] == 0
            assert other == own or LEVEL[other] < LEVEL[own] or same_level_ok, f"{own} imports {other}"


def test_every_public_name_loads_and_is_documented() -> None:
    assert sorted(sims_lens.__all__) == sims_lens.__all__
    assert set(sims_lens.__all__) == set(sims_lens._HOME)
    for module in LEVEL:
        importlib.import_module(f"sims_lens.{module}") if module != "__main__" else None
    for name in sims_lens.__all__:  # no module has taken the place of a function of its name
        assert isinstance(getattr(sims_lens, name), ModuleType) is (name in sims_lens._NAMESPACES), name
        assert getattr(sims_lens, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'steer'"):
        sims_lens.steer  # noqa: B018


def test_importing_is_light() -> None:
    heavy = ("torch", "transformers", "transformer_lens", "plotly", "numpy", "pandas", "scipy", "sklearn", "jaxtyping")
    heavy += ("ray",)
    code = f"import sims_lens, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""
