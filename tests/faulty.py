"""A run of the loop on a tiny model, and what can happen to it: killed, cut off, refused by the disk, interrupted.

Each run is a forked process, so that it can be killed without loading torch and a model each time. Beside the run
directory it keeps a diary of what was bought: every question to the ranker (when asked, and when the loop has written
the answer down) and every response (when drawn, and when the loop has come back for the next one).
"""

import errno
import hashlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sims_lens as sims
from sims_lens.data import Sample
from sims_lens.errors import SimsError
from sims_lens.files import Journal
from sims_lens.progress import Progress
from sims_lens.sampling import Drawn, LocalSampler

WORDS = ("sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf", "root", "bird", "fish", "stone", "sand", "ice")
PROMPTS = [f"Say {word}." for word in WORDS]
NOT_COMPARED = ("cost.json", "checksums.jsonl", ".lock")
"""Seconds are never the same twice, nor is the checksum of what holds them."""

DONE, ERROR, INTERRUPTED = 0, 3, 130
"""How a process ends: with a run, with an error that names something, by Ctrl-C. Anything else is a bug."""


def vowels(text: str) -> float:
    return sum(c in "aeiou" for c in text) / (1 + len(text)) + 1e-3 * len(set(text))


_write = os.write  # not the failing one


class Diary:
    """A file of lines, each there as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.unkept: list[str] = []

    def note(self, *words: object) -> None:
        _write(self._descriptor, ("\t".join(map(str, words)) + "\n").encode())


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Oracle:
    """A function of the text, such as a classifier that costs money."""

    name = "vowels"

    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        self._asks(_key(self.name, prompt, list(responses)))
        return [vowels(r) for r in responses]

    def _asks(self, key: str) -> None:
        self.diary.note("asks", key)
        self.diary.unkept.append(key)


class Judge(Oracle):
    """A judge that compares responses with each other; the loop keeps its verdicts, and asks across iterations."""

    name = "judge"
    judges = True
    pointwise = False
    settings = {"version": 1}

    def matrix(self, prompt: str, responses: Sequence[str]) -> Any:
        self._asks(_key("matrix", prompt, list(responses)))
        scores = np.array([vowels(r) for r in responses])
        return 1 / (1 + np.exp(8 * (scores[None, :] - scores[:, None]) - 0.2))


class Second(Oracle):
    name = "length"

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        self._asks(_key(self.name, prompt, list(responses)))
        return [float(len(r)) for r in responses]


class Spy(LocalSampler):
    """Writes down what is drawn."""

    diary: Diary

    def sample(self, prompts: Sequence[str], *, skip: Drawn = (), **asked: Any) -> Iterator[Any]:
        yield from self._noted(prompts, asked, super().sample(prompts, skip=skip, **asked))

    def sample_and_read(self, prompts: Sequence[str], *, skip: Drawn = (), **asked: Any) -> Iterator[Any]:
        yield from self._noted(prompts, asked, super().sample_and_read(prompts, skip=skip, **asked))

    def sample_and_measure(self, prompts: Sequence[str], *, skip: Drawn = (), **asked: Any) -> Iterator[Any]:
        yield from self._noted(prompts, asked, super().sample_and_measure(prompts, skip=skip, **asked))

    def _noted(self, prompts: Sequence[str], asked: dict[str, Any], found: Iterator[Any]) -> Iterator[Any]:
        plan = hashlib.sha256(asked["plan"].to_bytes()).hexdigest()[:8]
        for item in found:
            sample = item if isinstance(item, Sample) else item[0]
            key = _key(prompts[sample.prompt], sample.draw, asked["seed"], plan)
            self.diary.note("draws", key)
            yield item
            self.diary.note("drawn", key)


def config() -> sims.SIMSConfig:
    return sims.SIMSConfig(
        iterations=2,
        sampling=sims.SamplingConfig(responses=3, max_new_tokens=8, top_k=None, batch_rows=16),
        steering=sims.SteeringConfig(layers=(1,), strength=0.3),
        evaluation=sims.EvaluationConfig(samples=2, controls=2),
        contrast=sims.ContrastConfig(memory=2),
        ranking=sims.RankingConfig(audit="report"),
    )


@dataclass
class Trial:
    """Runs of one kind in one folder, and what was bought for them.

    Args:
        model: what is steered.
        folder: for the run and the diary.
        ranker: "oracle" or "judge".
    """

    model: Any
    folder: Path
    ranker: str = "oracle"
    settings: Any = None
    phases: list[tuple[float, str]] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def start(self, *, before: "Callable[[], None] | None" = None) -> int:
        """Begin, or go on, in a process of its own; gives its number. ``before`` is called in it first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child:
            return child
        code = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
        try:
            os.dup2(os.open(self.folder / "errors.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            diary = Diary(self.folder / "diary.txt")
            sampler = Spy(self.model, (self.settings or config()).sampling)
            sampler.diary = diary
            phases = Diary(self.folder / "phases.txt")
            phases.note("start")
            tell = Progress.phase

            def phase(bar: Progress, name: str) -> None:
                phases.note(time.monotonic(), name)
                tell(bar, name)

            append = Journal.append

            def appended(journal: Journal, row: Any) -> None:
                append(journal, row)
                if "answer" in row:
                    for key in diary.unkept:
                        diary.note("kept", key)
                    diary.unkept.clear()

            Progress.phase = phase  # type: ignore[method-assign]
            Journal.append = appended  # type: ignore[method-assign]
            if before is not None:
                before()
            ranker = (Judge if self.ranker == "judge" else Oracle)(diary)
            phases.note(time.monotonic(), "begin")
            sims.improve(
                self.model,
                PROMPTS,
                ranker=ranker,
                evaluator=Second(diary),
                config=self.settings or config(),
                out=self.out,
                sampler=sampler,
                progress=False,
            )
            phases.note(time.monotonic(), "end")
            code = DONE
        except SimsError as error:
            (self.folder / "error.txt").write_text(str(error))
            code = ERROR
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, **how: Any) -> int:
        """:meth:`start`, and wait; gives the exit status, negative where a signal ended it."""
        return ended(self.start(**how))

    def timeline(self) -> list[tuple[float, str]]:
        """When each phase of the last process began, in seconds from its beginning."""
        lines = (self.folder / "phases.txt").read_text().split("start\n")[-1].splitlines()
        rows = [line.split("\t") for line in lines]
        return [(float(at) - float(rows[0][0]), name) for at, name in rows]

    def bought(self) -> tuple[Counter[str], Counter[str]]:
        """What was bought, and how often: questions whose answers were kept, responses that were taken."""
        rows = [line.split("\t") for line in (self.folder / "diary.txt").read_text().splitlines()]
        return Counter(k for what, k in rows if what == "kept"), Counter(k for what, k in rows if what == "drawn")

    def under_way(self) -> tuple[int, int]:
        """Questions whose answers were not kept, responses that the loop had not come back from: what a crash costs."""
        count = Counter(line.split("\t")[0] for line in (self.folder / "diary.txt").read_text().splitlines())
        return count["asks"] - count["kept"], count["draws"] - count["drawn"]

    def files(self) -> dict[str, bytes]:
        """What the run directory holds, all that is to be the same each time."""
        found = {str(p.relative_to(self.out)): p.read_bytes() for p in sorted(self.out.rglob("*")) if p.is_file()}
        return {
            name: b"".join(sorted(data.splitlines(keepends=True))) if name.startswith("verdicts") else _timeless(data)
            for name, data in found.items()
            if not name.endswith(NOT_COMPARED)
        }


def _timeless(data: bytes) -> bytes:
    """Without the seconds and the memory that an audit says it took."""
    return re.sub(rb'"(seconds|peak)": [0-9.e+-]+', b'"\\1": 0', data)


def ended(child: int) -> int:
    """Wait for a process; its exit status, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(trial: Trial, after: float, how: int = signal.SIGKILL) -> int:
    """Let a run go on for some seconds after it has begun, then kill it; gives how it ended."""
    marks = trial.folder / "phases.txt"
    known = marks.stat().st_size if marks.exists() else 0
    child = trial.start()
    while not marks.exists() or b"begin" not in marks.read_bytes()[known:]:
        time.sleep(0.002)
    time.sleep(after)
    os.kill(child, how)
    return ended(child)


def newest(folder: Path) -> Path | None:
    """The file that was written last."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock"]
    return max(found, key=lambda p: p.stat().st_mtime_ns, default=None)


def cut(path: Path, rng: random.Random) -> None:
    """Cut a file off somewhere, as a power cut may."""
    size = path.stat().st_size
    os.truncate(path, rng.randrange(size) if size else 0)


def failing_disk(kind: str, at: int) -> Callable[[], None]:
    """What makes the disk fail from its ``at``-th write on; for :meth:`Trial.start`.

    Args:
        kind: "ENOSPC" from there on, "EIO" once, "short" writes from there on, "short, then ENOSPC", "EIO on sync", or
            "EIO on rename".
        at: counted from 0, among writes, syncs or renames.
    """

    def patch() -> None:
        write, fsync, rename = os.write, os.fsync, os.replace
        count = {"write": 0, "fsync": 0, "rename": 0}

        def counting(what: str, call: Callable[..., Any], fail: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                if what == "write" and args[0] <= 2:
                    return call(*args, **kwargs)
                number = count[what]
                count[what] += 1
                return fail(number, call, *args, **kwargs)

            return counted

        def writing(number: int, call: Callable[..., Any], descriptor: int, data: Any) -> Any:
            if number < at or (kind == "EIO" and number > at):
                return call(descriptor, data)
            if kind == "short":
                return call(descriptor, data[: max(1, len(data) // 3)])
            if kind == "short, then ENOSPC" and number == at:
                return call(descriptor, data[: max(1, len(data) // 3)])
            code = errno.EIO if kind == "EIO" else errno.ENOSPC
            raise OSError(code, os.strerror(code))

        def other(number: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if number == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args, **kwargs)

        if kind == "EIO on sync":
            os.fsync = counting("fsync", fsync, other)
        elif kind == "EIO on rename":
            os.replace = counting("rename", rename, other)
        else:
            os.write = counting("write", write, writing)

    return patch


def failing_ranker(at: int) -> Callable[[], None]:
    """What makes the ranker raise when it is asked for the ``at``-th time; for :meth:`Trial.start`."""

    def patch() -> None:
        count, rank = [0], Oracle.rank

        def failing(self: Oracle, prompt: str, responses: Sequence[str]) -> list[float]:
            count[0] += 1
            if count[0] > at:
                raise ConnectionError("the judge is out of credit")
            return rank(self, prompt, responses)

        Oracle.rank = failing  # type: ignore[method-assign]

    return patch


def failing_memory(at: int) -> Callable[[], None]:
    """What makes the ``at``-th joining of tensors run out of memory, and the next two; for :meth:`Trial.start`."""

    def patch() -> None:
        count, cat = [0], torch.cat

        def failing(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if at <= count[0] < at + 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 GB.")
            return cat(*args, **kwargs)

        torch.cat = failing

    return patch


__all__ = [
    "DONE",
    "ERROR",
    "INTERRUPTED",
    "Trial",
    "cut",
    "ended",
    "failing_disk",
    "failing_memory",
    "failing_ranker",
    "kill",
    "newest",
]
