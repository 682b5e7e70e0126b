"""A run that is killed, cut off, refused by the disk or interrupted ends as if nothing had happened.

A small share of what `benchmarks/faults.py` does; what that finds is in docs/faults.md.
"""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from faulty import PROMPTS, config, vowels

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.errors import DamagedError, RunError
from sims_lens.store import RunStore

ROOT = Path(__file__).resolve().parent.parent


FEW = {"kills": 3, "cuts": 2, "interrupts": 1, "disk": 3, "raises": 1, "memory": 2, "rot": 2}


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_whatever_happens_the_run_ends_with_the_same_bytes(times: int, tmp_path: Path) -> None:
    few = {what: times * count for what, count in FEW.items()}
    options = [word for what, count in few.items() for word in (f"--{what}", count)]
    command = [sys.executable, ROOT / "benchmarks/faults.py", *options, "--out", tmp_path / "found"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found").read_text())
    assert [row["runs"] for row in found["rows"]] == list(few.values())
    for row in found["rows"]:
        assert row["same"] == row["runs"] and not row["ended badly"] and not row["complete files damaged"], found
        assert not row["bought twice"] or row["what"] == "disk", found  # an answer that the disk refuses can't be kept


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sims.load(str(tiny.write("llama", tmp_path_factory.mktemp("models") / "small")), kind="bridge")


def improve(model: Any, out: Path, **settings: Any) -> sims.Run:
    def ranker(prompt: str, responses: list[str]) -> list[float]:
        return [vowels(r) for r in responses]

    settings = {"config": config()} | settings
    return sims.improve(model, PROMPTS, ranker=ranker, out=out, progress=False, **settings)


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> sims.Run:
    return improve(model, tmp_path_factory.mktemp("runs") / "run")


def test_a_damaged_file_is_named_and_only_its_iteration_is_computed_anew(
    model: Any, run: sims.Run, caplog: pytest.LogCaptureFixture
) -> None:
    file = run.path / "iterations/01/vectors.safetensors"
    others = {p: p.stat().st_mtime_ns for p in run.path.rglob("*.*") if "iterations/01" not in str(p)}
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"vectors\.safetensors is damaged .*start the same run again"):
        _ = sims.open_run(run.path).iterations[0].vectors
    before = [e.tensors["mean_difference"] for e in run.iterations[1:]]
    with caplog.at_level(logging.WARNING, logger="sims_lens"):
        again = improve(model, run.path)
    assert "vectors.safetensors was damaged" in caplog.text and (run.path / "iterations/01.damaged").is_dir()
    assert (again.iterations[1].tensors["mean_difference"] == before[0]).all() and again.complete
    changed = [p for p, when in others.items() if not p.exists() or p.stat().st_mtime_ns != when]
    assert not [p for p in changed if p.name != "run.lock"]


def test_a_second_process_is_refused(model: Any, run: sims.Run) -> None:
    with RunStore(run.path).locked(), pytest.raises(RunError, match="being written by another process"):
        improve(model, run.path)


def test_a_run_that_stopped_early_has_its_last_iteration_made_anew(model: Any, tmp_path: Path) -> None:
    guard = sims.GuardConfig(kl_95=1e-6, shrinks=0, patience=1)  # rolls the first iteration back, and stops
    run = improve(model, tmp_path / "r", config=replace(config(), guard=guard))
    assert run.stopped and len(run.iterations) == 1
    metrics = run.iterations[0].path / "metrics.json"
    before = json.loads(metrics.read_bytes())
    metrics.write_bytes(b"{}")
    again = improve(model, tmp_path / "r", config=replace(config(), guard=guard))
    assert json.loads(metrics.read_bytes())["evaluation"] == before["evaluation"]
    assert again.stopped == run.stopped and len(again.iterations) == 1


OLD = ROOT / "tests/data/run_v1"
"""A run that the version before checksums wrote, of the tiny Llama."""


def test_an_old_run_opens_and_is_gone_on_with(model: Any, tmp_path: Path) -> None:
    old = sims.open_run(OLD)
    assert old.complete and len(old.iterations) == 2 and old.stopped and "vowels" in repr(old)
    out = Path(shutil.copytree(OLD, tmp_path / "run"))
    header = json.loads((out / "run.json").read_text())
    header["model"] = asdict(adapt(model).provenance)  # another version of transformers writes another checkpoint
    del header["config"]["contrast"]["policy"]  # as if it had been added later
    (out / "run.json").write_text(json.dumps(header))
    shutil.rmtree(out / "iterations/02")
    shutil.rmtree(out / "controls")
    (out / "stopped.json").unlink()

    def ranker(prompt: str, responses: list[str]) -> list[float]:
        return [vowels(r) for r in responses]

    ranker.__name__ = "vowels"
    prompts = [json.loads(line)["prompt"] for line in (OLD / "prompts.jsonl").read_text().splitlines()]
    run = sims.improve(model, prompts, ranker=ranker, config=old.config, out=out, progress=False)
    for new, before in zip(run.rows(), old.rows(), strict=True):
        assert new[0] == before[0] and new[1].difference.estimate == pytest.approx(before[1].difference.estimate)
    assert (out / "iterations/02/checksums.jsonl").is_file() and not (out / "iterations/01/checksums.jsonl").exists()
