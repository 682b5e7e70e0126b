"""Forward passes on a twin: prompts, each once; and given responses to them, teacher-forced."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.twin.attention import Prefixes, PromptMemory, ResponseMemory
from sims_lens.twin.base import Cut, Points, Twin

PREFILL_TOKENS = 2048
"""Prompt tokens in one forward pass, about."""


@dataclass
class Beside:
    """The model without a plan, beside the model with it: the same tokens, and only the upper blocks are run again.

    Args:
        block: the first one that the plan acts in; below it both are the same.
        unsteered: a ``with`` block in which the plan does not act.
    """

    block: int
    unsteered: Callable[[], AbstractContextManager[None]]

    def __post_init__(self) -> None:
        self.prefixes = Prefixes(self.block)
        self.memory: ResponseMemory | None = None
        self.logits: dict[int, Float[Tensor, " d_vocab"]] = {}
        """At the last token of the prompt in each slot."""

    def run_prompts(self, twin: Twin, tokens: Tensor, positions: Tensor, points: Points, cut: Cut, count: int) -> None:
        """Run the upper blocks for prompts that have just been run; keys and values of ``count`` of them are kept."""
        memory = PromptMemory(self.block)
        with self.unsteered():
            last = twin.logits(tokens, positions, memory, keep=1, points=points, cut=cut)[:, -1]
        memory.keys = [block[:count] for block in memory.keys]
        memory.values = [block[:count] for block in memory.values]
        for slot, row in zip(self.prefixes.add(memory), last, strict=False):
            self.logits[slot] = row.clone()

    def run_step(
        self, twin: Twin, tokens: Tensor, positions: Tensor, points: Points, cut: Cut, like: ResponseMemory
    ) -> Float[Tensor, "row 1 d_vocab"]:
        """Run the upper blocks for the rows' newest tokens, which have just been run with memory ``like``."""
        if self.memory is None:
            self.memory = ResponseMemory(self.prefixes, like.slots, like.capacity)
        if self.memory.slots != like.slots:
            self.memory.assign(like.slots)
        self.memory.step(like.at, 1)
        with self.unsteered():
            return twin.logits(tokens, positions, self.memory, keep=1, points=points, cut=cut)


def run_prompts(
    twin: Twin,
    prompts: Sequence[Sequence[int]],
    prefixes: Prefixes,
    *,
    device: torch.device,
    points: Points,
    before: Callable[[int], None],
    least_rows: int = 1,
    beside: "Beside | None" = None,
) -> tuple[list[int], Float[Tensor, "prompt d_vocab"]]:
    """Run prompts, those of one length together, so that nothing is padded.

    Args:
        twin: the model.
        prompts: token ids, none empty.
        prefixes: where their keys and values are kept.
        device: the model's.
        points: HookPoints to fire.
        before: called with the length of the prompts before each pass.
        least_rows: tokens in a pass, at least; one that has fewer is filled up with copies.
        beside: also run the prompts as it says.

    Returns:
        The slot of each prompt, and the logits at its last token.
    """
    lengths: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(index)
    slots, logits = [0] * len(prompts), [torch.empty(0)] * len(prompts)
    for length, group in lengths.items():
        size = max(1, PREFILL_TOKENS // length)
        for some in (group[start : start + size] for start in range(0, len(group), size)):
            ids = [list(prompts[index]) for index in some]
            ids *= least_rows if len(ids) * length < least_rows else 1
            positions = torch.arange(length, device=device).expand(len(ids), -1)
            memory = PromptMemory()
            before(length)
            tokens, cut = torch.tensor(ids, device=device), None if beside is None else Cut(beside.block)
            last = twin.logits(tokens, positions, memory, keep=1, points=points, cut=cut)[:, -1]
            if beside is not None and cut is not None:
                beside.run_prompts(twin, tokens, positions, points, cut, len(some))
            memory.keys = [block[: len(some)] for block in memory.keys]
            memory.values = [block[: len(some)] for block in memory.values]
            for index, slot, row in zip(some, prefixes.add(memory), last, strict=False):
                slots[index], logits[index] = slot, row.clone()
    return slots, torch.stack(logits)


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
    slots, first = run_prompts(
        twin, prompts, prefixes, device=device, points=points, before=lambda width: before(width, True)
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


__all__ = ["Beside", "run_prompts", "run_responses"]
