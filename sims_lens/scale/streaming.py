"""Responses to more prompts than fit into memory: prompts are streamed, and what is drawn goes to the disk in shards.

A folder holds ``stream.json``, which says what was asked, and ``shards/``. A shard holds the responses to some prompts
that follow each other; its file is whole or not there, and its name has the shard's number and a key made of its
content: prompts, plan, seed, sampler. What is there is not drawn again, whichever sampler is asked to go on.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from filelock import FileLock, Timeout

from sims_lens.adapter import adapt
from sims_lens.bank import plan_digest
from sims_lens.checks import check_folder, check_integer, check_path, check_seed, shown
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import DamagedError, PromptError, RunError, SamplerError
from sims_lens.files import explained, write_bytes
from sims_lens.hooks import check_plan
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import Chat, iter_prompts
from sims_lens.rankers import CheckedRanker, as_ranker, rank
from sims_lens.rankers.fingerprint import canonical
from sims_lens.sampling import Sampler
from sims_lens.scale.actors import check_rows, drawn_by, read_shard, shard, shard_head
from sims_lens.store import read_json, write_json

FORMAT = "sims_lens.stream"
FORMAT_VERSION = 1
_NAME = re.compile(r"(\d{8})-([0-9a-f]{32})\.jsonl")


@runtime_checkable
class ShardSampler(Protocol):
    """A sampler that works on several shards at once, and takes them as it needs them."""

    def sample_shards(
        self, shards: Iterable[Sequence[str]], *, n: int, plan: SteeringPlan, seed: int
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the number and the samples of each shard of prompts, in any order."""
        ...


@dataclass(frozen=True)
class Streamed:
    """What :func:`stream` did.

    Args:
        path: the folder.
        prompts: there are responses to now.
        samples: responses that are there.
        shards: files that hold them.
        drawn: of the samples, how many were drawn now; the others were there.
    """

    path: Path
    prompts: int
    samples: int
    shards: int
    drawn: int


def stream(
    sampler: Sampler,
    prompts: Iterable[str] | str | Path,
    out: str | Path,
    *,
    n: int = 1,
    plan: SteeringPlan = NOTHING,
    seed: int = 0,
    ranker: object | None = None,
    shard_prompts: int = 256,
    progress: bool = True,
) -> Streamed:
    """Draw responses to any number of prompts, and keep them on the disk: memory does not grow with their number.

    Stopped at any time and started again with the same, it goes on where it was; with other prompts, the shards that
    they change are drawn anew.

    Args:
        sampler: :class:`~sims_lens.LocalSampler`, :class:`~sims_lens.RaySampler`, or any other.
        prompts: a file, as for :func:`sims_lens.prompts.iter_prompts`; or whatever gives texts or rows one by one, such
            as a data set of Hugging Face that is streamed. Prompts that are the same get the same responses.
        out: the folder.
        n: responses to each prompt.
        plan: what steers.
        seed: of the draws.
        ranker: scores the responses, of any shape; None for no scores.
        shard_prompts: prompts in a shard: what is in memory at once, with a few more shards where there are actors.
        progress: show a bar.

    Returns:
        What is there now. :func:`read_stream` reads it.

    Raises:
        PromptError: something is no prompt.
        RankerError: the ranker doesn't tell what its scores depend on.
        RunError: the folder holds something else, another process writes there, or it can't be written to.
        SamplerError: the sampler did not give what it was asked for.

    >>> import tempfile
    >>> class Echo:
    ...     count = None
    ...
    ...     def sample(self, prompts, *, n, plan, seed):
    ...         for index, prompt in enumerate(prompts):
    ...             yield from (Sample(index, k, (1,), prompt.upper(), True) for k in range(n))
    >>> done = stream(Echo(), ["sea", "sky", "sun"], tempfile.mkdtemp(), n=2, shard_prompts=2, progress=False)
    >>> done.samples, done.shards, [sample.text for _, sample in read_stream(done.path)][-1]
    (6, 2, 'SUN')
    """
    if not callable(getattr(sampler, "sample", None)):
        raise SamplerError(f"{shown(sampler)} is no sampler: it has no method sample; give LocalSampler(model), say")
    check_integer("n, the responses to each prompt,", n)
    check_integer("shard_prompts", shard_prompts)
    check_seed(seed)
    check_plan(plan)
    folder = check_folder(out, RunError)
    checked = None if ranker is None else as_ranker(ranker)
    texts = iter_prompts(prompts)
    settings = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "n": n,
        "seed": seed,
        "plan": plan_digest(plan),
        "sampler": _identity(sampler),
        "ranker": "" if checked is None else canonical(checked),  # its settings too: scores are kept
        "shard_prompts": shard_prompts,
    }
    with _ours(folder, settings), Progress(0, show=progress) as bar:
        bar.phase("streaming")
        shards = _Shards(folder / "shards", settings, checked, n)
        todo = shards.missing(_cut(texts, shard_prompts), bar)
        for number, some, samples in _drawn(sampler, todo, n=n, plan=plan, seed=seed):
            shards.keep(number, some, samples)
            bar.advance(len(samples))
        shards.tidy()
    if not shards.prompts:
        raise PromptError("there are no prompts; give at least one")
    return Streamed(folder, shards.prompts, shards.prompts * n, shards.count, shards.drawn)


def read_stream(path: str | Path) -> Iterator[tuple[str, Sample]]:
    """Each prompt with each of its samples, shard by shard, in the order of the prompts; ``sample.prompt`` counts them.

    Args:
        path: the folder that :func:`stream` filled, wholly or in part.

    Raises:
        RunError: there is no such folder.
        DamagedError: a shard is not whole.
    """
    folder = check_path(path, RunError)
    if not (folder / "stream.json").is_file():
        raise RunError(f"{folder} is no folder of sims_lens.stream: it has no stream.json")
    for file in _files(folder / "shards").values():
        yield from _read(file)


class _Shards:
    """The shards of a folder: which are there, and putting others there."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], ranker: CheckedRanker | None, n: int) -> None:
        self.folder, self._ranker, self._n = folder, ranker, n
        self._settings = json.dumps(settings, sort_keys=True)
        self._first: dict[int, int] = {}
        self.prompts = self.count = self.drawn = 0
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._files = _files(folder)

    def missing(self, cut: Iterable[tuple[str, ...]], bar: Progress) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Number and prompts of each shard that isn't there, one by one."""
        for number, prompts in enumerate(cut):
            start, self.prompts, self.count = self.prompts, self.prompts + len(prompts), self.count + 1
            bar.more(len(prompts) * self._n)
            file = self._files.get(number)
            if file is not None and file.name == self._name(number, prompts) and _whole(file):
                bar.advance(len(prompts) * self._n)
                continue
            self._first[number] = start
            yield number, prompts

    def keep(self, number: int, prompts: Sequence[str], samples: Sequence[Sample]) -> None:
        """Score a shard, and put it on the disk."""
        check_rows([(index, draw) for index in range(len(prompts)) for draw in range(self._n)], samples)
        ordered = sorted(samples, key=lambda sample: (sample.prompt, sample.draw))
        if self._ranker is not None:
            ordered = rank(self._ranker, prompts, ordered)
        start, name = self._first.pop(number), self._name(number, prompts)
        rows = ((replace(sample, prompt=start + sample.prompt), None) for sample in ordered)
        about = {"first": start, "prompts": [_content(prompt) for prompt in prompts]}
        with explained(self.folder / name):
            if number in self._files:  # of other prompts, or damaged
                self._files[number].unlink(missing_ok=True)
            write_bytes(self.folder / name, shard(_key(name), rows, about))
        self.drawn += len(samples)

    def tidy(self) -> None:
        """Delete what is beyond the last shard: there were more prompts once."""
        for number, file in self._files.items():
            if number >= self.count:
                file.unlink(missing_ok=True)

    def _name(self, number: int, prompts: Sequence[str]) -> str:
        content = json.dumps([self._settings, [_content(prompt) for prompt in prompts]])
        return f"{number:08}-{hashlib.sha256(content.encode()).hexdigest()[:32]}.jsonl"


def _drawn(
    sampler: Sampler, todo: Iterable[tuple[int, tuple[str, ...]]], *, n: int, plan: SteeringPlan, seed: int
) -> Iterator[tuple[int, tuple[str, ...], list[Sample]]]:
    """Number, prompts and samples of each shard, in the order in which they are finished."""
    if not isinstance(sampler, ShardSampler):
        for number, prompts in todo:
            yield number, prompts, list(sampler.sample(prompts, n=n, plan=plan, seed=seed))
        return
    asked: dict[int, tuple[int, tuple[str, ...]]] = {}

    def shards() -> Iterator[tuple[str, ...]]:
        for place, (number, prompts) in enumerate(todo):
            asked[place] = number, prompts
            yield prompts

    for place, samples in sampler.sample_shards(shards(), n=n, plan=plan, seed=seed):
        yield *asked.pop(place), samples


@contextmanager
def _ours(folder: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """A ``with`` block inside which no other process writes to the folder; it is begun, or holds the same."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "stream.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process writes to {folder}; wait for it, or give another folder") from None
    try:
        file = folder / "stream.json"
        if not file.exists():
            if any(folder.glob("*.json*")):
                raise RunError(f"{folder} holds something else; give another folder")
            write_json(file, settings)
        known = read_json(file)
        if not isinstance(known, dict) or known.get("format") != FORMAT:
            raise RunError(f"{file} is no file of sims_lens.stream; give another folder")
        for name, value in json.loads(json.dumps(settings)).items():  # a tuple is a list in JSON
            if known.get(name) != value:
                raise RunError(
                    f"{folder} was begun with {name} = {shown(known.get(name))}, and {shown(value)} is asked for; give "
                    "another folder, or the same again"
                )
        yield
    finally:
        lock.release()


def _cut(texts: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    texts = iter(texts)
    while some := tuple(islice(texts, size)):
        yield some


def _identity(sampler: Sampler) -> dict[str, Any]:
    """What draws, so that another sampler that draws the same may go on."""
    found: Any = getattr(sampler, "provenance", None)
    if found is None and hasattr(sampler, "model"):
        found = adapt(sampler.model).provenance
    config = getattr(sampler, "config", None)
    return {
        "model": getattr(found, "model", type(sampler).__name__),
        "revision": getattr(found, "revision", ""),
        "sampling": drawn_by(config) if isinstance(config, SamplingConfig) else None,
    }


def _content(prompt: str) -> Any:
    return prompt.turns if isinstance(prompt, Chat) else str(prompt)


def _files(folder: Path) -> dict[int, Path]:
    """The shards that are there, by their numbers, in their order."""
    found = [(match, path) for path in folder.glob("*.jsonl") if (match := _NAME.fullmatch(path.name))]
    return {int(match[1]): path for match, path in sorted(found, key=lambda each: each[1].name)}


def _key(name: str) -> str:
    return name.removesuffix(".jsonl").partition("-")[2]


def _whole(file: Path) -> bool:
    try:
        return bool(read_shard(_bytes(file), str(file), key=_key(file.name)))
    except RunError:
        return False


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {file}: {error.strerror or error}") from error


def _read(file: Path) -> Iterator[tuple[str, Sample]]:
    data = _bytes(file)
    samples = read_shard(data, str(file), key=_key(file.name))
    head = shard_head(data, str(file))
    try:
        prompts, first = [_prompt(each) for each in head["prompts"]], int(head["first"])
        yield from [(prompts[sample.prompt - first], sample) for sample, _ in samples]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{file} is damaged ({type(error).__name__}: {error}); stream again") from error


def _prompt(content: Any) -> str:
    """A prompt from what :func:`_content` made of it."""
    if isinstance(content, str):
        return content
    said = [turn["content"] for turn in content]
    return Chat(said[::2], said[1::2])


__all__ = ["ShardSampler", "Streamed", "read_stream", "stream"]
