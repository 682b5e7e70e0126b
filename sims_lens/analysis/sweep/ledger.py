"""What is kept of a sweep while it goes."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from sims_lens.analysis.sweep.result import FIGURES, LayerSweep
from sims_lens.data import Sample
from sims_lens.errors import DamagedError, RunError
from sims_lens.plan import SteeringPlan
from sims_lens.store import Folder, read_json, write_json
from sims_lens.typed import read_as

_FORMAT, _VERSION = "sims_lens.sweep", 1
_SAVE_SECONDS = 5.0


class Ledger:
    """The folder of a sweep: its settings, its directions, and the figures of each lot of units as they come.

    ::

        sweep.json                what was asked for; written first
        directions.safetensors    what is done at each direction, site and layer, with the residual norms
        figures/00-000.json       round and lot: for each cell, for each unit, its figures
        unsteered.partial/        generation mode: the unsteered responses
        result.json               :class:`LayerSweep`

    Args:
        path: the folder; None keeps nothing.
        settings: what the figures depend on.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self._name: tuple[int, int] | None = None
        self._held: dict[int, list[list[float]]] = {}
        self._changed, self._saved = False, time.monotonic()
        if path is None:
            return
        header = path / "sweep.json"
        if not header.is_file():
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise RunError(f"{path} exists and holds no sweep; choose another folder")
            write_json(header, {"format": _FORMAT, "version": _VERSION, "settings": settings})
            return
        found = read_json(header)
        if not isinstance(found, dict) or found.get("format") != _FORMAT or found.get("version") != _VERSION:
            raise RunError(f"{header} is not of a sweep that this sims_lens reads; choose another folder")
        there = read_as(dict[str, Any], found.get("settings", {}), f"settings in {header}")
        for key in sorted({*there, *settings}):
            if there.get(key) != settings.get(key):
                raise RunError(f"{path} holds a sweep with other {key}; use the same to go on, or another folder")

    def steering(self, make: Callable[[], SteeringPlan], plan: SteeringPlan) -> SteeringPlan:
        """The plan with its residual norms, which are measured once and read back after that."""
        if self.path is None:
            return make()
        file = self.path / "directions.safetensors"
        if not file.is_file():
            make().save(file)
        norms = [i.residual_norm for i in SteeringPlan.load(file).interventions]
        both = zip(plan.interventions, norms, strict=True)
        return replace(plan, interventions=tuple(replace(i, residual_norm=norm) for i, norm in both))

    def samples(self, chunk: tuple[int, ...], make: Callable[[], list[Sample]]) -> list[Sample]:
        """The unsteered responses to some prompts."""
        if self.path is None:
            return make()
        return Folder(self.path / "unsteered").samples(f"from-{chunk[0]:04d}", make)

    def read(self, name: tuple[int, int], count: int) -> dict[int, Float[np.ndarray, "unit figure"]]:
        """The figures that are there for a lot of ``count`` units, by cell."""
        self._name, self._held = name, {}
        file = self._file()
        if file is not None and file.is_file():
            try:
                self._held = {int(cell): values for cell, values in read_json(file).items()}
                found = {cell: np.array(values, dtype=float) for cell, values in self._held.items()}
                if any(values.shape != (count, len(FIGURES)) for values in found.values()):
                    raise ValueError(f"a cell has no {count} units")
            except (AttributeError, TypeError, ValueError, OverflowError) as error:
                if isinstance(error, RunError):
                    raise
                raise DamagedError(f"{file} is damaged ({error}); delete it and go on") from error
            return found
        return {}

    def add(self, cell: int, values: Float[np.ndarray, "unit figure"]) -> None:
        """Keep a cell's figures of the lot that was read last; on disk within some seconds."""
        if self.path is None:
            return
        self._held[cell] = values.tolist()
        self._changed = True
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has come since the last time."""
        file = self._file()
        if file is not None and self._changed:
            write_json(file, {str(cell): values for cell, values in self._held.items()})
            self._changed, self._saved = False, time.monotonic()

    def finish(self, sweep: LayerSweep) -> None:
        """Keep the result."""
        if self.path is not None:
            write_json(self.path / "result.json", sweep.to_json())

    def _file(self) -> Path | None:
        if self.path is None or self._name is None:
            return None
        level, index = self._name
        return self.path / "figures" / f"{level:02d}-{index:03d}.json"


__all__ = ["Ledger"]
