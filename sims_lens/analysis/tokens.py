"""A text, token by token: how far the stream lies along a direction, steered against not."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import capture_tokens, residual_norms
from sims_lens.adapter import Adapter, adapt
from sims_lens.analysis.directions import Directions, directions_of
from sims_lens.checks import shown
from sims_lens.errors import PlanError, PromptError
from sims_lens.hooks import check_plan, check_unsteered, steering
from sims_lens.plan import SteeringPlan
from sims_lens.prompts import quote
from sims_lens.run import Run
from sims_lens.scope import Region, left_padded_regions
from sims_lens.transforms import unit_direction

if TYPE_CHECKING:
    import pandas as pd

Text = str | tuple[str, str]
"""A prompt, or a prompt and a response to it."""

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 6
"""Tokens that one character may be cut into: four bytes, and room for what stands before them."""
_NAMED_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BLUE, _VERMILLION = "40, 140, 210", "213, 94, 0"  # as in the figures; a lighter blue, to be seen on a dark page
_STRONGEST = 0.62
"""Opacity of the strongest colour: text stays readable on it, on a light page and on a dark one."""
_SATURATED = 0.95
"""The share of values that the colour scale covers; a few tokens with massive activations would wash out the rest."""


@dataclass(frozen=True)
class Token:
    """A token as it is shown.

    Args:
        id: its id.
        text: what it spells, special tokens included; of a character that is cut into several tokens, the whole
            character.
        part: which of the tokens of such a character it is, counted from 1.
        parts: how many tokens there are of it; 1 nearly always.
    """

    id: int
    text: str
    part: int = 1
    parts: int = 1

    @property
    def label(self) -> str:
        """On one line, with everything visible; see :func:`visible`."""
        return visible(self.text) + (f"⟨{self.part}/{self.parts}⟩" if self.parts > 1 else "")


def visible(text: str) -> str:
    r"""Text in which white space and what has no shape can be seen, on one line.

    Spaces become ``␣``, newlines ``⏎``; what else isn't printable (control characters, and those that change the
    direction of writing) is written as an escape.

    >>> visible(" so\n\t\x1b")
    '␣so⏎⇥\\x1b'
    """
    names = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    shown = (names.get(c, c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
    return "".join(shown)


def spell(tokenizer: Any, ids: Sequence[int]) -> tuple[Token, ...]:
    """What each of some consecutive tokens spells.

    Byte-level tokenizers cut a rare character, an emoji for instance, into several tokens, none of which decodes to
    anything: those are decoded together. A leading space is kept, also where a tokenizer drops it from a lone token.

    Args:
        tokenizer: of the model.
        ids: token ids.
    """
    found: list[Token] = []
    while len(found) < len(ids):
        start = len(found)
        text = _decoded(tokenizer, ids[start : start + 1])
        size = 1
        while _REPLACEMENT in text and size < min(_LONGEST_CHARACTER, len(ids) - start):
            size += 1
            text = _decoded(tokenizer, ids[start : start + size])
        if _REPLACEMENT in text:  # half a character, or none
            found.append(Token(int(ids[start]), _bytes_of(tokenizer, ids[start])))
        else:
            found += [Token(int(i), text, part, size) for part, i in enumerate(ids[start : start + size], start=1)]
    return tuple(found)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    piece = str(tokenizer.convert_ids_to_tokens(int(ids[0])))
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def _bytes_of(tokenizer: Any, token: int) -> str:
    """The bytes of a token that is no text by itself, as ``<F0 9F>``; its name where they aren't known."""
    piece = tokenizer.convert_ids_to_tokens(int(token))
    if piece is None:  # a row of the embedding that the tokenizer doesn't use
        return f"<{int(token)}>"
    table = _byte_alphabet()
    if not _NAMED_BYTE.fullmatch(piece) and all(c in table for c in piece):
        return f"<{' '.join(f'{table[c]:02X}' for c in piece)}>"
    return str(piece)


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: printable Latin-1 stands for itself, the rest follow
    from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + k): byte for k, byte in enumerate(rest)}


@dataclass(frozen=True, eq=False)
class TokenScores:
    """How far the stream lies along a direction at each token of a text; made by :func:`token_scores`.

    Args:
        name: of the direction.
        site: where in the block.
        tokens: the text.
        regions: "prompt", "last_prompt" or "response" for each token.
        layers: ascending.
        unsteered: projection of the stream on the unit direction, absolute.
        steered: the same with the plan attached; None without a plan.
        residual_norm: median norm of the stream at the site, first position left out: what a relative score is in.
        plan: what the model was steered with; None without a plan.
    """

    name: str
    site: str
    tokens: tuple[Token, ...] = field(repr=False)
    regions: tuple[str, ...] = field(repr=False)
    layers: tuple[int, ...]
    unsteered: Float[Tensor, "layer pos"] = field(repr=False)
    steered: Float[Tensor, "layer pos"] | None = field(repr=False)
    residual_norm: Float[Tensor, " layer"] = field(repr=False)
    plan: SteeringPlan | None = field(repr=False)

    @property
    def layer(self) -> int:
        """The layer that is shown where none is named: the first that the plan steers, else the middle one."""
        steered = [layer for layer in self.layers if self.plan is not None and layer in self.plan.layers]
        return steered[0] if steered else self.layers[len(self.layers) // 2]

    def at(self, layer: int | None = None) -> dict[str, Float[Tensor, " pos"]]:
        """Scores of a layer in multiples of the median residual norm: "unsteered" and, with a plan, "steered".

        Args:
            layer: None for :attr:`layer`.

        Raises:
            PlanError: that layer wasn't scored.
        """
        chosen = self.layer if layer is None else layer
        if chosen not in self.layers:
            raise PlanError(f"layer {layer!r} was not scored; {self.name} has layers {list(self.layers)}")
        index = self.layers.index(chosen)
        rows = {"unsteered": self.unsteered} | ({} if self.steered is None else {"steered": self.steered})
        return {name: values[index] / self.residual_norm[index] for name, values in rows.items()}

    def limit(self, layer: int | None = None) -> float:
        """Where the colours end, in multiples of the median residual norm: the 95th percentile of the scores'
        magnitudes, steered or not, first position left out.

        Args:
            layer: as in :meth:`at`.
        """
        values = torch.stack([v[1:] for v in self.at(layer).values()]).abs().flatten()
        return max(float(values.quantile(_SATURATED)), 1e-9) if len(values) else 1.0

    def table(self) -> "pd.DataFrame":
        """One row per layer and token: ``unsteered`` and ``steered`` are absolute projections, ``*_relative`` are in
        multiples of ``residual_norm``; ``first`` marks the first position, whose massive activations say little."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for k, layer in enumerate(self.layers):
            norm = float(self.residual_norm[k])
            for position, (token, region) in enumerate(zip(self.tokens, self.regions, strict=True)):
                before = float(self.unsteered[k, position])
                after = float("nan") if self.steered is None else float(self.steered[k, position])
                rows.append(
                    {
                        "layer": layer,
                        "position": position,
                        "token": token.text,
                        "token_id": token.id,
                        "part": token.part,
                        "region": region,
                        "first": position == 0,
                        "unsteered": before,
                        "steered": after,
                        "unsteered_relative": before / norm,
                        "steered_relative": after / norm,
                        "residual_norm": norm,
                    }
                )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        lines = [self._head(), f"  layer {self.layer}, multiples of the median residual norm:"]
        for name, values in self.at().items():
            means = [f"{region} {mean:+.3f}" for region, mean in self._means(values).items()]
            lines.append(f"  {name:<10} mean over {', '.join(means)}")
        return "\n".join(lines)

    def _head(self) -> str:
        layers = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        steered = "" if self.steered is None else ", unsteered and steered"
        return f"Projection on {self.name} at {self.site}: {len(self.tokens)} tokens, {layers}{steered}"

    def _means(self, values: Float[Tensor, " pos"]) -> dict[str, float]:
        """Mean over the prompt (first position left out) and over the response."""
        response = torch.tensor([region == "response" for region in self.regions])
        first = torch.arange(len(values)) == 0
        masks = {"prompt": ~response & ~first, "response": response}
        return {name: float(values[mask].mean()) for name, mask in masks.items() if bool(mask.any())}

    def _repr_html_(self) -> str:
        return self.html()

    def html(self, layer: int | None = None) -> str:
        """The text with each token on a colour, unsteered and steered, as HTML without scripts.

        Args:
            layer: None for :attr:`layer`.

        Raises:
            PlanError: that layer wasn't scored.
        """
        rows, limit = self.at(layer), self.limit(layer)
        chosen = self.layer if layer is None else layer
        norm = float(self.residual_norm[self.layers.index(chosen)])
        parts = [f"<div><b>{html.escape(self._head())}</b> (shown: layer {chosen})</div>"]
        for name, values in rows.items():
            means = ", ".join(f"{region} {mean:+.3f}" for region, mean in self._means(values).items())
            spans = "".join(self._span(k, rows, name, limit) for k in range(len(self.tokens)))
            parts.append(f'<div style="margin-top:.7em"><b>{name}</b> (mean: {means})</div>')
            parts.append(f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.8">{spans}</div>')
        shades = ", ".join(_colour(x, 1.0) for x in (-1.0, -0.75, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0))
        bar = "display:inline-block;width:9em;height:.9em;vertical-align:middle;"
        bar += f"background:linear-gradient(90deg, {shades})"
        parts.append(
            f'<div style="margin-top:.7em;font-size:.9em">{-limit:+.2f} <span style="{bar}"></span> {limit:+.2f} '
            f"&times; the median residual norm ({norm:.4g}); colours saturate there. Underlined: response. Dashed: "
            "first position, not coloured.</div>"
        )
        return f'<div style="font-family:system-ui,sans-serif">{"".join(parts)}</div>'

    def _span(self, k: int, rows: dict[str, Float[Tensor, " pos"]], name: str, limit: float) -> str:
        token = self.tokens[k]
        numbers = "; ".join(f"{row} {float(values[k]):+.3f}" for row, values in rows.items())
        title = html.escape(f"{k}: {token.label} ({self.regions[k].replace('_', ' ')}): {numbers}")
        style = "unicode-bidi:isolate;border-radius:2px;padding:1px 0;margin-right:1px"
        style += ";border:1px dashed" if k == 0 else f";background:{_colour(float(rows[name][k]), limit)}"
        style += ";border-bottom:2px solid" if self.regions[k] == "response" else ""
        return f'<span title="{title}" style="{style}">{html.escape(_flowing(token))}</span>'


def _flowing(token: Token) -> str:
    """A token within running text: spaces stay spaces, a newline is shown and made."""
    if token.part > 1:
        return "·"
    if not token.text.strip(" "):
        return visible(token.text)
    pieces = [" " if c == " " else visible(c) + ("\n" if c == "\n" else "") for c in token.text]
    return "".join(pieces)


def _colour(value: float, limit: float) -> str:
    """Blue for negative, vermillion for positive, clear at zero: the page shows through, so that its text stays
    readable on it.

    >>> _colour(-2.0, 1.0)
    'rgba(40, 140, 210, 0.62)'
    """
    share = min(abs(value) / limit, 1.0)
    return f"rgba({_BLUE if value < 0 else _VERMILLION}, {_STRONGEST * share**0.7:.2f})"


def token_scores(
    model: Any, text: Text, source: Any, *, layer: int | None = None, plan: SteeringPlan | None = None
) -> TokenScores:
    """Project the stream at every token of a text on a direction, of the model as it is and steered.

    The text is given, not sampled (teacher forcing): both models read the same tokens, so that what differs is the
    plan's doing. A score is the component of the stream along the unit direction, h . v / |v|. At the layer where a
    plan adds that very direction the steered score differs by what was added; above it, by what became of that. Scores
    are not centred: a direction that the whole stream leans to gives every token a score.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        text: ``(prompt, response)``, or a prompt alone; an instruct model sees the prompt in its chat template.
        source: one set of directions, as in :func:`~sims_lens.analysis.directions.directions_of`; a run's last
            iteration.
        layer: one layer; every layer that the source has where None.
        plan: what the steered model is steered with. By default the source itself where it is a plan, or a run's plan;
            otherwise nothing is steered. ``SteeringPlan(())`` for none.

    Raises:
        PlanError: the source has several directions at a layer, or none at ``layer``; it or the plan does not fit.
        PromptError: a text is empty or white space, or has more tokens than the context.
        ModelError: a plan is attached to the model.
    """
    check_unsteered(model)
    adapter = adapt(model)
    found = _one(source)
    if layer is not None:
        vector, norm = found.at(layer), found.residual_norm
        known = None if norm is None else norm[found.layers.index(layer)][None]
        found = Directions(found.name, (layer,), vector[None], found.site, residual_norm=known)
    check_width(adapter, found)
    row = _encoded(adapter, text)
    if plan is not None:
        check_plan(plan)
    if plan is None:
        plan = source.plan if isinstance(source, Run) else source if isinstance(source, SteeringPlan) else None
    pairs = zip(found.layers, found.vectors, strict=True)
    units = torch.stack([unit_direction(vector, f"{found.name} at layer {at}") for at, vector in pairs])

    def project() -> Float[Tensor, "layer pos"]:
        (streams,) = capture_tokens(model, [row], layers=found.layers, site=found.site, scope="all")
        return torch.einsum("pld,ld->lp", streams, units)

    unsteered, steered = project(), None
    norms = found.residual_norm
    if norms is None:
        measured = residual_norms(model, site=found.site)
        norms = torch.tensor([measured[at] for at in found.layers])
    if plan is not None and plan.interventions:
        with steering(model, plan):
            steered = project()
    prompt, response = row
    length = len(prompt) + len(response)
    regions = left_padded_regions([len(prompt)], [length], length)[0].tolist()
    return TokenScores(
        name=found.name,
        site=found.site,
        tokens=spell(adapter.tokenizer, [*prompt, *response]),
        regions=tuple(Region(code).name.lower() for code in regions),
        layers=found.layers,
        unsteered=unsteered,
        steered=steered,
        residual_norm=norms.float(),
        plan=None if steered is None else plan,
    )


def check_width(adapter: Adapter, found: Directions) -> None:
    """Raise :class:`PlanError` unless the directions have the model's width and layers."""
    width = found.vectors.shape[1]
    if width != adapter.d_model:
        raise PlanError(f"{found.name} has vectors of {width} entries, {adapter.name} has d_model = {adapter.d_model}")
    outside = [layer for layer in found.layers if not 0 <= layer < adapter.n_layers]
    if outside:
        raise PlanError(f"{found.name} has a vector for layer {outside[0]}, {adapter.name} has {adapter.n_layers}")


def _one(source: Any) -> Directions:
    several = directions_of(source)
    if not several:
        raise PlanError(f"the source has no directions: {shown(source)}")
    if len(several) > 1 and not isinstance(source, Run):
        names = ", ".join(d.name for d in several)
        raise PlanError(f"token scores need one set of directions, the source has {len(several)} ({names}): pass one")
    return several[-1]


def _encoded(adapter: Adapter, text: Text) -> tuple[list[int], list[int]]:
    if not (isinstance(text, str) or (isinstance(text, tuple) and [type(t) for t in text] == [str, str])):
        raise PromptError(f"a text is a prompt or (prompt, response), got {quote(repr(text))}")
    prompt, response = (text, None) if isinstance(text, str) else text
    for what, given in (("prompt", prompt), ("response", response)):
        if given is not None and not given.strip():
            raise PromptError(f"the {what} is {given!r}: it has no tokens to score; give one with text in it")
    row = adapter.encode(prompt), [] if response is None else adapter.encode_response(response)
    if len(row[0]) + len(row[1]) > adapter.n_ctx:
        length = len(row[0]) + len(row[1])
        raise PromptError(f"the text has {length} tokens, the context {adapter.n_ctx}: shorten {shown(text)}")
    return row


__all__ = ["Text", "Token", "TokenScores", "check_width", "spell", "token_scores", "visible"]
