"""The run directory: the only place where a run's state lives. Files are whole or absent, never half-written.

::

    run.json                      config, model, ranker, versions; written first
    prompts.jsonl                 every prompt with its split
    base/                         the unsteered model on the held-out and validation prompts
    choice/                       how "auto" picked the layer, on the validation prompts
    iterations/01/                samples.jsonl  pairs.jsonl  vectors.safetensors  plan.safetensors
                                  heldout.jsonl  metrics.json
    controls/                     the norm-matched shuffled-label plans on the held-out prompts

A folder is called ``NAME.partial`` while it is being filled and renamed when it is complete. Each step's result is
a file; a run that goes on reads the steps that are there and computes the rest. Within a step, what arrives one by one
(responses, verdicts) goes into a journal as it arrives. Whatever a step was made from stays until its folder is
complete, so that any one file can be made again from those before it.

Every file's SHA-256 is in its folder's ``checksums.jsonl``, written there before the file gets its name, and compared
each time that the file is read.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from sims_lens import files
from sims_lens.config import SIMSConfig
from sims_lens.cost import Cost
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, DamagedError, RunError
from sims_lens.files import Journal, explained

logger = logging.getLogger("sims_lens")

FORMAT = "sims_lens.run"
FORMAT_VERSION = 2
"""1 had no checksums; such a run opens, and is gone on with, unchecked."""

CHECKSUMS = "checksums.jsonl"
LOCK = "run.lock"
JOURNAL = ".journal"
_OURS = (".json", ".jsonl", ".safetensors")
_MADE_FROM = (f"*{JOURNAL}", "*.responses.jsonl", "*.scored.jsonl", "*.scored.base.jsonl")
"""What a step leaves for the next ones; needed until the folder is complete."""
_FOLDERS = ("audit", "base", "choice", "controls", "compared")

_DAMAGED = "start the same run again: what is missing is computed anew"


class Folder:
    """One folder of a run: steps are computed once and read back after that.

    Args:
        path: where it is once it is complete.
    """

    def __init__(self, path: Path) -> None:
        self.final = path
        self.partial = path.with_name(path.name + ".partial")

    @property
    def complete(self) -> bool:
        """Whether every step of it is there."""
        return self.final.is_dir()

    @property
    def path(self) -> Path:
        """Where its files are now."""
        return self.final if self.complete else self.partial

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).is_file()

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole, its checksum first.

        Raises:
            RunError: it can't be written there; what was there stays.
        """
        path = self.path
        with explained(path / name):
            older = [] if self.has(CHECKSUMS) else self._ours()  # in a run that had no checksums
            with Journal(path / CHECKSUMS).open() as checksums:
                for file in older:
                    checksums.append({"file": file.name, "sha256": hashlib.sha256(_read(file)).hexdigest()})
                checksums.append({"file": name, "sha256": hashlib.sha256(data).hexdigest()})
            files.write_bytes(path / name, data)

    def read(self, name: str) -> bytes:
        """What a file holds.

        Raises:
            RunError: the file is missing.
            DamagedError: it isn't what was written.
        """
        data = _read(self.path / name)
        known = self._checksums()
        if known is not None and hashlib.sha256(data).hexdigest() not in known.get(name, ()):
            raise DamagedError(f"{self.path / name} is damaged (it is not what was written); {_DAMAGED}")
        return data

    def samples(self, name: str, make: Callable[[], Iterable[Sample]]) -> list[Sample]:
        """The samples in ``NAME.jsonl``, drawn by ``make`` where the file is not there yet."""
        if not self.has(f"{name}.jsonl"):
            self.write_samples(name, make())
        return self.read_samples(name)

    def write_samples(self, name: str, samples: Iterable[Sample]) -> None:
        """Write ``NAME.jsonl``."""
        self.write_rows(name, (asdict(sample) for sample in samples))

    def read_samples(self, name: str) -> list[Sample]:
        """The samples in ``NAME.jsonl``.

        Raises:
            RunError: the file is missing or damaged.
        """
        return [sample_from(row, self.path / f"{name}.jsonl") for row in self.read_rows(name)]

    def write_rows(self, name: str, rows: Iterable[Any]) -> None:
        """Write ``NAME.jsonl``, one JSON value per line."""
        self.write(f"{name}.jsonl", _jsonl(rows))

    def read_rows(self, name: str) -> list[Any]:
        """What ``NAME.jsonl`` holds.

        Raises:
            RunError: the file is missing or damaged.
        """
        return _parsed_lines(self.read(f"{name}.jsonl"), self.path / f"{name}.jsonl")

    def tensors(
        self, name: str, make: Callable[[], Mapping[str, Tensor]], about: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The tensors in ``NAME.safetensors``, computed by ``make`` where the file is not there yet.

        Args:
            name: of the file.
            make: computes them.
            about: where they came from, kept in the file's metadata as JSON under "sims_lens.run".
        """
        if not self.has(f"{name}.safetensors"):
            self.write_tensors(name, make(), about)
        return self.read_tensors(name)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
        """Write ``NAME.safetensors``; see :meth:`tensors`."""
        self.write(f"{name}.safetensors", _tensor_bytes(tensors, about))

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """What ``NAME.safetensors`` holds.

        Raises:
            RunError: the file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        data = self.read(f"{name}.safetensors")
        try:
            return load(data)
        except SafetensorError as error:
            raise DamagedError(f"{self.path / name}.safetensors is damaged ({error}); {_DAMAGED}") from error

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``NAME.json`` holds, computed by ``make`` where the file is not there yet."""
        if not self.has(f"{name}.json"):
            self.write(f"{name}.json", _json(make()))
        return self.read_json(name)

    def read_json(self, name: str) -> Any:
        """What ``NAME.json`` holds.

        Raises:
            RunError: the file is missing or damaged.
        """
        return _parsed(self.read(f"{name}.json"), self.path / f"{name}.json")

    def journal(self, name: str) -> Journal:
        """A journal of what arrives one by one."""
        return Journal(self.path / f"{name}{JOURNAL}")

    def spend(self, phase: str, cost: Cost) -> None:
        """Add to ``cost.json`` what a phase took, so that it is known after an interruption too."""
        costs = self.costs()
        costs[phase] = costs.get(phase, Cost()) + cost
        self.write("cost.json", _json({name: spent.to_json() for name, spent in costs.items()}))

    def costs(self) -> dict[str, Cost]:
        """What the phases took so far."""
        if not self.has("cost.json"):
            return {}
        return {name: Cost.from_json(spent) for name, spent in self.read_json("cost").items()}

    def finish(self) -> None:
        """Every step is there: the folder gets its name, and what steps were made from goes."""
        with explained(self.final):
            if not self.complete:
                self._compact()
                self.partial.replace(self.final)
                files.sync_folder(self.final.parent)
            self.tidy()

    def tidy(self) -> None:
        """Delete what steps were made from, in a complete folder."""
        for path in self._superfluous():
            path.unlink(missing_ok=True)

    def damaged(self) -> list[str]:
        """Names of files that are not what was written."""
        known = self._checksums()
        if known is None:
            return []
        return [p.name for p in self._ours() if hashlib.sha256(_read(p)).hexdigest() not in known.get(p.name, ())]

    def _checksums(self) -> dict[str, set[str]] | None:
        """Digests that each file may have: two where a crash came before the file got its name. None in an old run."""
        path = self.path / CHECKSUMS
        if not path.is_file():
            return None
        known: dict[str, set[str]] = {}
        for row in Journal(path).rows():
            try:
                known.setdefault(str(row["file"]), set()).add(str(row["sha256"]))
            except (KeyError, TypeError) as error:
                raise DamagedError(f"{path} is damaged (a line of it is {row!r:.80}); {_DAMAGED}") from error
        return known

    def _ours(self) -> list[Path]:
        return sorted(p for p in self.path.glob("*") if p.suffix in _OURS and p.name != CHECKSUMS)

    def _compact(self) -> None:
        """One checksum for each file that stays."""
        known = self._checksums()
        if known is None:
            return
        going = {path.name for path in self._superfluous()}
        digests = {
            name: hashlib.sha256(self.read(name)).hexdigest() for name in sorted({*known} - going) if self.has(name)
        }
        rows = [files.line({"file": name, "sha256": digest}) for name, digest in digests.items()]
        files.write_bytes(self.path / CHECKSUMS, b"".join(rows))

    def _superfluous(self) -> list[Path]:
        made_from = [path for pattern in _MADE_FROM for path in self.path.glob(pattern)]
        fitted = [self.path / "readings.safetensors"] if self.has("vectors.safetensors") else []
        return [path for path in made_from + fitted if path.is_file()]


_FIGURES = ("score", "independent", "nll", "kl", "kl_95")


def sample_from(row: Any, where: Path) -> Sample:
    """The sample that a row describes.

    Raises:
        DamagedError: it describes none; ``where`` is the file to be named.
    """
    try:
        return Sample(
            prompt=int(row["prompt"]),
            draw=int(row["draw"]),
            tokens=tuple(int(t) for t in row["tokens"]),
            text=str(row["text"]),
            ended=bool(row["ended"]),
            **{k: None if row.get(k) is None else float(row[k]) for k in _FIGURES},
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DamagedError(f"{where} is damaged ({type(error).__name__}: {error}); {_DAMAGED}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, and its folder where there is none.

    Raises:
        RunError: it can't be written there; what was there stays.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, sorted and indented."""
    write_bytes(path, _json(value))


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: the file is missing or damaged.
    """
    return _parsed(_read(path), path, "delete the file and start the same again")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _jsonl(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()


def _tensor_bytes(tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None) -> bytes:
    from safetensors.torch import save

    metadata = {FORMAT: json.dumps(dict(about), sort_keys=True)} if about else None
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error


def _parsed(data: bytes, path: Path, remedy: str = _DAMAGED) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}); {remedy}") from error


def _parsed_lines(data: bytes, path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in data.decode("utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}); {_DAMAGED}") from error


class RunStore:
    """A run directory.

    Args:
        path: the folder; made when it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "run.json").is_file()

    @property
    def root(self) -> Folder:
        """Its own files."""
        return Folder(self.path)

    def folder(self, name: str) -> Folder:
        """One of its folders, complete or not.

        Raises:
            RunError: it is a link that leads elsewhere.
        """
        found = Folder(self.path / name)
        for path in (found.final, found.partial):
            if not path.resolve().is_relative_to(self.path.resolve()):
                raise RunError(f"{path} is a link that leads out of the run folder; put its files in its place")
        return found

    def iteration(self, index: int) -> Folder:
        """The folder of an iteration, counted from 1."""
        return self.folder(f"iterations/{index:02d}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A ``with`` block inside which no other process writes here. The lock goes with the process that holds it.

        Raises:
            RunError: another process holds it, or the folder can't be written to.
        """
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise OSError(errno.EACCES, "Permission denied")
            lock = FileLock(self.path / LOCK, timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise RunError(
                    f"{self.path} is being written by another process; wait for it, end it, or choose another folder"
                ) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def stopped(self) -> str:
        """Why the run ended before its last iteration; "" where it has not."""
        return str(self._stopped()["reason"]) if self.root.has("stopped.json") else ""

    def ends_before(self, iteration: int) -> bool:
        """Whether the run stopped, and an iteration is not to come."""
        if not self.stopped:
            return False
        after = self._stopped().get("after")  # an earlier version did not write it
        return not self.iteration(iteration).complete if after is None else iteration > int(after)

    def _stopped(self) -> dict[str, Any]:
        found = self.root.read_json("stopped")
        if not isinstance(found, dict) or not isinstance(found.get("reason"), str):
            raise DamagedError(f"{self.path / 'stopped.json'} is damaged; {_DAMAGED}")
        return found

    def stop(self, reason: str, *, after: int) -> None:
        """Write down why no iteration is to come after one."""
        if not self.stopped:
            self.root.write("stopped.json", _json({"reason": reason, "after": after}))

    def begin(self, header: Mapping[str, Any], prompts: Iterable[Mapping[str, Any]]) -> None:
        """Start a run here, or make sure that the one here is the same and undamaged.

        What is damaged is set aside or deleted, so that it is computed anew, and the log names it.

        Raises:
            RunError: the folder holds another run, or something else; or a damaged file can't be made again.
        """
        header = {"format": FORMAT, "version": FORMAT_VERSION, **header}
        written = {"prompts.jsonl": _jsonl(dict(row) for row in prompts), "run.json": _json(header)}
        known, fresh = self.root._checksums(), not self.exists
        if fresh:
            begun = (LOCK, CHECKSUMS, "prompts.jsonl")
            there = list(self.path.iterdir()) if self.path.is_dir() else []
            if any(p.name not in begun and p.suffix != files.TEMPORARY for p in there) or (
                self.path.exists() and not self.path.is_dir()
            ):
                raise RunError(f"{self.path} exists and holds no run; choose another folder")
            with explained(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        for name in set(self.root.damaged()) & {*written, "stopped.json"}:  # what else is here is the user's own
            if name in written and _read(self.path / name) == written[name]:  # it is its checksum that was lost
                self.root.write(name, written[name])
                continue
            again = hashlib.sha256(written.get(name, b"")).hexdigest()
            if known is not None and name in written and again not in known.get(name, ()):
                raise DamagedError(f"{self.path / name} is damaged; put a copy back, or start anew in another folder")
            logger.warning("%s was damaged; it is written anew", self.path / name)
            (self.path / name).unlink()
        for name, data in written.items():
            if not self.root.has(name):
                if known is None and self.exists:
                    raise RunError(f"{self.path / name} is missing; put a copy back, or start anew in another folder")
                self.root.write(name, data)
        if fresh:
            return
        self._compare(header, json.loads(json.dumps(_parsed_lines(written["prompts.jsonl"], self.path))))
        self._mend()

    def _compare(self, header: Mapping[str, Any], prompts: list[Any]) -> None:
        """Raise unless the run here is the same."""
        found = self.header()
        for key in ("config", "model", "ranker", "evaluator"):
            old, new = found.get(key), json.loads(json.dumps(header[key]))
            if key == "config" and isinstance(old, dict) and old != new:
                old = _filled(old)
            if old != new:
                raise RunError(
                    f"{self.path} holds a run with another {key}: {_difference(old, header[key])}; "
                    "use the same one to go on with it, or another folder"
                )
        if self.root.read_rows("prompts") != prompts:
            raise RunError(f"{self.path} holds a run on other prompts; use the same ones to go on, or another folder")

    def _mend(self) -> None:
        """Set aside what is damaged, and delete what a crash left half-written."""
        for path in self.path.rglob(f".*{files.TEMPORARY}"):
            path.unlink(missing_ok=True)
        for folder in self.folders():
            if folder.complete:
                folder.tidy()
            if not folder.has(CHECKSUMS):
                if self.header()["version"] > 1 and any(p.suffix in _OURS for p in folder.path.iterdir()):
                    _set_aside(folder.path, CHECKSUMS)
                continue
            for name in folder.damaged():
                if folder.complete and name != "cost.json":
                    _set_aside(folder.path, name)
                    break
                logger.warning("%s was damaged; it is computed anew", folder.path / name)
                (folder.path / name).unlink()

    def folders(self) -> list[Folder]:
        """Its folders that are there, complete or not."""
        named = [self.folder(name) for name in _FOLDERS]
        turns = self.path / "iterations"
        named += [self.iteration(i) for i in range(1, 1 + len(list(turns.glob("*"))))]
        return [folder for folder in named if folder.path.is_dir()]

    def header(self) -> dict[str, Any]:
        """What ``run.json`` holds.

        Raises:
            RunError: there is no run here, or one of a newer version.
        """
        if not self.exists:
            raise RunError(f"there is no run at {self.path}; a run folder holds a run.json")
        header = self.root.read_json("run")
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise RunError(f"{self.path / 'run.json'} is not of a sims_lens run")
        if not isinstance(header.get("version"), int) or header["version"] > FORMAT_VERSION:
            raise RunError(f"{self.path} was written by a newer sims_lens (format {header.get('version')}); update it")
        return header


def _set_aside(path: Path, name: str) -> None:
    """Give a folder another name, so that it is computed anew and nothing of it is lost."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    logger.warning("%s was damaged; its folder is computed anew, the old one is now called %s", path / name, aside.name)


def _filled(config: Mapping[str, Any]) -> Any:
    """A config of an earlier version, with the defaults of what it didn't know."""
    try:
        return SIMSConfig.from_json(config).to_json()
    except (ConfigError, TypeError):
        return config


def _difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != json.loads(json.dumps(new.get(key))):
                return _difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return f"{where} = {old!r} there, {new!r} here" if where else f"{old!r} there, {new!r} here"
