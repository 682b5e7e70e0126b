"""Verdicts on disk: a run that goes on never asks twice what it has asked before."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from sims_lens.errors import RankerError
from sims_lens.files import line, parsed
from sims_lens.rankers.base import CheckedRanker, Item, as_ranker
from sims_lens.rankers.fingerprint import canonical

JOURNAL: Final = "verdicts.jsonl"
_CHUNK = 32  # prompts asked before their verdicts are written down
_PATIENCE = 60.0  # seconds to wait for another process that writes


class CachedRanker:
    """A ranker that keeps its verdicts in a folder and answers from there.

    A verdict is filed under a hash of the ranker's name and settings, the prompt and the responses: all responses of
    the group in their order, or, for a ranker whose attribute ``pointwise`` is true, each response for itself. The
    journal is a file that only grows, a line with a checksum for what was asked in one go; each is on the disk before
    :meth:`rank` returns. A line that a crash left unfinished, or that is damaged, is skipped. Several processes may
    share a folder, and several rankers.

    What a ranker's scores depend on is read off its attribute ``settings`` (anything that JSON can hold), each time it
    is asked. Without one, a function counts with its code, default values and what it closes over, an object with its
    attributes and its class's code; what that code calls elsewhere isn't looked into. Where this isn't enough the
    ranker is refused: one that holds a model, say. Give its ``settings`` here. A judge that is steered is refused in
    any case, since its verdicts change with the plan.

    Verdicts that were stored say nothing about how stable the ranker is; ``matrix`` and :meth:`uncached` ask anew.

    Args:
        ranker: a ranker of any shape that :func:`as_ranker` takes.
        folder: where the journal is; made when there is none.
        settings: what the scores depend on, in place of what the ranker says itself.

    Attributes:
        ranker: the ranker that is asked.
        hits: verdicts that were there, so far.
        misses: verdicts that were asked for, so far.

    Raises:
        RankerError: nothing tells what the ranker's scores depend on, or it is steered; or the journal can't be read or
            written.
    """

    def __init__(self, ranker: object, folder: str | Path, *, settings: Any = None) -> None:
        self.ranker = as_ranker(ranker)
        self.path = Path(folder).expanduser() / JOURNAL
        self.hits = self.misses = 0
        self._settings = settings
        if getattr(self.ranker, "steered", False):
            raise RankerError(
                f"the verdicts of {self.name!r} can't be kept, since it judges with the steered model and the plan "
                "changes; leave it uncached, or let the unsteered model judge"
            )
        self._known: dict[str, tuple[float, ...]] = {}
        self._read_to = 0
        try:
            self._identity()
        except RankerError:
            if not hasattr(self.ranker, "bind"):  # one to be bound may not know yet what it depends on
                raise
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RankerError(f"verdicts can't be kept in {self.path.parent}: {error.strerror or error}") from error
        self._catch_up()

    def __repr__(self) -> str:
        return f"<{self.name}, verdicts kept in {self.path.parent}>"

    def __getattr__(self, name: str) -> Any:
        if name not in ("count", "keep", "matrix", "pointwise", "steered"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.ranker, name)

    @property
    def name(self) -> str:
        """The ranker's name."""
        return self.ranker.name

    @property
    def settings(self) -> Any:
        """What the scores depend on, beside the texts."""
        return json.loads(self._identity())[1]

    def uncached(self) -> CheckedRanker:
        """The ranker that is asked: it answers anew each time, as an audit of its stability needs."""
        return self.ranker

    def bind(self, *args: Any, **kwargs: Any) -> "CachedRanker":
        """The same folder for the bound ranker; one that can't be bound stays as it is."""
        bind: Callable[..., object] | None = getattr(self.ranker, "bind", None)
        if bind is None:
            return self
        return CachedRanker(bind(*args, **kwargs), self.path.parent, settings=self._settings)

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score the responses to one prompt, from the journal where it has them.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            One score for each response, as the ranker gave it.

        Raises:
            RankerError: the ranker failed, or the journal can't be read or written.
        """
        return self.rank_all([(prompt, responses)])[0]

    def rank_all(self, items: Sequence[Item]) -> list[tuple[float, ...]]:
        """Score the responses to many prompts, asking the ranker for what the journal doesn't have.

        What is asked is written down every few prompts, so that a failure loses little.

        Args:
            items: pairs of a prompt and the responses to it.

        Returns:
            The scores of each item's responses.

        Raises:
            RankerError: the ranker failed, or the journal can't be read or written.
        """
        self._catch_up()
        identity = self._identity()
        pointwise = bool(getattr(self.ranker, "pointwise", False))
        units = [_units(prompt, responses, pointwise) for prompt, responses in items]
        keys = [[_key(identity, item[0], unit) for unit in group] for item, group in zip(items, units, strict=True)]
        missing: dict[str, tuple[str, tuple[str, ...]]] = {}
        for (prompt, _), group, names in zip(items, units, keys, strict=True):
            for unit, key in zip(group, names, strict=True):
                if key in self._known or key in missing:
                    self.hits += 1
                else:
                    self.misses += 1
                    missing[key] = (prompt, unit)
        self._ask(missing)
        return [tuple(score for key in names for score in self._known[key]) for names in keys]

    def _ask(self, missing: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
        """Ask for the missing verdicts, prompt by prompt or some prompts at a time, and write them down."""
        asked: list[tuple[str, list[str], list[tuple[str, int]]]] = []  # prompt, responses, (key, how many of them)
        for key, (prompt, unit) in missing.items():
            same = asked and asked[-1][0] == prompt and getattr(self.ranker, "pointwise", False)
            if not same:
                asked.append((prompt, [], []))
            asked[-1][1].extend(unit)
            asked[-1][2].append((key, len(unit)))
        step = _CHUNK if callable(getattr(self.ranker.inner, "rank_all", None)) else 1
        for start in range(0, len(asked), step):
            chunk = asked[start : start + step]
            found = self.ranker.rank_all([(prompt, responses) for prompt, responses, _ in chunk])
            verdicts: dict[str, tuple[float, ...]] = {}
            for (_, _, keys), scores in zip(chunk, found, strict=True):
                rest = iter(scores)
                verdicts |= {key: tuple(next(rest) for _ in range(size)) for key, size in keys}
            self._append(verdicts)

    def _identity(self) -> str:
        """The ranker's name and settings as canonical JSON."""
        return canonical(self.ranker) if self._settings is None else canonical(self.ranker, self._settings)

    def _append(self, verdicts: Mapping[str, tuple[float, ...]]) -> None:
        """Add a line to the journal, under a lock, flushed to the disk.

        What was asked in one go stays together: a crash that lost a part of it would have that part asked in another
        batch, with other last bits where a model judges.
        """
        data = line({"ranker": self.name, "verdicts": verdicts})
        try:
            with FileLock(f"{self.path}.lock", timeout=_PATIENCE), self.path.open("a+b") as file:
                end = file.seek(0, os.SEEK_END)
                if end:
                    file.seek(end - 1)
                    if file.read(1) != b"\n":  # a crash left the last line unfinished: it must not swallow ours
                        file.write(b"\n")
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except Timeout as error:
            raise RankerError(
                f"{self.path} has been locked by another process for {_PATIENCE:.0f} s; wait for it, or end it"
            ) from error
        except OSError as error:
            raise RankerError(f"{self.path} can't be written: {error.strerror or error}") from error
        for key, scores in verdicts.items():
            self._known.setdefault(key, scores)

    def _catch_up(self) -> None:
        """Read what was added to the journal since the last time, by whomever."""
        try:
            if not self.path.is_file():
                return
            with self.path.open("rb") as file:
                file.seek(self._read_to)
                data = file.read()
        except OSError as error:
            raise RankerError(f"{self.path} can't be read: {error.strerror or error}") from error
        whole, newline, _ = data.rpartition(b"\n")  # what comes after is being written, or never was to its end
        self._read_to += len(whole) + len(newline)
        for row in whole.split(b"\n"):
            for key, scores in _verdicts(row).items():
                self._known.setdefault(key, scores)


def _units(prompt: str, responses: Sequence[str], pointwise: bool) -> list[tuple[str, ...]]:
    """What has a verdict of its own: each response, or the group."""
    if isinstance(responses, str):
        raise RankerError(f"the responses to {prompt[:60]!r} are a bare string; wrap it in a list")
    if pointwise:
        return [(response,) for response in responses]
    return [tuple(responses)] if responses else []


def _key(identity: str, prompt: str, responses: Sequence[str]) -> str:
    text = json.dumps([identity, prompt, list(responses)])
    return hashlib.sha256(text.encode()).hexdigest()


def _verdicts(data: bytes) -> dict[str, tuple[float, ...]]:
    """What a line of the journal holds; nothing where it is damaged."""
    try:
        row = parsed(data) if not data.startswith(b"{") else json.loads(data)  # an earlier version had no checksums
        found = row["verdicts"] if "verdicts" in row else {row["key"]: row["scores"]}
        return {str(key): tuple(float(score) for score in scores) for key, scores in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {}
