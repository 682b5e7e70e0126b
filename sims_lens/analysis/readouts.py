r"""What a direction writes: the tokens that it promotes and suppresses when it reaches the unembedding.

The logit lens, of a vector instead of a stream. With the stream x at the end of the last block, the model's logits are

    logits(x) = W_U^T (g * P x / s(x) + b) + b_U

where P takes the mean off (LayerNorm; nothing with RMSNorm), s(x) is the norm that the final norm divides by, g and b
its gain and bias. The *direct effect* of a direction v is the part of it that is linear in v,

    e(v) = W_U^T (g * P v)

centred over the vocabulary (a constant added to all logits changes nothing) and divided by its standard deviation over
the vocabulary, so that directions and layers compare: z. What that leaves out:

- s(x + v). With it held, logits(x + v) - logits(x) = e(v) / s: a positive scale, which changes no rank. But it isn't
  held: a large v makes s larger, which scales down the logits that were there, so that next to what v writes the model
  becomes less sure of what it would have said. For a v at right angles to P x this is of second order.
- A softcap of the logits is monotone: it keeps ranks, not distances.
- The blocks between. A direction at layer l is read and rewritten by every block above it. At late layers e(v) is most
  of what a direction does to the next token, at early layers it says little. ``texts=`` measures how much it says.

Reference: nostalgebraist 2020, "interpreting GPT: the logit lens". Ours is of directions: the norm's bias and the
unembedding's, which no direction writes, cancel.
"""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sims_lens.activations import capture_tokens, residual_norms
from sims_lens.adapter import Adapter, adapt
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.analysis.tokens import check_width, spell, visible
from sims_lens.checks import check_dimensions, check_seed
from sims_lens.errors import ConfigError, ModelError, PlanError, PromptError
from sims_lens.forced import ForcedBatch, force
from sims_lens.hooks import check_unsteered, steering
from sims_lens.plan import SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import quote
from sims_lens.run import Run
from sims_lens.sites import check_layers
from sims_lens.stats import CONFIDENCE, Interval
from sims_lens.transforms import unit_direction

if TYPE_CHECKING:
    import pandas as pd

RANDOM_DIRECTIONS = 256
"""Directions that say what chance gives."""
_ROWS = 64
"""Directions that are unembedded together: 13 MB of logits with a vocabulary of 50,000."""
_SAME_TAIL = 0.9
"""Correlation of the model's logits and the unembedded final norm that shows that nothing else lies between."""
_SURE = 1 - 1e-9


@dataclass(frozen=True)
class TokenEffect:
    """What a direction does to one token.

    Args:
        token_id: its id.
        token: what it spells.
        z: the direct effect, in standard deviations over the vocabulary; of a measured effect, the same of the change
            in log-probability.
    """

    token_id: int
    token: str
    z: float


_Effects = tuple[TokenEffect, ...]


@dataclass(frozen=True)
class Measured:
    """What the model did when it was steered along a direction, against the direct readout.

    Args:
        correlation: of the mean change of each token's log-probability with the direct effect, over the vocabulary,
            with its 95% jackknife interval over texts: too narrow with a handful of them, [-1, 1] with one.
        overlap: share of the most promoted tokens that both have (Jaccard).
        promoted: the tokens that rose most.
        suppressed: the tokens that fell most.
    """

    correlation: Interval
    overlap: float
    promoted: tuple[TokenEffect, ...] = field(repr=False)
    suppressed: tuple[TokenEffect, ...] = field(repr=False)


@dataclass(frozen=True)
class Reading:
    """The readout of one direction.

    Args:
        name: of the source.
        iteration: of a run, from 1; 0 where there is none.
        layer: where the direction is.
        site: where in the block.
        promoted: the tokens with the largest direct effect, largest first.
        suppressed: those with the smallest, smallest first.
        kurtosis: excess kurtosis of the effects over the vocabulary: 0 where they are spread as by chance (normal),
            large where a few tokens are singled out.
        random_share: share of random directions whose first token has at least this one's z, (1 + those) / (1 + all).
        shuffled_z: the largest z of the promoted tokens of the fits to shuffled labels; nan where there are none. They
            lie where the activations vary, so they are a harder control than random directions.
        measured: with ``texts``, what steering did to the model; None without.
    """

    name: str
    iteration: int
    layer: int
    site: str
    promoted: tuple[TokenEffect, ...] = field(repr=False)
    suppressed: tuple[TokenEffect, ...] = field(repr=False)
    kurtosis: float
    random_share: float
    shuffled_z: float = math.nan
    measured: Measured | None = None

    @property
    def top_z(self) -> float:
        """Of the token that is promoted most, its z."""
        return self.promoted[0].z


@dataclass(frozen=True)
class Drift:
    """How far the readouts of two directions agree.

    Args:
        name: of the later one.
        iteration: of the later one.
        layer: of the later one.
        against: "previous iteration" or "first iteration" at this layer, or "previous layer" of this iteration.
        other: the earlier one's name, or its layer.
        overlap: Jaccard overlap of the promoted tokens.
        cosine: of the effects over the vocabulary (the correlation of z).
    """

    name: str
    iteration: int
    layer: int
    against: str
    other: str
    overlap: float
    cosine: float


@dataclass(frozen=True)
class Chance:
    """What random directions of the model's width give: 95% quantiles.

    Args:
        top_z: of the first token's z.
        kurtosis: of the excess kurtosis.
        cosine: of the magnitude of the cosine of two random directions' effects. The unembedding stretches some
            directions more than others, so this is more than in a space of the vocabulary's size.
        overlap: of the Jaccard overlap of two random directions' promoted tokens.
        directions: how many.
    """

    top_z: float
    kurtosis: float
    cosine: float
    overlap: float
    directions: int = RANDOM_DIRECTIONS


@dataclass(frozen=True)
class Readout:
    """What directions write; made by :func:`readout`.

    Args:
        model: its name.
        readings: one per direction: by source, then by layer.
        drifts: agreement of readings one after another.
        chance: what random directions give.
        steered: the layers that the source steers, where it is a plan or a run.
        top: tokens in each list.
    """

    model: str
    readings: tuple[Reading, ...]
    drifts: tuple[Drift, ...] = field(repr=False)
    chance: Chance
    steered: tuple[int, ...]
    top: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in order."""
        return tuple(dict.fromkeys(r.name for r in self.readings))

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer that some source has, ascending."""
        return tuple(sorted({r.layer for r in self.readings}))

    def reading(self, layer: int | None = None, name: str | None = None) -> Reading:
        """The reading of one direction.

        Args:
            layer: None for the first steered layer that there is, else the last, where the direct effect says most.
            name: None for the last source, of a run the last iteration.

        Raises:
            PlanError: there is none.
        """
        wanted = self.names[-1] if name is None else name
        found = {r.layer: r for r in self.readings if r.name == wanted}
        if not found:
            raise PlanError(f"there is no readout of {wanted!r}; there are {', '.join(map(repr, self.names))}")
        if layer is None:
            layer = next((k for k in self.steered if k in found), max(found))
        if layer not in found:
            raise PlanError(f"there is no readout of {wanted} at layer {layer!r}; it has layers {sorted(found)}")
        return found[layer]

    def tokens(self, layer: int | None = None, name: str | None = None) -> list[str]:
        """The promoted tokens of one direction, largest effect first.

        Args:
            layer: as in :meth:`reading`.
            name: as in :meth:`reading`.
        """
        return [effect.token for effect in self.reading(layer, name).promoted]

    def table(self) -> "pd.DataFrame":
        """One row per token that a direction promotes or suppresses."""
        return self._tokens((r, r.promoted, r.suppressed) for r in self.readings)

    def measured_table(self) -> "pd.DataFrame":
        """As :meth:`table`, of the tokens whose log-probability rose and fell most; empty without ``texts``."""
        measured = ((r, r.measured) for r in self.readings)
        return self._tokens((r, m.promoted, m.suppressed) for r, m in measured if m is not None)

    def _tokens(
        self, lists: Iterator[tuple[Reading, tuple[TokenEffect, ...], tuple[TokenEffect, ...]]]
    ) -> "pd.DataFrame":
        import pandas as pd

        columns = ["name", "iteration", "layer", "sign", "rank", "token", "token_id", "z"]
        rows = [
            (r.name, r.iteration, r.layer, sign, rank, effect.token, effect.token_id, effect.z)
            for r, promoted, suppressed in lists
            for sign, effects in (("promoted", promoted), ("suppressed", suppressed))
            for rank, effect in enumerate(effects, start=1)
        ]
        return pd.DataFrame(rows, columns=columns)

    def summary(self) -> "pd.DataFrame":
        """One row per direction: how far its first tokens stand out, beside what chance gives, and with ``texts`` how
        well it foretells what steering does."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for r in self.readings:
            row: dict[str, Any] = {"name": r.name, "iteration": r.iteration, "layer": r.layer, "site": r.site}
            row |= {"top_z": r.top_z, "bottom_z": r.suppressed[0].z, "chance_z": self.chance.top_z}
            row |= {"random_share": r.random_share, "shuffled_z": r.shuffled_z}
            row |= {"kurtosis": r.kurtosis, "chance_kurtosis": self.chance.kurtosis}
            if r.measured is not None:
                c = r.measured.correlation
                row |= {"correlation": c.estimate, "correlation_low": c.low, "correlation_high": c.high}
                row |= {"overlap": r.measured.overlap}
            rows.append(row)
        return pd.DataFrame(rows)

    def drift(self) -> "pd.DataFrame":
        """One row per pair of readings that follow each other: iterations at one layer, layers of one iteration."""
        import pandas as pd

        columns = ["name", "iteration", "layer", "against", "other", "overlap", "cosine"]
        frame = pd.DataFrame([[getattr(d, column) for column in columns] for d in self.drifts], columns=columns)
        return frame.assign(chance_overlap=self.chance.overlap, chance_cosine=self.chance.cosine)

    def __repr__(self) -> str:
        lines = [*self._head()]
        for name in self.names:
            lines.append(f"  {name}")
            for r in self._shown(name):
                lines.append(f"    layer {r.layer:>2}  z {r.top_z:4.1f}  + {_listed(r.promoted)}")
                lines.append(f"              {r.suppressed[0].z:5.1f}  - {_listed(r.suppressed)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *about = map(html.escape, self._head())
        rows = []
        for name in self.names:
            for r in self._shown(name):
                cells = [name, str(r.layer), f"{r.top_z:.1f}", _listed(r.promoted, 8), _listed(r.suppressed, 8)]
                if r.measured is not None:
                    cells.append(str(r.measured.correlation))
                rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        titles = ["direction", "layer", "z of the first", "promotes", "suppresses"]
        titles += ["correlation with what steering does"] if any(r.measured for r in self.readings) else []
        top = "".join(f"<th>{title}</th>" for title in titles)
        return (
            f"<p><b>{head}</b><br>{'<br>'.join(about)}</p>"
            f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )

    def _head(self) -> list[str]:
        c, count = self.chance, len(self.readings)
        return [
            f"What {count} direction{'s write' if count != 1 else ' writes'} into the logits of {self.model}",
            f"  z: standard deviations over the vocabulary; the first token of a random direction has less than "
            f"{c.top_z:.1f} in 95 of 100 cases",
        ]

    def _shown(self, name: str) -> list[Reading]:
        """Of many layers the steered ones and some others: the rest is in the table."""
        found = [r for r in self.readings if r.name == name]
        if len(found) <= 6:
            return found
        kept = {round(k * (len(found) - 1) / 4) for k in range(5)}
        return [r for k, r in enumerate(found) if k in kept or r.layer in self.steered]


def _listed(effects: Sequence[TokenEffect], count: int = 6) -> str:
    return "  ".join(visible(effect.token) for effect in effects[:count])


def logit_effects(model: Any, vectors: Float[Tensor, "direction d_model"]) -> Float[Tensor, "direction d_vocab"]:
    """The direct effect of directions on the logits, in standard deviations over the vocabulary.

    Computed by the model's own final norm and unembedding, so that folded weights, LayerNorm and RMSNorm need nothing
    said. With f the final norm, (f(v) - f(-v)) / 2 is g * P v over a positive number; the unembedding's bias is what it
    gives for zero.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        vectors: directions in the residual stream; their length doesn't matter.

    Returns:
        z, of mean 0 and standard deviation 1 over the tokens that the tokenizer has (a vocabulary that was padded has
        more rows), float32, on the CPU.

    Raises:
        PlanError: a direction is zero, or the final norm leaves nothing of it.
    """
    adapter = adapt(model)
    adapter.check_runs()
    check_dimensions("vectors", vectors, 2, PlanError)
    if vectors.shape[1] != adapter.d_model:
        raise PlanError(f"vectors have {vectors.shape[1]} entries each, {adapter.name} has d_model = {adapter.d_model}")
    width = min(int(adapter.cfg.d_vocab), len(adapter.tokenizer))
    found = torch.empty(len(vectors), width)
    for start in range(0, len(vectors), _ROWS):
        rows = [unit_direction(v, f"direction {start + k}") for k, v in enumerate(vectors[start : start + _ROWS])]
        x = math.sqrt(adapter.d_model) * torch.stack(rows)[None].to(adapter.device, adapter.dtype)
        with torch.no_grad():
            odd = (_final_norm(adapter, x) - _final_norm(adapter, -x)) / 2  # its bias cancels
            bias = adapter.model.unembed(torch.zeros_like(x[:, :1]))
            effect = (adapter.model.unembed(odd).float() - bias.float())[0, :, :width]
        effect = effect - effect.mean(-1, keepdim=True)
        spread = effect.std(-1, keepdim=True, correction=0)
        if bool((spread <= 1e-6 * effect.abs().max().clamp(min=1.0)).any()):
            raise PlanError("a direction has no effect on the logits: the final norm or the unembedding leaves nothing")
        found[start : start + len(rows)] = (effect / spread).cpu()
    return found


def _final_norm(adapter: Adapter, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    return stream if adapter.cfg.normalization_type is None else adapter.model.ln_final(stream)


def _check_tail(adapter: Adapter) -> None:
    """Raise :class:`ModelError` where the logits aren't the unembedded final norm of the last block's stream."""
    ids = adapter.encode("a")[:8]
    tokens = torch.tensor([ids], device=adapter.device)
    with torch.no_grad():
        (stream,) = capture_tokens(adapter.model, [(ids, ())], layers=[adapter.n_layers - 1], scope="all")
        logits = adapter.logits(tokens, torch.ones_like(tokens, dtype=torch.bool), keep=1)[0, -1]
        last = stream[None, -1:, 0].to(adapter.device, adapter.dtype)
        tail = adapter.model.unembed(_final_norm(adapter, last))[0, -1]
    agreement = float(torch.corrcoef(torch.stack([logits.float(), tail.float()]))[0, 1])
    if not agreement > _SAME_TAIL:
        raise ModelError(
            f"{adapter.name} does more to the last block's stream than its final norm and unembedding (correlation "
            f"{agreement:.2f} with its own logits), so a direction can't be read out; compare texts with "
            "token_scores instead"
        )


def readout(
    model: Any,
    source: Any,
    *,
    top: int = 10,
    layers: Sequence[int] | None = None,
    texts: Sequence[tuple[str, str]] | None = None,
    coefficient: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Readout:
    """Read out what directions write into the logits, how it changes over iterations and layers, and what chance gives.

    The readout is linear in the direction and skips the blocks above it: what that means is said in
    :mod:`sims_lens.analysis.readouts`. Of twenty layers one exceeds the 95% quantile of chance by chance.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        source: as in :func:`~sims_lens.analysis.directions.directions_of`: a run (each iteration), a fit, a plan,
            vectors by layer, or several of them by name.
        top: tokens in each list.
        layers: which; all that the source has where None.
        texts: ``(prompt, response)``, a handful: the model is steered along each direction, one at a time, and the mean
            change of the next token's log-probability over the response's positions is compared with the direct effect.
            One forward pass of the layers above for each direction.
        coefficient: of that steering, in multiples of the median residual norm at the site.
        seed: of the random directions.
        progress: show a progress bar where texts are run.

    Raises:
        PlanError: the source's directions don't fit the model, one is zero, or a layer isn't there.
        ConfigError: ``top``, ``coefficient`` or ``layers`` can't be used.
        PromptError: a text isn't a pair, or is longer than the context.
        ModelError: the model's logits aren't its unembedded final norm, or a plan is attached to it.

    Reference: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    check_unsteered(model)
    adapter = adapt(model)
    vocabulary = min(int(adapter.cfg.d_vocab), len(adapter.tokenizer))
    if type(top) is not int or not 1 <= top <= vocabulary // 2:
        raise ConfigError(f"top must be an integer in 1..{vocabulary // 2}, got {top!r}")
    if isinstance(coefficient, bool) or not (isinstance(coefficient, (int, float)) and 0 < coefficient < math.inf):
        raise ConfigError(f"coefficient must be a number above 0, got {coefficient!r}")
    check_seed(seed)
    layers = None if layers is None else check_layers(layers, adapter.n_layers, adapter.name)
    sources = tuple(_restricted(d, layers) for d in directions_of(source))
    for directions in sources:
        check_width(adapter, directions)
    names = [d.name for d in sources]
    if len(set(names)) < len(names):
        raise PlanError(f"several directions share a name in {names}; give them different ones")
    _check_tail(adapter)
    rows = None if texts is None else _encoded(adapter, texts)

    chance, random_tops = _by_chance(model, adapter.d_model, top, seed)
    measure = _Texts(model, rows, coefficient) if rows is not None else None
    effects = [logit_effects(model, d.vectors) for d in sources]
    readings: list[Reading] = []
    drifts: list[Drift] = []
    count = sum(len(d.layers) for d in sources)
    with Progress(count * len(rows or ()), show=progress and measure is not None) as bar:
        for k, (d, earlier) in enumerate(zip(sources, _predecessors(sources), strict=True)):
            for at, layer in enumerate(d.layers):
                z, found = effects[k][at], None
                if measure is not None:
                    bar.phase(f"steering: {d.name}, layer {layer}")
                    found = measure.along(d, layer, z, top)
                    bar.advance(len(rows or ()))
                readings.append(_reading(model, d, layer, z, top, random_tops, found))
                for against, other in earlier:
                    if layer in sources[other].layers:
                        before = effects[other][sources[other].layers.index(layer)]
                        drifts.append(_drift(d, layer, against, sources[other].name, z, before, top))
                if at:
                    below = str(d.layers[at - 1])
                    drifts.append(_drift(d, layer, "previous layer", below, z, effects[k][at - 1], top))
    steered = source.plan.layers if isinstance(source, Run) else ()
    steered = source.layers if isinstance(source, SteeringPlan) else steered
    return Readout(
        model=adapter.name,
        readings=tuple(readings),
        drifts=tuple(drifts),
        chance=chance,
        steered=tuple(steered),
        top=top,
    )


def _restricted(found: Directions, layers: Sequence[int] | None) -> Directions:
    """The directions at some layers; their shuffled fits too."""
    if layers is None:
        return found
    chosen = tuple(sorted(layers))
    vectors = torch.stack([found.at(layer) for layer in chosen])
    kept = [found.layers.index(layer) for layer in chosen]
    return Directions(
        found.name,
        chosen,
        vectors,
        found.site,
        found.iteration,
        shuffled=None if found.shuffled is None else found.shuffled[:, kept],
        residual_norm=None if found.residual_norm is None else found.residual_norm[kept],
    )


def _predecessors(sources: Sequence[Directions]) -> list[list[tuple[str, int]]]:
    """For each source those of the same run that it is compared with: the one before it, and the first."""
    found: list[list[tuple[str, int]]] = []
    first = 0
    for k, d in enumerate(sources):
        follows = k > 0 and d.iteration > 1 and sources[k - 1].iteration == d.iteration - 1
        first = first if follows else k
        found.append([("previous iteration", k - 1), ("first iteration", first)] if follows else [])
    return found


def _drift(
    found: Directions, layer: int, against: str, other: str, z: Tensor, earlier: Float[Tensor, " d_vocab"], top: int
) -> Drift:
    overlap = _jaccard(z.topk(top).indices, earlier.topk(top).indices)
    return Drift(found.name, found.iteration, layer, against, other, overlap, float((z * earlier).mean()))


def _jaccard(left: Int[Tensor, " top"], right: Int[Tensor, " top"]) -> float:
    a, b = set(left.tolist()), set(right.tolist())
    return len(a & b) / len(a | b)


def _kurtosis(z: Float[Tensor, "*direction d_vocab"]) -> Float[Tensor, "*direction"]:
    return (z**4).mean(-1) - 3.0


def _by_chance(model: Any, d_model: int, top: int, seed: int) -> tuple[Chance, Float[Tensor, " direction"]]:
    """What random directions give, and z of the first token of each."""
    random = torch.randn(RANDOM_DIRECTIONS, d_model, generator=torch.Generator().manual_seed(seed))
    tops, kurtoses, cosines, overlaps = [], [], [], []
    for start in range(0, len(random), _ROWS):
        z = logit_effects(model, random[start : start + _ROWS])
        tops.append(z.amax(-1))
        kurtoses.append(_kurtosis(z))
        cosines.append((z[0::2] * z[1::2]).mean(-1).abs())
        best = z.topk(top).indices
        overlaps += [_jaccard(a, b) for a, b in zip(best[0::2], best[1::2], strict=True)]

    def quantile(values: Tensor) -> float:
        return float(values.quantile(CONFIDENCE))

    chance = Chance(
        top_z=quantile(torch.cat(tops)),
        kurtosis=quantile(torch.cat(kurtoses)),
        cosine=quantile(torch.cat(cosines)),
        overlap=quantile(torch.tensor(overlaps)),
    )
    return chance, torch.cat(tops)


def _reading(
    model: Any,
    found: Directions,
    layer: int,
    z: Float[Tensor, " d_vocab"],
    top: int,
    random_tops: Float[Tensor, " direction"],
    measured: Measured | None,
) -> Reading:
    shuffled = math.nan
    if found.shuffled is not None and len(found.shuffled):
        controls = found.shuffled[:, found.layers.index(layer)]
        controls = controls[controls.norm(dim=-1) > 0]
        shuffled = float(logit_effects(model, controls).max()) if len(controls) else math.nan
    promoted, suppressed = _extremes(z, adapt(model).tokenizer, top)
    above = int((random_tops >= promoted[0].z).sum())
    return Reading(
        name=found.name,
        iteration=found.iteration,
        layer=layer,
        site=found.site,
        promoted=promoted,
        suppressed=suppressed,
        kurtosis=float(_kurtosis(z)),
        random_share=(1 + above) / (1 + len(random_tops)),
        shuffled_z=shuffled,
        measured=measured,
    )


def _extremes(
    z: Float[Tensor, " d_vocab"], tokenizer: Any, top: int
) -> tuple[tuple[TokenEffect, ...], tuple[TokenEffect, ...]]:
    """The tokens with the largest and those with the smallest values."""
    both = []
    for best in (z.topk(top), z.topk(top, largest=False)):
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        both.append(tuple(TokenEffect(i, spell(tokenizer, [i])[0].text, value) for i, value in pairs))
    return both[0], both[1]


def _encoded(adapter: Adapter, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence) or not len(texts):
        raise PromptError(f"texts must be [(prompt, response), ...], got {quote(repr(texts))}")
    for index, text in enumerate(texts):
        if not (isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(t, str) for t in text)):
            raise PromptError(f"text {index} is not (prompt, response): {quote(repr(text))}")
    return [(adapter.encode(prompt), adapter.encode_response(response)) for prompt, response in texts]


class _Texts:
    """Texts that are run under one direction after another."""

    def __init__(self, model: Any, rows: Sequence[tuple[list[int], list[int]]], coefficient: float) -> None:
        self.model, self.coefficient = model, coefficient
        self.batches: list[ForcedBatch] = list(force(model, rows))
        self.norms: dict[str, dict[int, float]] = {}

    def along(self, found: Directions, layer: int, z: Float[Tensor, " d_vocab"], top: int) -> Measured:
        """What steering along a direction does to the next token, against the direct effect."""
        if found.residual_norm is not None:
            norms = {layer: float(found.residual_norm[found.layers.index(layer)])}
        else:
            if found.site not in self.norms:
                self.norms[found.site] = residual_norms(self.model, site=found.site)
            norms = self.norms[found.site]
        plan = SteeringPlan.addition(
            {layer: found.at(layer)},
            coefficient=self.coefficient,
            units="residual_norm",
            site=found.site,
            residual_norms=norms,
        )
        changes = []
        with torch.no_grad(), steering(self.model, plan):
            for batch in self.batches:
                # A log-probability is a logit less a constant of the position, which centring takes off.
                change = (batch.run(layer=layer) - batch.logits)[..., : len(z)].float()
                change = torch.where(batch.counted[..., None], change, 0.0).sum(1) / batch.counted.sum(-1, keepdim=True)
                changes.append((change - change.mean(-1, keepdim=True)).cpu())
        change = torch.cat(changes)
        mean = change.mean(0)
        measured = mean / mean.std(correction=0)
        promoted, suppressed = _extremes(measured, adapt(self.model).tokenizer, top)
        return Measured(
            correlation=_correlation(change, z),
            overlap=_jaccard(measured.topk(top).indices, z.topk(top).indices),
            promoted=promoted,
            suppressed=suppressed,
        )


def _correlation(change: Float[Tensor, "text d_vocab"], z: Float[Tensor, " d_vocab"]) -> Interval:
    """Correlation over the vocabulary of the mean change with z, with a delete-one-text jackknife interval.

    The mean of a bootstrap draw is noisier than the mean of all texts, so that its correlations all lie low; the
    jackknife draws no text twice. On Fisher's scale, where correlations near 1 have a spread.
    """
    every = change.double()
    n = len(every)

    def fisher(mean: Float[Tensor, " d_vocab"]) -> float:
        return math.atanh(min(max(float(torch.corrcoef(torch.stack([mean, z.double()]))[0, 1]), -_SURE), _SURE))

    whole = fisher(every.mean(0))
    if n == 1:
        return Interval(math.tanh(whole), -1.0, 1.0)
    left_out = torch.tensor([fisher((every.sum(0) - row) / (n - 1)) for row in every])
    error = 1.96 * float(((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())
    return Interval(math.tanh(whole), math.tanh(whole - error), math.tanh(whole + error))


__all__ = [
    "RANDOM_DIRECTIONS",
    "Chance",
    "Drift",
    "Measured",
    "Reading",
    "Readout",
    "TokenEffect",
    "logit_effects",
    "readout",
]
