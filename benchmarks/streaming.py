"""What a stream of a million prompts takes in the process that drives it: memory, time, bytes on the disk.

The model is a stub that answers at once with 40 tokens, so that what is measured is ours: prompts read from a JSONL
file, shards written whole, shards read back. Each size runs in a process of its own, whose peak the system tells.

    python benchmarks/streaming.py --sizes 10000 100000 1000000 --out docs/data/streaming.json
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sims_lens as sims
from sims_lens.cost import TokenCount
from sims_lens.data import Sample
from sims_lens.plan import SteeringPlan

TOKENS = 40


class Stub:
    """A sampler without a model."""

    def __init__(self) -> None:
        self.count = TokenCount()

    def sample(self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int) -> Iterator[Sample]:
        """See ``Sampler``."""
        for index in range(len(prompts)):
            for draw in range(n):
                tokens = tuple((index + draw + seed + len(plan.interventions) + k) % 49152 for k in range(TOKENS))
                yield Sample(index, draw, tokens, "an answer of some words " * 7, True)


def peak() -> float:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one(count: int) -> dict[str, Any]:
    """A stream of so many prompts, here."""
    sims.stream(Stub(), ["a"], tempfile.mkdtemp(), progress=False)  # whatever is imported late
    before = peak()
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch) / "prompts.jsonl", Path(scratch) / "out"
        with file.open("w") as lines:
            for index in range(count):
                lines.write(
                    json.dumps({"prompt": f"Tell me something about the number {index}, in a few words."}) + "\n"
                )
        start = time.perf_counter()
        done = sims.stream(Stub(), file, out, progress=False)
        wrote = time.perf_counter() - start
        read = sum(1 for _ in sims.read_stream(out))
        seconds = time.perf_counter() - start - wrote
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert done.prompts == done.samples == read == count
    return {
        "prompts": count,
        "shards": done.shards,
        "peak_bytes": peak(),
        "peak_before_bytes": before,
        "seconds": wrote,
        "seconds_to_read": seconds,
        "bytes_on_disk": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one)))
        return
    found = []
    for count in given.sizes:
        ran = subprocess.run(
            [sys.executable, __file__, "--one", str(count)], capture_output=True, text=True, check=True
        )
        found.append(json.loads(ran.stdout))
        row = found[-1]
        print(
            f"{count:>9} prompts: peak {row['peak_bytes'] / 1e6:.0f} MB (before: {row['peak_before_bytes'] / 1e6:.0f})",
            f"{row['seconds']:.1f} s, read back in {row['seconds_to_read']:.1f} s",
            f"{row['bytes_on_disk'] / 1e6:.0f} MB on the disk",
            sep=", ",
            flush=True,
        )
    if given.out:
        about = {
            "date": time.strftime("%F"),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "tokens": TOKENS,
        }
        given.out.write_text(json.dumps({"about": about, "sizes": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
