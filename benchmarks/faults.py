"""What happens to a run of the loop when it is killed, cut off, refused by the disk, or interrupted.

`python benchmarks/faults.py` runs the loop on a tiny model of Llama's architecture some hundred times, each in a
process of its own, and does something bad to each, at a random instant or at a random write; then the same command
goes on, and what is there at the end is compared, byte for byte, with a run that nothing happened to. Counted is also
what was bought twice: questions that the ranker had answered, responses that the loop had taken.

Twenty minutes on one core. `--embedded N` adds N kills of runs of the embedded model, half a minute each.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402
from faulty import (  # noqa: E402
    DONE,
    ERROR,
    INTERRUPTED,
    Trial,
    cut,
    failing_disk,
    failing_memory,
    failing_ranker,
    kill,
    newest,
)

import sims_lens as sims  # noqa: E402

DISK = ("ENOSPC", "EIO", "short", "short, then ENOSPC", "EIO on sync", "EIO on rename")


@dataclass
class Found:
    """What became of one run.

    Args:
        what: was done to it.
        where: in which phases, or at which write.
        same: whether it ended with the same bytes as a run that nothing happened to.
        twice: questions that had been answered and responses that had been taken, bought again.
        under_way: of both, those that were under way when it happened: these are bought again, nobody has seen them.
        damaged: files that were complete and are not what they were.
        bad: how the process ended, where not as it should have.
    """

    what: str
    where: list[str]
    same: bool
    twice: int
    under_way: int
    damaged: int = 0
    bad: str = ""


class Harness:
    """Runs that nothing happened to, to compare with."""

    def __init__(self, model, folder: Path, settings=None) -> None:
        self.model, self.folder, self.settings = model, folder, settings
        self.whole: dict[str, Trial] = {}
        for ranker in ("oracle", "judge"):
            trial = self.trial(f"whole-{ranker}", ranker)
            status = trial.run()
            if status != DONE:
                raise SystemExit(f"the run that nothing happens to ended with {status}: {said(trial)}")
            self.whole[ranker] = trial
        self.files = {ranker: trial.files() for ranker, trial in self.whole.items()}

    def trial(self, name: str, ranker: str) -> Trial:
        """A run that has not begun."""
        return Trial(self.model, self.folder / name, ranker, self.settings)

    def instant(self, ranker: str, rng: random.Random) -> tuple[float, str]:
        """Seconds from the beginning, and the phase that is then: every phase is as likely, however short it is."""
        line = self.whole[ranker].timeline()
        place = rng.randrange(len(line) - 1)
        return rng.uniform(line[place][0], line[place + 1][0]), line[place][1]

    def verdict(self, trial: Trial, what: str, where: list[str], **more) -> Found:
        """Go on to the end, and compare."""
        status = trial.run()
        bad = "" if status == DONE else f"went on and ended with {status}: {said(trial)}"
        there = trial.files() if status == DONE else {}
        answered, drawn = trial.bought()
        whole_answered, whole_drawn = self.whole[trial.ranker].bought()
        twice = sum((answered - whole_answered).values()) + sum((drawn - whole_drawn).values())
        found = Found(what, where, there == self.files[trial.ranker], twice, sum(trial.under_way()), bad=bad, **more)
        if found.same and not found.bad:
            shutil.rmtree(trial.folder)
        return found

    def broken(self, trial: Trial) -> int:
        """Files that are there under their names and are not what they are to be."""
        found = trial.files() if trial.out.exists() else {}
        wanted = self.files[trial.ranker]
        ours = {name.replace(".partial/", "/"): data for name, data in found.items() if not name.endswith(".journal")}
        return sum(name in wanted and data != wanted[name] for name, data in ours.items() if "verdicts" not in name)


def said(trial: Trial) -> str:
    """What a process left to be read."""
    return " / ".join(
        (trial.folder / f).read_text()[-800:] for f in ("error.txt", "errors.txt") if (trial.folder / f).exists()
    )


def killed(
    harness: Harness, number: int, rng: random.Random, *, how: int = signal.SIGKILL, truncate: bool = False
) -> Found:
    """Killed one to three times at random instants; where asked, the file written last is cut off each time."""
    trial = harness.trial(f"{'cut' if truncate else 'kill'}-{how}-{number}", ("oracle", "judge")[number % 2])
    phases, bad = [], ""
    for _ in range(rng.choice((1, 1, 2, 3))):
        after, _ = harness.instant(trial.ranker, rng)
        status = kill(trial, after, how)
        if status == DONE:  # it was quicker this time
            break
        phases.append(trial.timeline()[-1][1])
        if status != -how and not (how == signal.SIGINT and status == INTERRUPTED):
            bad = f"ended with {status}: {said(trial)}"
        if truncate and (last := newest(trial.out)) is not None:
            cut(last, rng)
            phases[-1] += f", {last.name} cut off"
    what = {signal.SIGKILL: "killed", signal.SIGINT: "Ctrl-C"}[how] if not truncate else "killed and cut off"
    found = harness.verdict(trial, what, phases)
    if truncate:  # what was cut off is bought again, and has to be
        found.under_way, found.twice = found.under_way + found.twice, 0
    return Found(**asdict(found) | {"bad": found.bad or bad})


def refused(harness: Harness, number: int, rng: random.Random, writes: int) -> Found:
    """The disk fails at a random write, sync or rename."""
    kind = DISK[number % len(DISK)]
    at = rng.randrange(writes if "on" not in kind else writes // 4)
    trial = harness.trial(f"disk-{number}", ("oracle", "judge")[number // len(DISK) % 2])
    status = trial.run(before=failing_disk(kind, at))
    text = said(trial)
    bad = "" if status in (DONE, ERROR) else f"ended with {status}: {text}"
    if status == ERROR and not ("cannot write" in text or "can't be written" in text):
        bad = f"said {text}"
    damaged = harness.broken(trial)
    found = harness.verdict(trial, f"disk: {kind}", [f"at {at}"], damaged=damaged)
    return Found(**asdict(found) | {"bad": found.bad or bad})


def failed(harness: Harness, number: int, rng: random.Random, kind: str) -> Found:
    """The ranker raises from some question on, or memory runs out for a while."""
    trial = harness.trial(f"{kind}-{number}", ("oracle", "judge")[number % 2])
    at = rng.randrange(90) if kind == "ranker raises" else rng.randrange(1, 4000)
    status = trial.run(before=(failing_ranker if kind == "ranker raises" else failing_memory)(at))
    text = said(trial)
    bad = "" if status in (DONE, ERROR) or "can't allocate memory" in text else f"ended with {status}: {text}"
    if status == ERROR and "out of credit" not in text:
        bad = f"said {text}"
    damaged = harness.broken(trial)
    found = harness.verdict(trial, kind, [f"at {at}"], damaged=damaged)
    return Found(**asdict(found) | {"bad": found.bad or bad})


def rotten(harness: Harness, number: int, rng: random.Random) -> Found:
    """A byte of a finished run changes; the same command finds the file and makes only its folder anew."""
    trial = harness.trial(f"rot-{number}", ("oracle", "judge")[number % 2])
    shutil.copytree(harness.whole[trial.ranker].folder, trial.folder)
    paths = [p for p in trial.out.rglob("*") if p.is_file() and not p.name.endswith((".lock", "verdicts.jsonl"))]
    path = rng.choice(sorted(p for p in paths if p.stat().st_size))
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    (trial.folder / "diary.txt").unlink()
    name = str(path.relative_to(trial.out))
    status = trial.run()
    there = {n: d for n, d in trial.files().items() if ".damaged/" not in n} if status == DONE else {}
    told = path.name in said(trial)
    bad = "" if status == DONE and (told or path.name == "checksums.jsonl") else f"{status}, {name}: {said(trial)}"
    drawn = trial.bought()[1]
    return Found("a byte changed", [name], there == harness.files[trial.ranker], 0, sum(drawn.values()), bad=bad)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="runs that are killed, one to three times each")
    parser.add_argument("--cuts", type=int, default=50, help="runs that are killed, and the last write cut off")
    parser.add_argument("--interrupts", type=int, default=25)
    parser.add_argument("--disk", type=int, default=60, help="runs whose disk fails")
    parser.add_argument("--raises", type=int, default=25, help="runs whose ranker raises")
    parser.add_argument("--memory", type=int, default=25, help="runs that are out of memory for a while")
    parser.add_argument("--rot", type=int, default=50, help="finished runs in which a byte changes")
    parser.add_argument("--embedded", type=int, default=0, help="kills of runs of the embedded model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="draw where runs were killed, .png; needs kaleido and a Chromium")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/faults.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a process that has started threads can't be forked
    rng, found, start = random.Random(asked.seed), [], time.time()
    with tempfile.TemporaryDirectory(prefix="sims-faults-") as folder:
        model = sims.load(str(tiny.write("llama", Path(folder) / "small")), kind="bridge")
        harness = Harness(model, Path(folder))
        probe = harness.trial("probe", "oracle")
        counter = Path(folder) / "writes"
        probe.run(before=counted_writes(counter))
        writes = len(counter.read_bytes())
        jobs = [lambda i=i: killed(harness, i, rng) for i in range(asked.kills)]
        jobs += [lambda i=i: killed(harness, i, rng, truncate=True) for i in range(asked.cuts)]
        jobs += [lambda i=i: killed(harness, i, rng, how=signal.SIGINT) for i in range(asked.interrupts)]
        jobs += [lambda i=i: refused(harness, i, rng, writes) for i in range(asked.disk)]
        jobs += [lambda i=i: failed(harness, i, rng, "ranker raises") for i in range(asked.raises)]
        jobs += [lambda i=i: failed(harness, i, rng, "out of memory") for i in range(asked.memory)]
        jobs += [lambda i=i: rotten(harness, i, rng) for i in range(asked.rot)]
        for number, job in enumerate(jobs, start=1):
            found.append(job())
            if not found[-1].same or found[-1].bad or found[-1].twice or found[-1].damaged:
                print(found[-1], flush=True)
            if number % 25 == 0:
                print(f"{number} of {len(jobs)}, {time.time() - start:.0f} s", flush=True)
        if asked.embedded:
            found += on_embedded(Path(folder) / "embedded", asked.embedded, rng)
    rows = summary(found)
    print_rows(rows)
    kills = Counter(phase_kind(p) for f in found if f.what.startswith("killed") for p in f.where)
    data = {
        "command": "python benchmarks/faults.py" + (f" --embedded {asked.embedded}" if asked.embedded else ""),
        "seconds": round(time.time() - start),
        "rows": rows,
        "kills_by_phase": dict(kills.most_common()),
        "failures": [asdict(f) for f in found if not f.same or f.bad or f.twice or f.damaged],
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(data, indent=1) + "\n")
    if asked.figure:
        drawn(data).write_image(asked.figure, scale=2)


def drawn(data: dict):
    """How many kills fell into each kind of phase, as bars."""
    import plotly.graph_objects as go

    kinds = data["kills_by_phase"]
    rows = [row for row in data["rows"] if row["what"].startswith("killed")]
    runs, same = sum(row["runs"] for row in rows), sum(row["same"] for row in rows)
    bars = go.Bar(x=list(kinds.values()), y=list(kinds), orientation="h", text=list(kinds.values()), cliponaxis=False)
    figure = go.Figure(bars.update(textposition="outside", marker_color="#3b6fb6"))
    return figure.update_layout(
        title=f"{sum(kinds.values())} kills in {runs} runs: {same} ended with the same bytes",
        xaxis_title="kills, by what the run was doing",
        yaxis={"autorange": "reversed"},
        template="simple_white",
        width=800,
        height=330,
        margin={"l": 120, "r": 40, "t": 60, "b": 50},
    )


def on_embedded(folder: Path, count: int, rng: random.Random) -> list[Found]:
    """Kills of runs of a real model."""
    settings = sims.SIMSConfig(
        iterations=2,
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=16),
        steering=sims.SteeringConfig(layers=(17,)),
        evaluation=sims.EvaluationConfig(samples=2, controls=2, validation=0.0),
        ranking=sims.RankingConfig(audit="report"),
    )
    harness = Harness(sims.load("embedded"), folder, settings)
    found = []
    for i in range(count):
        found.append(killed(harness, i, rng))
        found[-1].what = "killed, embedded model"
        print(found[-1], flush=True)
    return found


def counted_writes(path: Path):
    """Lets a process count what it writes: a byte in a file for each."""

    def patch() -> None:
        import os

        write, log = os.write, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def counted(descriptor, data):
            if descriptor > 2:
                write(log, b".")
            return write(descriptor, data)

        os.write = counted

    return patch


def phase_kind(phase: str) -> str:
    """A phase without its number and names."""
    for kind, words in {
        "auditing": ("audit", "again about"),
        "sampling": ("sampling",),
        "ranking": ("ranking with", "judging with", "of all iterations"),
        "side effects": ("perplexity",),
        "capture and fit": ("reading",),
    }.items():
        if any(word in phase for word in words):
            return kind
    return "opening"


def summary(found: list[Found]) -> list[dict]:
    """A row for each kind of trouble."""
    rows = []
    for what in dict.fromkeys(f.what.split(":")[0] for f in found):
        some = [f for f in found if f.what.split(":")[0] == what]
        rows.append(
            {
                "what": what,
                "runs": len(some),
                "times": sum(len(f.where) for f in some),
                "same": sum(f.same for f in some),
                "bought twice": sum(f.twice for f in some),
                "under way": sum(f.under_way for f in some) if what != "a byte changed" else None,
                "complete files damaged": sum(f.damaged for f in some),
                "ended badly": sum(bool(f.bad) for f in some),
            }
        )
    return rows


def print_rows(rows: list[dict]) -> None:
    """As a table."""
    import pandas as pd

    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
