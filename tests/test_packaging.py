"""What a stranger installs: the metadata agree, the wheel holds what it should, and it works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import sims_lens as sims

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = sorted(PROJECT["project"]["optional-dependencies"])


def test_one_version_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert sims.__version__ == version
    assert cited()["version"] == version
    assert re.search(rf"^## (Unreleased|{re.escape(version)}\b)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_oldest_python_is_the_same_everywhere() -> None:
    supported = [c.split(" :: ")[-1] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert PROJECT["project"]["requires-python"] == f">={supported[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + supported[0].replace(".", "")
    assert f"sys.version_info < ({supported[0].replace('.', ', ')})" in (ROOT / "Makefile").read_text()


def cited() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_has_what_the_format_wants() -> None:
    found = cited()
    assert found["cff-version"] == "1.2.0"
    assert found["license"] == PROJECT["project"]["license"]
    assert [a["name"] for a in found["authors"]] == [a["name"] for a in PROJECT["project"]["authors"]]
    for entry in (found, *found["references"]):
        assert entry["title"] and entry["authors"]
    readme = (ROOT / "README.md").read_text()
    for entry in found["references"]:
        assert entry["url"].removeprefix("https://") in readme, "the README cites the same papers"


def test_the_changelog_has_no_entry_without_a_kind() -> None:
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    text = (ROOT / "CHANGELOG.md").read_text()
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= set(kinds)
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert "\n- " not in section.split("\n### ")[0], "an entry stands under a kind, such as '### Added'"
        headings = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert len(headings) == len(set(headings)), "one heading of a kind in each version"


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is downloaded"
    lint = re.search(r"^lint:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint
    made = set(re.findall(r"\$\(VENV\)/bin/(ruff check|ruff format|mypy)", lint[1]))
    assert {match for h in hooks[0]["hooks"] for match in re.findall(r"bin/(ruff \w+|mypy)", h["entry"])} == made


# The wheel and the source archive, built and tried: `make package`. It needs uv and a package index, and takes minutes.

UV = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"


def run(*command: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT")}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env={**outside, **(env or {})}, capture_output=True, text=True)


def uv(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    assert UV
    done = run(UV, *command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the source archive, and the source archive."""
    if not UV:
        pytest.skip("uv isn't here; `make package` installs it")
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--out-dir", folder, ROOT, cwd=folder)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    info = f"sims_lens-{sims.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"sims_lens", info}
    package = Path(sims.__file__).parent
    files = {str(f.relative_to(package.parent)) for f in package.rglob("*") if f.is_file() and f.suffix != ".pyc"}
    assert {name for name in names if name.startswith("sims_lens/")} == files
    assert {"sims_lens/py.typed", "sims_lens/prompts/everyday.txt", f"{info}/licenses/LICENSE"} <= set(names)
    assert "sims-lens = sims_lens.cli:main" in zipfile.ZipFile(built[0]).read(f"{info}/entry_points.txt").decode()


@pytest.mark.slow
def test_the_source_archive_holds_all_that_the_repository_does(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = run("git", "ls-files", cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a clone")
    assert {name for name in listed.stdout.splitlines() if not name.startswith(".ci/")} - names == set()


@pytest.fixture(scope="module", params=["wheel", "archive"])
def empty(request: pytest.FixtureRequest, built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has sims_lens and what it depends on, and no file of the repository."""
    folder = tmp_path_factory.mktemp(request.param)
    uv("venv", "--quiet", "--python", sys.executable, folder / "env", cwd=folder)
    source = built[0] if request.param == "wheel" else built[1]
    uv("pip", "install", "--quiet", "--python", folder / "env", "-c", CONSTRAINTS, source, cwd=folder)
    return folder


STEERED = """
import sims_lens as sims
model = sims.load("embedded")
plan = sims.fit(model, sims.tone_pairs(6), layers=[17], progress=False).plan(17, coefficient=0.25)
with sims.steering(model, plan) as steered:
    print(len(steered.hook_names), *model.generate("The sea", max_new_tokens=2, verbose=False).split()[:2])
"""


@pytest.mark.slow
def test_a_stranger_needs_no_repository(empty: Path) -> None:
    tool, python = empty / "env" / "bin" / "sims-lens", empty / "env" / "bin" / "python"
    cache = {"SIMS_LENS_CACHE": str(empty / "cache")}
    where = run(python, "-W", "error", "-c", "import sims_lens; print(sims_lens.__file__)", cwd=empty)
    assert Path(where.stdout.strip()).is_relative_to(empty) and where.stderr == ""
    lacking = run(tool, "demo", cwd=empty, env=cache)
    assert lacking.returncode and "Traceback" not in lacking.stderr
    commands = re.findall(r"pip install ([\w.= -]+?)(?=,|$| and)", lacking.stderr, re.MULTILINE)
    assert commands, lacking.stderr
    for command in commands:  # what the message says helps
        uv("pip", "install", "--quiet", "--python", empty / "env", *command.split(), cwd=empty)
    done = run(python, "-c", STEERED, cwd=empty, env=cache)
    assert done.stdout.split() == ["3", "The", "sea"], done.stderr
    if empty.name.startswith("wheel"):
        done = run(tool, "demo", "--iterations", "1", "--out", empty / "run", cwd=empty, env=cache)
        assert done.returncode == 0, done.stderr
        assert list((empty / "run").glob("*.html")) and "Warning" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_resolves(extra: str, built: tuple[Path, Path], tmp_path: Path) -> None:
    uv("venv", "--quiet", "--python", sys.executable, tmp_path / "env", cwd=tmp_path)
    uv("pip", "install", "--dry-run", "--python", tmp_path / "env", f"{built[0]}[{extra}]", cwd=tmp_path)
