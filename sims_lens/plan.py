"""The steering plan: which transform, at which site, how strongly, on which tokens, and where it came from.

A plan is the one currency of the package: the loop makes it, :func:`sims_lens.steering` applies it, analyses read
it. It is frozen, it knows no model, and it travels as one safetensors file that loads nothing executable.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from sims_lens.errors import PlanError
from sims_lens.scope import GENERATION, TokenScope
from sims_lens.sites import check_site, hook_name
from sims_lens.transforms import TRANSFORMS, Addition, Transform, checked_vector

Units = Literal["absolute", "residual_norm"]

FORMAT = "sims_lens.plan"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """Where a plan came from. Empty strings and zeros mean "not known", and are not checked.

    Args:
        model: the model's name, as ``sims_lens.load`` gave it or as its config has it.
        revision: hub revision, or the checksum of the embedded model.
        weight_processing: what TransformerLens did to the weights ("none", "folded", ...).
        n_layers, d_model: the shape that the plan needs.
        source: what made the plan, in words, for instance "improve, iteration 3, config 5f2c".
    """

    model: str = ""
    revision: str = ""
    weight_processing: str = ""
    n_layers: int = 0
    d_model: int = 0
    source: str = ""


@dataclass(frozen=True)
class Intervention:
    """One transform at one site.

    Args:
        layer: the block, counted from 0.
        site: one of ``resid_pre``, ``resid_post``, ``attn_out``, ``mlp_out``.
        transform: what to do there.
        coefficient: how strongly, in ``units``.
        units: ``"absolute"`` multiplies the transform's vector as it is; ``"residual_norm"`` counts in multiples of
            the median norm of the residual stream at that site (first position left out), and needs a unit vector.
        scope: which tokens.
        residual_norm: that median, where it is known; otherwise it is measured when the plan is attached.
    """

    layer: int
    site: str
    transform: Transform
    coefficient: float
    units: str = "absolute"
    scope: TokenScope = GENERATION
    residual_norm: float | None = None

    def __post_init__(self) -> None:
        check_site(self.site)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise PlanError(f"layer must be an integer from 0 up, got {self.layer!r}")
        if self.units not in get_args(Units):
            raise PlanError(f"units {self.units!r} is not one of {', '.join(get_args(Units))}")
        if isinstance(self.coefficient, bool) or not isinstance(self.coefficient, (int, float)):
            raise PlanError(f"coefficient must be a number, got {self.coefficient!r}")
        if not math.isfinite(self.coefficient):
            raise PlanError(f"coefficient must be finite, got {self.coefficient}")
        norm = self.residual_norm
        if norm is not None and not (isinstance(norm, (int, float)) and math.isfinite(norm) and norm > 0):
            raise PlanError(f"residual_norm must be a positive number, got {norm!r}")

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
        """One line: hook point, transform, coefficient with its unit, scope."""
        if self.units == "absolute":
            amount = f"{self.coefficient:+g}"
        elif self.residual_norm is None:
            amount = f"{self.coefficient:+g} x residual norm"
        else:
            amount = f"{self.coefficient:+g} x residual norm ({self.residual_norm:.4g})"
        return f"{hook_name(self.layer, self.site)}  {self.transform.kind}  {amount}  on {self.scope.name}"


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
        object.__setattr__(self, "interventions", tuple(self.interventions))

    @classmethod
    def addition(
        cls,
        vectors: Mapping[int, Float[Tensor, " d_model"]],
        *,
        coefficient: float = 1.0,
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
            raise PlanError(f"vectors must map layers to tensors, for instance {{14: vector}}; got {vectors!r}")
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

    def scaled(self, factor: float) -> "SteeringPlan":
        """The same plan with every coefficient multiplied by ``factor``."""
        return replace(
            self, interventions=tuple(replace(i, coefficient=factor * i.coefficient) for i in self.interventions)
        )

    def restrict(self, layers: Iterable[int]) -> "SteeringPlan":
        """Only the interventions at these layers.

        Raises:
            PlanError: the plan has none there.
        """
        wanted = set(layers)
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
        """Write one safetensors file. It is written beside ``path`` first, so a crash leaves the old file whole."""
        from safetensors.torch import save_file

        path = Path(path)
        if not path.parent.is_dir():
            raise PlanError(f"folder {path.parent} does not exist; create it first")
        tensors: dict[str, Tensor] = {}
        described = []
        for index, i in enumerate(self.interventions):
            names = {}
            for name, tensor in i.transform.tensors().items():
                names[name] = f"{index}.{name}"
                tensors[names[name]] = tensor.detach().contiguous().clone()
            described.append(
                {
                    "layer": i.layer,
                    "site": i.site,
                    "transform": i.transform.kind,
                    "tensors": names,
                    "coefficient": i.coefficient,
                    "units": i.units,
                    "scope": i.scope.to_json(),
                    "residual_norm": i.residual_norm,
                }
            )
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "provenance": asdict(self.provenance),
            "interventions": described,
        }
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(header, sort_keys=True)})
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "SteeringPlan":
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanError: the file is missing, is no safetensors file, holds something else, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise PlanError(f"there is no plan at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise PlanError(f"{path} is not a readable safetensors file ({error}); save the plan again") from error
        if FORMAT not in metadata:
            raise PlanError(f"{path} holds no sims_lens plan; files are written by plan.save(path)")
        try:
            return cls._from_header(json.loads(metadata[FORMAT]), tensors)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error}" if isinstance(error, PlanError) else f"{type(error).__name__}: {error}"
            raise PlanError(f"{path} is damaged or not of this format: {reason}") from error

    @classmethod
    def _from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> "SteeringPlan":
        if header["format"] != FORMAT:
            raise PlanError(f"format {header['format']!r} is not {FORMAT!r}")
        if not isinstance(header["version"], int) or not 1 <= header["version"] <= FORMAT_VERSION:
            raise PlanError(
                f"format version {header['version']!r} is not one that this sims_lens reads (1..{FORMAT_VERSION}); "
                "update sims_lens"
            )
        known = {f.name for f in fields(Provenance)}
        interventions = []
        for entry in header["interventions"]:
            if entry["transform"] not in TRANSFORMS:
                raise PlanError(f"transform {entry['transform']!r} is not one of {', '.join(TRANSFORMS)}")
            parts = {name: tensors[key] for name, key in entry["tensors"].items()}
            interventions.append(
                Intervention(
                    layer=entry["layer"],
                    site=entry["site"],
                    transform=TRANSFORMS[entry["transform"]](**parts),
                    coefficient=entry["coefficient"],
                    units=entry["units"],
                    scope=TokenScope(**entry["scope"]),
                    residual_norm=entry["residual_norm"],
                )
            )
        provenance = Provenance(**{k: v for k, v in header["provenance"].items() if k in known})
        return cls(tuple(interventions), provenance)

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
            f"<tr><td><code>{hook_name(i.layer, i.site)}</code></td><td>{html.escape(i.transform.kind)}</td>"
            f"<td>{i.coefficient:+g} {'&times; residual norm' if i.units == 'residual_norm' else ''}</td>"
            f"<td>{'' if i.residual_norm is None else f'{i.residual_norm:.4g}'}</td>"
            f"<td>{html.escape(i.scope.name)}</td></tr>"
            for i in self.interventions
        )
        model = html.escape(self.provenance.model or "any model of its shape")
        return (
            f"<p><b>SteeringPlan</b> for {model} {html.escape(self.provenance.source)}</p><table><thead><tr>"
            "<th>hook point</th><th>transform</th><th>coefficient</th><th>median residual norm</th><th>tokens</th>"
            f"</tr></thead><tbody>{rows}</tbody></table>"
        )


NOTHING = SteeringPlan(())
"""The plan that steers nothing: the base model."""

__all__ = ["NOTHING", "Intervention", "Provenance", "SteeringPlan"]
