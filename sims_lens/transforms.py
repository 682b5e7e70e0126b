"""What is done to the residual stream at a site: pure functions of its value, no model in sight.

A transform returns the *delta* that it wants added, not the new value. So deltas of several transforms compose by
running each on the stream as the ones before it left it, an activation addition is bitwise the vector it was
given, and at strength zero every delta is bitwise nothing. Each costs O(d_model) per token, but for the small angle
net of :class:`HPR`.

With x the stream at a token, û the unit direction and s the strength (a plan's coefficient):

==================  =========================================  =======================================================
transform           x becomes                                  s
==================  =========================================  =======================================================
Addition(v)         x + s v                                    a factor, or in multiples of the residual norm
Ablation(u)         x - s (x·û) û                              1 ablates the direction, less projects it out in part
Amplification(u)    x + s (x·û) û                              1 doubles the projection
Clamp(u, value)     x + s (value - x·û) û                      1 sets the projection to ``value``
Rotation(u)         x turned towards û, its norm kept          the angle in radians
HPR(w, net)         x turned by a learned angle, norm kept     a factor of that angle
Gated(t, u, c)      what ``t`` makes of it where x·û > c       that of ``t``
==================  =========================================  =======================================================

Which transforms act on *projections* depends on where the origin lies: on a model with LayerNorm whose writing weights
TransformerLens has centred, x differs from the unprocessed stream by its mean. A centred direction
(``plan.centred()``) does not see that difference.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu, linear

from sims_lens.checks import check_list, is_number, shown
from sims_lens.errors import PlanError

Stream: TypeAlias = Float[Tensor, "batch pos d_model"]
Strength: TypeAlias = float | Float[Tensor, "_batch _pos 1"]
"""A number, or one per token where the strength decays over generated tokens."""


@runtime_checkable
class Transform(Protocol):
    """The seam for a new way to steer: a name, its tensors, and the delta that it adds.

    One that is a frozen dataclass of tensors and numbers and has a line in :data:`TRANSFORMS` can also be saved.
    """

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the transform, float32, by name: what moves to the model's device."""
        ...

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """What to add to ``stream``, in its dtype. ``tensors`` are those of :meth:`tensors`, on its device."""
        ...


@dataclass(frozen=True, eq=False)
class _Directed(ABC):
    """What the transforms below share: fields that are tensors, and one direction that they act along."""

    kind: ClassVar[str]
    strength_is_length: ClassVar[bool] = False
    """Whether a strength is a distance in the stream, so that it can be counted in residual norms."""
    reads_projection: ClassVar[bool] = True
    """Whether the delta depends on the stream's projection, and so on where the stream has its origin."""

    def tensors(self) -> dict[str, Tensor]:
        """The transform's tensors by name; those of a list are numbered, those of an inner transform prefixed."""
        found: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
            elif isinstance(value, tuple):
                found |= {f"{field.name}.{index}": tensor for index, tensor in enumerate(value)}
            elif isinstance(value, _Directed):
                found |= {f"{field.name}.{name}": tensor for name, tensor in value.tensors().items()}
        return found

    @property
    @abstractmethod
    def direction(self) -> Float[Tensor, " d_model"]:
        """The unit direction that the transform acts along."""

    @abstractmethod
    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """See :meth:`Transform.delta`."""

    @property
    def d_model(self) -> int:
        """Entries of the direction."""
        return int(self.direction.shape[0])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "_Directed":
        """The same transform with ``change`` applied to its direction (or steering vector)."""
        name = "vector" if isinstance(self, Addition) else "axis"
        return replace(self, **{name: change(getattr(self, name))})


@dataclass(frozen=True, eq=False)
class Addition(_Directed):
    """Activation addition: the stream gets ``strength * vector`` at every token in scope.

    Reference: Turner et al. 2023, "Activation Addition" (arXiv 2308.10248).

    Args:
        vector: the steering vector, any finite 1-d float tensor; kept as a float32 copy.

    >>> Addition(torch.ones(3)).delta(torch.zeros(1, 1, 3), {"vector": torch.ones(3)}, 2.0).tolist()
    [[[2.0, 2.0, 2.0]]]
    """

    kind: ClassVar[str] = "addition"
    strength_is_length: ClassVar[bool] = True
    reads_projection: ClassVar[bool] = False
    vector: Float[Tensor, " d_model"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", checked_vector(self.vector, "a steering vector"))

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The steering vector at norm 1.

        Raises:
            PlanError: the vector is zero.
        """
        return unit_direction(self.vector, "a steering vector")

    @property
    def d_model(self) -> int:
        """Entries of the vector, which may be zero."""
        return len(self.vector)

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """``strength * vector``, computed in float32 and cast once."""
        return (strength * tensors["vector"]).to(stream.dtype).expand_as(stream)


@dataclass(frozen=True, eq=False)
class _AlongAxis(_Directed):
    """A transform of the projection on a direction.

    Args:
        axis: the direction, any finite 1-d float tensor but zero; kept at norm 1 in float32.
    """

    axis: Float[Tensor, " d_model"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", unit_direction(self.axis, f"the direction of the {self.kind}"))

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The unit direction."""
        return self.axis


@dataclass(frozen=True, eq=False)
class Ablation(_AlongAxis):
    """Directional ablation: ``x - s (x·û) û``. Strength 1 takes the direction out; 0.5 is a partial projection.

    Reference: Arditi et al. 2024, "Refusal in language models is mediated by a single direction" (arXiv 2406.11717).

    >>> ablate = Ablation(torch.tensor([2.0, 0.0]))
    >>> ablate.delta(torch.tensor([[[3.0, 1.0]]]), ablate.tensors(), 0.5).tolist()
    [[[-1.5, -0.0]]]
    """

    kind: ClassVar[str] = "ablation"

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """``-strength`` times the projection."""
        _, axis, projection = _projected(stream, tensors["axis"])
        return (-strength * projection * axis).to(stream.dtype)


@dataclass(frozen=True, eq=False)
class Amplification(_AlongAxis):
    """Amplify what is there: ``x + s (x·û) û``. Strength 1 doubles the projection, -1 is :class:`Ablation`.

    >>> amplify = Amplification(torch.tensor([1.0, 0.0]))
    >>> amplify.delta(torch.tensor([[[3.0, 1.0]]]), amplify.tensors(), 1.0).tolist()
    [[[3.0, 0.0]]]
    """

    kind: ClassVar[str] = "amplification"

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """``strength`` times the projection."""
        _, axis, projection = _projected(stream, tensors["axis"])
        return (strength * projection * axis).to(stream.dtype)


@dataclass(frozen=True, eq=False)
class Clamp(_AlongAxis):
    """Clamp the projection: ``x + s (value - x·û) û``. Strength 1 sets it to ``value``, less moves it part of the way.

    Args:
        value: of the projection, in absolute units of the stream. A good one is the mean projection of positive
            activations, as ``sims.fit`` reports it; a value of 0 is :class:`Ablation`.

    >>> clamp = Clamp(torch.tensor([1.0, 0.0]), 5.0)
    >>> clamp.delta(torch.tensor([[[3.0, 1.0]]]), clamp.tensors(), 1.0).tolist()
    [[[2.0, 0.0]]]
    """

    kind: ClassVar[str] = "clamp"
    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", _finite(self.value, "the value of a clamp"))

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """``strength`` times the way that is left to ``value``."""
        _, axis, projection = _projected(stream, tensors["axis"])
        return (strength * (self.value - projection) * axis).to(stream.dtype)


@dataclass(frozen=True, eq=False)
class Rotation(_AlongAxis):
    """Turn the stream towards the direction by an angle, in the plane of the two; its norm is kept.

    The strength is the angle in radians; a negative one turns away. A stream nearer to the direction than the angle
    is turned past it, as a rotation does. Where stream and direction are parallel there is no plane, and nothing is
    done.

    Reference: the rotation of HPR (Pham & Nguyen 2024, arXiv 2409.10053) with a given angle and no gate; compare
        Vu & Nguyen 2025, "Angular Steering" (arXiv 2510.26243), who turn within one fixed plane.

    >>> turn = Rotation(torch.tensor([0.0, 1.0]))
    >>> x = torch.tensor([[[2.0, 0.0]]])
    >>> (x + turn.delta(x, turn.tensors(), torch.pi / 2)).round(decimals=5).abs().tolist()
    [[[0.0, 2.0]]]
    """

    kind: ClassVar[str] = "rotation"

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """The rotated stream less the stream."""
        wide, axis, projection = _projected(stream, tensors["axis"])
        angle = torch.as_tensor(strength, dtype=wide.dtype, device=wide.device)
        return _turn(wide, axis, projection, angle).to(stream.dtype)


@dataclass(frozen=True, eq=False)
class HPR(_Directed):
    """Householder pseudo-rotation: a probe says which activations are negative, a small net by how much to turn them.

    Where ``sigmoid(probe·x)`` rounds to 1 the stream is left alone. Elsewhere it is turned towards the probe's side by
    ``strength * gamma(x)`` with ``gamma(x) = pi * sigmoid(MLP(x))``, the MLP with exact GELUs between its layers. The
    published form reflects x about the probe's hyperplane and interpolates between x and its reflection, which is a
    rotation in the plane of x and the probe; this is the same rotation without the reflection: O(d_model) but for the
    net, and no division by the sine of an angle that may be zero. Where x is parallel to the probe, that plane does
    not exist, and x is left alone (the published form gives NaN there and on the hyperplane itself).

    Reference: Pham & Nguyen, "Householder Pseudo-Rotation", EMNLP 2024 (arXiv 2409.10053), and their implementation.
        With a KV cache edits of earlier tokens persist; the official scripts generate without a cache and edit the
        last token only, so earlier positions are recomputed unedited.

    Args:
        probe: the probe's weight, no bias; any finite 1-d float tensor but zero. Its scale sets nothing but p.
        weights: of the angle net's linear layers, first to last; ``[out, in]`` each, from d_model to 1.
        biases: one per weight, ``[out]``.
    """

    kind: ClassVar[str] = "hpr"
    probe: Float[Tensor, " d_model"]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        probe = checked_vector(self.probe, "the probe of an HPR")
        unit_direction(probe, "the probe of an HPR")
        object.__setattr__(self, "probe", probe)
        weights = tuple(check_list("the weights of an HPR", self.weights, "(weight,)", PlanError))
        biases = tuple(check_list("the biases of an HPR", self.biases, "(bias,)", PlanError))
        if not weights or len(weights) != len(biases):
            raise PlanError(f"an HPR needs one bias per weight, got {len(weights)} weights and {len(biases)} biases")
        width = len(probe)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            shapes = list(getattr(weight, "shape", ())), list(getattr(bias, "shape", ()))
            last = index == len(weights) - 1
            if (
                len(shapes[0]) != 2
                or shapes[0][1] != width
                or shapes[1] != shapes[0][:1]
                or (last and shapes[1] != [1])
            ):
                raise PlanError(
                    f"layer {index} of an HPR's angle net has weight {shapes[0]} and bias {shapes[1]}; it needs "
                    f"[{'1' if last else 'out'}, {width}] and [{'1' if last else 'out'}]"
                )
            width = shapes[0][0]
        checked = [checked_tensor(t, "an HPR's angle net") for t in (*weights, *biases)]
        object.__setattr__(self, "weights", tuple(checked[: len(weights)]))
        object.__setattr__(self, "biases", tuple(checked[len(weights) :]))

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The probe at norm 1: normal of the hyperplane, on the positive side."""
        return unit_direction(self.probe, "the probe of an HPR")

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "_Directed":  # noqa: ARG002
        """An HPR has a net beside its direction, so its direction can't be exchanged.

        Raises:
            PlanError: always.
        """
        raise PlanError("an HPR's angle net belongs to its probe: its direction can't be changed; fit it again")

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """The turned stream less the stream, zero where the probe says positive."""
        probe = tensors["probe"].to(torch.promote_types(stream.dtype, torch.float32))
        wide, axis, projection = _projected(stream, probe / probe.norm())
        angle = strength * predicted_angle(
            wide,
            [tensors[f"weights.{k}"].to(wide.dtype) for k in range(len(self.weights))],
            [tensors[f"biases.{k}"].to(wide.dtype) for k in range(len(self.biases))],
        )
        positive = torch.sigmoid(wide @ probe)[..., None].round() == 1
        return torch.where(positive, 0.0, _turn(wide, axis, projection, angle)).to(stream.dtype)


@dataclass(frozen=True, eq=False)
class Gated(_Directed):
    """Conditional steering: another transform, only at tokens whose projection on a second direction is large enough.

    Reference: Lee et al. 2024, "Programming refusal with conditional activation steering" (arXiv 2409.05907), who
        compare a cosine over the whole prompt; this compares the projection of each token, where it is steered.

    Args:
        inner: what is done where the gate is open; not gated itself (compose plans for two conditions).
        axis: the direction of the gate; kept at norm 1.
        threshold: of the projection, in absolute units of the stream.
        above: whether the gate is open above the threshold, or below it.

    >>> gate = Gated(Addition(torch.ones(2)), torch.tensor([1.0, 0.0]), 2.0)
    >>> gate.delta(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]]), gate.tensors(), 1.0).tolist()
    [[[1.0, 1.0], [0.0, 0.0]]]
    """

    kind: ClassVar[str] = "gated"
    inner: _Directed
    axis: Float[Tensor, " d_model"]
    threshold: float
    above: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.inner, _Directed) or isinstance(self.inner, Gated):
            raise PlanError(
                f"the inner transform of a gate must be one that is not gated, got {type(self.inner).__name__}"
            )
        object.__setattr__(self, "axis", unit_direction(self.axis, "the direction of the gate"))
        object.__setattr__(self, "threshold", _finite(self.threshold, "the threshold of a gate"))
        if not isinstance(self.above, bool):
            raise PlanError(f"above must be True or False, got {self.above!r}")
        if len(self.axis) != self.inner.d_model:
            raise PlanError(
                f"the gate's direction has {len(self.axis)} entries, its {self.inner.kind} has {self.inner.d_model}"
            )

    @property
    def strength_is_length(self) -> bool:  # type: ignore[override]
        """As for the inner transform."""
        return self.inner.strength_is_length

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The direction of the inner transform; that of the gate is ``axis``."""
        return self.inner.direction

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "_Directed":
        """The same gate around the inner transform with ``change`` applied to its direction."""
        return replace(self, inner=self.inner.mapped(change))

    def delta(self, stream: Stream, tensors: Mapping[str, Tensor], strength: Strength) -> Stream:
        """The inner delta where the gate is open, zero elsewhere."""
        _, _, projection = _projected(stream, tensors["axis"])
        passed = projection > self.threshold if self.above else projection < self.threshold
        prefix = "inner."
        inner = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return torch.where(passed, self.inner.delta(stream, inner, strength), 0.0)


def predicted_angle(
    stream: Float[Tensor, "*site d_model"],
    weights: "list[Tensor] | tuple[Tensor, ...]",
    biases: "list[Tensor] | tuple[Tensor, ...]",
) -> Float[Tensor, "*site 1"]:
    """gamma(x) = pi * sigmoid(MLP(x)) of :class:`HPR`, in radians."""
    hidden = stream
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = linear(gelu(hidden) if index else hidden, weight, bias)
    return torch.pi * torch.sigmoid(hidden)


def _projected(stream: Tensor, axis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stream and unit axis in at least float32, and the projection as a column."""
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    axis = axis.to(wide.dtype)
    return wide, axis, (wide @ axis)[..., None]


def _turn(wide: Tensor, axis: Tensor, projection: Tensor, angle: Tensor) -> Tensor:
    """``(cos γ - 1) x + sin γ |x| û`` with û the unit part of the axis that is orthogonal to x."""
    tiny = torch.finfo(wide.dtype).tiny
    # A turned stream scales with the stream: at a largest entry of 1 no square overflows or vanishes.
    scale = wide.detach().abs().amax(-1, keepdim=True).clamp(min=tiny)
    wide, projection = wide / scale, projection / scale
    norm = wide.norm(dim=-1, keepdim=True)  # whose gradient at zero is zero, unlike that of a root
    square = (norm * norm).clamp(min=tiny)
    across = axis - projection / square * wide
    # Once more: what rounding has left of x would change the norm where x and the axis are nearly parallel.
    across = across - (across * wide).sum(-1, keepdim=True) / square * wide
    length = across.norm(dim=-1, keepdim=True)
    turned = (angle.cos() - 1) * wide + angle.sin() * norm * (across / length.clamp(min=tiny))
    plane = (norm > 0) & (length > 16 * torch.finfo(wide.dtype).eps)
    return torch.where(plane, scale * turned, 0.0)


def checked_tensor(tensor: Tensor, what: str) -> Tensor:
    """A float32 copy of a finite float tensor on the CPU; gradients flow through the copy.

    Raises:
        PlanError: not a tensor, not a float tensor, or with NaN or infinite entries.
    """
    if not isinstance(tensor, Tensor):
        raise PlanError(f"{what} must be a torch tensor, got {type(tensor).__name__}; use torch.tensor(...)")
    if not tensor.is_floating_point():
        raise PlanError(f"{what} must hold floats, got {tensor.dtype}; use .float()")
    if tensor.is_meta or tensor.layout != torch.strided:
        kept = "the meta device" if tensor.is_meta else str(tensor.layout)
        raise PlanError(f"{what} is a tensor in {kept}, so its values can't be read; give a dense tensor with values")
    copied = tensor.to(dtype=torch.float32, device="cpu", copy=True)
    if not bool(torch.isfinite(copied).all()):  # after the cast: float64 holds what float32 can't
        count = int((~torch.isfinite(copied)).sum())
        raise PlanError(f"{what} has {count} NaN or infinite entries of {tensor.numel()}; fit it again")
    return copied


def checked_vector(vector: Tensor, what: str) -> Float[Tensor, " d_model"]:
    """:func:`checked_tensor` of a vector.

    Raises:
        PlanError: as there; or it is not 1-d, or empty.
    """
    if isinstance(vector, Tensor) and (vector.ndim != 1 or vector.numel() == 0):
        raise PlanError(f"{what} must have shape [d_model], got {list(vector.shape)}")
    return checked_tensor(vector, what)


def unit_direction(vector: Tensor, what: str) -> Float[Tensor, " d_model"]:
    """:func:`checked_vector` at norm 1.

    Raises:
        PlanError: as there; or it is zero.
    """
    vector = checked_vector(vector, what)
    norm = (
        vector.detach().double().norm()
    )  # in float32 the squares of tiny entries vanish and those of huge ones overflow
    if float(norm) == 0.0:
        raise PlanError(f"{what} is zero: it has no direction")
    if abs(float(norm) - 1.0) < 1e-6:  # as it is, so that saving and loading changes no bit
        return vector
    unit: Tensor = (vector.double() / vector.double().norm()).float()
    return unit


def _finite(value: Any, what: str) -> float:
    if not is_number(value):
        raise PlanError(f"{what} must be a finite number, got {shown(value)}")
    return float(value)


# How a saved plan finds its transforms again. A new transform is one class and one line here.
TRANSFORMS: dict[str, type[_Directed]] = {
    t.kind: t for t in (Addition, Ablation, Amplification, Clamp, Rotation, HPR, Gated)
}


def label(transform: Transform) -> str:
    """What a transform is, in a few words: its kind and its numbers.

    >>> label(Clamp(torch.ones(2), 2.5))
    'clamp(value=2.5)'
    """
    shown = []
    for field in fields(transform) if isinstance(transform, _Directed) else ():
        value = getattr(transform, field.name)
        if isinstance(value, _Directed):
            shown.append(label(value))
        elif not isinstance(value, (Tensor, tuple)) and value != field.default:
            shown.append(f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}")
    return f"{transform.kind}({', '.join(shown)})" if shown else transform.kind


def dump(transform: Transform, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A transform as plain data and named tensors; the inverse of :func:`restore`.

    Args:
        transform: of a kind in :data:`TRANSFORMS`.
        prefix: of the tensors' names.

    Raises:
        PlanError: it is of another kind.
    """
    if TRANSFORMS.get(transform.kind) is not type(transform):
        raise PlanError(
            f"a transform of kind {transform.kind!r} ({type(transform).__name__}) can't be saved: add its class to "
            "sims_lens.transforms.TRANSFORMS"
        )
    parameters: dict[str, Any] = {}
    names: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for field in fields(transform):
        value = getattr(transform, field.name)
        key = f"{prefix}.{field.name}"
        if isinstance(value, Tensor):
            names[field.name] = key
            tensors[key] = value
        elif isinstance(value, tuple):
            names[field.name] = [f"{key}.{k}" for k in range(len(value))]
            tensors |= dict(zip(names[field.name], value, strict=True))
        elif isinstance(value, _Directed):
            parameters[field.name], inner = dump(value, key)
            tensors |= inner
        else:
            parameters[field.name] = value
    detached = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    return {"transform": transform.kind, "tensors": names, "parameters": parameters}, detached


def restore(data: Mapping[str, Any], tensors: Mapping[str, Tensor], *, nested: bool = False) -> _Directed:
    """The transform that :func:`dump` described.

    Raises:
        PlanError: the kind is unknown, or a value is not one that it takes.
        KeyError, TypeError: a name or a tensor is missing, or there is one too many.
    """
    kind = data["transform"]
    if kind not in TRANSFORMS:
        raise PlanError(f"transform {kind!r} is not one of {', '.join(TRANSFORMS)}; update sims_lens")
    parts: dict[str, Any] = {
        name: tuple(tensors[key] for key in keys) if isinstance(keys, list) else tensors[keys]
        for name, keys in data["tensors"].items()
    }
    for name, value in data.get("parameters", {}).items():  # absent in version 1
        if isinstance(value, dict):
            if nested:
                raise PlanError(f"a {kind} within a transform can't hold another one")
            parts[name] = restore(value, tensors, nested=True)
        else:
            parts[name] = value
    return TRANSFORMS[kind](**parts)
