"""Do directions of layers, iterations, estimators and runs agree, and by how much more than chance?

Every cosine stands between a floor and a ceiling. The floor is what random directions give: isotropic ones, for which
cosine^2 ~ Beta(1/2, (d_model - 1)/2), and ones of the stream's own covariance, which agree far more because the stream
is anisotropic. The ceiling is what two noisy fits of one true direction give, known from how well two halves of their
pairs agree.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import adapt
from sims_lens.analysis.axes import stream_directions
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.analysis.norms import check_fit, counted
from sims_lens.analysis.permutation import PermutationTest, permutation_p, run_differences, tested
from sims_lens.checks import (
    check_dimensions,
    check_integer,
    check_kind,
    check_list,
    check_mapping,
    check_number,
    check_seed,
    shown,
)
from sims_lens.errors import ConfigError, PlanError
from sims_lens.estimators import unit
from sims_lens.hooks import check_unsteered
from sims_lens.run import Run

if TYPE_CHECKING:
    import pandas as pd

_SHARE = 0.95
_DRAWS = 100


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two directions, layer by layer.

    Args:
        first: name of the one.
        second: name of the other.
        layers: that both have.
        cosine: of the two.
        angle: between them, in degrees.
        random: 95% of random directions have a cosine with each other of less than this in magnitude.
        stream: the same of random directions with the covariance of the residual stream there; NaN without a model.
        ceiling: the cosine to expect if both are noisy fits of one direction, see :func:`ceiling`; NaN where no noise
            is known.
    """

    first: str
    second: str
    layers: tuple[int, ...]
    cosine: Float[Tensor, " layer"] = field(repr=False)
    angle: Float[Tensor, " layer"] = field(repr=False)
    random: float
    stream: Float[Tensor, " layer"] = field(repr=False)
    ceiling: Float[Tensor, " layer"] = field(repr=False)

    @property
    def corrected(self) -> Float[Tensor, " layer"]:
        """Cosine over ceiling: an estimate of the cosine without noise in the fits. It can exceed 1, by chance or
        because two fits share pairs; NaN where the ceiling is unknown or 0."""
        return torch.where(self.ceiling > 0, self.cosine / self.ceiling, torch.nan)

    def table(self) -> "pd.DataFrame":
        """One row per layer."""
        import pandas as pd

        names = ("cosine", "angle", "stream", "ceiling", "corrected")
        columns = {name: getattr(self, name).tolist() for name in names}
        table = pd.DataFrame(columns, index=pd.Index(self.layers, name="layer"))
        table.insert(2, "random", self.random)
        return table


@dataclass(frozen=True, eq=False)
class PrincipalAngles:
    """How two subspaces lie to each other, smallest angle first, beside random subspaces of the same dimensions.

    Args:
        first: names whose directions span the one.
        second: names whose directions span the other.
        degrees: the principal angles.
        random: mean of those between random subspaces.
        random_low: 2.5th percentile of the same; an angle below it is smaller than chance gives.
        random_high: 97.5th percentile.
        overlap: mean of cos^2 of the angles: 1 where the smaller subspace lies in the larger one, 0 where they are
            orthogonal.
        random_overlap: its expectation for random subspaces, the larger dimension over d_model.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    degrees: Float[Tensor, " angle"] = field(repr=False)
    random: Float[Tensor, " angle"] = field(repr=False)
    random_low: Float[Tensor, " angle"] = field(repr=False)
    random_high: Float[Tensor, " angle"] = field(repr=False)
    overlap: float
    random_overlap: float

    def table(self) -> "pd.DataFrame":
        """One row per angle."""
        import pandas as pd

        names = ("degrees", "random", "random_low", "random_high")
        columns = {name: getattr(self, name).tolist() for name in names}
        return pd.DataFrame(columns, index=pd.RangeIndex(1, 1 + len(self.degrees), name="angle"))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A direction over iterations, at one layer.

    Args:
        layer: which.
        names: of the iterations' directions, in order.
        norm: of each, in units of the residual stream.
        with_first: cosine with the first one's direction.
        with_previous: cosine with that of the one before; NaN for the first.
        turn: angle in degrees by which the cumulative direction (the sum of the unit directions so far, which is what
            "accumulate" steers with) turns at each; NaN for the first.
        total_turn: angle in degrees between the cumulative direction and the first one.
        points: unit directions in the plane of their two largest principal components, the origin being zero.
        path: the cumulative sum of the points, over their number: where the plan's vector goes, in units of its
            total strength.
        explained: share of the unit directions' sum of squares along both axes.
        random: 95% of random directions have a cosine with each other of less than this in magnitude.
    """

    layer: int
    names: tuple[str, ...]
    norm: Float[Tensor, " iteration"] = field(repr=False)
    with_first: Float[Tensor, " iteration"] = field(repr=False)
    with_previous: Float[Tensor, " iteration"] = field(repr=False)
    turn: Float[Tensor, " iteration"] = field(repr=False)
    total_turn: Float[Tensor, " iteration"] = field(repr=False)
    points: Float[Tensor, "iteration 2"] = field(repr=False)
    path: Float[Tensor, "iteration 2"] = field(repr=False)
    explained: tuple[float, float]
    random: float

    def table(self) -> "pd.DataFrame":
        """One row per iteration."""
        import pandas as pd

        names = ("norm", "with_first", "with_previous", "turn", "total_turn")
        columns = {name: getattr(self, name).tolist() for name in names}
        for name in ("points", "path"):
            columns |= {f"{name}_{axis}": getattr(self, name)[:, at].tolist() for at, axis in enumerate("xy")}
        return pd.DataFrame(columns, index=pd.Index(self.names, name="name"))


@dataclass(frozen=True, eq=False)
class SharedSubspace:
    """How few dimensions hold many directions: PCA of the unit directions, about the origin.

    Args:
        labels: (name, layer) of each direction.
        explained: share of the directions' sum of squares along each component, largest first.
        components: the components, unit vectors; the sign of each is such that most directions have it.
        random: mean shares for as many random directions.
        random_high: 97.5th percentile of the same.
        participation_ratio: (sum of shares)^2 / sum of shares^2: 1 if all directions lie on one line, their number if
            they are orthogonal.
        random_participation_ratio: mean of the same for random directions.
        effective_rank: exp of the entropy of the shares (Roy & Vetterli 2007).
        random_effective_rank: mean of the same for random directions.
    """

    labels: tuple[tuple[str, int], ...] = field(repr=False)
    explained: Float[Tensor, " component"] = field(repr=False)
    components: Float[Tensor, "component d_model"] = field(repr=False)
    random: Float[Tensor, " component"] = field(repr=False)
    random_high: Float[Tensor, " component"] = field(repr=False)
    participation_ratio: float
    random_participation_ratio: float
    effective_rank: float
    random_effective_rank: float

    def table(self) -> "pd.DataFrame":
        """One row per component."""
        import pandas as pd

        columns = {name: getattr(self, name).tolist() for name in ("explained", "random", "random_high")}
        table = pd.DataFrame(columns, index=pd.RangeIndex(1, 1 + len(self.explained), name="component"))
        table.insert(1, "cumulative", table["explained"].cumsum())
        return table


@dataclass(frozen=True, eq=False)
class DirectionSimilarity:
    """Directions and how they lie to each other; made by :func:`direction_similarity`.

    Args:
        directions: of the source.
        others: those that they are compared with; where there are none, they are compared with each other.
        differences: paired differences of activations that a direction is the mean of, by its name.
        stream_band: by site and layer, what 95% of the cosines of random directions with the stream's covariance stay
            below; empty without a model.
        permutations: label shuffles in a test; 0 for no tests in the table.
        seed: of shuffles and random baselines.
    """

    directions: tuple[Directions, ...]
    others: tuple[Directions, ...] = ()
    differences: Mapping[str, Float[Tensor, "_pair _layer d_model"]] = field(default_factory=dict, repr=False)
    stream_band: Mapping[tuple[str, int], float] = field(default_factory=dict, repr=False)
    permutations: int = 0
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of all directions, those of the source first."""
        return tuple(d.name for d in (*self.directions, *self.others))

    @property
    def d_model(self) -> int:
        """Their size."""
        return int(self.directions[0].vectors.shape[1])

    @property
    def random(self) -> float:
        """95% of random directions have a cosine with each other of less than this in magnitude."""
        return random_cosine(self.d_model)

    @property
    def labels(self) -> tuple[tuple[str, int], ...]:
        """(name, layer) of every direction: what the rows and columns of ``cosines`` are."""
        return tuple((d.name, layer) for d in (*self.directions, *self.others) for layer in d.layers)

    @cached_property
    def cosines(self) -> Float[Tensor, "label label"]:
        """Between all directions, of all names and layers."""
        axes = _unit(torch.cat([d.vectors for d in (*self.directions, *self.others)]))
        return (axes @ axes.T).clamp(-1, 1).float()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Names that are compared: of the source with the others, or of the source with each other."""
        ours = [d.name for d in self.directions]
        found = product(ours, [d.name for d in self.others]) if self.others else combinations(ours, 2)
        return tuple((a, b) for a, b in found if set(self.get(a).layers) & set(self.get(b).layers))

    def get(self, name: str) -> Directions:
        """The directions of a name.

        Raises:
            PlanError: there are none.
        """
        for d in (*self.directions, *self.others):
            if d.name == name:
                return d
        raise PlanError(f"there is no direction {name!r}; there are {', '.join(map(repr, self.names))}")

    def between(self, first: str, second: str) -> Comparison:
        """Two directions at every layer that both have.

        Raises:
            PlanError: there is no such name, or they share no layer.
        """
        a, b, layers = self._shared(first, second)
        u, v = (_unit(torch.stack([d.at(layer) for layer in layers])) for d in (a, b))
        return Comparison(
            first=first,
            second=second,
            layers=layers,
            cosine=(u * v).sum(-1).clamp(-1, 1).float(),
            angle=_degrees(u, v).float(),
            random=self.random,
            stream=torch.tensor([self.stream_band.get((a.site, layer), math.nan) for layer in layers]),
            ceiling=ceiling(_halves(a, layers), _halves(b, layers)),
        )

    def across_layers(self, first: str, second: str | None = None) -> Float[Tensor, "layer other_layer"]:
        """Cosine between every two layers of a name, or of a layer of one name and one of another."""
        a, b = self.get(first), self.get(first if second is None else second)
        return (_unit(a.vectors) @ _unit(b.vectors).T).clamp(-1, 1).float()

    def at_layer(self, layer: int) -> tuple[tuple[str, ...], Float[Tensor, "name name"]]:
        """The names that have a layer, and the cosines between them there.

        Raises:
            PlanError: none has it.
        """
        found = [d for d in (*self.directions, *self.others) if layer in d.layers]
        if not found:
            raise PlanError(f"no direction has layer {layer!r}; there are layers {list(self._layers())}")
        axes = _unit(torch.stack([d.at(layer) for d in found]))
        return tuple(d.name for d in found), (axes @ axes.T).clamp(-1, 1).float()

    def principal_angles(
        self,
        first: str | Sequence[str],
        second: str | Sequence[str],
        *,
        layers: Sequence[int] | None = None,
        draws: int = _DRAWS,
    ) -> PrincipalAngles:
        """Angles between the subspaces that directions span: those of all layers of a name, of several names
        (iterations) at one layer, or of both.

        Args:
            first: the name, or names, whose directions span the one.
            second: the same of the other.
            layers: which directions of them; all where None.
            draws: pairs of random subspaces.

        Raises:
            PlanError: a name has none of the layers.

        Reference: Björck & Golub 1973, "Numerical methods for computing angles between linear subspaces"; small
            angles by their sines (Knyazev & Argentati 2002).
        """
        groups = [(side,) if isinstance(side, str) else tuple(side) for side in (first, second)]
        bases = [_basis(self._stacked(group, layers)[1]) for group in groups]
        small, large = sorted(len(basis) for basis in bases)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.stack([_random_angles(small, large, self.d_model, generator) for _ in range(draws)])
        angles = principal_angles(*bases)
        return PrincipalAngles(
            first=groups[0],
            second=groups[1],
            degrees=angles.float(),
            random=drawn.mean(0).float(),
            random_low=drawn.quantile((1 - _SHARE) / 2, dim=0).float(),
            random_high=drawn.quantile((1 + _SHARE) / 2, dim=0).float(),
            overlap=float(angles.deg2rad().cos().square().mean()),
            random_overlap=large / self.d_model,
        )

    def trajectory(self, layer: int, names: Sequence[str] | None = None) -> Trajectory:
        """A layer's direction over iterations.

        Args:
            layer: which.
            names: of the iterations, in order; by default all of the source that have the layer.

        Raises:
            PlanError: none of them has the layer.
        """
        chosen = tuple(d.name for d in self.directions if layer in d.layers) if names is None else tuple(names)
        if not chosen:
            raise PlanError(f"no direction has layer {layer!r}; there are layers {list(self._layers())}")
        vectors = torch.stack([self.get(name).at(layer) for name in chosen]).double()
        axes = _unit(vectors)
        total = axes.cumsum(0)
        unknown = torch.full((1,), torch.nan, dtype=torch.float64)
        _, values, right = torch.linalg.svd(axes, full_matrices=False)
        plane = torch.zeros(2, axes.shape[1], dtype=torch.float64)
        plane[: len(right)] = right[:2]
        points = axes @ plane.T
        # A sign is arbitrary: to the right, and up at the end.
        points = points * torch.where(torch.stack([points[:, 0].sum(), points[-1, 1]]) < 0, -1.0, 1.0)
        shares = (values.square() / values.square().sum()).tolist()
        count = torch.arange(1, len(axes) + 1)[:, None]
        return Trajectory(
            layer=layer,
            names=chosen,
            norm=vectors.norm(dim=-1).float(),
            with_first=(axes @ axes[0]).clamp(-1, 1).float(),
            with_previous=torch.cat([unknown, (axes[1:] * axes[:-1]).sum(-1).clamp(-1, 1)]).float(),
            turn=torch.cat([unknown, _degrees(_unit(total[1:]), _unit(total[:-1]))]).float(),
            total_turn=_degrees(_unit(total), axes[:1].expand_as(axes)).float(),
            points=points.float(),
            path=(points.cumsum(0) / count.max()).float(),
            explained=(shares[0], shares[1] if len(shares) > 1 else 0.0),
            random=self.random,
        )

    def shared_subspace(
        self, names: Sequence[str] | None = None, *, layers: Sequence[int] | None = None, draws: int = _DRAWS
    ) -> SharedSubspace:
        """PCA of the unit directions.

        Args:
            names: whose; by default all of the source.
            layers: which; all where None.
            draws: sets of random directions to compare with.

        Raises:
            PlanError: a name has none of the layers.
        """
        chosen = [d.name for d in self.directions] if names is None else names
        labels, vectors = self._stacked(chosen, layers)
        _, values, right = torch.linalg.svd(vectors, full_matrices=False)
        shares = values.square() / len(vectors)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.stack([_random_shares(len(vectors), self.d_model, generator) for _ in range(draws)])
        signs = torch.where((vectors @ right.T).sum(0) < 0, -1.0, 1.0)
        return SharedSubspace(
            labels=labels,
            explained=shares.float(),
            components=(right * signs[:, None]).float(),
            random=drawn.mean(0).float(),
            random_high=drawn.quantile((1 + _SHARE) / 2, dim=0).float(),
            participation_ratio=float(_participation(shares)),
            random_participation_ratio=float(_participation(drawn).mean()),
            effective_rank=float(_effective_rank(shares)),
            random_effective_rank=float(_effective_rank(drawn).mean()),
        )

    def test(self, first: str, second: str, *, permutations: int | None = None) -> PermutationTest:
        """Does one direction agree with the other by more than fits to shuffled labels do?

        The labels of one are shuffled, the other is kept: it must come from other pairs, or from none, for the test to
        be one of agreement; of two fits to the same pairs it only says that labels matter. Where paired differences
        are known, they are shuffled; else the shuffled fits that came with the directions are all there is, and five
        of those give no p below 1/6.

        Args:
            first: its labels are shuffled, if its differences or its shuffled fits are known.
            second: likewise, otherwise.
            permutations: label shuffles; by default those of this result, or 1000.

        Raises:
            PlanError: nothing is known of either that could be shuffled; or there is no such name.
        """
        a, b, layers = self._shared(first, second)
        count = permutations or self.permutations or 1000
        for ours, theirs in ((a, b), (b, a)):
            at = [ours.layers.index(layer) for layer in layers]
            reference = torch.stack([theirs.at(layer) for layer in layers])
            if ours.name in self.differences:
                found = self.differences[ours.name][:, at]
                return replace(permutation_p(found, reference, permutations=count, seed=self.seed), layers=layers)
            if ours.shuffled is not None and len(ours.shuffled):
                cosine = torch.cosine_similarity(ours.vectors[at].double(), reference.double(), dim=-1)
                null = torch.cosine_similarity(ours.shuffled[:, at].double(), reference.double(), dim=-1)
                return tested(layers, cosine, null)
        raise PlanError(
            f"neither {first!r} nor {second!r} has labels to shuffle; give model= with a Run, or differences="
        )

    def table(self) -> "pd.DataFrame":
        """One row per pair of names and layer: cosine, angle, baselines, ceiling; and p-values where ``permutations``
        is not 0 and there is something to shuffle.

        Raises:
            PlanError: no two directions share a layer.
        """
        import pandas as pd

        if not self.pairs:
            raise PlanError(self._alone())
        tables = []
        for first, second in self.pairs:
            table = self.between(first, second).table().reset_index()
            table.insert(0, "second", second)
            table.insert(0, "first", first)
            if (test := self._tests.get((first, second))) is not None:
                for name in ("one_sided", "two_sided", "holm"):
                    table[f"p_{name}"] = getattr(test, name).tolist()
                table["permutations"] = test.permutations
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def _tests(self) -> dict[tuple[str, str], PermutationTest]:
        if not self.permutations:
            return {}
        testable = _testable((*self.directions, *self.others), self.differences)
        return {(a, b): self.test(a, b) for a, b in self.pairs if {a, b} & testable}

    def _layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for d in (*self.directions, *self.others) for layer in d.layers}))

    def _shared(self, first: str, second: str) -> tuple[Directions, Directions, tuple[int, ...]]:
        a, b = self.get(first), self.get(second)
        layers = tuple(layer for layer in a.layers if layer in b.layers)
        if not layers:
            raise PlanError(
                f"{first!r} has layers {list(a.layers)}, {second!r} has {list(b.layers)}: they share none; see "
                "across_layers"
            )
        return a, b, layers

    def _stacked(
        self, names: Sequence[str], layers: Sequence[int] | None
    ) -> tuple[tuple[tuple[str, int], ...], Float[Tensor, "label d_model"]]:
        found = [self.get(name) for name in names]
        labels = [(d.name, layer) for d in found for layer in d.layers if layers is None or layer in layers]
        if missing := [d.name for d in found if d.name not in {name for name, _ in labels}]:
            raise PlanError(f"{missing[0]!r} has none of layers {list(layers or ())}")
        if not labels:
            raise PlanError("name at least one direction")
        return tuple(labels), _unit(torch.stack([self.get(name).at(layer) for name, layer in labels]))

    def _alone(self) -> str:
        """What to do where no two directions can be compared layer by layer."""
        first, second = self.directions[0], (*self.others, *self.directions[1:], None)[0]
        if second is None:
            return f"there is one direction, {first.name!r}: give other=, or see .across_layers({first.name!r})"
        return (
            f"no two directions share a layer ({first.name!r} has {list(first.layers)}, {second.name!r} has "
            f"{list(second.layers)}): see .across_layers({first.name!r}, {second.name!r})"
        )

    def __repr__(self) -> str:
        if not self.pairs:
            return f"{self._head()}\n  {self._alone()}"
        head, *rows = self._cells()
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        lines = [
            "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in (head, *rows)
        ]
        return "\n".join([self._head(), *lines])

    def _repr_html_(self) -> str:
        if not self.pairs:
            return f"<p>{html.escape(self._head())}<br>{html.escape(self._alone())}</p>"
        head, *rows = self._cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return f"<p>{html.escape(self._head())}</p><table><tr>{top}</tr>{body}</table>"

    def _head(self) -> str:
        return (
            f"DirectionSimilarity of {counted(len(self.labels), 'direction')} of {self.d_model} values; random "
            f"directions: |cosine| below {self.random:.3f} in 95% of cases"
        )

    def _cells(self) -> list[tuple[str, ...]]:
        tests = self._tests
        floor_name = "beyond the stream's random" if self.stream_band else "beyond random"
        head = ["names", "layers", "mean cosine", "lowest", "highest", "ceiling", floor_name]
        cells: list[tuple[str, ...]] = [(*head, "smallest Holm p") if tests else tuple(head)]
        for first, second in self.pairs:
            found = self.between(first, second)
            floor = torch.where(found.stream.isnan(), found.random, found.stream)
            beyond = int((found.cosine.abs() > floor).sum())
            row = [
                f"{first} | {second}",
                str(len(found.layers)),
                f"{float(found.cosine.mean()):+.3f}",
                f"{float(found.cosine.min()):+.3f}",
                f"{float(found.cosine.max()):+.3f}",
                _known(found.ceiling.nanmean()),
                f"{beyond} of {len(found.layers)}",
            ]
            test = tests.get((first, second))
            cells.append((*row, f"{float(test.holm.min()):.3g}" if test else "-") if tests else tuple(row))
        return cells


def direction_similarity(
    source: Any,
    other: Any = None,
    *,
    layers: Sequence[int] | None = None,
    model: Any = None,
    differences: Mapping[str, Float[Tensor, "_pair _layer d_model"]] | None = None,
    permutations: int = 0,
    seed: int = 0,
) -> DirectionSimilarity:
    """Compare directions: of layers, iterations, estimators, runs, and with the model's own axes.

    Args:
        source: anything that :func:`~sims_lens.analysis.directions.directions_of` takes; several by name,
            ``{"mine": run, "theirs": fit}``.
        other: what to compare with, likewise, for instance another run or :func:`model_axes`; the source with itself
            where None. A name that is in both gets " (other)" behind it.
        layers: which; all where None.
        model: unsteered. Where it is given, random directions are drawn from the covariance of its residual stream too,
            on the packaged everyday prompts. With ``permutations`` it also reads the pairs of a run again.
        differences: activations of each pair's better text less those of its worse one, by the name of the direction
            that is fitted to them, at all of its layers in order; see :func:`pair_differences`.
        permutations: label shuffles for p-values; 1000 is a good number. 0: no tests. They need labels to shuffle: a
            run with its model, or ``differences``.
        seed: of shuffles and random baselines.

    Raises:
        PlanError: there are no such directions or layers, sizes differ, a direction is zero or not finite, or two have
            one name.
        ConfigError: ``permutations`` is no number of shuffles, there is nothing to shuffle, or differences don't fit
            their direction.
        RunError: the model is not the one of the run.
        ModelError: a plan is attached to the model.
    """
    if model is not None:
        check_unsteered(model)
    if type(permutations) is not int or permutations < 0:
        raise ConfigError(f"permutations must be an integer from 0 up, got {permutations!r}")
    if layers is not None:
        for layer in check_list("layers", layers, "[17]", PlanError):
            check_integer("a layer", layer, 0, error=PlanError)
    check_seed(seed)
    if differences is not None:
        check_mapping("differences", differences or {"": 0}, "{'plan': rows}")
        for rows in differences.values():
            check_kind("differences", rows, Tensor, "give [pair, layer, d_model]")
    ours, theirs = directions_of(source), () if other is None else directions_of(other)
    taken = {d.name for d in ours}
    theirs = tuple(replace(d, name=f"{d.name} (other)") if d.name in taken else d for d in theirs)
    everything = (*ours, *theirs)
    names = [d.name for d in everything]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise PlanError(f"two directions are called {repeated[0]!r}; give them names: {{'a': ..., 'b': ...}}")
    if len(sizes := sorted({d.vectors.shape[1] for d in everything})) > 1:
        raise PlanError(f"directions must have one size, got {sizes}: are they of one model?")
    if model is not None:
        check_fit(everything, adapt(model))
    known = {name: rows.detach().float() for name, rows in (differences or {}).items()}
    for name, rows in known.items():
        found = next((d for d in everything if d.name == name), None)
        if found is None:
            raise PlanError(f"differences has {name!r}, which is no direction; there are {', '.join(map(repr, names))}")
        if rows.ndim != 3 or rows.shape[1:] != found.vectors.shape:
            raise ConfigError(
                f"differences of {name!r} must have shape [pair, {', '.join(map(str, found.vectors.shape))}], one "
                f"layer for each of the direction's; got {list(rows.shape)}"
            )
    if model is not None and permutations:
        for d, run, iteration in (*_iterations(source, ours), *_iterations(other, theirs)):
            if d.name not in known:
                known[d.name] = run_differences(model, run, iteration)
    if permutations and not _testable(everything, known):
        raise ConfigError(
            f"permutations={permutations}, but there are no labels to shuffle: give a Run with model=, or differences="
        )
    ours, theirs = (tuple(_restricted(d, layers) for d in group) for group in (ours, theirs))
    if layers is not None:
        full = {d.name: d.layers for d in everything}
        kept = {d.name: [full[d.name].index(layer) for layer in d.layers] for d in (*ours, *theirs)}
        known = {name: rows[:, kept[name]] for name, rows in known.items()}
    for d in (*ours, *theirs):
        for layer, vector in zip(d.layers, d.vectors, strict=True):
            if not bool(vector.isfinite().all()) or not bool(vector.any()):
                state = "zero" if bool(vector.isfinite().all()) else "not finite"
                raise PlanError(f"{d.name} is {state} at layer {layer}, so it has no direction; name other layers=")
    bands: dict[tuple[str, int], float] = {}
    if model is not None:
        for site in dict.fromkeys(d.site for d in (*ours, *theirs)):
            drawn = _unit(stream_directions(model, site=site, seed=seed).transpose(0, 1))
            upper = torch.triu_indices(drawn.shape[1], drawn.shape[1], offset=1)
            cosines = (drawn @ drawn.transpose(1, 2))[:, upper[0], upper[1]].abs()
            bands |= {(site, layer): float(band) for layer, band in enumerate(cosines.quantile(_SHARE, dim=1))}
    return DirectionSimilarity(
        directions=ours,
        others=theirs,
        differences=known,
        stream_band=bands,
        permutations=permutations,
        seed=seed,
    )


def random_cosine(d_model: int, share: float = _SHARE) -> float:
    """What the magnitude of the cosine of two random directions stays below in a share of cases.

    Exact: cosine^2 ~ Beta(1/2, (d_model - 1)/2), so that the angle from the equator has the density cos^(d_model - 2).

    Args:
        d_model: size of the directions.
        share: of the cases.

    >>> round(random_cosine(576), 4)  # scipy.special.betaincinv(0.5, 287.5, 0.95) ** 0.5
    0.0816
    """
    check_integer("d_model", d_model)
    check_number("share", share, 0.0, 1.0)
    if d_model < 2:
        return 1.0
    elevation = torch.linspace(0.0, min(math.pi / 2, 12 / math.sqrt(d_model)), 20_001, dtype=torch.float64)
    density = elevation.cos().clamp(min=0) ** (d_model - 2)
    mass = torch.cat([torch.zeros(1), ((density[1:] + density[:-1]) / 2).cumsum(0)])
    mass = mass / mass[-1]
    at = int(torch.searchsorted(mass, share))
    part = float((share - mass[at - 1]) / (mass[at] - mass[at - 1]))
    return math.sin(float(elevation[at - 1] + part * (elevation[at] - elevation[at - 1])))


def ceiling(first: Float[Tensor, " layer"], second: Float[Tensor, " layer"]) -> Float[Tensor, " layer"]:
    """The cosine to expect of two independent, noisy fits of one and the same true direction.

    A fit to half of the pairs agrees with one to the other half by a cosine h, so two fits to as many pairs as there
    are would agree by ``r = 2h / (1 + h)`` (Spearman-Brown); fits of reliabilities r1 and r2 by ``sqrt(r1 * r2)``. It
    is an expectation, not a bound: fits that share pairs agree better, and a cosine varies about it.

    Args:
        first: split-half cosine of the one, per layer. A negative one counts as 0; NaN is taken for a direction
            without noise.
        second: the same of the other.

    Returns:
        NaN where neither is known.

    Reference: Spearman 1904 and 1910, Brown 1910; the correction for attenuation.

    >>> ceiling(torch.tensor([0.5]), torch.tensor([0.5])).item()  # doctest: +ELLIPSIS
    0.6666...
    """
    for name, values in (("first", first), ("second", second)):
        check_dimensions(name, values, 1)
    if len(first) != len(second):
        raise ConfigError(f"first and second must have a value for each layer, got {len(first)} and {len(second)}")
    h = torch.stack([first, second]).float()
    reliability = 2 * h.clamp(min=0) / (1 + h.clamp(min=0))
    product_of = torch.where(h.isnan(), 1.0, reliability).prod(0).sqrt()
    return torch.where(h.isnan().all(0), torch.nan, product_of)


def principal_angles(
    first: Float[Tensor, "rank d_model"], second: Float[Tensor, "other_rank d_model"]
) -> Float[Tensor, " angle"]:
    """Angles in degrees between the subspaces of two orthonormal bases, smallest first."""
    for name, basis in (("first", first), ("second", second)):
        check_dimensions(name, basis, 2, PlanError)
        if not bool(basis.isfinite().all()):
            raise PlanError(f"{name} has entries that are NaN or infinite: {shown(basis)}")
    if first.shape[1] != second.shape[1]:
        raise PlanError(f"both bases must have one d_model, got {first.shape[1]} and {second.shape[1]}")
    small, large = sorted((first.double(), second.double()), key=len)
    left, cosines, _ = torch.linalg.svd(small @ large.T, full_matrices=False)
    # Small angles by their sines: a cosine near 1 says little about its angle.
    beyond = left.T @ small
    beyond = beyond - (beyond @ large.T) @ large
    sines = torch.linalg.vector_norm(beyond, dim=-1)
    return torch.atan2(sines, cosines.clamp(min=0)).rad2deg()


def _testable(directions: Sequence[Directions], differences: Mapping[str, Tensor]) -> set[str]:
    """Names of the directions whose labels can be shuffled, or were."""
    return {d.name for d in directions if d.name in differences or (d.shuffled is not None and len(d.shuffled))}


def _iterations(source: Any, found: Sequence[Directions]) -> list[tuple[Directions, Run, int]]:
    """For each of a source's directions that an iteration of a run made: that run and iteration."""
    if isinstance(source, Run):
        return [(d, source, turn.index) for d, turn in zip(found, source.iterations, strict=True)]
    if not (isinstance(source, Mapping) and all(isinstance(key, str) for key in source)):
        return []
    pairs: list[tuple[Directions, Run, int]] = []
    start = 0
    for value in source.values():
        count = len(directions_of(value))
        pairs += _iterations(value, found[start : start + count])
        start += count
    return pairs


def _restricted(d: Directions, layers: Sequence[int] | None) -> Directions:
    if layers is None:
        return d
    at = [k for k, layer in enumerate(d.layers) if layer in layers]
    if not at:
        raise PlanError(f"{d.name} has none of layers {list(layers)}; it has {list(d.layers)}")
    return replace(
        d,
        layers=tuple(d.layers[k] for k in at),
        vectors=d.vectors[at],
        split_half=None if d.split_half is None else d.split_half[at],
        shuffled=None if d.shuffled is None else d.shuffled[:, at],
        residual_norm=None if d.residual_norm is None else d.residual_norm[at],
    )


def _halves(d: Directions, layers: Sequence[int]) -> Float[Tensor, " layer"]:
    if d.split_half is None:
        return torch.full((len(layers),), torch.nan)
    return d.split_half[[d.layers.index(layer) for layer in layers]].float()


def _unit(vectors: Float[Tensor, "*site d_model"]) -> Float[Tensor, "*site d_model"]:
    return unit(vectors.double())


def _degrees(u: Float[Tensor, "*site d_model"], v: Float[Tensor, "*site d_model"]) -> Float[Tensor, "*site"]:
    """Angles between unit vectors; arccos would lose half of the digits of a small one (Kahan)."""
    half: Tensor = torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
    return (2 * half).rad2deg()


def _basis(vectors: Float[Tensor, "label d_model"]) -> Float[Tensor, "rank d_model"]:
    _, values, right = torch.linalg.svd(vectors.double(), full_matrices=False)
    found: Tensor = right[values > 1e-6 * values[0]]  # float32 vectors that repeat each other span nothing new
    return found


def _random_angles(small: int, large: int, d_model: int, generator: torch.Generator) -> Float[Tensor, " angle"]:
    """Angles between random subspaces: one of them may as well be that of the first axes."""
    basis, _ = torch.linalg.qr(torch.randn(d_model, small, generator=generator, dtype=torch.float64))
    cosines: Tensor = torch.linalg.svdvals(basis[:large]).clamp(max=1)
    return cosines.arccos().rad2deg()


def _random_shares(count: int, d_model: int, generator: torch.Generator) -> Float[Tensor, " component"]:
    drawn = unit(torch.randn(count, d_model, generator=generator, dtype=torch.float64))
    values: Tensor = torch.linalg.svdvals(drawn)
    return values.square() / count


def _participation(shares: Float[Tensor, "*draw component"]) -> Float[Tensor, "*draw"]:
    return shares.sum(-1).square() / shares.square().sum(-1)


def _effective_rank(shares: Float[Tensor, "*draw component"]) -> Float[Tensor, "*draw"]:
    shares = shares / shares.sum(-1, keepdim=True)
    return torch.where(shares > 0, -shares * shares.clamp(min=1e-300).log(), 0.0).sum(-1).exp()


def _known(value: Float[Tensor, ""]) -> str:
    return "-" if bool(value.isnan()) else f"{float(value):.3f}"


__all__ = [
    "Comparison",
    "DirectionSimilarity",
    "PrincipalAngles",
    "SharedSubspace",
    "Trajectory",
    "ceiling",
    "direction_similarity",
    "principal_angles",
    "random_cosine",
]
