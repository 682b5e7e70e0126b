"""GGUF control vectors, as llama.cpp reads them (``--control-vector FILE``).

A control vector is a GGUF file whose tensors are called ``direction.N``: float32, one-dimensional, ``d_model`` long.
``direction.N`` is added to the output of block N, counted from 0, at every token. Block 0 can't be steered: llama.cpp
refuses a file with a ``direction.0``.

Reference: llama.cpp, ``common_control_vector_load_one`` (common/common.cpp) stores ``direction.N`` at offset
    ``n_embd * (N - 1)`` and refuses other names, types and shapes; ``llama_adapter_cvec::apply``
    (src/llama-adapter.cpp) reads the vector of block ``il`` from offset ``n_embd * (il - 1)``, so il = N; the graph
    builders add it (``build_cvec``) after the block's last residual addition. It reads no metadata; the keys written
    here are those of its own generator. The file format: ggml, docs/gguf.md.

The format is small and a stranger's file is not to be trusted, so it is read here, with every length checked against
what is left of the file before anything is made of it.
"""

import re
import struct
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import adapt
from sims_lens.errors import ExportError, PlanError
from sims_lens.export.check import TOLERANCE, Exported, block_additions, read_bytes, write_file
from sims_lens.plan import Provenance, SteeringPlan
from sims_lens.scope import ALL

_WHAT = "GGUF control vector"
_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_UINT32, _STRING, _ARRAY, _FLOAT32 = 4, 8, 9, 0
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by type
_MODEL = "sims_lens.model"
_NAME = re.compile(r"direction\.(0|[1-9]\d{0,4})")


def to_gguf(model: Any, plan: SteeringPlan, path: str | Path, *, tolerance: float = TOLERANCE) -> Exported:
    """Write a plan as a control vector for llama.cpp.

    Args:
        model: what the plan is for.
        plan: additions at block outputs from block 1 on, on all tokens; several at one block are summed.
        path: of the file.
        tolerance: largest difference between logits.

    Raises:
        ExportError: the format can't hold the plan, or the file read back isn't the same.
        PlanError: the plan doesn't fit the model.
    """
    adapter = adapt(model)
    architecture = str(getattr(adapter.cfg, "original_architecture", None) or getattr(adapter.cfg, "architecture", ""))
    hint = re.sub(r"(ForCausalLM|LMHeadModel)$", "", architecture).lower()

    def write(held: SteeringPlan, target: Path) -> None:
        vectors = {layer: vector for (layer, _), vector in held.vectors().items()}
        target.write_bytes(_encode(vectors, hint=hint, model_name=adapter.name))

    return write_file(
        model,
        plan,
        path,
        what=_WHAT,
        nearest=partial(block_additions, model, first_layer=1),
        write=write,
        read=from_gguf,
        tolerance=tolerance,
    )


def from_gguf(path: str | Path, *, coefficient: float = 1.0) -> SteeringPlan:
    """Read a control vector, whoever wrote it, as the plan that llama.cpp would carry out: on all tokens.

    Args:
        path: of the file.
        coefficient: what llama.cpp calls its scale.

    Raises:
        ExportError: it is no control vector that llama.cpp would take, or it is damaged.
    """
    data = read_bytes(path, _WHAT)
    try:
        vectors, name = _decode(data)
        width = len(next(iter(vectors.values())))
        return SteeringPlan.addition(
            vectors,
            coefficient=coefficient,
            scope=ALL,
            provenance=Provenance(model=name, d_model=width, source=_WHAT),
        )
    except (ExportError, PlanError) as error:
        raise ExportError(f"{path} is not a {_WHAT} that can be read: {error}") from error


def _encode(vectors: dict[int, Float[Tensor, " d_model"]], *, hint: str, model_name: str) -> bytes:
    """The file's bytes, tensors in the order of their layers."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def entry(key: str, value: str | int) -> bytes:
        if isinstance(value, int):
            return string(key) + struct.pack("<II", _UINT32, value)
        return string(key) + struct.pack("<I", _STRING) + string(value)

    keys: dict[str, str | int] = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": hint,
        "controlvector.layer_count": len(vectors),
        _MODEL: model_name,
    }
    blocks = [vectors[layer].numpy().astype("<f4").tobytes() for layer in sorted(vectors)]
    offsets = [sum(_padded(len(block)) for block in blocks[:index]) for index in range(len(blocks))]
    head = _MAGIC + struct.pack("<IQQ", _VERSION, len(vectors), len(keys))
    head += b"".join(entry(key, value) for key, value in keys.items())
    for layer, offset in zip(sorted(vectors), offsets, strict=True):
        head += string(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(vectors[layer]), _FLOAT32, offset)
    return b"".join(part.ljust(_padded(len(part)), b"\0") for part in (head, *blocks))


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


class _Cursor:
    """Reads on through the bytes; what lies beyond their end is an error, never an allocation."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ExportError(f"it is cut off: {count} bytes wanted at {self.position} of {len(self.data)}")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string(self) -> str:
        text = self.take(self.number("<Q"))
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ExportError(f"a name at byte {self.position - len(text)} is not UTF-8") from error

    def value(self) -> str | int | None:
        """A metadata value: a string, an unsigned number, or None for what isn't needed here."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind == _UINT32:
            return self.number("<I")
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner == _STRING:
                for _ in range(count):  # each takes bytes, so the end of the file ends it
                    self.take(self.number("<Q"))
            else:
                self.take(count * _size(inner))
            return None
        self.take(_size(kind))
        return None


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise ExportError(f"it has a metadata value of unknown type {kind}")
    return _SIZES[kind]


def _decode(data: bytes) -> tuple[dict[int, Float[Tensor, " d_model"]], str]:
    """Vectors by layer, and the model's name where the file says it."""
    cursor = _Cursor(data)
    if cursor.take(4) != _MAGIC:
        raise ExportError("it doesn't begin with 'GGUF'")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ExportError(f"it has GGUF version {version}, not 2 or 3 (a big-endian file is not read either)")
    n_tensors, n_keys = cursor.number("<Q"), cursor.number("<Q")
    keys = {cursor.string(): cursor.value() for _ in range(n_keys)}
    found = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = keys.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ExportError(f"its alignment {alignment!r} is not a power of two")
    start = -(-cursor.position // alignment) * alignment
    vectors = dict(_vectors(data, start, found))
    if not vectors:
        raise ExportError("it has no tensors")
    if len(vectors) != len(found):
        raise ExportError("it has two directions for one block")
    name = keys.get(_MODEL)
    return vectors, name if isinstance(name, str) else ""


def _tensor_info(cursor: _Cursor) -> tuple[int, int, int]:
    """Layer, length and offset of a tensor; the same things are refused as by llama.cpp."""
    name = cursor.string()
    shape = [cursor.number("<Q") for _ in range(min(cursor.number("<I"), 5))]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    matched = _NAME.fullmatch(name)
    if not matched:
        raise ExportError(f"its tensor {name[:60]!r} is not called direction.N")
    if matched[1] == "0":
        raise ExportError("it has a direction.0, which llama.cpp refuses: block 0 can't be steered")
    if kind != _FLOAT32:
        raise ExportError(f"its tensor {name} is of type {kind}, not float32")
    if len(shape) != 1 or shape[0] == 0:
        raise ExportError(f"its tensor {name} has shape {shape}, not [d_model]")
    return int(matched[1]), shape[0], offset


def _vectors(data: bytes, start: int, found: list[tuple[int, int, int]]) -> Iterable[tuple[int, Tensor]]:
    for layer, length, offset in found:
        first = start + offset
        if first + 4 * length > len(data):
            raise ExportError(f"it is cut off: direction.{layer} lies beyond its {len(data)} bytes")
        yield layer, torch.frombuffer(bytearray(data[first : first + 4 * length]), dtype=torch.float32)
