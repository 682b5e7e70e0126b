"""What SECURITY.md promises: no code of strangers runs, pages and terminals show what they say, files are only data."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import tiny
from browser import Browser, Page, browser, needs_browser
from test_benchmarks import FOLDER, module
from test_plots import write_run

import sims_lens as sims
from sims_lens import cli, plots, terminal
from sims_lens.data import Sample
from sims_lens.errors import ModelError, RunError
from sims_lens.plan import NOTHING, Provenance
from sims_lens.report import write_figures
from sims_lens.widgets import ConsoleView

ROOT = Path(sims.__file__).parent

# --- the source -------------------------------------------------------------------------------------------------------

MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "xml",
    "requests",
    "httpx",
}
MODULES |= {"telnetlib", "ftplib", "xmlrpc", "code", "pty"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "pd.read_pickle", "os.system"}
CALLS |= {"os.popen", "tempfile.mktemp", "ssl._create_unverified_context", "torch.hub.load", "urlopen"}
ARGUMENTS = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True, "shell": False, "verify": True}
ALLOWED = {
    ("torch.save", "export/lm_eval.py"),  # the harness reads its own format; written, never read
    ("urllib.request", "client.py"),  # with timeouts and limits, see test_endpoint.py
    ("urllib.request", "scale/serving.py"),  # of this machine, with a timeout
    ("from_pretrained", "rankers/pairrm.py"),  # of one class of configurations, which are numbers
}


def offences(source: str, name: str = "") -> list[str]:
    """What a module does that could run a stranger's code, or ask for more than it should."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [m for m in modules if m.split(".")[0] in MODULES or m == "urllib.request"]
            found += [f"from {m} import {a.name}" for m in modules for a in node.names if f"{m}.{a.name}" in CALLS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            last = called.rpartition(".")[2]
            found += [called] if called in CALLS or last in ("extractall", "unpack_archive") else []
            found += ["torch.save"] if called == "torch.save" else []
            found += [k for k, safe in ARGUMENTS.items() if given.get(k, str(safe)) != str(safe)]
            found += [last] if last == "from_pretrained" and "trust_remote_code" not in given else []
            found += ["no timeout"] if called.endswith("_opener.open") and "timeout" not in given else []
        if isinstance(node, ast.Attribute) and node.attr in ("CERT_NONE", "_unverified_context"):
            found.append(node.attr)
    return [each for each in found if (each, name) not in ALLOWED]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_of_strangers_can_run(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "torch.load(f, weights_only=True)",
        "import yaml",
        "eval('1')",
        "exec(compile(s, '', 'exec'))",
        "np.load(p)",
        "np.lib.load(p, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p)",
        "import requests",
        "from urllib.request import urlopen",
        "self._opener.open(r)",
        "context.verify_mode = ssl.CERT_NONE",
        "tarfile.open(p).extractall()",
        "torch.save(x, p)",
    ],
)
def test_the_walk_over_the_source_can_fail(source: str) -> None:
    assert offences(source)


def test_code_that_comes_with_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tiny.write("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    with pytest.raises(ModelError, match="Python code that comes with it, which is never run"):
        sims.load(folder)
    assert not (tmp_path / "pwned").exists()


# --- terminals --------------------------------------------------------------------------------------------------------

DRIVING = "a\x1b]0;owned\x07b\rc\x9bd\u202ee\u2066f\x08g"


def test_a_terminal_is_not_driven(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.plain(DRIVING + "\n2") == "a\\x1b]0;owned\\x07b\\rc\\x9bd\\u202ee\\u2066f\\x08g 2"
    assert terminal.lines("a\tb\nc") == "a\\tb\nc"
    for text in ("schön 🙂", "日本\u3000語", "می\u200cخواهم", "👩\u200d👧"):
        assert terminal.plain(text) == text
    terminal.say(f"{DRIVING}\nnext")
    assert capsys.readouterr().out == terminal.plain(DRIVING) + "\nnext\n"


def test_a_run_does_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", heldout=4, ranker=DRIVING, model=DRIVING, prompt=DRIVING, response=DRIVING)
    out = tmp_path / f"{DRIVING[:9]}.html"
    assert cli.main(["report", str(run.path), "--out", str(out), "--json", str(tmp_path / "r.json")]) == 0
    assert cli.main(["report", str(tmp_path / DRIVING)]) == 2
    terminal.say(f"{run}\n{cli.examples(run)}")
    said = capsys.readouterr()
    assert "owned" in said.out and "owned" in said.err
    for text in (said.out, said.err):
        assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert json.loads((tmp_path / "r.json").read_text())["ranker"] == DRIVING  # JSON is exact


def test_what_lies_in_the_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", heldout=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    assert cli.main(["report", str(run.path)]) == 0
    assert sys.path == before
    (tmp_path / "beside_you.py").write_text("def score(prompt, responses):\n    return [0.0 for _ in responses]\n")
    assert cli._ranker("beside_you:score")
    assert sys.path == [*before, ""]  # last: nothing there takes the place of an installed package


# --- files ------------------------------------------------------------------------------------------------------------


def test_mutated_files_are_read_or_refused() -> None:
    """Some thousand of the cases of `python benchmarks/fuzz.py`, each kind of file among them."""
    command = [sys.executable, str(FOLDER / "fuzz.py"), "--cases", "3000", "--looks", "0.002"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 findings" in done.stdout


def test_the_fuzzer_sees_a_crash_a_hang_and_a_large_allocation(tmp_path: Path) -> None:
    fuzz = module("fuzz")
    fuzz.SECONDS = 1.0

    def read(path: Path) -> object:
        first = path.read_bytes()[:1]
        if first == b"h":
            while True:
                pass
        if first == b"m":
            return bytearray(fuzz.MEMORY * 2)
        return {}[first] if first == b"c" else None

    options = fuzz.argparse.Namespace(seed=0, looks=0.0)
    fuzz.mutated = lambda data, ending, rng: data
    for start, error in ((b"c", "KeyError"), (b"h", "_TooSlowError"), (b"m", "MemoryError"), (b"x", None)):
        found = fuzz.fuzzed(fuzz.Artifact("a", "a.bin", start, read), tmp_path, options, range(2))
        assert len(found["findings"]) == (0 if error is None else 2)
        assert error is None or found["findings"][0]["what"].startswith(error)


def test_no_path_leaves_the_run_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", heldout=4)
    (tmp_path / "mine").write_text("mine")
    (run.path / "report.html").symlink_to(tmp_path / "mine")
    assert cli.main(["report", str(run.path)]) == 0  # replaced, not followed
    assert (tmp_path / "mine").read_text() == "mine" and not (run.path / "report.html").is_symlink()
    (run.path / "controls").rename(tmp_path / "elsewhere")
    (run.path / "controls").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="leads out of the run folder"):
        sims.open_run(run.path)
    link = tmp_path / "link"
    link.symlink_to(run.path)
    (run.path / "controls").unlink()
    assert sims.open_run(link).iterations  # a link to the whole is the user's own


# --- pages ------------------------------------------------------------------------------------------------------------

PWN = "window.__pwned=(window.__pwned||0)+1"
PAYLOADS = (
    f"<script>{PWN}</script>",
    f"<img src=x onerror='{PWN}'>",
    f'"><svg onload={PWN}>',
    f"' autofocus onfocus='{PWN}' x='",
    f'<a href="javascript:{PWN}">link</a>',
    f'<iframe srcdoc="<script>parent.{PWN}</script>"></iframe>',
    f"<iframe src='data:text/html,<script>parent.{PWN}</script>'></iframe>",
    f"</script><script>{PWN}</script>",
    f"]]><script>{PWN}</script>",
    f"--><script>{PWN}</script><!-- -->",
    f"</td></title></style></textarea><svg/onload={PWN}>",
    f"\u2028{PWN};//\u2029",
    "<style>@import 'http://canary.test/import.css'; body{background:url(http://canary.test/background)}</style>",
    f"<b style=\"width:expression({PWN});background:url('http://canary.test/style')\">b</b>",
    f"<math><mtext><table><mglyph><style><img src onerror={PWN}></style></mglyph></table></mtext></math>",
    f"<object data='javascript:{PWN}'></object>",
    "<link rel=stylesheet href=http://canary.test/link.css>",
    "<img src=http://canary.test/image>",
    f"<form action='javascript:{PWN}'><button>b</button></form>",
    f"<input autofocus onfocus={PWN}>",
    f"<details open ontoggle={PWN}>d</details>",
    f"<svg><a xlink:href='javascript:{PWN}'><text>t</text></a><animate onbegin={PWN} attributeName=x dur=1s></svg>",
    f"${{{PWN}}}",
    f"{{{{constructor.constructor('{PWN}')()}}}}",
    f"%{{customdata[0]}} &lt;script&gt;{PWN}&lt;/script&gt; $\\alpha$ <b>bold</b>",
)
HOSTILE = " ".join(PAYLOADS)
SHORT = " ".join((PAYLOADS[1], PAYLOADS[4], PAYLOADS[-1]))
"""For names in figures, where a long text takes a browser seconds to lay out."""

PLANTED = "iframe, object, embed, form, base, link, details [ontoggle], math, [onload], [onerror], [onfocus], [onbegin]"

HOVER = """
const gd = document.querySelectorAll('.js-plotly-plot')[FIGURE];
for (let curve = 0; curve < gd.data.length; curve++) {
  const subplot = (gd._fullData[curve].xaxis || '') + (gd._fullData[curve].yaxis || '');
  try { Plotly.Fx.hover(gd, [{curveNumber: curve, pointNumber: 0}], subplot); } catch (error) { continue; }
  await new Promise(done => setTimeout(done, 60));  // it is throttled
  window.hovered = (window.hovered || 0) + gd.querySelectorAll('.hoverlayer text').length;
}
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sims.Run:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    return write_run(folder, heldout=3, ranker=HOSTILE, model=HOSTILE, prompt=HOSTILE, response=HOSTILE)


def results(folder: Path) -> list[Any]:
    """Results of every kind that is read back from JSON, with payloads in each of their texts."""
    made = module("fuzz_artifacts")
    reads = (made.Audit.from_json, made.Calibration.from_json, sims.analysis.LayerSweep.from_json)
    found = [
        read(hostile(each.to_json()))
        for read, each in zip(reads, (made.audit(), made.calibration(), made.sweep()), strict=True)
    ]
    file = folder / "comparison.json"
    file.write_text(json.dumps(hostile(made.comparison(folder).to_json())))
    return [*found, sims.open_comparison(file)]


def hostile(value: Any) -> Any:
    """JSON with payloads after every text that is free."""
    if isinstance(value, dict):
        kept = ("format", "kind", "site", "verdict", "reason")
        return {k: v if k in kept or v == "loop" else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return f"{value} {SHORT}" if isinstance(value, str) else value


def without_policy(path: Path) -> Path:
    """The same page without its content security policy: escaping has to hold alone."""
    text = path.read_text(encoding="utf-8")
    assert text.count('<meta http-equiv="Content-Security-Policy"') == 1
    bare = path.with_name(f"bare-{path.name}")
    bare.write_text(text.replace('http-equiv="Content-Security-Policy"', 'name="x"', 1), encoding="utf-8")
    return bare


def assert_harmless(page: Page) -> None:
    """Nothing ran, nothing was asked for, and no payload became an element."""
    for figure in range(page.run("return document.querySelectorAll('.js-plotly-plot').length;")):
        page.run(HOVER.replace("FIGURE", str(figure)))
    page.run("await new Promise(done => setTimeout(done, 200));")
    assert page.run("return window.__pwned || 0;") == 0
    assert (page.requests, page.dialogs) == ([], [])
    assert page.run(f'return [...document.querySelectorAll("{PLANTED}")].map(e => e.outerHTML.slice(0, 200));') == []
    links = "[...document.querySelectorAll('a')].map(a => a.getAttribute('href') || a.getAttribute('xlink:href') || '')"
    assert not [link for link in page.run(f"return {links};") if "script:" in link or "canary" in link]


@needs_browser
def test_a_page_without_escaping_trips_every_wire(chromium: Browser, tmp_path: Path) -> None:
    """The control: the payloads do execute, and the checks see it."""
    (tmp_path / "control.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body><table><td>{HOSTILE}", "utf-8")
    page = chromium.open(tmp_path / "control.html")
    assert page.run("return window.__pwned;") >= 8
    assert len({r for r in page.requests if "canary.test" in r}) >= 4
    assert page.run(f'return document.querySelectorAll("{PLANTED}").length;') >= 8
    with pytest.raises(AssertionError):
        assert_harmless(page)


@needs_browser
@pytest.mark.parametrize("policy", [True, False], ids=["with-policy", "without"])
def test_a_hostile_report(policy: bool, run: sims.Run, chromium: Browser, tmp_path: Path) -> None:
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "report.html")]) == 0
    page = chromium.open(tmp_path / "report.html" if policy else without_policy(tmp_path / "report.html"))
    page.until("document.querySelectorAll('.js-plotly-plot .main-svg').length")
    assert_harmless(page)
    text = page.run("return document.body.textContent;")
    for payload in PAYLOADS:
        assert payload in text
    assert page.run("return document.querySelectorAll('.responses tbody tr').length;") == 3


@needs_browser
@pytest.mark.parametrize("policy", [True, False], ids=["with-policy", "without"])
def test_hostile_figures(policy: bool, run: sims.Run, chromium: Browser, tmp_path: Path) -> None:
    drawn = [figure for each in (run, *results(tmp_path)) for figure in plots.figures(each)]
    drawn.append(plots.sample_browser(run))
    path = write_figures(drawn, tmp_path / "figures.html", title=HOSTILE)
    page = chromium.open(path if policy else without_policy(path))
    page.until(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {len(drawn)}")
    assert_harmless(page)
    assert page.run("return window.hovered;") >= len(drawn)  # what appears under the mouse was looked at too
    assert page.run("return document.title;").split() == HOSTILE.split()


@needs_browser
def test_hostile_rich_forms(run: sims.Run, chromium: Browser, tmp_path: Path) -> None:
    """What notebooks show: tables of results, plans, and the console's answers."""
    sample = Sample(0, 0, (1, 2), HOSTILE, True, 1.0, None, 1.0, 0.1)
    view = ConsoleView(HOSTILE, NOTHING, 1, 0.2, sample, sample, None)
    plan = replace(run.plan, provenance=Provenance(model=HOSTILE, source=HOSTILE))
    shown = [each._repr_html_() for each in (run, plan, view, *results(tmp_path))]
    (tmp_path / "rich.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{'<hr>'.join(shown)}", "utf-8")
    page = chromium.open(tmp_path / "rich.html")
    assert_harmless(page)
    text = page.run("return document.body.textContent;")
    for payload in PAYLOADS:
        assert payload in text


def test_a_figure_s_text_is_escaped_wherever_it_stands(run: sims.Run, tmp_path: Path) -> None:
    """Without a browser: no string of a figure holds a payload as it is, names and hover texts included."""
    drawn = [figure for each in (run, *results(tmp_path)) for figure in plots.figures(each)]
    texts = [text for figure in [*drawn, plots.sample_browser(run)] for text in strings(figure.to_plotly_json())]
    assert any("&lt;img" in text for text in texts)
    for text in texts:
        assert "<script" not in text and "<img" not in text and "<a " not in text and "%{customdata[0]} &" not in text
    assert list(strings(go.Figure(layout={"title": {"text": "<script"}}).to_plotly_json()))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        for each in value.tolist() if hasattr(value, "tolist") else value:
            yield from strings(each)
