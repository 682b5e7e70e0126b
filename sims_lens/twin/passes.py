"""Forward passes on a twin: prompts, each once; and given responses to them, teacher-forced."""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.cost import TokenCount
from sims_lens.twin.attention import Prefixes, PromptMemory, ResponseMemory
from sims_lens.twin.base import Cut, Points, Twin

PREFILL_TOKENS = 2048
"""Prompt tokens in one forward pass, about."""

BODY_BYTES = 1 << 28
"""Keys and values of prompts that are kept from one plan to the next, at most."""


class Bodies:
    """What a model makes of prompts before their last token: the same under all plans that spare the prompt.

    Args:
        twin: the model; what is kept is its own.
        limit: bytes, at most; what was put down first goes first.
    """

    def __init__(self, twin: Twin, limit: int = BODY_BYTES) -> None:
        self.twin, self.limit = twin, limit
        self._kept: dict[tuple[int, ...], PromptMemory] = {}
        self._size = 0
        self._lock = threading.Lock()

    def get(self, prompt: Sequence[int]) -> PromptMemory | None:
        """The keys and values of a prompt without its last token, where they are kept."""
        return self._kept.get(tuple(prompt))

    def put(self, prompt: Sequence[int], body: PromptMemory) -> None:
        """Keep them, if there is room at all."""
        size, key = _bytes(body), tuple(prompt)
        with self._lock:
            if size > self.limit or key in self._kept:
                return
            self._kept[key] = body
            self._size += size
            while self._size > self.limit:
                self._size -= _bytes(self._kept.pop(next(iter(self._kept))))


def _bytes(body: PromptMemory) -> int:
    return sum(block.nbytes for block in (*body.keys, *body.values))


class Beside:
    """The model without a plan, beside the model with it: the same tokens, and only the upper blocks are run again.

    Args:
        block: the first one that the plan acts in; below it both are the same.
        blocks: how many the model has.
        unsteered: a ``with`` block in which the plan does not act.
    """

    def __init__(self, block: int, blocks: int, unsteered: Callable[[], AbstractContextManager[None]]) -> None:
        self.block, self.unsteered = block, unsteered
        self.share = 1.0 - block / blocks
        self.count = TokenCount()
        """What was run, until somebody takes it."""
        self.prefixes = Prefixes(block)
        self.memory: ResponseMemory | None = None
        self.logits: dict[int, Float[Tensor, " d_vocab"]] = {}
        """At the last token of the prompt in each slot."""
        self.places: list[int | None] = []
        """Of the rows beside, which of the rows each goes with; None where it is free."""

    def run_prompts(self, twin: Twin, tokens: Tensor, positions: Tensor, points: Points, cut: Cut, count: int) -> None:
        """Run the upper blocks for prompts that have just been run; keys and values of ``count`` of them are kept."""
        memory = PromptMemory(self.block)
        with self.unsteered():
            last = twin.logits(tokens, positions, memory, keep=1, points=points, cut=cut)[:, -1]
        for slot, row in zip(self.prefixes.add([memory.select(range(count))]), last, strict=False):
            self.logits[slot] = row.clone()
        self._counted([tokens.shape[1]] * count, whole=True)

    def run_last(
        self, twin: Twin, prompts: Sequence[Sequence[int]], slots: Sequence[int], points: Points, cut: Cut
    ) -> None:
        """Run the upper blocks for the last tokens of prompts, which have just been run."""
        with self.unsteered():
            last = _run_last(twin, prompts, slots, self.prefixes, points, cut)
        self.logits |= dict(zip(slots, last, strict=True))
        self._counted([len(prompt) for prompt in prompts])

    def _counted(self, lengths: Sequence[int], *, whole: bool = False) -> None:
        """Add passes over last tokens of sequences of these lengths, or over whole ones."""
        ran = TokenCount.forced(lengths)
        tokens, attended = (ran.prefill, ran.attended) if whole else (len(lengths), sum(lengths))
        self.count.take(TokenCount(beside=self.share * tokens, attended=self.share * attended, logits=len(lengths)))

    def join(self, place: int, slot: int, capacity: int) -> None:
        """The row in a place, which goes on from the prompt in a slot, is to be run beside from now on."""
        if None in self.places:
            at = self.places.index(None)
            self.places[at] = place
        else:
            at = len(self.places)
            self.places.append(place)
        if self.memory is None:
            self.memory = ResponseMemory(self.prefixes, [], capacity)
        slots = self.memory.slots + [slot] * (len(self.places) - len(self.memory.slots))
        slots[at] = slot
        self.memory.assign(slots)

    def leave(self, place: int) -> None:
        """The row in a place is done."""
        if place in self.places:
            self.places[self.places.index(place)] = None

    def keep(self, places: Sequence[int]) -> None:
        """Only the rows in these places are left; they are renumbered in this order."""
        if self.memory is None:
            return
        new = {old: number for number, old in enumerate(places)}
        kept = [at for at, place in enumerate(self.places) if place in new]
        self.places = [new[place] for at in kept if (place := self.places[at]) is not None]
        self.memory.select(kept)

    def keep_prompts(self, slots: Sequence[int], renamed: dict[int, int]) -> None:
        """Only these slots are left; the rows of others are done."""
        self.prefixes.keep(slots)
        if self.memory is not None:
            self.memory.assign([renamed.get(slot, 0) for slot in self.memory.slots])

    def run_step(
        self, twin: Twin, tokens: Tensor, positions: Tensor, points: Points, cut: Cut, like: ResponseMemory
    ) -> dict[int, Float[Tensor, " d_vocab"]]:
        """Run the upper blocks for newest tokens, which have just been run with memory ``like``; logits by place."""
        if self.memory is None or all(place is None for place in self.places):
            return {}
        chosen = [0 if place is None else place for place in self.places]
        rows = torch.tensor(chosen, device=tokens.device)
        self.memory.step([0 if place is None else like.at[place] for place in self.places], 1)
        assert cut.stream is not None
        upper = Cut(cut.block, cut.stream[rows])
        with self.unsteered():
            found = twin.logits(tokens[rows], positions[rows], self.memory, keep=1, points=points, cut=upper)[:, -1]
        lengths = [self.prefixes.lengths[slot] for slot in self.memory.slots]
        told = zip(self.places, lengths, strict=True)
        self._counted([length + like.at[place] + 1 for place, length in told if place is not None])
        return {place: row for place, row in zip(self.places, found, strict=True) if place is not None}


def run_prompts(
    twin: Twin,
    prompts: Sequence[Sequence[int]],
    prefixes: Prefixes,
    *,
    device: torch.device,
    points: Points,
    before: Callable[[int, int], None],
    beside: Beside | None = None,
    bodies: Bodies | None = None,
) -> tuple[list[int], Float[Tensor, "prompt d_vocab"], TokenCount]:
    """Run prompts, those of one length together, so that nothing is padded.

    Args:
        twin: the model.
        prompts: token ids, none empty.
        prefixes: where their keys and values are kept.
        device: the model's.
        points: HookPoints to fire.
        before: called before each pass with its width and the length of its prompts.
        beside: also run the prompts as it says.
        bodies: all tokens of a prompt but the last are looked up here, or run and kept here: where nothing that is
            attached acts on them or looks at them.

    Returns:
        The slot of each prompt, the logits at its last token, and what was run.
    """
    slots, logits = [0] * len(prompts), [torch.empty(0)] * len(prompts)
    apart = [bodies is not None and len(prompt) > 1 for prompt in prompts]
    spent = TokenCount(logits=len(prompts))
    prefixes.reserve(len(prompts), max(map(len, prompts)))
    for length, group in _by_length(prompts, [i for i, own in enumerate(apart) if not own]):
        ids = [list(prompts[index]) for index in group]
        count = len(ids)
        positions = torch.arange(length, device=device).expand(len(ids), -1)
        memory = PromptMemory()
        before(length, length)
        tokens, cut = torch.tensor(ids, device=device), None if beside is None else Cut(beside.block)
        last = twin.logits(tokens, positions, memory, keep=1, points=points, cut=cut)[:, -1]
        if beside is not None and cut is not None:
            beside.run_prompts(twin, tokens, positions, points, cut, count)
        spent.take(TokenCount.forced([length] * count))
        for index, slot, row in zip(group, prefixes.add([memory.select(range(count))]), last, strict=False):
            slots[index], logits[index] = slot, row.clone()
    some = [index for index, own in enumerate(apart) if own]
    if bodies is None or not some:
        return slots, torch.stack(logits), spent
    found, ran = _bodies(twin, [prompts[index] for index in some], bodies, device, before)
    asked, places = [prompts[index] for index in some], prefixes.add(found, room=1)
    if beside is not None:  # where no plan has acted yet, both are the same
        beside.prefixes.add([body.above(beside.block) for body in found], room=1)
    cut = None if beside is None else Cut(beside.block)
    before(1, 1)
    for index, slot in zip(some, places, strict=True):
        slots[index] = slot
    for index, row in zip(some, _run_last(twin, asked, places, prefixes, points, cut), strict=True):
        logits[index] = row
    if beside is not None and cut is not None:
        beside.run_last(twin, asked, places, points, cut)
    spent.take(ran)
    spent.take(TokenCount(prefill=len(some), attended=sum(map(len, asked))))
    return slots, torch.stack(logits), spent


def _bodies(
    twin: Twin,
    prompts: Sequence[Sequence[int]],
    bodies: Bodies,
    device: torch.device,
    before: Callable[[int, int], None],
) -> tuple[list[PromptMemory], TokenCount]:
    """The bodies of prompts, and what was run for them. No HookPoint fires: nobody looks at them."""
    found = [bodies.get(prompt) for prompt in prompts]
    ran = TokenCount()
    for length, group in _by_length(prompts, [i for i, body in enumerate(found) if body is None]):
        ids = [list(prompts[index][:-1]) for index in group]
        positions = torch.arange(length - 1, device=device).expand(len(ids), -1)
        memory = PromptMemory()
        before(length - 1, length)
        twin.logits(torch.tensor(ids, device=device), positions, memory, keep=1, points={})
        ran.take(TokenCount.forced([length - 1] * len(group), logits=len(group)))
        for row, index in enumerate(group):
            body = memory.select([row])
            found[index] = body
            bodies.put(prompts[index], body)
    return [body for body in found if body is not None], ran


def _run_last(
    twin: Twin,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    prefixes: Prefixes,
    points: Points,
    cut: Cut | None,
) -> Float[Tensor, "prompt d_vocab"]:
    """Run the last tokens of prompts whose bodies lie in slots, and put them there too."""
    memory = ResponseMemory(prefixes, slots, 1)
    memory.step([0] * len(slots), 1)
    device = prefixes.keys[0].device
    tokens = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)
    positions = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=device)
    last = twin.logits(tokens, positions, memory, keep=1, points=points, cut=cut)[:, -1]
    prefixes.lengthen(slots, memory)
    return last


def _by_length(prompts: Sequence[Sequence[int]], indices: Iterable[int]) -> list[tuple[int, list[int]]]:
    """Some prompts in groups of one length, each of about :data:`PREFILL_TOKENS` tokens at most."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(len(prompts[index]), []).append(index)
    return [
        (length, group[start : start + size])
        for length, group in groups.items()
        for size in (max(1, PREFILL_TOKENS // length),)
        for start in range(0, len(group), size)
    ]


def run_responses(
    twin: Twin,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[tuple[int, Sequence[int]]],
    *,
    device: torch.device,
    points: Points,
    before: Callable[[int, bool], None],
) -> Float[Tensor, "row pos d_vocab"]:
    """Logits that predict each token of each response, as :meth:`Adapter.response_logits` gives them.

    Args:
        twin: the model.
        prompts: token ids.
        responses: index of the prompt, and response token ids.
        device: the model's.
        points: HookPoints to fire.
        before: called before each pass with its width and whether it is of prompts.
    """
    prefixes = Prefixes()
    slots, first, _ = run_prompts(
        twin, prompts, prefixes, device=device, points=points, before=lambda width, _length: before(width, True)
    )
    rows = [index for index, _ in responses]
    inputs = [list(tokens[:-1]) for _, tokens in responses]
    width = max(len(row) for row in inputs)
    start = first[rows][:, None]
    if width == 0:
        return start
    memory = ResponseMemory(prefixes, [slots[index] for index in rows], width, keep=False)
    memory.step([0] * len(rows), width)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in inputs], device=device)
    lengths = torch.tensor([len(prompts[index]) for index in rows], device=device)
    positions = lengths[:, None] + torch.arange(width, device=device)
    longest = max(len(prompts[index]) + len(row) for index, row in zip(rows, inputs, strict=True))
    positions = positions.clamp(max=longest - 1)  # padding must not lie beyond the context
    before(width, False)
    rest = twin.logits(tokens, positions, memory, keep=width, points=points)
    return torch.cat([start, rest], dim=1)


__all__ = ["Beside", "Bodies", "run_prompts", "run_responses"]
