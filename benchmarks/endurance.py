"""Does anything grow that should not? Memory, hooks, threads and open files over many iterations on a tiny model.

`python benchmarks/endurance.py` runs each workload in a process of its own and writes docs/data/endurance.json and a
figure; `--only improve --rounds 40` runs one here and prints its record. Python's garbage is collected and free memory
given back to the system before each reading, so that what is left is held by somebody.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tiny models are the tests'

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

import sims_lens as sims  # noqa: E402

PROMPTS = [f"Say {first}{second}." for first in "abcde" for second in "vwxyz"]
PAIRS = [(prompt, "eee", "ooo") for prompt in PROMPTS[:6]]
EXACT = ("hooks", "attributes", "threads", "files")
"""What may not change at all."""


def vowels(_prompt: str, responses: Any) -> list[float]:
    """Share of vowels, and a little for variety, so that ties are rare."""
    return [sum(c in "aeiou" for c in r) / (1 + len(r)) + 1e-3 * len(set(r)) for r in responses]


def reading(model: Any) -> dict[str, int]:
    """What the process and the model hold now."""
    for _ in range(2):
        gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    process = psutil.Process()
    modules = list(model.modules())
    return {
        "rss": process.memory_info().rss,
        "objects": len(gc.get_objects()),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
        "attributes": len(model.__dict__) + len(model.hook_dict) + len(modules),
        "threads": process.num_threads() + threading.active_count(),
        "files": process.num_fds(),
    }


class Watching(sims.LocalSampler):
    """The model's own sampler, which calls somebody whenever an iteration has been completed."""

    def __init__(self, model: Any, config: sims.SamplingConfig, folder: Path, told: Callable[[int], None]) -> None:
        super().__init__(model, config)
        self._folder, self._told, self._last = folder / "iterations", told, 0

    def reads(self, plan: sims.SteeringPlan, site: str = "resid_post") -> bool:
        """See :class:`sims_lens.LocalSampler`; asked ahead of everything that is drawn."""
        done = len([path for path in self._folder.glob("*") if path.suffix != ".partial"])
        if done > self._last:
            self._last = done
            self._told(done)
        return super().reads(plan, site)


def looped(model: Any, rounds: int, told: Callable[[int], None], contrast: sims.ContrastConfig) -> None:
    """One run of the loop, of so many iterations."""
    config = sims.SIMSConfig(
        iterations=rounds,
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=8, top_k=None),
        contrast=contrast,
        steering=sims.SteeringConfig(layers=(1,), strength=0.3),
        evaluation=sims.EvaluationConfig(samples=1, controls=1),
        guard=sims.GuardConfig(mode="report"),
    )
    with tempfile.TemporaryDirectory() as folder:
        sampler = Watching(model, config.sampling, Path(folder), told)
        sims.improve(model, PROMPTS, ranker=vowels, config=config, out=folder, sampler=sampler, progress=False)


def improve(model: Any, rounds: int, told: Callable[[int], None]) -> None:
    """`improve` as it is by itself: pairs of the iteration at hand."""
    looped(model, rounds, told, sims.ContrastConfig())


def improve_all(model: Any, rounds: int, told: Callable[[int], None]) -> None:
    """`improve` with pairs from all iterations: the memory bank grows."""
    looped(model, rounds, told, sims.ContrastConfig(memory=None))


def analyses(model: Any, rounds: int, told: Callable[[int], None]) -> None:
    """The same things done to one model again and again, with a plan of other numbers each time."""
    tokens = torch.arange(10, 18)[None]
    rows = [(tokens[0, :4].tolist(), tokens[0, 4:].tolist())]
    short = sims.SamplingConfig(max_new_tokens=6, top_k=None)
    for index in range(1, rounds + 1):
        drawn = torch.randn(tiny.N_LAYERS, tiny.D_MODEL, generator=torch.Generator().manual_seed(index))
        vectors = dict(enumerate(drawn))
        plan = sims.SteeringPlan.addition(vectors, coefficient=0.5, units="residual_norm")
        with sims.steering(model, plan):
            model.generate(tokens, max_new_tokens=4, verbose=False)
            sims.capture(model, rows)
        list(sims.LocalSampler(model, short).sample(PROMPTS[:4], n=2, plan=plan, seed=index))
        next(sims.LocalSampler(model, short).sample(PROMPTS, n=2, plan=plan, seed=index))  # and no more of it
        sims.layer_sweep(model, vectors, behaviour=PAIRS, coefficients=(0.5,), layers=(0, 2), progress=False)
        sims.leave_one_out(model, sims.resolve(model, plan), behaviour=PAIRS, progress=False)
        told(index)


WORKLOADS = {work.__name__: work for work in (improve, improve_all, analyses)}


def record(name: str, rounds: int, every: int, kind: str) -> dict[str, Any]:
    """Run a workload here, with a reading every so many rounds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = sims.load(tiny.write("llama", Path(folder) / "tiny-llama"), kind=kind)
    readings: list[dict[str, int]] = []

    def told(index: int) -> None:
        if index % every == 0:
            readings.append({"round": index, **reading(model)})

    started = time.perf_counter()
    WORKLOADS[name](model, rounds, told)
    return {
        "workload": name,
        "kind": kind,
        "rounds": rounds,
        "seconds": round(time.perf_counter() - started, 1),
        "readings": readings,
    }


def slopes(readings: list[dict[str, int]], *, start: int) -> dict[str, float]:
    """Growth per round from a round on, by least squares: bytes of memory, and counts of everything else."""
    later = [each for each in readings if each["round"] >= start]
    at = np.array([each["round"] for each in later], dtype=float)
    return {
        what: float(np.polyfit(at, [each[what] for each in later], 1)[0]) for what in readings[0] if what != "round"
    }


def figure(records: list[dict[str, Any]]) -> Any:
    """Memory and Python's objects over the rounds, from the first reading on."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    drawn = make_subplots(cols=2, subplot_titles=("resident memory, MB more", "Python objects, thousands more"))
    for place, each in enumerate(records):
        rounds = [r["round"] for r in each["readings"]]
        for column, (what, unit) in enumerate((("rss", 1e6), ("objects", 1e3)), start=1):
            values = [(r[what] - each["readings"][0][what]) / unit for r in each["readings"]]
            name, colour = f"{each['workload']}, {each['kind']}", sims.plots.TEMPLATE.layout.colorway[place]
            trace = go.Scatter(x=rounds, y=values, name=name, line_color=colour, showlegend=column == 1)
            drawn.add_trace(trace, row=1, col=column)
            drawn.update_xaxes(title="round", row=1, col=column)
    return drawn.update_layout(template=sims.plots.TEMPLATE, width=1000, height=380, paper_bgcolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--only", choices=WORKLOADS, help="run this one in this process, and print its record")
    parser.add_argument("--kind", default="bridge")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/endurance.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/figures/endurance.png")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(record(given.only, given.rounds, given.every, given.kind)))
        return
    records = []
    jobs = [
        ("improve", "bridge"),
        ("improve", "hooked"),
        ("improve_all", "bridge"),
        ("analyses", "bridge"),
        ("analyses", "hooked"),
    ]
    for name, kind in jobs:
        options = ["--only", name, "--kind", kind, "--rounds", str(given.rounds), "--every", str(given.every)]
        command = [sys.executable, __file__, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        found = json.loads(done.stdout.splitlines()[-1])
        found["slopes"] = slopes(found["readings"], start=given.rounds // 5)
        print(name, kind, f"{found['seconds']} s", {what: round(value, 2) for what, value in found["slopes"].items()})
        records.append(found)
    given.out.write_text(json.dumps(records, indent=1) + "\n")
    drawn = figure(records)
    drawn.write_image(given.figure, scale=2)


if __name__ == "__main__":
    main()
