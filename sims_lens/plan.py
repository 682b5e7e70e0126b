"""The steering plan: which transform, at which site, how strongly, on which tokens, and where it came from.

A plan is the one currency of the package: the loop makes it, :func:`sims_lens.steering` applies it, analyses read
it. It is frozen, it knows no model, and it travels as one safetensors file that loads nothing executable.
"""

import hashlib
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.checks import check_kind, check_list, check_path, is_number, one_line, shown
from sims_lens.errors import PlanError
from sims_lens.files import write_bytes
from sims_lens.scope import GENERATION, TokenScope
from sims_lens.sites import check_site, hook_name
from sims_lens.transforms import Addition, Transform, checked_vector, dump, label, restore

Units = Literal["absolute", "residual_norm"]

FORMAT = "sims_lens.plan"
FORMAT_VERSION = 2
"""1: additions only. 2: every transform of :mod:`sims_lens.transforms`, ``half_life``, ``centred``, ``config``, and a
checksum of the tensors, ``sha256``."""

_ENTRIES = frozenset(["layer", "site", "transform", "tensors", "coefficient", "units", "scope", "residual_norm"])
"""What a saved intervention consists of since version 1; 2 adds ``parameters`` and ``half_life``."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a plan's tensors may be in a file. :meth:`SteeringPlan.save` writes float32."""

_CENTRED = 1e-5
"""A unit direction counts as centred when its entries' mean, times the root of their number, is below this."""


@dataclass(frozen=True)
class Provenance:
    """Where a plan came from. Empty strings and zeros mean "not known", and are not checked.

    Args:
        model: the model's name, as ``sims_lens.load`` gave it or as its config has it.
        revision: hub revision, or the checksum of the embedded model.
        weight_processing: what TransformerLens did to the weights ("none", "folded", ...).
        n_layers, d_model: the shape that the plan needs.
        source: what made the plan, in words, for instance "improve, iteration 3, config 5f2c".
        config: digest of the settings that made it, see ``SIMSConfig.digest``.

    Raises:
        PlanError: a value is not of its type, or a number is negative.
    """

    model: str = ""
    revision: str = ""
    weight_processing: str = ""
    n_layers: int = 0
    d_model: int = 0
    source: str = ""
    config: str = ""

    def __post_init__(self) -> None:
        for name in ("model", "revision", "weight_processing", "source", "config"):
            if not isinstance(value := getattr(self, name), str):
                raise PlanError(f"{name} of a provenance must be a string, got {value!r}; leave it out if not known")
        for name in ("n_layers", "d_model"):
            if type(value := getattr(self, name)) is not int or value < 0:
                raise PlanError(f"{name} of a provenance must be an integer from 0 up, got {value!r}; 0 is not known")


@dataclass(frozen=True)
class Intervention:
    """One transform at one site.

    Args:
        layer: the block, counted from 0.
        site: one of ``resid_pre``, ``resid_post``, ``attn_out``, ``mlp_out``.
        transform: what to do there.
        coefficient: how strongly, in ``units``.
        units: ``"absolute"`` takes the coefficient as the transform's strength; ``"residual_norm"`` multiplies it by
            the median norm of the residual stream at that site (first position left out). The latter needs a transform
            whose strength is a length, an activation addition, and there a unit vector.
        scope: which tokens.
        residual_norm: that median, where it is known; otherwise it is measured when the plan is attached.
        half_life: generated tokens after which the strength has fallen by half: the n-th one gets
            ``2 ** (-n / half_life)`` of it, the prompt all of it. None for no decay.
    """

    layer: int
    site: str
    transform: Transform
    coefficient: float | int
    units: str = "absolute"
    scope: TokenScope = GENERATION
    residual_norm: float | None = None
    half_life: float | int | None = None

    def __post_init__(self) -> None:
        check_site(self.site)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise PlanError(f"layer must be an integer from 0 up, got {self.layer!r}")
        if self.units not in get_args(Units):
            raise PlanError(f"units {self.units!r} is not one of {', '.join(get_args(Units))}")
        if isinstance(self.coefficient, bool) or not isinstance(self.coefficient, (int, float)):
            raise PlanError(f"coefficient must be a number, got {shown(self.coefficient)}")
        if not is_number(self.coefficient):
            raise PlanError(f"coefficient must be finite, got {shown(self.coefficient)}")
        norm = self.residual_norm
        if norm is not None and not (is_number(norm) and norm > 0):
            raise PlanError(f"residual_norm must be a positive number, got {norm!r}")
        if self.units == "residual_norm" and not getattr(self.transform, "strength_is_length", True):
            raise PlanError(
                f"the strength of a {label(self.transform)} is no length, so it has no residual_norm units; "
                "use units='absolute'"
            )
        life = self.half_life
        if life is not None and not (is_number(life) and life > 0):
            raise PlanError(f"half_life must be a positive number of generated tokens, got {shown(life)}")

    @property
    def strength(self) -> float:
        """What the transform is multiplied by, in absolute units.

        Raises:
            PlanError: units are ``residual_norm`` and the norm has not been measured yet.
        """
        if self.units == "absolute":
            return float(self.coefficient)
        if self.residual_norm is None:
            raise PlanError(
                f"the residual norm at {hook_name(self.layer, self.site)} is not known yet; "
                "attach the plan, or call sims_lens.resolve(model, plan)"
            )
        return float(self.coefficient) * self.residual_norm

    def describe(self) -> str:
        """One line: hook point, transform, coefficient with its unit, scope, decay."""
        if self.units == "absolute":
            amount = f"{self.coefficient:+g}"
        elif self.residual_norm is None:
            amount = f"{self.coefficient:+g} x residual norm"
        else:
            amount = f"{self.coefficient:+g} x residual norm ({self.residual_norm:.4g})"
        decay = "" if self.half_life is None else f", half as strong after {self.half_life:g} generated tokens"
        return f"{hook_name(self.layer, self.site)}  {label(self.transform)}  {amount}  on {self.scope.name}{decay}"


@dataclass(frozen=True)
class SteeringPlan:
    """Interventions in the order in which they act. Two at one site compose: the second sees what the first did.

    >>> import torch
    >>> plan = SteeringPlan.addition({1: torch.ones(4)}, coefficient=2.0)
    >>> plan
    SteeringPlan with 1 intervention
      blocks.1.hook_resid_post  addition  +2  on generation
    >>> (plan + plan).layers
    (1,)
    """

    interventions: tuple[Intervention, ...]
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        given = check_list("interventions", self.interventions, "(Intervention(...),)", PlanError)
        for each in given:
            check_kind("what a plan holds", each, Intervention, "see SteeringPlan.addition({layer: vector})", PlanError)
        object.__setattr__(self, "interventions", tuple(given))

    @classmethod
    def addition(
        cls,
        vectors: Mapping[int, Float[Tensor, " d_model"]],
        *,
        coefficient: float | int = 1.0,
        units: str = "absolute",
        site: str = "resid_post",
        scope: TokenScope | str = GENERATION,
        residual_norms: Mapping[int, float] | None = None,
        provenance: Provenance | None = None,
    ) -> "SteeringPlan":
        """Activation addition by hand: a vector per layer.

        Args:
            vectors: steering vector of each layer, ``[d_model]``.
            coefficient: in ``units``. ``"absolute"`` adds ``coefficient * vector``; ``"residual_norm"`` adds
                ``coefficient * (median residual norm at the site) * vector / |vector|``, so that 0.2 means the same
                thing in every layer and model.
            units: ``"absolute"`` or ``"residual_norm"``.
            site: where in the block.
            scope: which tokens, a :class:`TokenScope` or its name.
            residual_norms: the median norm of each layer, where known; measured on attaching otherwise.
            provenance: where the vectors came from.

        Raises:
            PlanError: no vectors, a vector that is not finite and 1-d, vectors of different sizes, a zero vector in
                units of the residual norm, an unknown site, unit or scope.
        """
        if not isinstance(vectors, Mapping) or not vectors:
            raise PlanError(f"vectors must map layers to tensors, for instance {{14: vector}}; got {shown(vectors)}")
        _check_keys(vectors)
        known = residual_norms or {}
        interventions = []
        for layer in sorted(vectors):
            vector = checked_vector(vectors[layer], f"the vector of layer {layer}")
            if units == "residual_norm":
                norm = vector.norm()
                if float(norm) == 0.0:
                    raise PlanError(f"the vector of layer {layer} is zero: it has no direction to scale")
                vector = vector / norm
            interventions.append(
                Intervention(
                    layer=layer,
                    site=site,
                    transform=Addition(vector),
                    coefficient=coefficient,
                    units=units,
                    scope=TokenScope.of(scope),
                    residual_norm=known.get(layer),
                )
            )
        sizes = {int(v.shape[0]) for v in vectors.values()}
        if len(sizes) > 1:
            raise PlanError(f"vectors of one plan must have one size, got {sorted(sizes)}")
        return cls(tuple(interventions), provenance or Provenance())

    @classmethod
    def of(
        cls,
        transforms: Mapping[int, Transform],
        *,
        coefficient: float | int = 1.0,
        site: str = "resid_post",
        scope: TokenScope | str = GENERATION,
        half_life: float | int | None = None,
        provenance: Provenance | None = None,
    ) -> "SteeringPlan":
        """Any transform per layer, for instance ``SteeringPlan.of({14: sims.Ablation(direction)})``.

        Args:
            transforms: what to do at each layer.
            coefficient: the strength, in the transform's own terms (:mod:`sims_lens.transforms`).
            site: where in the block.
            scope: which tokens.
            half_life: see :class:`Intervention`.
            provenance: where the directions came from.

        Raises:
            PlanError: no transforms, or an unknown site or scope.
        """
        if not isinstance(transforms, Mapping) or not transforms:
            raise PlanError(
                f"transforms must map layers to transforms, as {{14: Ablation(v)}}; got {shown(transforms)}"
            )
        _check_keys(transforms)
        for each in transforms.values():
            if not isinstance(each, Transform):
                raise PlanError(f"a transform is for instance sims_lens.Ablation(v), got {shown(each)}")
        made = [
            Intervention(layer, site, transforms[layer], coefficient, scope=TokenScope.of(scope), half_life=half_life)
            for layer in sorted(transforms)
        ]
        return cls(tuple(made), provenance or Provenance())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are steered, ascending."""
        return tuple(sorted({i.layer for i in self.interventions}))

    def __add__(self, other: "SteeringPlan") -> "SteeringPlan":
        if not isinstance(other, SteeringPlan):
            return NotImplemented
        provenance = self.provenance
        if self.provenance != other.provenance:
            if self.provenance.model and other.provenance.model and self.provenance.model != other.provenance.model:
                raise PlanError(
                    f"plans for {self.provenance.model!r} and {other.provenance.model!r} can't be composed; "
                    "use plan.unbound() on one if you know that they fit one model"
                )
            provenance = replace(
                self.provenance if self.provenance.model else other.provenance,
                source=" + ".join(s for s in (self.provenance.source, other.provenance.source) if s),
            )
        return SteeringPlan(self.interventions + other.interventions, provenance)

    def __sub__(self, other: "SteeringPlan") -> "SteeringPlan":
        return self + -other if isinstance(other, SteeringPlan) else NotImplemented

    def __neg__(self) -> "SteeringPlan":
        return self.scaled(-1.0)

    def __mul__(self, factor: float | int) -> "SteeringPlan":
        return self.scaled(factor) if isinstance(factor, (int, float)) else NotImplemented

    __rmul__ = __mul__

    def scaled(self, factor: float | int) -> "SteeringPlan":
        """The same plan with every coefficient multiplied by ``factor``; ``factor * plan`` is the same."""
        if not is_number(factor):
            raise PlanError(f"a factor must be a finite number, got {shown(factor)}")
        return self._each(lambda i: replace(i, coefficient=factor * i.coefficient))

    def on(self, scope: TokenScope | str) -> "SteeringPlan":
        """The same plan on other tokens."""
        chosen = TokenScope.of(scope)
        return self._each(lambda i: replace(i, scope=chosen))

    def decaying(self, half_life: float | int | None) -> "SteeringPlan":
        """The same plan with a strength that halves every ``half_life`` generated tokens; None for no decay."""
        return self._each(lambda i: replace(i, half_life=half_life))

    def using(self, transform: Callable[[Tensor], Transform], coefficient: float | int = 1.0) -> "SteeringPlan":
        """Another transform along the same directions, at the same sites and tokens.

        Args:
            transform: makes one of a unit direction: ``sims.Ablation``, ``sims.Rotation``, or
                ``lambda direction: sims.Clamp(direction, 4.0)``.
            coefficient: its strength. For ``sims.Addition`` that is the norm of what is added.

        Raises:
            PlanError: a transform of this plan has no direction.
        """
        if not callable(transform):
            raise PlanError(
                f"transform must make a transform of a direction, as sims.Ablation does; got {shown(transform, 40)}"
            )
        return self._each(
            lambda i: replace(
                i, transform=transform(_direction(i)), coefficient=coefficient, units="absolute", residual_norm=None
            )
        )

    def centred(self) -> "SteeringPlan":
        """The same plan with the mean of each direction's entries taken off.

        On a model with LayerNorm the stream's mean is never read, and TransformerLens' weight processing removes it;
        a centred direction means the same with and without.
        """
        return self._each(lambda i: _mapped(i, lambda vector: vector - vector.mean()))

    @property
    def is_centred(self) -> bool:
        """Whether every direction has mean zero; a transform of one's own that has no direction has none that has."""

        def raw(i: Intervention) -> object:
            return i.transform.vector if isinstance(i.transform, Addition) else getattr(i.transform, "direction", None)

        vectors = [v.detach() if isinstance(v := raw(i), Tensor) else None for i in self.interventions]
        return all(
            v is not None and abs(float(v.mean())) * math.sqrt(len(v)) <= _CENTRED * float(v.norm()) for v in vectors
        )

    def orthogonal_to(self, other: "SteeringPlan") -> "SteeringPlan":
        """This plan without what its directions share with those of ``other`` at the same layer and site.

        An addition keeps what is left of its vector, so it becomes weaker by the share that it loses; the direction of
        any other transform is taken at norm 1 again. Directions of ``other`` that overlap are orthonormalised first.

        Raises:
            PlanError: nothing is left of a direction, or a transform has none.
        """
        check_kind("the other plan", other, SteeringPlan, "see SteeringPlan.addition({layer: vector})", PlanError)
        _check_shapes(SteeringPlan(self.interventions + other.interventions))
        shared: dict[tuple[int, str], list[Tensor]] = {}
        for i in other.interventions:
            shared.setdefault((i.layer, i.site), []).append(_direction(i).double())

        def without(i: Intervention) -> Intervention:
            found = shared.get((i.layer, i.site))
            if not found:
                return i
            basis, values, _ = torch.linalg.svd(torch.stack(found, dim=1), full_matrices=False)
            basis = basis[:, values > 1e-6 * values[0]]

            def project(vector: Tensor) -> Tensor:
                left = vector.double() - basis @ (basis.T @ vector.double())
                if float(left.norm()) < 1e-5 * float(vector.norm()):
                    raise PlanError(f"nothing is left of {i.describe()}: the other plan has the same direction there")
                remaining: Tensor = left.float()
                return remaining

            return _mapped(i, project)

        return self._each(without)

    def _each(self, change: Callable[[Intervention], Intervention]) -> "SteeringPlan":
        return replace(self, interventions=tuple(change(i) for i in self.interventions))

    def restrict(self, layers: Iterable[int]) -> "SteeringPlan":
        """Only the interventions at these layers.

        Raises:
            PlanError: the plan has none there.
        """
        chosen = tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, (str, bytes)) else None
        if chosen is None or not all(isinstance(layer, int) for layer in chosen):
            raise PlanError(f"layers must be a list of them, such as {list(self.layers)}, got {shown(layers)}")
        wanted = set(chosen)
        if missing := wanted - set(self.layers):
            raise PlanError(f"the plan does not steer layers {sorted(missing)}; it steers {list(self.layers)}")
        return replace(self, interventions=tuple(i for i in self.interventions if i.layer in wanted))

    def unbound(self) -> "SteeringPlan":
        """The same interventions without a provenance: only shapes are checked when they are attached."""
        return SteeringPlan(self.interventions)

    def vectors(self) -> dict[tuple[int, str], Float[Tensor, " d_model"]]:
        """What the plan's additions add up to at each (layer, site), in absolute units, float32.

        Raises:
            PlanError: a transform is not an addition, or a residual norm is not known yet.
        """
        total: dict[tuple[int, str], Tensor] = {}
        for i in self.interventions:
            if not isinstance(i.transform, Addition):
                raise PlanError(f"{i.describe()} is not an addition: it has no one vector")
            where = (i.layer, i.site)
            delta = i.strength * i.transform.vector
            total[where] = total[where] + delta if where in total else delta
        return total

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file. It is written beside ``path`` first, so a crash leaves the old file whole.

        Raises:
            PlanError: the folder is missing, a transform can't be saved, or the interventions don't fit one model.
            OSError: the disk is full, or the folder may not be written to.
        """
        path = check_path(path, PlanError)
        if not path.parent.is_dir():
            raise PlanError(f"folder {path.parent} does not exist; create it first")
        if path.is_dir():
            raise PlanError(f"{path} is a folder; name a file, for instance {path / 'plan.safetensors'}")
        write_bytes(path, self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """What :meth:`save` writes: a safetensors file.

        Raises:
            PlanError: a transform can't be saved, or the interventions don't fit one model.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        described = []
        for index, i in enumerate(self.interventions):
            what, named = dump(i.transform, str(index))
            tensors |= named
            described.append(
                {
                    **what,
                    "layer": i.layer,
                    "site": i.site,
                    "coefficient": i.coefficient,
                    "units": i.units,
                    "scope": i.scope.to_json(),
                    "residual_norm": i.residual_norm,
                    "half_life": i.half_life,
                }
            )
        _check_shapes(self)
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "centred": self.is_centred,
            "provenance": asdict(self.provenance),
            "interventions": described,
            "sha256": _digest(tensors),
        }
        return save(tensors, {FORMAT: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "SteeringPlan":
        """Read a plan that :meth:`save` wrote. Nothing in the file is run, and memory is bounded by the file's size.

        Raises:
            PlanError: the file is missing, is no safetensors file, holds something else, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = check_path(path, PlanError)
        if not path.is_file():
            raise PlanError(f"there is no plan at {path}")
        try:
            with safe_open(path, framework="np") as file:  # reads the header only: what is no plan may be large
                is_plan = FORMAT in (file.metadata() or {})
            # At once: safe_open opens the file again for its tensors, and a plan may be saved there in between.
            data = path.read_bytes() if is_plan else b""
        except (SafetensorError, OSError, ValueError) as error:
            raise PlanError(
                f"{path} is not a readable safetensors file ({one_line(error)}); save the plan again"
            ) from error
        if not is_plan:
            raise PlanError(f"{path} holds no sims_lens plan; files are written by plan.save(path)")
        return cls.from_bytes(data, where=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "the plan") -> "SteeringPlan":
        """The inverse of :meth:`to_bytes`.

        Args:
            data: a safetensors file.
            where: it came from, for the message of an error.

        Raises:
            PlanError: it is no plan, or damaged.

        >>> plan = SteeringPlan.addition({1: torch.ones(3)}, coefficient=2.0)
        >>> SteeringPlan.from_bytes(plan.to_bytes()).layers
        (1,)
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)  # compares sizes and offsets with the file's own size first
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            return cls._from_header(json.loads(metadata[FORMAT]), tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            reason = one_line(error) if isinstance(error, PlanError) else f"{type(error).__name__}: {one_line(error)}"
            raise PlanError(f"{where} is damaged or not of this format: {reason}") from error

    @classmethod
    def _from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> "SteeringPlan":
        """The plan that a file's JSON and tensors describe; strict, because a damaged file must not steer."""
        if header["format"] != FORMAT:
            raise PlanError(f"format {header['format']!r} is not {FORMAT!r}")
        version = header["version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise PlanError(
                f"format version {version!r} is not one that this sims_lens reads (1..{FORMAT_VERSION}); "
                "update sims_lens"
            )
        if not isinstance(entries := header["interventions"], list):
            raise PlanError(f"interventions must be a list, got a {type(entries).__name__}")
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise PlanError(f"tensor {name!r} must hold floats, got {tensor.dtype}")
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        used = [name for entry in entries for name in _tensor_names(entry)]
        if len(set(used)) < len(used):  # a small file could ask for any number of copies of a large tensor
            raise PlanError("two interventions name one tensor")
        expected = _ENTRIES if version == 1 else _ENTRIES | {"parameters", "half_life"}
        interventions = []
        for entry in entries:
            if missing := sorted(expected - entry.keys()):
                raise KeyError(missing[0])
            if unknown := sorted(entry.keys() - expected):
                raise PlanError(f"an intervention has {unknown[0]!r}, which format version {version} does not know")
            if not all(isinstance(held, bool) for held in entry["scope"].values()):
                raise PlanError(f"a scope must hold true or false for each region, got {entry['scope']!r}")
            if isinstance(entry["residual_norm"], bool):
                raise PlanError(f"residual_norm must be a positive number, got {entry['residual_norm']!r}")
            interventions.append(
                Intervention(
                    layer=entry["layer"],
                    site=entry["site"],
                    transform=restore(entry, tensors),
                    coefficient=entry["coefficient"],
                    units=entry["units"],
                    scope=TokenScope(**entry["scope"]),
                    residual_norm=entry["residual_norm"],
                    half_life=entry.get("half_life"),
                )
            )
        if unnamed := sorted(tensors.keys() - set(used)):
            raise PlanError(f"no intervention names tensor {unnamed[0]!r}")
        known = {f.name for f in fields(Provenance)}
        provenance = Provenance(**{k: v for k, v in header["provenance"].items() if k in known})
        plan = cls(tuple(interventions), provenance)
        _check_shapes(plan)
        if "sha256" in header and header["sha256"] != _digest(tensors):  # absent in version 1
            raise PlanError("its tensors are not those that were saved (their sha256 differs)")
        return plan

    def __repr__(self) -> str:
        count = len(self.interventions)
        head = f"SteeringPlan with {count} intervention{'' if count == 1 else 's'}"
        if self.provenance.model:
            head += f" for {self.provenance.model}"
        if self.provenance.source:
            head += f" ({self.provenance.source})"
        return "\n".join([head, *(f"  {i.describe()}" for i in self.interventions)])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{hook_name(i.layer, i.site)}</code></td><td>{html.escape(label(i.transform))}</td>"
            f"<td>{i.coefficient:+g} {'&times; residual norm' if i.units == 'residual_norm' else ''}</td>"
            f"<td>{'' if i.residual_norm is None else f'{i.residual_norm:.4g}'}</td>"
            f"<td>{html.escape(i.scope.name)}</td>"
            f"<td>{'' if i.half_life is None else f'{i.half_life:g} tokens'}</td></tr>"
            for i in self.interventions
        )
        model = html.escape(self.provenance.model or "any model of its shape")
        return (
            f"<p><b>SteeringPlan</b> for {model} {html.escape(self.provenance.source)}</p><table><thead><tr>"
            "<th>hook point</th><th>transform</th><th>coefficient</th><th>median residual norm</th><th>tokens</th>"
            f"<th>half-life</th></tr></thead><tbody>{rows}</tbody></table>"
        )


def _check_keys(by_layer: Mapping[Any, Any]) -> None:
    for layer in by_layer:
        if type(layer) is not int or layer < 0:
            raise PlanError(f"layer must be an integer from 0 up, got {shown(layer)}")


def _check_shapes(plan: SteeringPlan) -> None:
    """Raise :class:`PlanError` unless one model can fit all interventions: the one that the provenance describes."""
    n_layers, d_model = plan.provenance.n_layers, plan.provenance.d_model
    widths = {len(next(iter(i.transform.tensors().values()))) for i in plan.interventions}  # the first is a direction
    if len(widths) > 1:
        raise PlanError(f"directions of one plan must have one size, got {sorted(widths)}")
    if d_model and widths - {d_model}:
        raise PlanError(f"directions have {widths.pop()} entries, but the provenance says d_model = {d_model}")
    if n_layers and plan.layers and plan.layers[-1] >= n_layers:
        raise PlanError(f"layer {plan.layers[-1]} is not in 0..{n_layers - 1}: the provenance says {n_layers} layers")


def _tensor_names(entry: Mapping[str, Any]) -> list[str]:
    """The tensors that a saved transform names, those of an inner one included."""
    names: list[str] = []
    for found in entry["tensors"].values():
        names += found if isinstance(found, list) else [found]
    for value in entry.get("parameters", {}).values():
        if isinstance(value, dict):
            names += _tensor_names(value)
    return names


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of float32 tensors with their names: safetensors itself does not notice a flipped bit."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(f"{name}{list(tensors[name].shape)}".encode())
        sha256.update(tensors[name].numpy().astype("<f4").tobytes())
    return sha256.hexdigest()


def _direction(i: Intervention) -> Float[Tensor, " d_model"]:
    found = getattr(i.transform, "direction", None)
    if not isinstance(found, Tensor):
        raise PlanError(f"{i.describe()} has no direction")
    return found


def _mapped(i: Intervention, change: Callable[[Tensor], Tensor]) -> Intervention:
    """The intervention with ``change`` applied to its direction; an addition's length stays in its coefficient."""
    if not hasattr(i.transform, "mapped"):
        raise PlanError(f"{i.describe()} has no direction")
    if i.units == "absolute":
        return replace(i, transform=i.transform.mapped(change))
    factor = float(change(_direction(i)).norm())
    return replace(
        i, transform=i.transform.mapped(lambda vector: change(vector) / factor), coefficient=factor * i.coefficient
    )


NOTHING = SteeringPlan(())
"""The plan that steers nothing: the base model."""

__all__ = ["NOTHING", "Intervention", "Provenance", "SteeringPlan"]
