"""Nothing grows over many rounds but what has to: the benchmark's workloads, in a process of their own."""

import json
import subprocess
import sys

import pytest
from test_benchmarks import FOLDER, module

endurance = module("endurance")

PER_ITERATION = 40
"""Python objects that an iteration of the loop leaves on the tiny model: its plan, directions, decision and figures."""


def check(workload: str, rounds: int, every: int, *, objects: float, memory: float) -> None:
    command = [sys.executable, "-W", "ignore", str(FOLDER / "endurance.py"), "--only", workload]
    options = ["--rounds", str(rounds), "--every", str(every)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    readings = json.loads(done.stdout.splitlines()[-1])["readings"]
    later = [reading for reading in readings if reading["round"] >= rounds // 5]
    assert len(later) > 3
    for what in endurance.EXACT:
        assert len({reading[what] for reading in later}) == 1, what
    slopes = endurance.slopes(readings, start=rounds // 5)
    assert slopes["objects"] <= objects and slopes["rss"] <= memory, slopes


def test_iterations_leave_little_and_no_hook_thread_or_file() -> None:
    check("improve", 12, 2, objects=PER_ITERATION, memory=1e6)


@pytest.mark.slow
def test_two_hundred_iterations() -> None:
    check("improve", 200, 10, objects=PER_ITERATION, memory=60_000)


@pytest.mark.slow
def test_two_hundred_rounds_of_analyses() -> None:
    check("analyses", 200, 10, objects=0.1, memory=200_000)


def test_a_slope_is_growth_per_round() -> None:
    readings = [{"round": n, "rss": 7 if n < 4 else 100 * n, "files": 3} for n in range(10)]
    assert endurance.slopes(readings, start=4) == pytest.approx({"rss": 100.0, "files": 0.0}, abs=1e-9)
