"""Continuous batching on a twin: each prompt is run once, and a row that is done makes room for the next at once.

A row is one response. Rows of a prompt share its keys and values; each row has a block of its own for what it adds.
After every step finished rows are handed out and waiting ones take their places, so that the batch stays full until
nothing waits. What is computed for a row depends on nothing beside it: see :mod:`sims_lens.twin.attention`.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sims_lens.config import SamplingConfig
from sims_lens.cost import TokenCount
from sims_lens.sampling.draw import choose
from sims_lens.twin import Beside, Bodies, Cut, Points, Prefixes, ResponseMemory, SoloMemory, Twin, run_prompts

_DRAIN = 0.75
"""Share of rows that are left when, with nothing waiting, the batch is made smaller."""


_TOGETHER = 8
"""Rows whose distributions over the vocabulary are compared at a time on a CPU: they stay in its cache."""


@dataclass
class Row:
    """A response that is being drawn.

    Args:
        prompt: index of its prompt.
        draw: which of the responses to it.
        noise: a uniform number per token.
        tokens: so far.
        ended: the model, or a stop string, has ended it.
        nll: sum over its tokens of the negative log-likelihood under the model without the plan, where measured.
        kls: KL(with the plan || without) before each of its tokens, where measured.
    """

    prompt: int
    draw: int
    noise: Sequence[float]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    nll: float = 0.0
    kls: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """What is to be drawn.

    Args:
        prompts: token ids.
        rows: every row, shortest prompts first.
        stops: tokens that end a response.
        cut: of the tokens so far, how many belong to the response, where a stop string has ended it; else None.
        config: how tokens are chosen.
    """

    prompts: Sequence[Sequence[int]]
    rows: Sequence[Row]
    stops: frozenset[int]
    cut: Callable[[Sequence[int]], int | None]
    config: SamplingConfig


class Decoder:
    """Draws the rows of a job; :meth:`run` puts those that are done into :attr:`done`, whence they are taken.

    Args:
        twin: the model.
        job: what to draw.
        size: rows side by side, at most.
        device: the model's.
        measured: of the draws for each prompt, how many have their rows' ``nll`` and ``kl`` summed up.
        beside: the model without the plan, where there is one and something is measured.
        bodies: what the model makes of prompts before their last token, where the plan spares them.
        whole: every token of a response is run, also the last one of a response that reached the limit.
        solo: the job is one row, and so it is run.

    :attr:`watched` is for its user to set: run nothing but the rows themselves, because somebody looks on.
    """

    def __init__(
        self,
        twin: Twin,
        job: Job,
        size: int,
        *,
        device: torch.device,
        measured: int = 0,
        beside: Beside | None = None,
        bodies: Bodies | None = None,
        whole: bool = False,
        solo: bool = False,
    ) -> None:
        self.twin, self.job, self.size, self.count = twin, job, size, TokenCount()
        self.device, self.whole, self.watched, self.solo = device, whole, False, solo
        self.measured, self.beside, self.bodies = measured, beside, bodies
        self.waiting = deque(job.rows)
        self.left = [0] * len(job.prompts)
        for row in job.rows:
            self.left[row.prompt] += 1
        self.done: list[Row] = []
        self.live: list[Row | None] = []
        self.slots: list[int] = []
        self.prefixes = Prefixes()
        self.slot: dict[int, int] = {}
        self.first: dict[int, Float[Tensor, " d_vocab"]] = {}
        self.memory: ResponseMemory | None = None
        self.logits: Tensor | None = None
        self.beside_logits: dict[int, Float[Tensor, " d_vocab"]] = {}

    @property
    def finished(self) -> bool:
        """Whether no row is left to be drawn."""
        return not self.waiting and all(row is None for row in self.live)

    @property
    def unfinished(self) -> list[Row]:
        """Rows that are not done, from their start: to be drawn again after a mishap."""
        rows = [row for row in self.live if row is not None] + list(self.waiting)
        return [Row(row.prompt, row.draw, row.noise) for row in rows]

    def run(self, enough: Callable[[], bool], points: Points, watch: "Watch") -> None:
        """Go on until that is enough, or all rows are in :attr:`done`."""
        while not enough() and not self.finished:
            self._admit(points, watch)
            if any(row is not None for row in self.live):
                self._shrink(watch)
                self._step(points, watch)
                self._extend(watch)

    def _admit(self, points: Points, watch: "Watch") -> None:
        """Give free places to waiting rows, and draw their first tokens."""
        while self.waiting:
            free = [place for place, row in enumerate(self.live) if row is None]
            room = len(free) + self.size - len(self.live)
            rows = [self.waiting[i] for i in range(min(room, len(self.waiting)))]
            if not rows:
                return
            self._prefill(list(dict.fromkeys(row.prompt for row in rows)), points, watch)
            first = [self.first[row.prompt] for row in rows]
            known = {} if self.beside is None else self.beside.logits
            self._draw(rows, torch.stack(first), self._without(rows, known, [self.slot[row.prompt] for row in rows]))
            for row in rows:  # after the draw: what fails there loses no row
                self.waiting.popleft()
                if self._finished(row):
                    self._leave(row)
                    continue
                slot = self.slot[row.prompt]
                place = free.pop(0) if free else len(self.live)
                if place == len(self.live):
                    self.live.append(row)
                    self.slots.append(slot)
                else:
                    self.live[place], self.slots[place] = row, slot
                if self.beside is not None and row.draw < self.measured:
                    self.beside.join(place, slot, self.job.config.max_new_tokens)
            self._assign()

    def _prefill(self, prompts: Sequence[int], points: Points, watch: "Watch") -> None:
        """Run the prompts that have not been run."""
        new = [prompt for prompt in prompts if prompt not in self.slot]
        if not new:
            return
        slots, logits, count = run_prompts(
            self.twin,
            [self.job.prompts[prompt] for prompt in new],
            self.prefixes,
            device=self.device,
            points=points,
            before=watch.prompts,
            beside=self.beside,
            bodies=None if self.watched else self.bodies,
        )
        self.count.take(count)
        self.slot |= dict(zip(new, slots, strict=True))
        self.first |= dict(zip(new, logits, strict=True))

    def _assign(self) -> None:
        if not self.live:
            return
        if self.memory is None:
            kind = SoloMemory if self.solo and not self.watched else ResponseMemory
            self.memory = kind(self.prefixes, self.slots, self.job.config.max_new_tokens)
        else:
            self.memory.assign(self.slots)

    def _shrink(self, watch: "Watch") -> None:
        """With nothing waiting, drop the places of finished rows once they are many, or when somebody looks on."""
        assert self.memory is not None
        kept = [place for place, row in enumerate(self.live) if row is not None]
        if self.waiting or len(kept) == len(self.live):
            return
        if len(kept) > _DRAIN * len(self.live) and not self.watched:
            return
        self.live = [self.live[place] for place in kept]
        self.memory.select(kept)
        if self.beside is not None:
            self.beside.keep(kept)
        watch.keeps(kept)
        used = list(dict.fromkeys(self.memory.slots))
        if len(used) < len(self.prefixes.lengths):
            renamed = {old: new for new, old in enumerate(used)}
            self.prefixes.keep(used)
            if self.beside is not None:
                self.beside.keep_prompts(used, renamed)
            self.slot = {prompt: renamed[slot] for prompt, slot in self.slot.items() if slot in renamed}
            self.memory.assign([renamed[slot] for slot in self.memory.slots])
        self.slots = list(self.memory.slots)

    def _step(self, points: Points, watch: "Watch") -> None:
        """Run the newest token of every place; an empty one repeats what it held, and nobody reads it."""
        assert self.memory is not None
        at = [0 if row is None else len(row.tokens) - 1 for row in self.live]
        newest = [0 if row is None else row.tokens[-1] for row in self.live]
        lengths = [self.prefixes.lengths[slot] for slot in self.slots]
        self.memory.step(at, 1)
        watch.steps(at)
        positions = torch.tensor([length + own for length, own in zip(lengths, at, strict=True)], device=self.device)
        tokens = torch.tensor(newest, device=self.device)
        tokens, positions = tokens[:, None], positions[:, None]
        cut = None if self.beside is None else Cut(self.beside.block)
        self.logits = None  # or those of two steps would be there at once
        self.logits = self.twin.logits(tokens, positions, self.memory, keep=1, points=points, cut=cut)[:, -1]
        if self.beside is not None and cut is not None:
            self.beside_logits = self.beside.run_step(self.twin, tokens, positions, points, cut, self.memory)
        ran = [length + own + 1 for length, own, row in zip(lengths, at, self.live, strict=True) if row is not None]
        self.count.take(TokenCount(decode=len(ran), attended=sum(ran), logits=len(ran)))
        if self.beside is not None:
            self.count.take(self.beside.count)

    def _extend(self, watch: "Watch") -> None:
        """Draw the next token of every live row; rows that are done leave."""
        assert self.logits is not None
        limit = self.job.config.max_new_tokens
        places = [p for p, row in enumerate(self.live) if row is not None and len(row.tokens) < limit]
        rows = [row for p in places if (row := self.live[p]) is not None]
        if rows:
            of = slice(None) if len(places) == len(self.logits) else torch.tensor(places, device=self.device)
            self._draw(rows, self.logits[of], self._without(rows, self.beside_logits, places))
        for place, row in enumerate(self.live):
            if row is not None and (self._finished(row) or (self.whole and place not in places)):
                watch.ends(row, place)
                self.live[place] = None
                if self.beside is not None:
                    self.beside.leave(place)
                self._leave(row)

    def _without(
        self, rows: Sequence[Row], known: Mapping[int, Float[Tensor, " d_vocab"]], keys: Sequence[int]
    ) -> list[Float[Tensor, " d_vocab"]] | None:
        """Of logits without the plan those for rows that are measured; None where there is no plan."""
        if self.beside is None:
            return None
        return [known[key] for row, key in zip(rows, keys, strict=True) if row.draw < self.measured]

    def _draw(
        self,
        rows: Sequence[Row],
        logits: Float[Tensor, "row d_vocab"],
        without: "list[Float[Tensor, ' d_vocab']] | None",
    ) -> None:
        """Draw a token for each row from the model's logits; ``without`` are those without the plan, where measured."""
        config = self.job.config
        noise = torch.tensor([row.noise[len(row.tokens)] for row in rows], dtype=torch.float64, device=self.device)
        tokens = choose(
            logits,
            noise if self.device.type != "mps" else noise.float(),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        nll, kl = [0.0] * len(rows), [0.0] * len(rows)
        measured = [index for index, row in enumerate(rows) if row.draw < self.measured]
        if measured:
            of = torch.tensor(measured, device=self.device)
            found = _divergence(logits[of], None if without is None else torch.stack(without), tokens[of])
            for index, row_nll, row_kl in zip(measured, *found, strict=True):
                nll[index], kl[index] = row_nll, row_kl
        for row, token, row_nll, row_kl in zip(rows, tokens.tolist(), nll, kl, strict=True):
            if token in self.job.stops:
                row.ended = True
                continue
            row.tokens.append(token)
            row.nll += row_nll
            row.kls.append(row_kl)
            kept = self.job.cut(row.tokens)
            if kept is not None:
                row.ended = True
                del row.tokens[kept:]

    def _finished(self, row: Row) -> bool:
        return row.ended or (len(row.tokens) >= self.job.config.max_new_tokens and not self.whole)

    def _leave(self, row: Row) -> None:
        """A row is done; with the last one of a prompt the prompt goes."""
        self.done.append(row)
        self.left[row.prompt] -= 1
        if not self.left[row.prompt]:
            slot = self.slot.pop(row.prompt)
            self.prefixes.free(slot)
            if self.beside is not None:
                self.beside.prefixes.free(slot)
            del self.first[row.prompt]


def _divergence(
    logits: Float[Tensor, "row d_vocab"], without: Float[Tensor, "row d_vocab"] | None, tokens: Int[Tensor, " row"]
) -> tuple[list[float], list[float]]:
    """Of each token the negative log-likelihood without the plan, and KL(with || without) where it was drawn."""
    together = _TOGETHER if logits.device.type == "cpu" else len(tokens)
    nll, kl = [], []
    for at in range(0, len(tokens), together):
        some = slice(at, at + together)
        log_q = (logits if without is None else without)[some].float().log_softmax(-1)
        nll.append(-log_q.gather(-1, tokens[some, None])[:, 0])
        if without is None:
            kl.append(torch.zeros_like(nll[-1]))
        else:
            log_p = logits[some].float().log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(nll).tolist(), torch.cat(kl).tolist()


class Watch:
    """What is told of every pass before it runs. This one takes no notice."""

    def prompts(self, width: int, length: int) -> None:
        """A part of prompts is about to be run: ``width`` columns, of which number ``length`` ends the prompt."""

    def steps(self, at: Sequence[int]) -> None:
        """The newest token of the row in each place is about to be run, which is number ``at`` of its own."""

    def ends(self, row: Row, place: int) -> None:
        """The row in a place is done."""

    def keeps(self, places: Sequence[int]) -> None:
        """Only these places are left; they are renumbered in this order."""
