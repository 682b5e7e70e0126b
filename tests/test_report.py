"""The report: complete, self-contained, and safe whatever a prompt, a model or a ranker says."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from test_plots import write_run

from sims_lens import report
from sims_lens.cost import cost_text
from sims_lens.errors import RunError
from sims_lens.report import write_report
from sims_lens.run import Run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\" onload=\"alert(3)<!-- &lt; </td></title>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, the text outside scripts, the tables, the scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        {
            "script": lambda: self.scripts.append(""),
            "table": lambda: self.tables.append([]),
            "tr": lambda: self.tables[-1].append([]),
            "td": lambda: self.tables[-1][-1].append(""),
            "th": lambda: self.tables[-1][-1].append(""),
        }.get(tag, lambda: None)()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] == "style":
            self.styles.append(data)
        else:
            self.texts.append(data)
            if "td" in self.open or "th" in self.open:
                self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def policy(self) -> str:
        (found,) = [a["content"] for t, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        assert found
        return found

    @property
    def figures(self) -> dict[str, Any]:
        match = re.search(r"const figures = (.*);\n", self.scripts[-1])
        assert match
        return json.loads(match[1])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    return Page(write_report(run))


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(
        tmp_path_factory.mktemp("hostile") / "run",
        heldout=22,
        ranker=f"ranker {HOSTILE}",
        model=f"model {HOSTILE}",
        prompt=f"prompt {HOSTILE}",
        response=f"response {HOSTILE}",
    )


def test_it_is_written_into_the_run_by_default(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", heldout=4)
    before = {p for p in run.path.rglob("*") if p.is_file()}
    assert write_report(str(run.path)) == run.path / "report.html"
    assert {p for p in run.path.rglob("*") if p.is_file()} - before == {run.path / "report.html"}


def test_it_is_written_where_one_says(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "page.html"
    assert write_report(run, path) == path
    assert path.read_bytes() == write_report(run, tmp_path / "again.html").read_bytes()
    with pytest.raises(RunError, match="name a file"):
        write_report(run, tmp_path)


def test_every_row_of_the_table_is_there(run: Run, page: Page) -> None:
    assert page.tables[0] == [list(row) for row in run.cells()]
    assert len(page.tables[0]) == 1 + 1 + 3 + 5


def test_the_heading_says_model_ranker_and_verdict(run: Run, page: Page) -> None:
    for text in (run.model.model, run.ranker, run.verdict(), "30 training, 4 validation, 30 held-out", "complete"):
        assert text in page.text


def test_responses_stand_side_by_side(run: Run, page: Page) -> None:
    shown, more = (table for table in page.tables if table[0][0] == "prompt")
    assert (len(shown) - 1, len(more) - 1) == (20, 10)
    base, steered = ([s for s in run.samples(i) if s.draw == 0] for i in (0, 3))
    for row, left, right in zip([*shown[1:], *more[1:]], base, steered, strict=True):
        assert row[0] == run.prompts[left.prompt]
        for cell, sample in zip(row[1:], (left, right), strict=True):
            assert cell == f"{sample.score:.3g}{sample.text}{'' if sample.ended else '…'}"


def test_layer_choice_pairs_cost_and_config_are_there(run: Run, page: Page) -> None:
    tables = {table[0][0]: table[1:] for table in page.tables}
    assert [(row[0], row[-1]) for row in tables["layer"]] == [("7", ""), ("8", "chosen"), ("11", "")]
    assert [row[1] for row in tables["layer"]] == [str(run.choice[layer].win_rate) for layer in (7, 8, 11)]
    assert [row[:2] for row in tables["iteration"]] == [["1", "29"], ["2", "28"], ["3", "27"]]
    (cost,) = (row for row in tables["phase"] if row[0] == "sample")
    assert f"{cost[3]} decode" in cost_text(run.cost) and cost[5] == "18.00" and "18.0 TFLOP" in cost_text(run.cost)
    assert cost[6] == "2.0"
    assert json.dumps(run.config.to_json(), indent=2, sort_keys=True) in page.text
    assert '"python": "3.11.7"' in page.text


def test_the_figures_carry_the_runs_numbers(run: Run, page: Page) -> None:
    figures = page.figures
    places = {a["id"] for _, a in page.elements if a.get("class") == "figure"}
    assert places == set(figures) and len(figures) == 7
    steered = [trace for trace in figures["win-rate"]["data"] if trace["name"] == "steered"]
    assert steered[0]["y"] == [i.evaluation.win_rate.estimate for i in run.iterations]
    assert all("width" not in f["layout"] and f["layout"]["autosize"] for f in figures.values())


def test_nothing_is_loaded(page: Page) -> None:
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "formaction", "data", "poster"}
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "form", "img"}
    assert not re.search(r"url\(|@import|https?:", "".join(page.styles))
    assert page.policy.startswith("default-src 'none';")
    assert "http" not in page.policy and "unsafe-eval" not in page.policy


def test_only_the_two_scripts_of_the_page_may_run(page: Page) -> None:
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts]
    assert len(hashes) == 2
    (allowed,) = [part.split()[1:] for part in page.policy.split("; ") if part.startswith("script-src")]
    assert allowed == [f"'sha256-{digest}'" for digest in hashes]


def test_hostile_text_stays_text(hostile_run: Run, run: Run, tmp_path: Path) -> None:
    page, harmless = (Page(write_report(r, tmp_path / f"{i}.html")) for i, r in enumerate((hostile_run, run)))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in harmless.elements}
    assert {n for _, a in page.elements for n in a} == {n for _, a in harmless.elements for n in a}
    assert len(page.scripts) == 2 and page.scripts[0] == harmless.scripts[0]
    assert "alert" not in page.scripts[1] and "alert" not in page.policy
    for what in ("ranker", "model", "prompt", "response"):
        assert f"{what} {HOSTILE}" in page.text
    assert page.tables[0][1][0] == "base"


def test_hostile_text_in_a_figure_could_not_end_the_script() -> None:
    figure = go.Figure(layout={"title": {"text": HOSTILE}})
    script = report._drawing({"x": figure})
    assert "<" not in script.replace("for (const", "") and "alert" in script
    described = re.search(r"const figures = (.*);\n", script)
    assert described and json.loads(described[1])["x"]["layout"]["title"]["text"] == HOSTILE
    assert figure.layout.autosize is None


@pytest.mark.parametrize(("finished", "figures"), [(0, 0), (1, 7), (3, 7)])
def test_an_unfinished_run_gives_a_page(finished: int, figures: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=finished, controls=0 if finished == 3 else 5, heldout=4, choice=False)
    page = Page(write_report(run))
    assert [row[0] for row in page.tables[0][1:]] == ["base", *(f"iteration {i + 1}" for i in range(finished))]
    assert len([a for _, a in page.elements if a.get("class") == "figure"]) == figures
    assert len(page.scripts) == (2 if figures else 0)
    assert ("unfinished: " in page.text) is (finished < 3)
    assert run.verdict() in page.text


def test_odd_characters_do_not_stop_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=1, heldout=4, response="\ud800 \u202e \x00 \u2028 שלום 🌊")
    assert "שלום 🌊" in write_report(run).read_text(encoding="utf-8")


def test_without_a_run_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        write_report(tmp_path)
