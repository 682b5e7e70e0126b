"""Whatever is typed: exit code 2 with one line and no traceback, before anything is computed where it can be known."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
from common import plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_plots import write_run

import sims_lens as sims
from sims_lens.cli import COMMANDS, main

LONGEST = 420
FILES = (
    "missing",
    "folder",
    "empty.jsonl",
    "not-utf-8.jsonl",
    "null.jsonl",
    "noise.safetensors",
    "a" * 300,
    "run/run.json",
)
NUMBERS = ("-1", "0", "nan", "inf", "1e400", "many", "", "1.5", "9" * 40)
WORDS = ("", "some", "no:such", "json:no", ".:x", "שלום", "👩‍👩‍👧", "\x1b[31m", "--", "-x")
TAKES: dict[str, tuple[list[str], dict[str, tuple[str, ...]]]] = {
    "demo": (
        [],
        {"--ranker": WORDS, "--kind": WORDS, "--iterations": ("-1", "0", "many", "1.5"), "--seed": ("-1", "many")},
    ),
    "improve": (
        ["--prompts", "prompts.txt", "--model", "model", "--out", "out"],
        {
            "--prompts": FILES,
            "--model": FILES,
            "--ranker": WORDS,
            "--kind": WORDS,
            "--json": FILES,
            "--revision": WORDS,
            "--evaluator": WORDS,
            "--sampling.responses": ("-1", "0", "1", "nan"),
            "--steering.layers": ("9", "-1", "x"),
            "--steering.site": WORDS,
            "--steering.scope": WORDS,
            "--steering.strength": ("-1", "0", "nan", "many"),
        },
    ),
    "plan": (
        ["--prompts", "100"],
        {
            "--prompts": ("-1", "0", "x"),
            "--model-size": WORDS,
            "--hardware": WORDS,
            "--gpus": ("-1", "0", "x"),
            "--judge": WORDS,
            "--sampler": WORDS,
            "--prompt-tokens": ("-1", "0", "nan", "x"),
        },
    ),
    "compare": (
        ["--prompts", "prompts.txt", "--model", "model", "--out", "out"],
        {
            "--prompts": FILES,
            "--pairs": FILES,
            "--html": ("no/such/page.html", "folder"),
            "--seeds": ("-1", "x"),
            "--ranker": WORDS,
        },
    ),
    "fit": (
        ["--pairs", "pairs.jsonl", "--model", "model", "--out", "made.safetensors"],
        {
            "--pairs": FILES,
            "--model": FILES,
            "--out": ("folder", "no/such/plan"),
            "--estimator": WORDS,
            "--layers": ("9", "-1", "x"),
            "--site": WORDS,
            "--coefficient": ("nan", "inf", "1e400", "x"),
            "--scope": WORDS,
            "--seed": ("-1", "9" * 40),
        },
    ),
    "generate": (
        ["--run", "plan.safetensors", "--model", "model", "--prompt", "Say a.", "--max-new-tokens", "2"],
        {
            "--run": (*FILES, "nothing.safetensors"),
            "--model": FILES,
            "--prompt": ("", " ", "x" * 500),
            "--samples": NUMBERS[:2],
            "--scale": ("nan", "inf", "1e400"),
            "--max-new-tokens": ("-1", "0", "500", "x"),
            "--seed": ("-1", "9" * 40),
        },
    ),
    "sweep": (
        ["--run", "plan.safetensors", "--model", "model", "--pairs", "pairs.jsonl", "--coefficients", "0.1"],
        {
            "--run": FILES,
            "--pairs": FILES,
            "--coefficients": ("nan", "inf", "0", "x"),
            "--layers": ("9", "-1", "x"),
            "--seed": ("-1",),
            "--html": ("no/such/page.html", "folder"),
            "--out": ("plan.safetensors", "a" * 300),
        },
    ),
    "export": (
        ["--run", "plan.safetensors", "--model", "model", "--to", "gguf", "--out", "made.gguf"],
        {"--run": FILES, "--to": WORDS, "--out": ("folder", "no/such/file.gguf"), "--model": FILES},
    ),
    "report": (["run"], {"": FILES, "--out": ("folder",), "--json": ("folder", "no/such/x.json")}),
}
"""Of each command: arguments that work, or would, and what may be wrong with one."""

QUIET = settings(
    max_examples=12, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with good files and bad ones, which commands are run in."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.write("llama", folder / "model")
    write_run(folder / "run", iterations=1, heldout=4, controls=0)
    plan_of(1).save(folder / "plan.safetensors")
    sims.SteeringPlan(()).save(folder / "nothing.safetensors")
    (folder / "prompts.txt").write_text("".join(f"Say {word}.\n" for word in "abcdefghij"))
    pairs = [{"prompt": f"Say {word}.", "positive": "yes", "negative": "no"} for word in "abcd"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "folder").mkdir()
    (folder / "empty.jsonl").touch()
    (folder / "not-utf-8.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    (folder / "null.jsonl").write_text("null\n")
    (folder / "noise.safetensors").write_bytes(bytes(range(256)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def ran(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # what the parser itself refuses
        return int(stop.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_argument_is_exit_code_2_in_one_line(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, wrong = TAKES[command]

    @QUIET
    @given(st.sampled_from([(option, value) for option, values in wrong.items() for value in values]))
    def run(chosen: tuple[str, str]) -> None:
        option, value = chosen
        at = good.index(option) if option in good else len(good)
        arguments = [value] if not option else [*good[:at], option, value, *good[at + 2 :]]
        code = ran([command, *arguments])
        said = capsys.readouterr().err
        assert code == 2 and "Traceback" not in said, (arguments, said)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert not lines or (len(lines) == 1 and len(lines[0]) <= LONGEST), said

    run()
    assert not (place / "out").exists()


@QUIET
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20))
def test_any_prompt_is_answered_or_refused(text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = ran(
        [*["generate", "--run", "plan.safetensors", "--model", "model", "--max-new-tokens", "2"], f"--prompt={text}"]
    )
    printed = capsys.readouterr()
    assert code == (0 if text.strip() else 2)
    assert all(c.isprintable() or c == "\n" for c in printed.out + printed.err.replace("\r", ""))


def test_json_is_valid_and_interrupts_are_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(name)

    assert ran([*["report", "run", "--out", "page.html", "--json", "result.json"]]) == 0
    json.loads((place / "result.json").read_text(), parse_constant=no_constant)

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, os.strerror(28), "page.html")

    def interrupted(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    for raised, code in ((full, 2), (interrupted, 130)):
        monkeypatch.setattr("sims_lens.report.write_report", raised)
        capsys.readouterr()
        assert ran(["report", "run", "--out", "page.html"]) == code
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_budgets_without_limits_and_intervals_without_ends_are_valid_json() -> None:
    from sims_lens.stats import Interval, interval_from

    budget = sims.FluencyBudget(perplexity_ratio=float("inf"))
    assert json.dumps(budget.to_json(), allow_nan=False) == '{"perplexity_ratio": null, "kl": 0.5}'
    assert sims.FluencyBudget.from_json(budget.to_json()) == budget
    for interval in (Interval(1.0, 0.5, float("inf")), Interval(1.0, 0.5, 2.0)):
        assert json.dumps(interval.to_json(), allow_nan=False) and interval_from(interval.to_json()) == interval
