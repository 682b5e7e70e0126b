"""CONTRIBUTING.md is true: its recipes run, one file and one test each, and its table of exceptions is complete."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sims_lens import transforms

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
FILE = re.compile(r"^```python\n# (?P<name>\w+\.py)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


FILES = {found["name"]: found["code"] for found in FILE.finditer(PAGE.read_text(encoding="utf-8"))}
PARTS = sorted(name for name in FILES if not name.startswith("test_"))


def test_there_is_a_ranker_an_estimator_a_transform_and_a_figure() -> None:
    assert len(PARTS) == 4 and set(FILES) == {*PARTS, *(f"test_{name}" for name in PARTS)}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("part", PARTS)
def test_a_new_part_takes_one_file_and_one_test(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "TRANSFORMS", dict(transforms.TRANSFORMS))
    monkeypatch.syspath_prepend(tmp_path)
    for name in (part, f"test_{part}"):
        (tmp_path / name).write_text(FILES[name], encoding="utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    try:
        test = importlib.import_module(f"test_{part.removesuffix('.py')}")
        checks = [check for name, check in vars(test).items() if name.startswith("test_")]
        assert checks
        for check in checks:  # what pytest does, without the seconds that another pytest takes to start
            check(*[tmp_path for _ in inspect.signature(check).parameters])
    finally:
        for name in (part, f"test_{part}"):
            sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.slow
def test_pytest_runs_the_parts_too(tmp_path: Path) -> None:
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    quiet = ("-q", "-W", "error", "-W", "ignore::DeprecationWarning", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *quiet, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"{len(PARTS)} passed" in done.stdout, done.stdout + done.stderr


def test_every_exception_of_mypy_is_named() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "sims_lens").rglob("*.py"))
    assert not re.search(r"type: ignore(?!\[)", code), "say which error is ignored"
    used = {each.strip() for found in re.findall(r"type: ignore\[([\w\-, ]+)\]", code) for each in found.split(",")}
    table = PAGE.read_text(encoding="utf-8").partition("\n## Types")[2]
    named = {
        each for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for each in re.findall(r"`([^`]+)`", row)
    }
    assert used == named


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([\w-]+)", PAGE.read_text(encoding="utf-8")))))
def test_every_command_is_there(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
