"""The command line as a user has it: results, machine-readable output, exit codes, no traceback."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import sims_lens as sims
from sims_lens.cli import main

SMALL = [
    "--iterations",
    "1",
    "--sampling.responses",
    "2",
    "--sampling.max-new-tokens",
    "6",
    "--steering.layers",
    "1",
    "--evaluation.samples",
    "2",
    "--evaluation.controls",
    "1",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write("llama", tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(
        "".join(f"Say {w}.\n" for w in ["sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf", "root", "bird"])
    )
    return str(path)


@pytest.fixture(scope="module")
def run(model: str, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = out.with_suffix(".json")
    code = main(["improve", "--model", model, "--prompts", prompts, "--out", str(out), "--json", str(result), *SMALL])
    assert code == 0
    written = json.loads(result.read_text())
    assert written["complete"] and written["layers"] == [1] and len(written["controls"]) == 1
    assert (out / "report.html").is_file()
    return out


def test_improve_again_goes_on_and_prints_the_same(
    run: Path, model: str, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["improve", "--model", model, "--prompts", prompts, "--out", str(run), *SMALL]) == 0
    printed = capsys.readouterr()
    assert repr(sims.open_run(run)) in printed.out and "going on where it stopped" in printed.err


def test_generate_shows_base_and_steered(run: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (run, run / "iterations/01/plan.safetensors"):
        arguments = [
            "generate",
            "--run",
            str(place),
            "--model",
            model,
            "--prompt",
            "Say a.",
            "Say b.",
            "--samples",
            "2",
        ]
        assert main([*arguments, "--json", str(run / "out.json")]) == 0
        assert capsys.readouterr().out.count("steered") == 4
        rows = json.loads((run / "out.json").read_text())["responses"]
        assert [r["prompt"] for r in rows] == ["Say a.", "Say a.", "Say b.", "Say b."]
    (run / "out.json").unlink()


def test_report_writes_a_page(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "<html" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["improve", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["improve", "--prompts", "PROMPTS", "--model", "nowhere/at-all"], "nowhere/at-all"),
        (["improve", "--prompts", "PROMPTS", "--ranker", "taste"], "taste"),
        (["improve", "--prompts", "PROMPTS", "--sampling.responses", "1"], "got 1"),
        (["improve", "--prompts", "PROMPTS", "--steering.site", "resid_mid"], "resid_mid"),
        (["generate", "--run", "nowhere", "--prompt", "a"], "there is no plan or run at nowhere"),
        (["sweep", "--run", "plan.safetensors"], "there is no plan or run at plan.safetensors"),
        (["generate", "--run", "RUN", "--prompt", ""], "prompt"),
        (["report", "nowhere"], "nowhere"),
        (["report", "RUN", "--json", "no/such/folder/x.json"], "no/such/folder"),
        (["improve", "--prompts", "PROMPTS", "--model", "MODEL", "--steering.layers", "9"], r"layer 9 is not in 0..2"),
        (["fly"], "fly"),
        (["demo", "--iterations", "many"], "many"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, run: Path, model: str, prompts: str, tmp_path: Path
) -> None:
    places = {"RUN": str(run), "PROMPTS": prompts, "MODEL": model}
    done = subprocess.run(
        [sys.executable, "-m", "sims_lens", *(places.get(a, a) for a in arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message.replace("..", ".") in (done.stderr + done.stdout).replace("..", ".")


def test_an_interrupted_run_exits_130_and_goes_on(
    model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["improve", "--model", model, "--prompts", prompts, "--out", str(tmp_path / "run"), *SMALL]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sims_lens.loop.fit_contrast", interrupted)
        assert main(arguments) == 130
    assert "go on" in capsys.readouterr().err
    assert main(arguments) == 0


def test_help_names_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["improve", "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--steering.strength" in printed and "(default: auto)" in printed and "(default: 0.3)" in printed


@pytest.fixture(scope="module")
def fitted(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    pairs = [{"prompt": f"Say {w}.", "positive": f"yes {w}", "negative": f"no, {w}"} for w in ("a", "b", "c", "d", "e")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    out, result = folder / "plan.safetensors", folder / "fit.json"
    given = ["--model", model, "--pairs", str(folder / "pairs.jsonl"), "--out", str(out), "--json", str(result)]
    assert main(["fit", *given, "--layers", "1", "--estimator", "mass_mean", "--scope", "all"]) == 0
    written = json.loads(result.read_text())
    assert written["layers"] == [1] and written["quality"]["layer"] == [0, 1, 2]
    return out


def test_fit_makes_a_plan_that_generate_takes(fitted: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = sims.SteeringPlan.load(fitted)
    assert plan.layers == (1,) and plan.interventions[0].scope.name == "all"
    assert plan.provenance.source == "fit, mass_mean, 5 pairs"
    assert main(["generate", "--run", str(fitted), "--model", model, "--prompt", "Say sea."]) == 0
    assert "steered" in capsys.readouterr().out


def test_export_says_how_near_it_is(fitted: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = fitted.with_name("vector.gguf")
    given = ["export", "--run", str(fitted), "--model", model]
    assert main([*given, "--to", "gguf", "--out", str(out)]) == 0
    assert "logits within" in capsys.readouterr().out
    assert sims.export.from_gguf(out).layers == (1,)
    assert main([*given, "--to", "onnx", "--out", str(out)]) == 2
    assert "format 'onnx' is not one of baked, gguf" in capsys.readouterr().err


def test_export_of_a_runs_responses(
    run: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["export", "--run", str(run), "--to"]
    assert main([*given, "alpaca-eval", "--out", str(tmp_path / "steered.json")]) == 0
    assert main([*given, "arena-hard", "--out", str(tmp_path / "base.jsonl"), "--iteration", "0"]) == 0
    opened = sims.open_run(run)
    heldout = tuple(opened.prompts[i] for i in opened.indices("heldout"))
    assert f"{len(heldout)} responses for arena-hard" in capsys.readouterr().out
    steered = sims.export.from_alpaca_eval(tmp_path / "steered.json")
    base = sims.export.from_arena_hard(tmp_path / "base.jsonl")
    assert steered.prompts == base.prompts == heldout
    assert base.texts == tuple(s.text for s in opened.samples(0) if s.draw == 0)
    assert main(["export", "--run", str(fitted), "--to", "alpaca-eval", "--out", "a.json"]) == 2
    assert "is no run directory; only a run holds responses" in capsys.readouterr().err


def test_what_fit_cannot_use(fitted: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = str(fitted.with_name("pairs.jsonl"))
    for given, message in (
        (["--pairs", "missing.jsonl", "--out", "p"], "missing.jsonl cannot be read"),
        (["--pairs", pairs, "--out", "nowhere/p"], "folder nowhere does not exist"),
        (["--pairs", pairs, "--out", "p", "--estimator", "magic"], "estimator 'magic' is not one of mean_difference"),
        (["--pairs", pairs, "--out", "p", "--scope", "some"], "scope 'some' is not one of"),
        (["--pairs", pairs, "--out", str(fitted), "--layers", "9"], "layer 9 was not fitted"),
    ):
        assert main(["fit", "--model", model, *given]) == 2
        assert message in capsys.readouterr().err


def test_sweep_of_a_run_and_of_a_plan(
    run: Path, fitted: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page, result = tmp_path / "sweep.html", tmp_path / "sweep.json"
    options = ["--coefficients", "0.1", "0.2", "--html", str(page), "--json", str(result), "--model", model]
    assert main(["sweep", "--run", str(run), *options]) == 0
    assert "Sweep of" in capsys.readouterr().out and "Where to steer" in page.read_text()
    assert {cell["coefficient"] for cell in json.loads(result.read_text())["cells"]} == {0.1, 0.2}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "Q{k}", "positive": "yes {k}", "negative": "no"}}\n' for k in range(5)))
    assert main(["sweep", "--run", str(fitted), "--pairs", str(pairs), "--model", model]) == 0
    assert main(["sweep", "--run", str(fitted), "--model", model]) == 2
    assert "error: give --pairs or --ranker" in capsys.readouterr().err
    both = ["--pairs", str(pairs), "--ranker", "reading-ease"]
    assert main(["sweep", "--run", str(fitted), "--model", model, *both]) == 2
    assert "error: give --pairs or --ranker, not both" in capsys.readouterr().err


def test_report_under_the_microscope(run: Path, tmp_path: Path, model: str) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--microscope", "--model", model, "--out", str(page)]) == 0
    text = page.read_text()
    assert "Under the microscope" in text and "analysis-4-1" in text and "What an effect costs" in text


def test_compare_prints_a_table_and_draws_it(
    prompts: str, model: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, result = tmp_path / "compare.html", tmp_path / "compare.json"
    given = ["compare", "--prompts", prompts, "--model", model, "--out", str(tmp_path / "compared"), *SMALL]
    given += ["--pairs", str(fitted.with_name("pairs.jsonl")), "--instruction", "Be brief.", "--seeds", "0"]
    assert main([*given, "--html", str(page), "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "supervised, 5 pairs" in printed and "best of 2" in printed and "instruction" in printed
    assert "plotly" in page.read_text() and json.loads(result.read_text())["seeds"] == [0]
    assert main([*given, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert main([*given, "--seeds", "1", "1"]) == 2
    assert "seeds must be distinct" in capsys.readouterr().err
