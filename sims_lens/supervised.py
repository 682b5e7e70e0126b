"""Steering from contrast pairs that somebody wrote: CAA and its relatives, beside the loop that needs none.

A pair is a prompt with a positive and a negative response to it, or two whole texts. :func:`fit` reads the residual
stream of both at every layer, lets an estimator make a transform of them there, and says how well positive and
negative can be told apart along it on pairs that it was not fitted to.
"""

import csv
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sims_lens.activations import KeptPairs, capture, capture_moments, capture_tokens
from sims_lens.adapter import Adapter, adapt
from sims_lens.checks import check_integer, check_path, check_seed
from sims_lens.errors import FitError, PlanError
from sims_lens.estimators import Estimator, FitQuality, MeanDifference, fit_layers, fit_quality, unit
from sims_lens.estimators.base import check_estimator, check_means
from sims_lens.estimators.quality import LEAST_PAIRS, divided, held_out, judged, unknown_quality
from sims_lens.moments import PairMoments
from sims_lens.plan import Intervention, Provenance, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import quote
from sims_lens.scope import GENERATION, TokenScope
from sims_lens.sites import check_layers, check_site
from sims_lens.token_rows import Joined, Row, TokenRows
from sims_lens.transforms import Addition, Transform

if TYPE_CHECKING:
    import pandas as pd

Text: TypeAlias = str | Sequence[int]
"""A text, or the token ids that the model is to read as they are."""

STRENGTH = 0.2
"""Norm of an addition in units of the median residual norm, where no coefficient is given: that of the loop."""

JUDGED_PAIRS = 256
"""Pairs of a streamed fit whose activations are kept, to be judged on directions that are fitted without them."""

_SHORT = 64
"""Texts that need no progress bar."""

_KEYS = ("prompt", "positive", "negative")


def fit(
    model: Any,
    pairs: Sequence[object],
    *,
    estimator: Estimator | None = None,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    scope: TokenScope | str | None = None,
    seed: int = 0,
    batch_rows: int = 32,
    progress: bool = True,
) -> "SteeringFit":
    """Fit a steering transform at every layer to contrast pairs.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``. The stream is read as the model is now: inside of
            ``with steering(...)``, as it is steered.
        pairs: each a ``(prompt, positive, negative)`` of texts, or a mapping with those keys; or a ``(positive,
            negative)`` of two whole texts. A prompt, and a whole text, goes through the chat template where the model
            has one. Token ids in the place of a text are read as they are.
        estimator: what makes a transform of the activations; :class:`~sims_lens.estimators.MeanDifference`, which is
            contrastive activation addition, where None.
        layers: which to fit; all of them where None.
        site: where in the block.
        scope: the tokens that are averaged. By default the response, or of two whole texts the last token.
        seed: of the estimator's splits.
        batch_rows: sequences in one forward pass, at most, of an estimator that needs every activation.
        progress: show a bar where there are more than a few texts.

    Returns:
        What was fitted, with its quality per layer; ``.plan(...)`` makes a plan of it.

    Raises:
        FitError: there are fewer than two pairs, a pair has another shape or an empty text, or both halves are the
            same everywhere.
        PlanError: the site, the scope or a layer is not one of the model's.

    The mean difference is fitted as the texts go by, in memory that doesn't grow with the number of pairs. Of more than
    256 pairs, its accuracy, AUC and effect size are then those of so many drawn at random, on directions fitted to all
    pairs of the other folds. Other estimators need every pair's averages, 8 bytes * pairs * layers * d_model.

    Reference: Rimsky et al. 2024, "Steering Llama 2 via contrastive activation addition" (arXiv 2312.06681). They
        read the answer's last token; we average over the answer, unless told otherwise.
    """
    adapter = adapt(model)
    rows, whole = _rows(adapter, pairs)
    chosen = TokenScope.of(scope if scope is not None else ("last_prompt" if whole else "response"))
    return fit_rows(
        model,
        rows[0::2],
        rows[1::2],
        estimator=estimator,
        layers=layers,
        site=site,
        scope=chosen,
        seed=seed,
        batch_rows=batch_rows,
        progress=progress,
    )


def fit_rows(
    model: Any,
    positive: Sequence[Row],
    negative: Sequence[Row],
    *,
    estimator: Estimator | None = None,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    scope: TokenScope | str = "response",
    seed: int = 0,
    batch_rows: int = 32,
    progress: bool = True,
) -> "SteeringFit":
    """:func:`fit` for pairs that are token ids already: (prompt, response) of each positive and each negative."""
    estimator = MeanDifference() if estimator is None else estimator
    check_estimator(estimator)
    adapter, scope = adapt(model), TokenScope.of(scope)
    adapter.check_runs()
    check_site(site)
    check_seed(seed)
    check_integer("batch_rows", batch_rows)
    chosen = check_layers(layers, adapter.n_layers, adapter.name)
    if len(positive) != len(negative) or len(positive) < 2:
        raise FitError(f"{len(positive)} positive and {len(negative)} negative texts: give two pairs or more")
    rows = Joined(positive, negative)
    passes = 2 if estimator.reads == "tokens" else 1
    with Progress(passes * len(rows), show=progress and len(rows) > _SHORT) as bar:
        bar.phase("reading contrast pairs")
        if type(estimator) is MeanDifference:
            found = _streamed(model, positive, negative, chosen, site, scope, seed, bar)
        else:
            found = _in_memory(model, rows, estimator, chosen, site, scope, seed, batch_rows, bar)
    return SteeringFit(
        estimator=estimator.name,
        layers=chosen,
        transforms=found.transforms,
        quality=found.quality,
        positive_projection=found.positive_projection,
        negative_projection=found.negative_projection,
        residual_norm=found.residual_norm,
        site=site,
        read=scope,
        pairs=len(positive),
        provenance=replace(adapter.provenance, source=f"fit, {estimator.name}, {len(positive)} pairs"),
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """What a fit finds, see :class:`SteeringFit`."""

    transforms: tuple[Transform, ...]
    quality: FitQuality
    positive_projection: Float[Tensor, " layer"]
    negative_projection: Float[Tensor, " layer"]
    residual_norm: Float[Tensor, " layer"]


def _in_memory(
    model: Any,
    rows: Sequence[Row],
    estimator: Estimator,
    layers: Sequence[int],
    site: str,
    scope: TokenScope,
    seed: int,
    batch_rows: int,
    bar: Progress,
) -> _Found:
    """A fit that needs every activation: of all positive rows, then all negative ones."""
    pairs = len(rows) // 2
    read = capture(model, rows, site=site, scope=scope, batch_rows=batch_rows, advance=bar.advance)
    means = read.means[:, list(layers)]
    best, worst = means[:pairs], means[pairs:]
    if estimator.reads == "tokens":
        tokens = capture_tokens(
            model, rows, layers=layers, site=site, scope=scope, batch_rows=batch_rows, advance=bar.advance
        )
        fitted, quality = _fit_tokens(estimator, tokens[:pairs], tokens[pairs:], best, worst, seed)
    else:
        fitted, quality = fit_layers(estimator, best, worst), fit_quality(estimator, best, worst, seed=seed)
    return _Found(
        tuple(fitted),
        quality,
        _projections(fitted, best),
        _projections(fitted, worst),
        read.median_norm[list(layers)],
    )


def _streamed(
    model: Any,
    positive: Sequence[Row],
    negative: Sequence[Row],
    layers: Sequence[int],
    site: str,
    scope: TokenScope,
    seed: int,
    bar: Progress,
) -> _Found:
    """A fit of the mean difference, in memory that doesn't grow with the number of pairs.

    The directions of folds and halves come of sums over the pairs' differences. What must be projected on them is kept
    of some pairs only, as many of each fold.
    """
    pairs = len(positive)
    parts, halves = divided(pairs, seed=seed) if pairs >= LEAST_PAIRS else ([], [])
    judged_parts = [held[: max(2, JUDGED_PAIRS // len(parts))] if pairs > JUDGED_PAIRS else held for held in parts]
    groups = [*parts, *(first for first, _ in halves)]
    weights = torch.zeros(len(groups), pairs)
    for row, group in zip(weights, groups, strict=True):
        row[group] = 1.0
    read = capture_moments(
        model,
        positive,
        negative,
        sites=(site,),
        layers=layers,
        scope=scope,
        weights=weights,
        keep=torch.cat(judged_parts).tolist() if parts else (),
        advance=bar.advance,
    )[site]
    moments = read.moments
    check_means(moments.positive.mean, moments.negative.mean)
    fitted = tuple(Addition(vector) for vector in moments.difference.mean.float())
    quality = unknown_quality(MeanDifference.name, pairs, [float(t.vector.norm()) for t in fitted])
    if parts:
        quality = _streamed_quality(moments, judged_parts, read.kept, quality.length)
    directions = torch.stack([t.direction for t in fitted]).double()
    up, down = ((m.mean * directions).sum(-1).float() for m in (moments.positive, moments.negative))
    return _Found(fitted, quality, up, down, read.median_norm)


def _streamed_quality(
    moments: PairMoments,
    judged_parts: Sequence[Int[Tensor, " _held"]],
    kept: KeptPairs,
    length: Sequence[float],
) -> FitQuality:
    """As :func:`~sims_lens.estimators.fit_quality`; the sums are of folds, and then of a half of each halving."""
    pairs, folds = moments.difference.count, len(judged_parts)
    total = moments.difference.mean * pairs
    inside, outside = unit(moments.sums.float()), unit((total - moments.sums).float())
    projections, start = [], 0
    for fold, held in enumerate(judged_parts):
        here = slice(start, start + len(held))
        start += len(held)
        up, down = (torch.einsum("pld,ld->lp", rows, outside[fold]).double() for rows in kept.rows(here))
        projections.append((up, down))
    cosines = (inside[folds:] * outside[folds:]).sum(-1).mean(0)
    return judged(MeanDifference.name, pairs, projections, cosines.tolist(), length)


def aligned(
    positive: Sequence[Float[Tensor, "_pos layer d_model"]], negative: Sequence[Float[Tensor, "_pos layer d_model"]]
) -> tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"]]:
    """The tokens of each pair side by side by index, up to the shorter response's end, as HPR is trained."""
    lengths = [min(len(a), len(b)) for a, b in zip(positive, negative, strict=True)]
    return (
        torch.cat([a[:n] for a, n in zip(positive, lengths, strict=True)]),
        torch.cat([b[:n] for b, n in zip(negative, lengths, strict=True)]),
    )


@dataclass(frozen=True, eq=False)
class SteeringFit:
    """What :func:`fit` learnt, at every layer that it was asked for.

    Args:
        estimator: its name.
        layers: the layers.
        transforms: one per layer.
        quality: how well positive and negative are told apart on pairs that the fit has not seen, per layer.
        positive_projection: mean projection of the positive activations on the direction, per layer: what a
            :class:`~sims_lens.transforms.Clamp` can be set to.
        negative_projection: the same of the negative ones.
        residual_norm: median norm of the stream at the tokens that were read, first position left out, per layer.
            Of more than 16,384 tokens, where pairs are streamed, that of so many drawn at random.
        site: where the stream was read.
        read: the tokens that were read.
        pairs: how many.
        provenance: the model, and what was done.
    """

    estimator: str
    layers: tuple[int, ...]
    transforms: tuple[Transform, ...] = field(repr=False)
    quality: FitQuality
    positive_projection: Float[Tensor, " layer"]
    negative_projection: Float[Tensor, " layer"]
    residual_norm: Float[Tensor, " layer"]
    site: str
    read: TokenScope
    pairs: int
    provenance: Provenance

    def transform(self, layer: int) -> Transform:
        """The transform of a layer.

        Raises:
            PlanError: that layer was not fitted.
        """
        if layer not in self.layers:
            raise PlanError(f"layer {layer!r} was not fitted; {self.estimator} has layers {list(self.layers)}")
        return self.transforms[self.layers.index(layer)]

    def best(self, count: int = 1) -> tuple[int, ...]:
        """The layers with the highest held-out accuracy, ascending.

        Where pairs are easy to tell apart, many layers are equally accurate, and accuracy no longer says where steering
        works. Of equal ones those nearest to three quarters of the depth are taken, the middle of the loop's candidates
        (60, 75, 90%): a convention, not a finding. :func:`sims_lens.calibrate` over one plan per layer measures it.

        Raises:
            FitError: there were too few pairs to hold any out.
        """
        if self.pairs < LEAST_PAIRS:
            raise FitError(
                f"{self.pairs} pairs are too few to hold any out, so no layer is known to be best; give 4 pairs or "
                f"more, or name layers of {list(self.layers)}"
            )
        deep = 0.75 * (self.provenance.n_layers - 1)

        def worth(index: int) -> tuple[float, float]:
            return self.quality.accuracy[index].estimate, -abs(self.layers[index] - deep)

        check_integer("count", count, 1, error=FitError)
        order = sorted(range(len(self.layers)), key=worth, reverse=True)
        return tuple(sorted(self.layers[index] for index in order[:count]))

    def plan(
        self,
        layers: int | Sequence[int] | None = None,
        *,
        coefficient: float | None = None,
        scope: TokenScope | str = GENERATION,
        half_life: float | None = None,
    ) -> SteeringPlan:
        """A plan that applies the fitted transforms.

        Args:
            layers: where; where None, the layer with the highest held-out accuracy, or the best five of an HPR, as its
                authors do.
            coefficient: of an addition in units of the median residual norm, 0.2 where None; of any other transform
                its strength, 1 where None. :func:`sims_lens.calibrate` finds one under a fluency budget.
            scope: the tokens that are steered.
            half_life: generated tokens after which the strength has fallen by half.

        Raises:
            PlanError: a layer was not fitted, or the coefficient is not finite.
        """
        if layers is None:
            layers = self.best(1 if all(isinstance(t, Addition) for t in self.transforms) else 5)
        chosen = (layers,) if isinstance(layers, int) else tuple(layers)
        made = [self._intervention(layer, coefficient, TokenScope.of(scope), half_life) for layer in chosen]
        if not made:
            raise PlanError("layers is empty; name at least one, or leave it out for the best")
        return SteeringPlan(tuple(made), self.provenance)

    def _intervention(
        self, layer: int, coefficient: float | None, scope: TokenScope, half_life: float | None
    ) -> Intervention:
        transform = self.transform(layer)
        if not isinstance(transform, Addition):
            strength = 1.0 if coefficient is None else coefficient
            return Intervention(layer, self.site, transform, strength, scope=scope, half_life=half_life)
        norm = float(self.residual_norm[self.layers.index(layer)])
        return Intervention(
            layer,
            self.site,
            Addition(transform.direction),
            STRENGTH if coefficient is None else coefficient,
            units="residual_norm",
            scope=scope,
            residual_norm=norm if norm > 0 else None,  # NaN where only first positions were read: measured later
            half_life=half_life,
        )

    def table(self) -> "pd.DataFrame":
        """One row per layer: the quality, the mean projections of both classes, the median residual norm."""
        table = self.quality.table()
        table.index = list(self.layers)
        table.index.name = "layer"
        return table.assign(
            positive_projection=self.positive_projection.tolist(),
            negative_projection=self.negative_projection.tolist(),
            residual_norm=self.residual_norm.tolist(),
        )

    def __repr__(self) -> str:
        return f"{self._head()}\n{self.table().to_string(float_format=lambda value: f'{value:.3g}')}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._head())}</p>{self.table().to_html(float_format=lambda value: f'{value:.3g}')}"

    def _head(self) -> str:
        known = f"; best layer {self.best()[0]}" if self.pairs >= LEAST_PAIRS else ""
        if 0 < self.quality.judged < self.pairs:
            known += f" by {self.quality.judged} pairs drawn at random"
        return (
            f"SteeringFit by {self.estimator} to {self.pairs} contrast pairs of {self.provenance.model}, {self.site} "
            f"read on {self.read.name}{known}"
        )


def read_pairs(path: str | Path) -> list[tuple[str, str, str]]:
    """Read a file of contrast pairs: ``.jsonl`` with an object in each line, or ``.csv`` with a header; the keys, or
    columns, are "prompt", "positive" and "negative".

    Raises:
        FitError: the file can't be read, is of another kind, or a pair lacks a key; the message says in which line.
    """
    path = check_path(path, FitError)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or getattr(error, "reason", "")
        raise FitError(f"{path} cannot be read as UTF-8 text ({why}); check the path") from error
    try:
        if path.suffix.lower() == ".jsonl":
            items = [(n, json.loads(line)) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        elif path.suffix.lower() == ".csv":
            items = list(enumerate(csv.DictReader(text.splitlines(keepends=True)), start=2))
        else:
            raise FitError(f"{path} ends in {path.suffix!r}; pairs are read from .jsonl and .csv")
    except (ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, FitError):
            raise
        raise FitError(f"{path} is not valid {path.suffix[1:]}: {error}") from error
    for number, item in items:
        if not isinstance(item, Mapping) or not all(isinstance(item.get(key), str) for key in _KEYS):
            keys = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
            raise FitError(f"{path}, line {number}: a pair has strings under {', '.join(_KEYS)}; this has {keys}")
    if not items:
        raise FitError(f"{path} has no pairs in it; give two or more")
    return [(item["prompt"], item["positive"], item["negative"]) for _, item in items]


def _rows(adapter: Adapter, pairs: Sequence[object]) -> tuple[TokenRows, bool]:
    """Token ids of the positive and the negative of each pair in turn, and whether the pairs are of whole texts."""
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence) or len(pairs) < 2:
        count = f"{len(pairs)} of them" if isinstance(pairs, Sequence) else f"a {type(pairs).__name__}"
        raise FitError(f"pairs must be a list of two or more (prompt, positive, negative), got {count}")
    rows = TokenRows()
    sizes = set()
    for index, pair in enumerate(pairs):
        parts = _parts(index, pair)
        sizes.add(len(parts))
        if len(sizes) > 1:
            raise FitError(f"pair {index} has {len(parts)} parts, those before it have another number; use one form")
        for name, text in zip(_KEYS[-len(parts) :], parts, strict=True):
            if not len(text):
                raise FitError(f"the {name} of pair {index} is empty; leave the pair out")
        if len(parts) == 2:
            for text in parts:
                rows.append(_ids(text, adapter.encode), ())
        else:
            prompt = _ids(parts[0], adapter.encode)
            for text in parts[1:]:
                rows.append(prompt, _ids(text, adapter.encode_response))
    return rows, sizes == {2}


def _parts(index: int, pair: object) -> tuple[Text, ...]:
    if isinstance(pair, Mapping):
        if missing := [key for key in _KEYS if key not in pair]:
            raise FitError(f"pair {index} lacks {missing[0]!r}; a mapping has the keys {', '.join(_KEYS)}")
        pair = tuple(pair[key] for key in _KEYS)
    texts = pair if isinstance(pair, Sequence) and not isinstance(pair, (str, bytes)) else ()
    good = all(
        isinstance(t, str) or (isinstance(t, Sequence) and all(type(token) is int for token in t)) for t in texts
    )
    if len(texts) not in (2, 3) or not good:
        raise FitError(
            f"pair {index} is {quote(repr(pair))}; a pair is (prompt, positive, negative), or (positive, negative) of "
            "whole texts, each a string or a list of token ids"
        )
    return tuple(texts)


def _ids(text: Text, encode: Callable[[str], Sequence[int]]) -> Sequence[int]:
    return encode(text) if isinstance(text, str) else text


def _fit_tokens(
    estimator: Estimator,
    positive: Sequence[Tensor],
    negative: Sequence[Tensor],
    best: Float[Tensor, "pair layer d_model"],
    worst: Float[Tensor, "pair layer d_model"],
    seed: int,
) -> tuple[tuple[Transform, ...], FitQuality]:
    """Fit to token pairs; quality is that of whole responses in two folds, as such a fit takes long."""

    def refit(chosen: Int[Tensor, " pair"]) -> tuple[Transform, ...]:
        of = chosen.tolist()
        return fit_layers(estimator, *aligned([positive[k] for k in of], [negative[k] for k in of]))

    fitted = refit(torch.arange(len(best)))
    return fitted, held_out(estimator.name, fitted, refit, best, worst, seed=seed, folds=2, splits=0)


def _projections(transforms: Sequence[Transform], means: Float[Tensor, "pair layer d_model"]) -> Tensor:
    directions = torch.stack([t.direction for t in transforms])  # type: ignore[attr-defined]
    return torch.einsum("pld,ld->l", means, directions) / len(means)
