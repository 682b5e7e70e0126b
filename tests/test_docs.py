"""What the documentation says is so: examples run, commands parse, links lead somewhere, every public name is there."""

import ast
import contextlib
import doctest
import inspect
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tyro

import sims_lens as sims
from sims_lens.cli import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
if not (DOCS / "index.md").is_file():
    pytest.skip("no documentation in this copy", allow_module_level=True)
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = [*FRONT, *sorted(p for p in DOCS.rglob("*.md") if p.relative_to(DOCS).parts[0] != "notebooks")]
FENCE = re.compile(r"^(?P<marks>`{3,})(?P<language>[^\n]*)\n(?P<body>.*?)^(?P=marks)[ ]*$", re.MULTILINE | re.DOTALL)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    body: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(found["language"].strip(), found["body"], text.count("\n", 0, found.start()) + 1)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Examples. A block with prompts (>>>) is run, the blocks of a page one after the other; one without is read.


def examples(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python" and ">>> " in block.body]


# Pages that fit, sweep or sample on the embedded model, some seconds each: `make test-slow` runs them.
LONG = {"own_model", "read_a_sweep", "ablation_study", "export", "resume"}


def to_run() -> list[Any]:
    pages = [page for page in PAGES if examples(page)]
    return [pytest.param(p, id=name_of(p), marks=[pytest.mark.slow] if p.stem in LONG else []) for p in pages]


@pytest.mark.usefixtures("unchecked")  # a reader may write 20 for 20.0
@pytest.mark.parametrize("page", to_run())
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, Any] = {}
    runner, said = doctest.DocTestRunner(optionflags=FLAGS, verbose=False), io.StringIO()
    for block in examples(page):
        test = doctest.DocTestParser().get_doctest(block.body, names, name_of(page), name_of(page), block.line)
        runner.run(test, out=said.write, clear_globs=False)
        names = test.globs
    assert runner.summarize(verbose=False).failed == 0, said.getvalue()


def calls(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """What is taken from ``sims``, as a dotted name, and the keywords that it is called with."""
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        path, inner = [], node
        while isinstance(inner, ast.Attribute):
            path.append(inner.attr)
            inner = inner.value
        if path and isinstance(inner, ast.Name) and inner.id == "sims":
            call = called.get(id(node))
            yield ".".join(reversed(path)), [word.arg for word in call.keywords if word.arg] if call else []


def read_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(page)}:{block.line}")
        for page in PAGES
        for block in blocks(page)
        if block.language == "python" and ">>> " not in block.body
    ]


@pytest.mark.parametrize("block", read_blocks())
def test_other_code_names_what_there_is(block: Block) -> None:
    for name, keywords in calls(ast.parse(block.body)):
        thing: Any = sims
        for part in name.split("."):
            assert hasattr(thing, part), f"sims.{name}"
            thing = getattr(thing, part)
        if keywords:
            takes = inspect.signature(thing).parameters
            assert set(keywords) <= set(takes), f"sims.{name} takes {', '.join(takes)}"


# Commands.


def commands() -> list[Any]:
    """Every ``sims-lens`` line of a shell block, with the lines that continue it, and every one in the text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = [b.body.replace("\\\n", " ") for b in blocks(page) if b.language in ("bash", "sh", "console")]
        inline = re.findall(r"`(sims-lens [^`]+)`", FENCE.sub("", text))
        lines = [line.strip().removeprefix("$ ") for body in shell for line in body.splitlines()]
        for line in [*lines, *inline]:
            command = line.split("#")[0].split(";")[-1].strip()
            if command.startswith("sims-lens "):
                found.append(pytest.param(" ".join(command.split()), id=f"{name_of(page)}: {command[:60]}"))
    return found


@pytest.mark.parametrize("command", commands())
def test_a_command_line_parses(command: str) -> None:
    words = shlex.split(command)[1:]
    if re.search(r"[|…\[]| RUN\b|\.\.\.", command):  # a form, not a command
        assert words[0] in COMMANDS
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            tyro.extras.subcommand_cli_from_dict(dict(COMMANDS), prog="sims-lens", args=words)
    except SystemExit as end:
        assert end.code in (0, None), said.getvalue()


# Links.

LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in (one or other for one, other in LINK.findall(text)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: {target.name} has {sorted(anchors(target))}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed: set[Path] = set()
    for page in PAGES[len(FRONT) :]:
        for block in blocks(page):
            if block.language == "{toctree}":
                entries = [line.split("<")[-1].rstrip(">") for line in block.body.splitlines() if line.strip()]
                listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries if not entry.startswith(":")}
    assert {page.resolve() for page in PAGES[len(FRONT) :]} - listed == {(DOCS / "index.md").resolve()}


# The reference.

DOCUMENTED = re.compile(r"^\.\. auto\w+:: (sims_lens[\w.]*)", re.MULTILINE)
SPACES = {"": sims, **{name: getattr(sims, name) for name in ("analysis", "export", "lab", "plots", "widgets")}}


def public() -> list[Any]:
    return [
        pytest.param(space, name, id=f"{space}.{name}".lstrip("."))
        for space, module in SPACES.items()
        for name in module.__all__
        if name not in SPACES
    ]


@pytest.mark.parametrize(("space", "name"), public())
def test_every_public_name_is_in_the_reference(space: str, name: str) -> None:
    written = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    wanted = {f"sims_lens.{space}.{name}" if space else f"sims_lens.{name}"}
    if getattr(sims, name, None) is getattr(SPACES[space], name):
        wanted |= {f"sims_lens.{name}"}
    if space == "":
        wanted |= {f"sims_lens.{s}.{name}" for s, m in SPACES.items() if getattr(m, name, 0) is getattr(sims, name)}
    assert wanted & set(DOCUMENTED.findall(written))


# Pictures.


def test_pictures_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import pictures

    for name, draw in pictures.PICTURES.items():
        assert (DOCS / "figures" / f"concept_{name}.svg").read_text(encoding="utf-8") == draw(), "run docs/pictures.py"
    del sys.modules["pictures"]
