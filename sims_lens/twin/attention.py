"""Causal attention over a KV memory that is laid out for many responses to each of a few prompts.

The keys and values of a prompt are kept once, whatever the number of responses to it: its rows' queries meet them in
one matrix product. What a row adds itself lies in a block that is allocated beforehand and written in place.

A row's result is the same, bit for bit, whatever stands beside it in the batch (on a CPU, where it is tested). For
that, widths are multiples of :data:`STEP` columns, matrix products have at least :data:`LEAST` rows, and what is not
there is masked at the end of a block, where it adds exact zeros.

Somebody may look inside (:class:`Inside`): then scores and weights are brought into the shape that they have in the
model, rows of one length at a time, shown, and taken back as they come.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

STEP = 16
"""Columns by which blocks grow: one vector register of 16 floats."""

LEAST = 8
"""Rows of a matrix product, at least: smaller ones take other kernels, which add in another order."""

_ALIGNED = 32
"""Length of prompts from which PyTorch's fused kernel for CPUs works in blocks of 32 queries."""

_SCORES = 1 << 24
"""Attention scores at a time where there is no fused kernel for them."""


@dataclass(frozen=True)
class Inside:
    """HookPoints inside one layer's attention; each is called with a tensor, and what it gives back takes its place.

    What they are shown is what the model's own forward pass shows them when it runs rows of one length, without
    padding. Rows of different lengths are therefore shown one length after the other: a column is the same token in
    every row, which in a padded batch it is not.

    Args:
        keys: shown all keys so far, after rotation, ``[row, key_pos, kv_head, d_head]``; what is kept of them, for the
            tokens to come, is without its edits, as in the model.
        scores: shown the scores, ``[row, head, pos, key_pos]``, minus infinity where a key is hidden.
        pattern: shown the weights, ``[row, head, pos, key_pos]``.
    """

    keys: Callable[[Tensor], Tensor] | None = None
    scores: Callable[[Tensor], Tensor] | None = None
    pattern: Callable[[Tensor], Tensor] | None = None

    def shown_keys(
        self, key: Float[Tensor, "row kv_head key_pos d_head"]
    ) -> Float[Tensor, "row kv_head key_pos d_head"]:
        """The keys as the HookPoint leaves them."""
        if self.keys is None:
            return key
        # a copy: what a hook writes in place must not be kept
        own = key.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return self.keys(own).transpose(1, 2)

    def weights(
        self,
        scores: Float[Tensor, "row head pos key_pos"],
        hidden: Bool[Tensor, "pos key_pos"] | None,
        softcap: float | None,
    ) -> Float[Tensor, "row head pos key_pos"]:
        """Attention weights of scaled scores, as the HookPoints leave them."""
        dtype = scores.dtype
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        if self.scores is not None:
            scores = self.scores(scores)
        weights = scores.softmax(-1)
        weights = torch.where(weights.isnan(), 0.0, weights)  # a hook may hide every key
        if self.pattern is not None:
            weights = self.pattern(weights)
        return weights.to(dtype)


@runtime_checkable
class Memory(Protocol):
    """What a model asks for attention: it keeps the new keys and values, as it sees fit."""

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head pos d_head"],
        value: Float[Tensor, "batch kv_head pos d_value"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        inside: Inside | None = None,
    ) -> Float[Tensor, "batch head pos d_value"]:
        """The new tokens' attention to all tokens so far, themselves included.

        Args:
            layer: which.
            query: of the new tokens, after rotation.
            key: of the new tokens, after rotation.
            value: of the new tokens.
            scale: multiplies the scores.
            window: a token sees itself and the ``window - 1`` before it; all where None.
            softcap: scores are ``softcap * tanh(scores / softcap)``.
            inside: who looks on; None where nobody does, which is faster.
        """
        ...


def columns(count: int) -> int:
    """The next multiple of :data:`STEP`.

    >>> columns(17)
    32
    """
    return -(-count // STEP) * STEP


class PromptMemory:
    """For prompts of one length, run from their first token: keeps what the prompts' responses will look back at.

    Args:
        first: the first layer that is run.
    """

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.keys: list[Float[Tensor, "prompt kv_head pos d_head"]] = []
        self.values: list[Float[Tensor, "prompt kv_head pos d_value"]] = []

    def select(self, rows: Sequence[int]) -> "PromptMemory":
        """A copy of some prompts' keys and values."""
        some = PromptMemory(self.first)
        some.keys, some.values = ([block[list(rows)] for block in kept] for kept in (self.keys, self.values))
        return some

    def above(self, first: int) -> "PromptMemory":
        """Of the layers from the first one on."""
        upper = PromptMemory(first)
        upper.keys, upper.values = self.keys[first - self.first :], self.values[first - self.first :]
        return upper

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head pos d_head"],
        value: Float[Tensor, "batch kv_head pos d_value"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        inside: Inside | None = None,
    ) -> Float[Tensor, "batch head pos d_value"]:
        """See :class:`Memory`."""
        assert layer == self.first + len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        (batch, heads, length, _), kv_heads = query.shape, key.shape[1]
        if inside is not None:
            rows = (query * scale).reshape(batch, kv_heads, -1, query.shape[-1])
            scores = (rows @ inside.shown_keys(key).mT).view(batch, heads, length, length)
            at = torch.arange(length, device=query.device)
            weights = inside.weights(scores, ~causal(at[:, None], at[None], window), softcap).expand_as(scores)
            return (weights.reshape(batch, kv_heads, -1, length) @ value).view(batch, heads, length, -1)
        if softcap is None and (window is None or window >= length):
            # the kernel's threads share out one buffer by length: at an odd place products add in another order
            pad = (0, 0, 0, columns(length) - length if length < _ALIGNED else 0)
            query, key, value = (functional.pad(part, pad) for part in (query, key, value))
            found = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
            )
            return found[:, :, :length]
        position = torch.arange(length, device=query.device)
        size = max(1, _SCORES // (batch * heads * length))
        parts = []
        for some in torch.split(position, size):
            grouped = query[:, :, some].reshape(batch, kv_heads, -1, query.shape[-1])
            scores = ((grouped * scale) @ key.mT).view(batch, kv_heads, -1, len(some), length)
            hidden = ~causal(some[:, None], position[None], window)
            weights = _softmax(scores, hidden, softcap).view(batch, kv_heads, -1, length)
            parts.append((weights @ value).view(batch, heads, len(some), -1))
        return torch.cat(parts, dim=2)


class Prefixes:
    """Keys and values of prompts, each in a slot, of whatever lengths.

    Args:
        first: the first layer that is run.
    """

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.keys: list[Float[Tensor, "slot kv_head width d_head"]] = []
        self.values: list[Float[Tensor, "slot kv_head width d_value"]] = []
        self.lengths: list[int] = []
        """Tokens of the prompt in each slot; 0 where it is free."""
        self._ahead = (0, 0)

    def reserve(self, count: int, length: int) -> None:
        """So many prompts are to be added, of that many tokens at most: room is made for all of them at once, where
        growing with each :meth:`add` would leave the memory of every smaller block behind."""
        taken = sum(own > 0 for own in self.lengths)
        self._ahead = (taken + count, columns(length))

    def add(self, memories: Sequence[PromptMemory], *, room: int = 0) -> list[int]:
        """Keep prompts, with room for more tokens of them; says in which slots."""
        lengths = [memory.keys[0].shape[2] for memory in memories for _ in memory.keys[0]]
        slots = [slot for slot, taken in enumerate(self.lengths) if not taken][: len(lengths)]
        slots += range(len(self.lengths), len(self.lengths) + len(lengths) - len(slots))
        self.lengths += [0] * (max(slots) + 1 - len(self.lengths))
        for slot, length in zip(slots, lengths, strict=True):
            self.lengths[slot] = length
        width = max(columns(max(lengths) + room), self.keys[0].shape[2] if self.keys else 0, self._ahead[1])
        rows = max(len(self.lengths), self._ahead[0])
        self._ahead = (0, 0) if len(self.lengths) >= self._ahead[0] else self._ahead
        for kept, blocks in (
            (self.keys, [memory.keys for memory in memories]),
            (self.values, [memory.values for memory in memories]),
        ):
            for layer, parts in enumerate(zip(*blocks, strict=True)):
                if len(kept) == layer:
                    kept.append(parts[0].new_zeros(0, parts[0].shape[1], width, parts[0].shape[3]))
                old = kept[layer]
                if old.shape[0] < rows or old.shape[2] < width:
                    rows = max(rows, old.shape[0])
                    kept[layer] = old.new_zeros(rows, old.shape[1], width, old.shape[3])
                    kept[layer][: old.shape[0], :, : old.shape[2]] = old
                at = 0
                for block in parts:
                    places, length = slots[at : at + len(block)], block.shape[2]
                    kept[layer][places, :, :length] = block
                    kept[layer][places, :, length:] = 0.0
                    at += len(block)
        return slots

    def lengthen(self, slots: Sequence[int], memory: "ResponseMemory") -> None:
        """Make the first own token of rows, one for each slot, the last one of the prompt in it."""
        ends = [self.lengths[slot] for slot in slots]
        for kept, own in ((self.keys, memory.keys), (self.values, memory.values)):
            for block, new in zip(kept, own, strict=True):
                block[slots, :, ends] = new[: len(slots), :, 0]
        for slot in slots:
            self.lengths[slot] += 1

    def free(self, slot: int) -> None:
        """No row looks back at this slot any more."""
        self.lengths[slot] = 0

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots; the kept ones are renumbered in the order given."""
        self.lengths = [self.lengths[slot] for slot in slots]
        for kept in (self.keys, self.values):
            for layer in range(len(kept)):
                kept[layer] = kept[layer][list(slots)]


class Grouping:
    """Which rows look back at which slot: turns rows into one grid of queries per slot, and back.

    Args:
        slots: of each row.
        count: slots in all.
        heads_per_kv: query heads for each key head; a slot's grid has at least :data:`LEAST` queries.
        device: where the rows are.
    """

    def __init__(self, slots: Sequence[int], count: int, heads_per_kv: int, device: torch.device) -> None:
        members: list[list[int]] = [[] for _ in range(count)]
        for row, slot in enumerate(slots):
            members[slot].append(row)
        self.depth = max(-(-LEAST // heads_per_kv), *map(len, members))
        self.count = count
        grid = [rows + [0] * (self.depth - len(rows)) for rows in members]
        place = [0] * len(slots)
        for slot, rows in enumerate(members):
            for index, row in enumerate(rows):
                place[row] = slot * self.depth + index
        flat = [row for rows in grid for row in rows]
        same = flat == list(range(len(slots)))
        self._grid = None if same else torch.tensor(flat, device=device)
        self._place = None if same else torch.tensor(place, device=device)

    def spread(self, rows: Float[Tensor, "row kv_head m d"]) -> Float[Tensor, "slot kv_head depth_m d"]:
        """Each slot's rows side by side; places without a row hold another row's values, which nobody reads."""
        _, kv_heads, m, d = rows.shape
        rows = rows if self._grid is None else rows.index_select(0, self._grid)
        rows = rows.view(self.count, self.depth, kv_heads, m, d).transpose(1, 2)
        return rows.reshape(self.count, kv_heads, self.depth * m, d)

    def gather(self, grid: Float[Tensor, "slot kv_head depth_m d"]) -> Float[Tensor, "row kv_head m d"]:
        """The inverse of :meth:`spread`."""
        count, kv_heads, _, d = grid.shape
        rows = grid.view(count, kv_heads, self.depth, -1, d).transpose(1, 2)
        rows = rows.reshape(count * self.depth, kv_heads, -1, d)
        return rows if self._place is None else rows.index_select(0, self._place)


class ResponseMemory:
    """For rows that go on from prompts: each row's own tokens come in steps of any width, all rows' at once.

    Args:
        prefixes: the prompts.
        slots: the prompt of each row.
        capacity: own tokens of a row, at most.
        keep: False where all of a row's own tokens come in one step, so that nothing need be kept of them.
    """

    def __init__(self, prefixes: Prefixes, slots: Sequence[int], capacity: int, *, keep: bool = True) -> None:
        self.prefixes = prefixes
        self.capacity = columns(capacity)
        self.keep = keep
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._filled: list[int] = []
        self.assign(slots)

    def assign(self, slots: Sequence[int]) -> None:
        """Say anew which prompt each row goes on from."""
        self.slots = list(slots)
        self._grouping: Grouping | None = None

    def step(self, positions: Sequence[int], width: int) -> None:
        """The tokens to come are numbers ``positions[row]`` to ``positions[row] + width - 1`` of a row's own.

        To be called before each forward pass.
        """
        self.at, self._step = list(positions), width
        self._rows: Tensor | None = None
        self._hidden: dict[int | None, Tensor] = {}
        self._alike: list[tuple[int, int, slice | Tensor, Tensor]] | None = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only."""
        for kept in (self.keys, self.values):
            for layer in range(len(kept)):
                kept[layer] = kept[layer][list(rows)]
        self.assign([self.slots[row] for row in rows])

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch kv_head pos d_head"],
        value: Float[Tensor, "batch kv_head pos d_value"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        inside: Inside | None = None,
    ) -> Float[Tensor, "batch head pos d_value"]:
        """See :class:`Memory`."""
        layer -= self.prefixes.first
        batch, heads, new, _ = query.shape
        kv_heads = key.shape[1]
        if self._grouping is None:
            count = self.prefixes.keys[0].shape[0]
            self._grouping = Grouping(self.slots, count, heads // kv_heads, query.device)
        group = self._grouping
        own_keys, own_values = self._own(layer, key, value)
        prefix_keys, prefix_values = self.prefixes.keys[layer], self.prefixes.values[layer]
        width, own = prefix_keys.shape[2], own_keys.shape[2]
        rows = (query * scale).reshape(batch, kv_heads, -1, query.shape[-1])
        scores = rows.new_empty(*rows.shape[:-1], width + own)
        if inside is None or inside.keys is None:
            scores[..., :width] = group.gather(group.spread(rows) @ prefix_keys.mT)
            scores[..., width:] = rows @ own_keys.mT
        scores = scores.view(batch, kv_heads, -1, new, width + own)
        if inside is None:
            weights = _softmax(scores, self._mask(window, width, own, query.device), softcap)
        else:
            weights = self._shown(inside, scores, rows, prefix_keys, own_keys, window=window, softcap=softcap)
        weights = weights.flatten(2, 3)
        found = weights[..., width:] @ own_values
        found += group.gather(group.spread(weights[..., :width]) @ prefix_values)
        return found.view(batch, heads, new, -1)

    def _shown(
        self,
        inside: Inside,
        scores: Float[Tensor, "row kv_head group pos all"],
        rows: Float[Tensor, "row kv_head group_pos d_head"],
        prefix_keys: Float[Tensor, "slot kv_head width d_head"],
        own_keys: Float[Tensor, "row kv_head own d_head"],
        *,
        window: int | None,
        softcap: float | None,
    ) -> Float[Tensor, "row kv_head group pos all"]:
        """The weights, laid out as the scores are, once rows of each length have been shown to who looks on.

        The scores are not looked at where the keys are shown: they are worked out anew from what comes back.
        """
        width, new = prefix_keys.shape[2], self._step
        weights = torch.zeros_like(scores)
        for length, at, members, slots in self._by_length(scores.device):
            own = at + new
            if inside.keys is None:
                some = scores[members]
                some = torch.cat([some[..., :length], some[..., width : width + own]], dim=-1).flatten(1, 2)
            else:
                keys = torch.cat([prefix_keys[slots][:, :, :length], own_keys[members][:, :, :own]], dim=2)
                some = rows[members] @ inside.shown_keys(keys).mT
                some = some.view(len(some), -1, new, length + own)
            column = torch.arange(length + own, device=scores.device)
            alone = new == 1 and (window is None or window >= length + own)
            hidden = None if alone else ~causal(column[length + at :, None], column[None], window)
            found = (
                inside.weights(some, hidden, softcap)
                .expand_as(some)
                .reshape(len(some), *scores.shape[1:4], length + own)
            )
            weights[members, ..., :length] = found[..., :length]
            weights[members, ..., width : width + own] = found[..., length:]
        return weights

    def _by_length(self, device: torch.device) -> list[tuple[int, int, slice | Tensor, Tensor]]:
        """Rows that are of one length: tokens of the prompt, own tokens before the step, which rows, their slots.

        Rows of one length whose prompts differ in length are of one length all the same, but lie in memory in another
        way: they are shown apart.
        """
        if self._alike is None:
            alike: dict[tuple[int, int], list[int]] = {}
            for row, (slot, at) in enumerate(zip(self.slots, self.at, strict=True)):
                alike.setdefault((self.prefixes.lengths[slot], at), []).append(row)
            self._alike = [
                (
                    length,
                    at,
                    slice(None) if len(alike) == 1 else torch.tensor(rows, device=device),
                    torch.tensor([self.slots[row] for row in rows], device=device),
                )
                for (length, at), rows in alike.items()
            ]
        return self._alike

    def _own(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A row's own keys and values so far, the new ones among them, up to a multiple of :data:`STEP`."""
        new = key.shape[2]
        if not self.keep:
            pad = (0, 0, 0, columns(new) - new)
            return functional.pad(key, pad), functional.pad(value, pad)
        if len(self.keys) == layer:
            for kept, block in ((self.keys, key), (self.values, value)):
                kept.append(block.new_empty(block.shape[0], block.shape[1], self.capacity, block.shape[3]))
            self._filled.append(0)
        keys, values = self.keys[layer], self.values[layer]
        if len(keys) < len(key):  # rows have joined
            keys, values = (_taller(block, len(key)) for block in (keys, values))
            self.keys[layer], self.values[layer] = keys, values
        end = columns(max(self.at) + new)
        if end > self._filled[layer]:  # what is masked must be finite all the same
            keys[:, :, self._filled[layer] : end] = 0.0
            values[:, :, self._filled[layer] : end] = 0.0
            self._filled[layer] = end
        if len(set(self.at)) == 1:  # rows in step: one block is written, instead of many places
            keys[:, :, self.at[0] : self.at[0] + new] = key
            values[:, :, self.at[0] : self.at[0] + new] = value
            return keys[:, :, :end], values[:, :, :end]
        if self._rows is None:
            self._rows = torch.arange(len(key), device=key.device)[:, None]
            at = torch.tensor(self.at, device=key.device)[:, None]
            self._columns = at + torch.arange(new, device=key.device)
        keys[self._rows, :, self._columns] = key.transpose(1, 2)
        values[self._rows, :, self._columns] = value.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]

    def _mask(self, window: int | None, width: int, own: int, device: torch.device) -> Bool[Tensor, "row 1 1 pos all"]:
        if window not in self._hidden:
            lengths = torch.tensor([self.prefixes.lengths[slot] for slot in self.slots], device=device)[:, None]
            at = torch.tensor(self.at, device=device)[:, None] + torch.arange(self._step, device=device)
            prefix = torch.arange(width, device=device).expand(len(lengths), -1)
            mine = lengths + torch.arange(own, device=device)
            # a column beyond the prompt's end stands for no token: put it after every query
            prefix = torch.where(prefix < lengths, prefix, torch.iinfo(torch.long).max)
            seen = causal((lengths + at)[:, :, None], torch.cat([prefix, mine], dim=1)[:, None], window)
            self._hidden[window] = ~seen[:, None, None]
        return self._hidden[window]


class SoloMemory(ResponseMemory):
    """For one row that goes on from one prompt, a token at a time, with nobody looking inside.

    Its tokens come to lie behind its prompt's, in one block: two small products a layer instead of four. They add in
    another order than those of :class:`ResponseMemory`, whose row is the same among others.
    """

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "1 head 1 d_head"],
        key: Float[Tensor, "1 kv_head 1 d_head"],
        value: Float[Tensor, "1 kv_head 1 d_value"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        inside: Inside | None = None,
    ) -> Float[Tensor, "1 head 1 d_value"]:
        """See :class:`Memory`."""
        assert inside is None
        layer -= self.prefixes.first
        (slot,), (at,) = self.slots, self.at
        length = self.prefixes.lengths[slot]
        if len(self.keys) == layer:
            for kept, prompts in ((self.keys, self.prefixes.keys), (self.values, self.prefixes.values)):
                prompt = prompts[layer]
                block = prompt.new_empty(1, prompt.shape[1], length + self.capacity, prompt.shape[3])
                block[:, :, :length] = prompt[slot, :, :length]
                kept.append(block)
        keys, values, end = self.keys[layer], self.values[layer], length + at + 1
        keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = key, value
        seen = slice(0 if window is None else max(0, end - window), end)
        heads, kv_heads = query.shape[1], key.shape[1]
        scores = (query * scale).view(1, kv_heads, heads // kv_heads, -1) @ keys[:, :, seen].mT
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        return (weights @ values[:, :, seen]).view(1, heads, 1, -1)


def causal(query: Int[Tensor, "*query"], key: Int[Tensor, "*key"], window: int | None) -> Bool[Tensor, "*both"]:
    """Whether a token at position ``query`` sees one at position ``key``, by broadcasting.

    >>> causal(torch.tensor([[2]]), torch.arange(4)[None], 2).tolist()
    [[False, True, True, False]]
    """
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _softmax(
    scores: Float[Tensor, "batch kv_head group pos all"], hidden: Bool[Tensor, "*all"], softcap: float | None
) -> Float[Tensor, "batch kv_head group pos all"]:
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)  # in place: nobody else has them
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _taller(block: Tensor, rows: int) -> Tensor:
    grown = block.new_zeros(rows, *block.shape[1:])
    grown[: len(block)] = block
    return grown


__all__ = [
    "LEAST",
    "STEP",
    "Grouping",
    "Inside",
    "Memory",
    "PromptMemory",
    "Prefixes",
    "ResponseMemory",
    "SoloMemory",
    "causal",
    "columns",
]
