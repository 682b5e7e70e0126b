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
a file; a run that goes on reads the steps that are there and computes the rest.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sims_lens.cost import Cost
from sims_lens.data import Sample
from sims_lens.errors import RunError

FORMAT = "sims_lens.run"
FORMAT_VERSION = 1

_DAMAGED = "delete the folder that it is in and start the same again: what is missing is computed anew"


class Folder:
    """One folder of a run: steps are computed once and read back after that."""

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

    def samples(self, name: str, make: Callable[[], Iterable[Sample]]) -> list[Sample]:
        """The samples in ``NAME.jsonl``, drawn by ``make`` where the file is not there yet."""
        file = self.path / f"{name}.jsonl"
        if not file.is_file():
            write_jsonl(file, [asdict(sample) for sample in make()])
        return self.read_samples(name)

    def read_samples(self, name: str) -> list[Sample]:
        """The samples in ``NAME.jsonl``.

        Raises:
            RunError: the file is missing or damaged.
        """
        file = self.path / f"{name}.jsonl"
        return [_sample(row, file) for row in read_jsonl(file)]

    def tensors(
        self, name: str, make: Callable[[], Mapping[str, Tensor]], about: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """The tensors in ``NAME.safetensors``, computed by ``make`` where the file is not there yet.

        Args:
            name: of the file.
            make: computes them.
            about: where they came from, kept in the file's metadata as JSON under "sims_lens.run".
        """
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            write_tensors(file, make(), about)
        return read_tensors(file)

    def json(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``NAME.json`` holds, computed by ``make`` where the file is not there yet."""
        file = self.path / f"{name}.json"
        if not file.is_file():
            write_json(file, make())
        return read_json(file)

    def remove(self, name: str) -> None:
        """Delete a file that a later step has made superfluous."""
        (self.path / name).unlink(missing_ok=True)

    def spend(self, phase: str, cost: Cost) -> None:
        """Add to ``cost.json`` what a phase took, so that it is known after an interruption too."""
        costs = self.costs()
        costs[phase] = costs.get(phase, Cost()) + cost
        write_json(self.path / "cost.json", {name: spent.to_json() for name, spent in costs.items()})

    def costs(self) -> dict[str, Cost]:
        """What the phases took so far."""
        file = self.path / "cost.json"
        return {name: Cost.from_json(spent) for name, spent in read_json(file).items()} if file.is_file() else {}

    def finish(self) -> None:
        """Every step is there: the folder gets its name."""
        if not self.complete:
            self.partial.replace(self.final)


_FIGURES = ("score", "independent", "nll", "kl", "kl_95")


def _sample(row: Any, file: Path) -> Sample:
    try:
        return Sample(
            prompt=int(row["prompt"]),
            draw=int(row["draw"]),
            tokens=tuple(int(t) for t in row["tokens"]),
            text=str(row["text"]),
            ended=bool(row["ended"]),
            **{k: None if row.get(k) is None else float(row[k]) for k in _FIGURES},
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{file} is damaged ({type(error).__name__}: {error}); delete the file and resume") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: beside its place first, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, sorted and indented."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "replace"))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line."""
    lines = [json.dumps(row, ensure_ascii=True) for row in rows]
    write_bytes(path, "".join(line + "\n" for line in lines).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file, with ``about`` in its metadata."""
    from safetensors.torch import save

    metadata = {FORMAT: json.dumps(dict(about), sort_keys=True)} if about else None
    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata))


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); {_DAMAGED}") from error


def read_jsonl(path: Path) -> list[Any]:
    """Read one JSON value per line.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); {_DAMAGED}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"cannot read {path} ({error}); {_DAMAGED}") from error


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

    @property
    def stopped(self) -> str:
        """Why the run ended before its last iteration; "" where it has not."""
        file = self.path / "stopped.json"
        return str(read_json(file)["reason"]) if file.is_file() else ""

    def stop(self, reason: str) -> None:
        """Write down why no further iteration is to come."""
        if not self.stopped:
            write_json(self.path / "stopped.json", {"reason": reason})

    def begin(self, header: Mapping[str, Any], prompts: Iterable[Mapping[str, Any]]) -> None:
        """Start a run here, or make sure that the one here is the same.

        Raises:
            RunError: the folder holds another run, or something else.
        """
        header = {"format": FORMAT, "version": FORMAT_VERSION, **header}
        prompt_rows = [dict(row) for row in prompts]
        if not self.exists:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise RunError(f"{self.path} exists and holds no run; choose another folder")
            write_jsonl(self.path / "prompts.jsonl", prompt_rows)
            write_json(self.path / "run.json", header)
            return
        found = self.header()
        for key in ("config", "model", "ranker", "evaluator"):
            if (old := found.get(key)) != json.loads(json.dumps(header[key])):
                raise RunError(
                    f"{self.path} holds a run with another {key}: {_difference(old, header[key])}; "
                    "use the same one to go on with it, or another folder"
                )
        if read_jsonl(self.path / "prompts.jsonl") != json.loads(json.dumps(prompt_rows)):
            raise RunError(f"{self.path} holds a run on other prompts; use the same ones to go on, or another folder")

    def header(self) -> dict[str, Any]:
        """What ``run.json`` holds.

        Raises:
            RunError: there is no run here, or one of a newer version.
        """
        if not self.exists:
            raise RunError(f"there is no run at {self.path}; a run folder holds a run.json")
        header = read_json(self.path / "run.json")
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise RunError(f"{self.path / 'run.json'} is not of a sims_lens run")
        if not isinstance(header.get("version"), int) or header["version"] > FORMAT_VERSION:
            raise RunError(f"{self.path} was written by a newer sims_lens (format {header.get('version')}); update it")
        return header


def _difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != json.loads(json.dumps(new.get(key))):
                return _difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return f"{where} = {old!r} there, {new!r} here" if where else f"{old!r} there, {new!r} here"
