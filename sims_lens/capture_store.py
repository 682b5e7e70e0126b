"""Activations on disk: one memory-mapped safetensors file, written row by row, never larger than it may be."""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.errors import ConfigError
from sims_lens.typed import read_as

FILE = "tokens.safetensors"
_FORMAT = "sims_lens.tokens"


@dataclass(frozen=True)
class _About:
    layers: tuple[int, ...]
    site: str
    model: str


class StoredTokens(Sequence[Tensor]):
    """What :func:`~sims_lens.activations.capture_tokens` wrote: row k is ``[pos, layer, d_model]``, float32.

    A row is read from the disk where it is used; nothing stays in memory. Changes to it don't reach the file. Any
    safetensors reader opens the file: ``tokens`` is ``[token, layer, d_model]`` with the rows one after another, row k
    from ``starts[k]`` to ``starts[k + 1]``.

    Args:
        path: the file, or the folder that it is in.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        import numpy as np

        path = Path(path)
        self.path = path / FILE if path.is_dir() else path
        try:
            with self.path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > 1 << 20:
                    raise ValueError("its header is too long")
                header = json.loads(file.read(length))
                about = read_as(_About, json.loads(header["__metadata__"][_FORMAT]))
                self._shape = read_as(tuple[int, int, int], header["tokens"]["shape"], "the shape of tokens")
                (rows,) = read_as(tuple[int], header["starts"]["shape"], "the shape of starts")
                size, index = 4 * _product(self._shape), 8 * rows
                self._offset = 8 + length + index
                # all lengths are known now: nothing is asked of the memory that the file does not hold
                if min(*self._shape, rows - 1) < 0 or self.path.stat().st_size != self._offset + size:
                    raise ValueError("its length is not what its header says")
                if [header[name]["data_offsets"] for name in ("starts", "tokens")] != [
                    [0, index],
                    [index, index + size],
                ]:
                    raise ValueError("its parts are not where its header says")
                self._starts = np.frombuffer(file.read(index), dtype="<i8").tolist()
            if self._starts[0] != 0 or self._starts[-1] != self._shape[0] or self._starts != sorted(self._starts):
                raise ValueError("its rows do not follow one another")
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror or error}; check the path") from error
        except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
            raise ConfigError(
                f"{self.path} is not a file of captured tokens ({error!r}); write one with capture_tokens(..., out=)"
            ) from error
        self.layers, self.site, self.model = about.layers, about.site, about.model

    @property
    def nbytes(self) -> int:
        """Of the activations on disk."""
        return 4 * _product(self._shape)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        import numpy as np

        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self._starts[index : index + 2]
        _, *width = self._shape
        if start == end:
            return torch.zeros(0, *width)
        # "c": pages are copied on writing, so that the file stays as it is
        where = self._offset + 4 * start * _product(width)
        return torch.from_numpy(np.memmap(self.path, "<f4", "c", offset=where, shape=(end - start, *width)))

    def __repr__(self) -> str:
        return (
            f"StoredTokens of {self.model}: {len(self)} rows, {self._shape[0]} tokens, {len(self.layers)} layers, "
            f"{self.site}, {_size(self.nbytes)} in {self.path}"
        )


class TokenWriter:
    """Fills the file of a :class:`StoredTokens`. Made by :func:`writing`."""

    def __init__(self, file: Any, offset: int, starts: Sequence[int], width: int) -> None:
        self._file, self._offset, self._starts, self._width = file, offset, starts, width

    def write(self, row: int, tokens: Float[Tensor, "pos layer d_model"]) -> None:
        """Write a row to its place. Plain writes: pages of a map that were written to would stay in memory."""
        self._file.seek(self._offset + 4 * self._starts[row] * self._width)
        self._file.write(tokens.contiguous().numpy().astype("<f4", copy=False).tobytes())


@contextmanager
def writing(
    folder: str | Path,
    counts: Sequence[int],
    *,
    layers: Sequence[int],
    d_model: int,
    limit_bytes: int,
    site: str,
    model: str,
) -> Iterator[TokenWriter]:
    """A file for rows of so many tokens; it has its name once the block has ended well, and else is not there.

    Args:
        folder: made where it is not there.
        counts: tokens of each row.
        layers: of which the activations are.
        d_model: their width.
        limit_bytes: the most that the file may take.
        site: where in each block.
        model: its name.

    Raises:
        ConfigError: it would be larger than that, or than what is free on the disk.
    """
    folder = Path(folder)
    size = 4 * sum(counts) * len(layers) * d_model
    remedy = "capture fewer rows or layers, or tokens of a smaller scope"
    if size > limit_bytes:
        raise ConfigError(
            f"{sum(counts)} tokens at {len(layers)} layers take {_size(size)}, limit_bytes is {_size(limit_bytes)}; "
            f"{remedy}, or raise it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(folder).free):
        raise ConfigError(f"the activations take {_size(size)}, {folder} has {_size(free)} free; {remedy}")
    starts = list(accumulate(counts, initial=0))
    about = json.dumps({"layers": list(layers), "site": site, "model": model}, sort_keys=True)
    index = 8 * len(starts)
    entries: dict[str, Any] = {
        "__metadata__": {_FORMAT: about},
        "starts": {"dtype": "I64", "shape": [len(starts)], "data_offsets": [0, index]},
        "tokens": {
            "dtype": "F32",
            "shape": [starts[-1], len(layers), d_model],
            "data_offsets": [index, index + size],
        },
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path = folder / FILE
    temporary = folder / f".{FILE}.{os.getpid()}.tmp"
    try:
        with temporary.open("w+b") as file:
            file.write(struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(starts)}q", *starts))
            offset = file.tell()
            file.truncate(offset + size)
            yield TokenWriter(file, offset, starts, len(layers) * d_model)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
