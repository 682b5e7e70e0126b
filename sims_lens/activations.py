"""Reading the residual stream: averages over the tokens in scope, all layers in one forward pass.

No activation outlives its block: a hook at each site reduces it at once, so memory does not depend on the number
of layers times the length of the batch. What texts have in common is computed once: the beginning that all of them
share (a system prompt, a persona), and the prompt of several responses. Nothing is unembedded, and no token is run
behind the last one that counts.
"""

import copy
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sims_lens.adapter import Adapter, adapt, left_pad
from sims_lens.capture_store import StoredTokens, writing
from sims_lens.errors import ModelError
from sims_lens.moments import PairMoments, PairStream
from sims_lens.prompts import everyday
from sims_lens.scope import RESPONSE, TRACKER, TokenScope, left_padded_regions
from sims_lens.sites import check_layer
from sims_lens.token_rows import Joined
from sims_lens.token_rows import Row as Row  # others take it from here
from sims_lens.twin import attached

BATCH_TOKENS = 256
"""Tokens in one forward pass on a CPU with one or two threads, padding included: more take memory, and no less time."""

_MOST_THREADS = 8
"""With more threads more tokens, up to as many as for so many: what is done between products takes as long with few."""

_BATCH_TOKENS_ELSEWHERE = 16_384

STORE_LIMIT = 4 * 2**30
"""Bytes that captured tokens may take on disk, unless told otherwise."""

_NORM_PROMPTS = 16
_NORM_TOKENS = 16_384
"""Norms per layer that a median is taken of where pairs are streamed; of more tokens, so many are drawn."""

_BLOCK_PAIRS = 32
"""Pairs whose averages are held at once while they are streamed, on a CPU."""

_BLOCK_PAIRS_ELSEWHERE = 256

_LEAST_SAVED = 64
"""Tokens: sharing fewer than that isn't worth a forward pass of its own."""

_LEAST_GROUP = 16
"""Rows that begin alike, and are run apart from others for that."""

_MOST_GROUPS = 8


@dataclass(frozen=True, eq=False)
class Activations:
    """What :func:`capture` read.

    Args:
        means: average over the tokens in scope of each row, float32, on the CPU.
        median_norm: median over all tokens in scope of the norm of the stream, per layer. The first position of a
            sequence is left out: massive activations there (a norm of 25,000 beside 300 elsewhere on SmolLM2-135M)
            say nothing about the rest.
    """

    means: Float[Tensor, "row layer d_model"]
    median_norm: Float[Tensor, " layer"]


@dataclass(frozen=True, eq=False)
class PairCapture:
    """What :func:`capture_moments` read at a site.

    Args:
        layers: the layers.
        moments: of the pairs' averages over the tokens in scope, at each layer.
        median_norm: as in :class:`Activations`, at each layer. Of more than 16,384 tokens it is that of so many, drawn
            at random.
        kept: averages of the pairs that were to be kept.
    """

    layers: tuple[int, ...]
    moments: PairMoments
    median_norm: Float[Tensor, " layer"]
    kept: "KeptPairs"

    @property
    def kept_positive(self) -> Float[Tensor, "kept layer d_model"]:
        """Averages of the positive texts of the pairs that were to be kept, float32."""
        return self.kept.rows(slice(None))[0]

    @property
    def kept_negative(self) -> Float[Tensor, "kept layer d_model"]:
        """The same of their negative texts."""
        return self.kept.rows(slice(None))[1]


class KeptPairs:
    """Activations of some pairs in half the bytes: to 11 binary digits, in units of each row's largest entry.

    What is judged by them are projections on a direction, sums over the whole width: rounding moves one by about a
    thousandth of what it differs by from pair to pair.

    Args:
        pairs: how many.
        layers: how many.
        d_model: width.
    """

    def __init__(self, pairs: int, layers: int, d_model: int) -> None:
        self._values = torch.zeros(2, pairs, layers, d_model, dtype=torch.float16)
        self._scale = torch.zeros(2, pairs, layers, 1)

    def put(
        self, pair: int, positive: Float[Tensor, "layer d_model"], negative: Float[Tensor, "layer d_model"]
    ) -> None:
        """Keep a pair in its place."""
        for half, row in enumerate((positive, negative)):
            scale = row.abs().amax(-1, keepdim=True)
            self._scale[half, pair] = scale
            self._values[half, pair] = (row / torch.where(scale > 0, scale, 1.0)).half()

    def rows(self, pairs: slice) -> tuple[Float[Tensor, "some layer d_model"], Float[Tensor, "some layer d_model"]]:
        """The positive and the negative activations of some pairs, float32."""
        positive, negative = self._values[:, pairs].float() * self._scale[:, pairs]
        return positive, negative


def capture(
    model: Any,
    rows: Sequence[Row],
    *,
    site: str = "resid_post",
    scope: TokenScope | str = RESPONSE,
    batch_rows: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Activations:
    """Run sequences through the model as it is now (steered, if a plan is attached) and average a site's stream.

    A plan that is attached is told where each row's prompt ends.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        rows: prompt and response token ids of each sequence.
        site: where in every block.
        scope: which tokens count.
        batch_rows: sequences in one forward pass, at most.
        advance: called with the number of rows after each pass, for a progress bar.

    Raises:
        ModelError: a row has no token in scope.
    """
    reader = _Reader(model, rows, sites=(site,), scope=scope)
    means = torch.zeros(len(rows), reader.adapter.n_layers, reader.adapter.d_model)
    norms: list[list[Tensor]] = [[] for _ in range(reader.adapter.n_layers)]

    def read(seen: _Seen, stream: Float[Tensor, "batch pos d_model"]) -> None:
        means[seen.rows, seen.layer] += masked_sum(stream, seen.wanted).cpu()[seen.of]
        norms[seen.layer].append(_token_norms(seen, stream))

    for done in reader.run(range(len(rows)), read, batch_rows=batch_rows):
        means[done] /= torch.tensor([float(reader.counts[row]) for row in done])[:, None, None]
        if advance is not None:
            advance(len(done))
    return Activations(means=means, median_norm=_medians(norms))


def capture_moments(
    model: Any,
    positive: Sequence[Row],
    negative: Sequence[Row],
    *,
    sites: Sequence[str] = ("resid_post",),
    layers: Sequence[int] | None = None,
    scope: TokenScope | str = RESPONSE,
    weights: Float[Tensor, "group pair"] | None = None,
    keep: Sequence[int] = (),
    batch_tokens: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, PairCapture]:
    """:func:`capture` of contrast pairs that keeps statistics only: memory doesn't grow with the number of pairs.

    All layers and sites are read in one pass over the texts.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, as it is now.
        positive: prompt and response token ids of each pair's positive text.
        negative: those of its negative text.
        sites: where in every block.
        layers: which; all of them where None.
        scope: which tokens count.
        weights: of weighted sums over the pairs' differences, see :class:`~sims_lens.moments.PairMoments`.
        keep: indices of pairs whose averages are kept, in the order given.
        batch_tokens: in one forward pass, padding included; by the device where None.
        advance: called with the number of rows after each pass, for a progress bar.

    Returns:
        What was read, by site.

    Raises:
        ModelError: a row has no token in scope, there are not as many negative texts as positive ones, or no layer or
            site is named.
        PlanError: the model has no such layer or site.
    """
    if len(positive) != len(negative):
        raise ModelError(f"{len(positive)} positive and {len(negative)} negative texts; give one of each per pair")
    pairs = len(positive)
    weights = torch.zeros(0, pairs) if weights is None else weights
    if weights.shape[1] != pairs:
        raise ModelError(f"weights has a column for each of {weights.shape[1]} pairs, there are {pairs}")
    reader = _Reader(model, Joined(positive, negative), sites=sites, scope=scope, layers=layers)
    chosen, d_model = reader.layers, reader.adapter.d_model
    if not chosen or not sites:
        raise ModelError("layers or sites is empty; name at least one, or leave it out")
    place = {layer: index for index, layer in enumerate(chosen)}
    kept = {pair: index for index, pair in enumerate(keep)}
    found = {site: PairStream(len(weights), len(chosen), d_model) for site in sites}
    # What lives on is allocated here: between the short-lived tensors of forward passes it would fragment memory.
    held = {site: KeptPairs(len(kept), len(chosen), d_model) for site in sites}
    norms = {site: _Norms(len(chosen), sum(reader.counts)) for site in sites}
    size = 2 * min(pairs, reader.block_pairs)
    buffers = {site: torch.zeros(size, len(chosen), d_model) for site in sites}

    for block in reader.blocks(pairs):
        slot = {row: index for index, row in enumerate([*block, *(pair + pairs for pair in block)])}
        for buffer in buffers.values():
            buffer.zero_()

        def read(seen: _Seen, stream: Tensor, slot: dict[int, int] = slot) -> None:
            where, layer = [slot[row] for row in seen.rows], place[seen.layer]
            buffers[seen.site][where, layer] += masked_sum(stream, seen.wanted).cpu()[seen.of]
            norms[seen.site].add(layer, _token_norms(seen, stream), seen.turn)

        for done in reader.run(list(slot), read, batch_tokens=batch_tokens):
            if advance is not None:
                advance(len(done))
        counts = torch.tensor([float(reader.counts[row]) for row in slot])[:, None, None]
        for site in sites:
            up, down = buffers[site][: len(slot)].div_(counts).tensor_split(2)
            found[site].update(up, down, weights[:, block])
            here = [(index, kept[pair]) for index, pair in enumerate(block) if pair in kept]
            for index, target in here:
                held[site].put(target, up[index], down[index])
    return {site: PairCapture(chosen, found[site].moments, norms[site].medians(), held[site]) for site in sites}


class _Norms:
    """Norms of tokens by layer: all, or of very many as many as fit, drawn at random and the same at every layer.

    Args:
        layers: how many.
        tokens: how many will come.
    """

    def __init__(self, layers: int, tokens: int) -> None:
        self._chance = min(1.0, _NORM_TOKENS / max(1, tokens))
        room = tokens if self._chance == 1.0 else _NORM_TOKENS + _NORM_TOKENS // 16  # eight standard deviations
        self._values = torch.zeros(layers, room)
        self._filled = [0] * layers
        self._generator = torch.Generator().manual_seed(0)
        self._drawn, self._turn = torch.empty(0), -1

    def add(self, layer: int, values: Float[Tensor, " token"], turn: int) -> None:
        """Those of a forward pass at a layer; ``turn`` counts forward passes."""
        if self._chance < 1.0:
            if turn != self._turn:
                self._drawn, self._turn = torch.rand(len(values), generator=self._generator), turn
            values = values[self._drawn < self._chance]
        start = self._filled[layer]
        values = values[: self._values.shape[1] - start]
        self._values[layer, start : start + len(values)] = values
        self._filled[layer] = start + len(values)

    def medians(self) -> Float[Tensor, " layer"]:
        """Of each layer; NaN where there are none."""
        return _medians([[values[:filled]] for values, filled in zip(self._values, self._filled, strict=True)])


def capture_tokens(
    model: Any,
    rows: Sequence[Row],
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    scope: TokenScope | str = RESPONSE,
    batch_rows: int = 32,
    out: str | Path | None = None,
    limit_bytes: int = STORE_LIMIT,
    advance: Callable[[int], None] | None = None,
) -> Sequence[Float[Tensor, "_pos layer d_model"]]:
    """Like :func:`capture`, but every token in scope, for estimators that need them (HPR).

    They take 4 bytes * tokens * layers * d_model: in memory, or on disk where ``out`` says so. Choose layers where that
    is too much.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        rows: prompt and response token ids of each sequence.
        layers: which; all of them where None.
        site: where in every block.
        scope: which tokens.
        batch_rows: sequences in one forward pass, at most.
        out: a folder. The activations go to ``tokens.safetensors`` there, and none stays in memory.
        limit_bytes: the most that the file may take, looked at before anything is run.
        advance: called with the number of rows after each pass, for a progress bar.

    Returns:
        For each row its tokens in scope, in order, float32, on the CPU: a list, or with ``out`` a
        :class:`~sims_lens.capture_store.StoredTokens`, which reads a row where it is used.

    Raises:
        ModelError: a row has no token in scope.
        PlanError: the model has no such layer.
        ConfigError: the file would be larger than ``limit_bytes``, or than what is free on the disk.
    """
    reader = _Reader(model, rows, sites=(site,), scope=scope, layers=layers)
    adapter, chosen = reader.adapter, reader.layers
    place = {layer: index for index, layer in enumerate(chosen)}
    found: list[Tensor] = [torch.empty(0)] * len(rows)

    def read(seen: _Seen, stream: Float[Tensor, "batch pos d_model"]) -> None:
        for row, of in zip(seen.rows, seen.of, strict=True):
            kept, start = stream[of][seen.wanted[of]].cpu(), seen.before[of]
            if not len(found[row]):
                with torch.inference_mode(False):  # or no estimator could train on it
                    found[row] = torch.empty(reader.counts[row], len(chosen), adapter.d_model)
            found[row][start : start + len(kept), place[seen.layer]] = kept

    with ExitStack() as stack:
        writer = None
        if out is not None:
            writer = stack.enter_context(
                writing(
                    out,
                    reader.counts,
                    layers=chosen,
                    d_model=adapter.d_model,
                    limit_bytes=limit_bytes,
                    site=site,
                    model=adapter.name,
                )
            )
        for done in reader.run(range(len(rows)), read, batch_rows=batch_rows):
            if writer is not None:
                for row in done:
                    writer.write(row, found[row])
                    found[row] = torch.empty(0)
            if advance is not None:
                advance(len(done))
    return found if out is None else StoredTokens(out)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a stream that is being read is.

    Args:
        turn: counts forward passes.
        site: where.
        layer: of which block.
        rows: the rows that these tokens are part of: row ``rows[i]`` of batch row ``of[i]``.
        of: see there.
        wanted: tokens in scope.
        counted: those among them that are no row's first.
        before: tokens in scope of each batch row's rows that come before these.
    """

    turn: int
    site: str
    layer: int
    rows: list[int]
    of: list[int]
    wanted: Bool[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    before: list[int]


class _Reader:
    """Runs rows through a model and hands every block's stream of the tokens in scope to a function.

    Rows that begin alike share that beginning, and responses share their prompt, unless somebody else's hooks are
    attached: those see whole rows, each in a pass of its own batch.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        *,
        sites: Sequence[str],
        scope: TokenScope | str,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.model, self.rows, self.sites = model, rows, tuple(sites)
        self.scope = TokenScope.of(scope)
        self.adapter = adapt(model)
        for layer in layers or ():
            check_layer(layer, self.adapter.n_layers, self.adapter.name)
        self.layers = tuple(range(self.adapter.n_layers) if layers is None else layers)
        for site in self.sites:
            for layer in self.layers:
                self.adapter.point(layer, site)
        # arrays here and below: lists of very many numbers take much more memory
        self.counts = array("q", (_count(self.scope, len(prompt), len(response)) for prompt, response in rows))
        if 0 in self.counts:
            index = self.counts.index(0)
            raise ModelError(f"row {index} has no token in scope {self.scope.name!r}; leave such rows out")
        watched = attached(model).watched
        self._shares = not watched and _goes_on_from_any_column(self.adapter)
        self._ends = array("q", (len(prompt) + len(response) for prompt, response in rows))
        self._prompts = array("q", range(len(rows)))
        """A number for each row's prompt, the same for the same prompt."""
        self._roots: list[tuple[int, ...]] = [()] * len(rows)
        self._caches: dict[tuple[int, ...], Any] = {}
        self._turn = 0
        if self._shares:
            numbers: dict[bytes, int] = {}
            named = (array("q", prompt).tobytes() for prompt, _ in rows)
            self._prompts = array("q", (numbers.setdefault(name, len(numbers)) for name in named))
            if not self.scope.response:  # what comes after the last token that counts can't change it
                self._ends = array("q", (max(1, len(p) - (not self.scope.last_prompt)) for p, _ in rows))
            # all of them in the prompt, ahead of its last token, so that they are of one region in every row
            ends = zip(rows, self._ends, strict=True)
            self._roots = _roots([array("q", p[: max(0, min(len(p), end) - 1)]) for (p, _), end in ends])

    def run(
        self,
        chosen: Sequence[int],
        read: Callable[[_Seen, Tensor], None],
        *,
        batch_rows: int | None = None,
        batch_tokens: int | None = None,
    ) -> Iterator[list[int]]:
        """Run some of the rows; yields those of each batch when all their tokens have been read."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in chosen:
            groups.setdefault(self._roots[row], []).append(row)
        for root, group in groups.items():
            for batch in self._batches(group, len(root), batch_rows, batch_tokens):
                self._run_batch(root, batch, read)
                yield batch

    def blocks(self, pairs: int) -> Iterator[list[int]]:
        """Pairs in blocks of about one length, those of a prompt together; pair k is rows k and ``pairs + k``."""
        longest: dict[int, int] = {}
        lengths = [max(self._ends[k], self._ends[k + pairs]) for k in range(pairs)]
        for pair, length in enumerate(lengths):
            prompt = self._prompts[pair]
            longest[prompt] = max(longest.get(prompt, 0), length)
        order = sorted(range(pairs), key=lambda k: (longest[self._prompts[k]], self._prompts[k], lengths[k]))
        for start in range(0, pairs, self.block_pairs):
            yield order[start : start + self.block_pairs]

    @property
    def block_pairs(self) -> int:
        """Pairs in a block, at most."""
        return _BLOCK_PAIRS if self.adapter.device.type == "cpu" else _BLOCK_PAIRS_ELSEWHERE

    def _batches(
        self, group: list[int], root: int, batch_rows: int | None, batch_tokens: int | None
    ) -> Iterator[list[int]]:
        """The rows in batches, the shortest first, those of a prompt side by side."""
        if batch_tokens is None:
            on_cpu = BATCH_TOKENS * min(_MOST_THREADS, max(2, torch.get_num_threads())) // 2
            batch_tokens = on_cpu if self.adapter.device.type == "cpu" else _BATCH_TOKENS_ELSEWHERE
        longest: dict[int, int] = {}
        if self._shares:
            for row in group:
                longest[self._prompts[row]] = max(longest.get(self._prompts[row], 0), self._ends[row])

        def key(row: int) -> tuple[int, ...]:
            prompt = self._prompts[row]
            return (longest[prompt], prompt, self._ends[row]) if self._shares else (self._ends[row],)

        size = _Size(root, shares=self._shares)
        batch: list[int] = []
        for row in sorted(group, key=key):
            added = size.add(self._prompts[row], len(self.rows[row][0]), self._ends[row])
            if batch and (len(batch) == batch_rows or added > batch_tokens):
                yield batch
                batch, size = [], _Size(root, shares=self._shares)
                size.add(self._prompts[row], len(self.rows[row][0]), self._ends[row])
            batch.append(row)
        if batch:
            yield batch

    def _prompts_pay(self, batch: list[int], root: int) -> bool:
        """Whether enough is saved by running each prompt once, ahead of what follows it."""
        size = _Size(root, shares=self._shares)
        for row in batch:
            size.add(self._prompts[row], len(self.rows[row][0]), self._ends[row])
        return size.prompts_pay

    def _run_batch(self, root: tuple[int, ...], batch: list[int], read: Callable[[_Seen, Tensor], None]) -> None:
        past = self._root(root, batch, read) if root else None
        if self._prompts_pay(batch, len(root)):
            self._run_prompts(len(root), past, batch, read)
            return
        start, scope = len(root), self.scope
        texts = [[*self.rows[row][0], *self.rows[row][1]][start : self._ends[row]] for row in batch]
        tokens, mask = left_pad(texts, self.adapter.device)
        width, lengths = tokens.shape[1], [len(text) for text in texts]
        prompts = [len(self.rows[row][0]) - start for row in batch]
        self._forward(
            read,
            tokens,
            mask,
            None if past is None else past.select([0] * len(batch), keeps=False),
            boundary=[start + width - length + prompt for prompt, length in zip(prompts, lengths, strict=True)],
            wanted=scope.mask(left_padded_regions(prompts, lengths, width)),
            first=_first(lengths, width) if not start else torch.zeros(len(batch), width, dtype=torch.bool),
            rows=batch,
            of=list(range(len(batch))),
            before=[start if scope.prompt else 0] * len(batch),
        )

    def _run_prompts(
        self, start: int, past: "_Past | None", batch: list[int], read: Callable[[_Seen, Tensor], None]
    ) -> None:
        """Each prompt from ``start`` on once, then what follows it in each row."""
        scope, one = self.scope, {self._prompts[row]: row for row in reversed(batch)}
        place = {prompt: index for index, prompt in enumerate(one)}
        of = [place[self._prompts[row]] for row in batch]
        heads = [list(self.rows[row][0][start : self._ends[row]]) for row in one.values()]
        tokens, mask = left_pad(heads, self.adapter.device)
        width, lengths = tokens.shape[1], [len(head) for head in heads]
        prompts = [len(self.rows[row][0]) - start for row in one.values()]
        tails = [index for index, row in enumerate(batch) if self._ends[row] > len(self.rows[row][0])]
        if past is not None:
            past = past.select([0] * len(heads), keeps=bool(tails))
        elif tails:
            past = _Past.new(self.adapter, len(heads))
        self._forward(
            read,
            tokens,
            mask,
            past,
            boundary=[start + width + prompt - length for prompt, length in zip(prompts, lengths, strict=True)],
            wanted=scope.mask(left_padded_regions(prompts, lengths, width)),
            first=_first(lengths, width) if not start else torch.zeros(len(heads), width, dtype=torch.bool),
            rows=batch,
            of=of,
            before=[start if scope.prompt else 0] * len(heads),
        )
        if past is None or not tails:
            return
        # Padded on the right, so that a response comes right after its prompt.
        texts = [list(self.rows[batch[index]][1]) for index in tails]
        longest = max(len(text) for text in texts)
        real = torch.arange(longest)[None] < torch.tensor([len(text) for text in texts])[:, None]
        padded = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        self._forward(
            read,
            padded.to(tokens.device),
            real.to(tokens.device),
            past.select([of[index] for index in tails], keeps=False),
            boundary=[start + width] * len(tails),
            wanted=real if scope.response else torch.zeros_like(real),
            first=torch.zeros_like(real),
            rows=[batch[index] for index in tails],
            of=list(range(len(tails))),
            before=[_count(scope, len(self.rows[batch[index]][0]), 0) for index in tails],
        )

    def _root(self, root: tuple[int, ...], batch: list[int], read: Callable[[_Seen, Tensor], None]) -> "_Past":
        """What follows from the tokens that all rows of a batch begin with. Read anew for each batch if they count."""
        if root in self._caches:
            return self._caches[root]  # type: ignore[no-any-return]
        past = _Past.new(self.adapter, 1)
        tokens = torch.tensor([root], device=self.adapter.device)
        real = torch.ones(1, len(root), dtype=torch.bool)
        self._forward(
            read,
            tokens,
            real.to(tokens.device),
            past,
            boundary=[len(root) + 1],  # its last token lies behind them
            wanted=real if self.scope.prompt else ~real,
            first=_first([len(root)], len(root)),
            rows=batch,
            of=[0] * len(batch),
            before=[0],
        )
        if not self.scope.prompt:
            self._caches[root] = past
        return past

    def _forward(
        self,
        read: Callable[[_Seen, Tensor], None],
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"],
        past: "_Past | None",
        *,
        boundary: list[int],
        wanted: Bool[Tensor, "batch pos"],
        first: Bool[Tensor, "batch pos"],
        rows: list[int],
        of: list[int],
        before: list[int],
    ) -> None:
        """One forward pass; streams are read if a token in it counts. ``boundary``: columns up to the prompts' ends."""
        self._turn += 1
        seen = _Seen(self._turn, "", 0, rows, of, wanted.to(tokens.device), (wanted & ~first).to(tokens.device), before)

        def at(site: str) -> Callable[[int, Tensor], None]:
            return lambda layer, stream: read(replace(seen, site=site, layer=layer), stream.float())

        tracker = self.model.__dict__.get(TRACKER)
        with torch.inference_mode(), ExitStack() as stack:
            if bool(wanted.any()):
                for site in self.sites:
                    stack.enter_context(listening(self.adapter, site, at(site), layers=self.layers))
            stack.enter_context(tracker.prompt(boundary) if tracker is not None else nullcontext())
            if self._shares:
                _run(self.adapter, tokens, mask, past, max(self.layers, default=-1) + 1)
            else:
                self.adapter.logits(tokens, mask, keep=1)  # somebody's hook may be anywhere


class _Size:
    """Tokens in the largest forward pass of a batch that grows row by row, padding included.

    Args:
        root: tokens that all rows begin with.
        shares: whether rows may share their prompts.
    """

    def __init__(self, root: int, *, shares: bool) -> None:
        self._root, self._shares = root, shares
        self._prompts: set[int] = set()
        self._rows = self._saved = self._whole = self._head = self._tail = 0

    def add(self, number: int, prompt: int, end: int) -> int:
        """With one more row: which prompt it has, how many tokens that has, and how many of the row are run."""
        self._shares = self._shares and prompt > 0
        if number in self._prompts:
            self._saved += prompt - self._root
        self._prompts.add(number)
        self._rows += 1
        self._whole = max(self._whole, end - self._root)
        self._head = max(self._head, prompt - self._root)
        self._tail = max(self._tail, end - prompt)
        if self.prompts_pay:
            return max(self._head * len(self._prompts), self._tail * self._rows)
        return self._whole * self._rows

    @property
    def prompts_pay(self) -> bool:
        """Whether enough is saved by running each prompt once, ahead of what follows it in each row."""
        return self._shares and self._saved >= _LEAST_SAVED


class _Past:
    """Keys and values of the tokens before those that are run.

    Args:
        adapter: of the model.
        cache: what the adapter makes.
        mask: real tokens among the columns so far.
        keeps: whether tokens that are run are added.
    """

    def __init__(self, adapter: Adapter, cache: Any, mask: Bool[Tensor, "batch pos"], *, keeps: bool) -> None:
        self.adapter, self.cache, self.mask, self.keeps = adapter, cache, mask, keeps

    @classmethod
    def new(cls, adapter: Adapter, batch: int) -> "_Past":
        """Of no tokens."""
        none = torch.zeros(batch, 0, dtype=torch.bool, device=adapter.device)
        return cls(adapter, adapter.new_cache(batch), none, keeps=True)

    def select(self, rows: Sequence[int], *, keeps: bool) -> "_Past":
        """Of these rows. Where it keeps nothing, a single row's are not even copied."""
        index = torch.tensor(list(rows), device=self.mask.device)
        mask = self.mask.index_select(0, index)
        if keeps:
            return _Past(self.adapter, self.adapter.select_rows(self.cache, index), mask, keeps=True)

        def chosen(values: Tensor) -> Tensor:
            return values.expand(len(rows), *values.shape[1:]) if len(values) == 1 else values.index_select(0, index)

        new = copy.copy(self.cache)
        if self.adapter.kind == "HookedTransformer":
            new.entries = [
                type(entry)(chosen(entry.past_keys), chosen(entry.past_values), frozen=True) for entry in new.entries
            ]
            new.previous_attention_mask = chosen(new.previous_attention_mask)
            new.frozen = True
        else:
            new.layers = [copy.copy(layer) for layer in new.layers]
            for layer in new.layers:
                layer.keys, layer.values = chosen(layer.keys), chosen(layer.values)
                layer.update = partial(_not_kept, layer.keys, layer.values)
        return _Past(self.adapter, new, mask, keeps=False)


def _not_kept(
    old_keys: Tensor, old_values: Tensor, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any
) -> tuple[Tensor, Tensor]:
    """In place of a cache layer's ``update``: the new tokens' keys and values are used, and forgotten."""
    return torch.cat([old_keys, keys], dim=-2), torch.cat([old_values, values], dim=-2)


def _run(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    past: _Past | None,
    blocks: int,
) -> None:
    """Run the first ``blocks`` blocks, or all of them where a model can't stop; nothing is unembedded."""
    before = mask.new_zeros(len(mask), 0) if past is None else past.mask
    whole, cache = torch.cat([before, mask], dim=1), None if past is None else past.cache
    if past is not None and past.keeps:
        past.mask = whole
    if adapter.kind == "HookedTransformer":
        adapter.model.forward(tokens, attention_mask=mask.int(), past_kv_cache=cache, stop_at_layer=blocks)
        return
    base = getattr(adapter.model.original_model, "base_model", None)
    if base is None or base is adapter.model.original_model:
        adapter.logits(tokens, whole, keep=1, cache=cache)
        return
    positions = (whole.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    base(
        input_ids=tokens,
        attention_mask=whole.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )


def _roots(beginnings: Sequence["array[int]"]) -> list[tuple[int, ...]]:
    """What each row shares with others: the longest beginning that saves enough, a few different ones at most."""
    found: list[tuple[int, ...]] = [()] * len(beginnings)
    order = sorted(range(len(beginnings)), key=beginnings.__getitem__)
    least = max(_LEAST_GROUP, len(order) // _MOST_GROUPS)
    groups = [(order, 0, 2)]  # rows that begin alike; tokens that they share already; rows that make a group
    while groups:
        rows, shared, enough = groups.pop()
        if len(rows) < enough:
            continue
        one, other = beginnings[rows[0]], beginnings[rows[-1]]  # sorted: what these share, all do
        width = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        if (width - shared) * (len(rows) - 1) >= _LEAST_SAVED:
            root = tuple(one[:width])
            for row in rows:
                found[row] = root
            shared = width
        longer = [row for row in rows if len(beginnings[row]) > width]
        for _, same in groupby(longer, key=lambda row: beginnings[row][width]):
            groups.append((list(same), shared, least))
    return found


def _count(scope: TokenScope, prompt: int, response: int) -> int:
    """Tokens in scope of a row with that many prompt and response tokens."""
    return scope.prompt * max(0, prompt - 1) + scope.last_prompt * min(1, prompt) + scope.response * response


def _first(lengths: Sequence[int], width: int) -> Bool[Tensor, "batch pos"]:
    """Where left-padded rows begin."""
    return torch.arange(width)[None] == (width - torch.tensor(list(lengths)))[:, None]


def _goes_on_from_any_column(adapter: Adapter) -> bool:
    """Whether masked columns between a token and those that it attends to make no difference: with a window, or with
    positions as distances between columns, they would."""
    if getattr(adapter.cfg, "positional_embedding_type", "rotary") not in ("rotary", "standard"):
        return False
    if adapter.kind == "HookedTransformer":
        return not getattr(adapter.cfg, "use_local_attn", False)
    layers = adapter.new_cache(1).layers
    return bool(layers) and all(type(layer).__name__ == "DynamicLayer" for layer in layers)


def _token_norms(seen: _Seen, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " token"]:
    """Norms of the tokens that count, but for first ones; those that several rows share are there for each of them."""
    norms, counted = stream.norm(dim=-1), seen.counted
    if seen.of != list(range(len(norms))):
        norms, counted = norms[seen.of], counted[seen.of]
    found: Tensor = norms[counted].cpu()
    return found


def _medians(norms: Sequence[Sequence[Tensor]]) -> Float[Tensor, " layer"]:
    """Each layer's, NaN where there are none."""
    found = [torch.cat(list(values)) if values else torch.empty(0) for values in norms]
    medians = [values.median() if len(values) else torch.tensor(torch.nan) for values in found]
    return torch.stack(medians) if medians else torch.empty(0)


def masked_sum(
    stream: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Sum over the tokens where ``mask`` is True."""
    total: Tensor = torch.where(mask[..., None], stream, 0.0).sum(1)  # not a product: padding may hold anything
    return total


def masked_mean(
    stream: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the tokens where ``mask`` is True."""
    mean: Tensor = masked_sum(stream, mask) / mask.sum(-1, keepdim=True)
    return mean


@contextmanager
def listening(
    adapter: Adapter,
    site: str,
    read: Callable[[int, Tensor], None],
    *,
    layers: Sequence[int] | None = None,
    everywhere: bool = False,
) -> Iterator[None]:
    """Call ``read(layer, stream)`` for every block's value at a site, or some blocks', while the block is open.

    What other threads run meanwhile is not read, unless with ``everywhere``.

    Plain forward hooks on TransformerLens' HookPoints: they see what hooks before them left, so a plan that is
    attached already has acted.
    """
    handles, own = [], threading.get_ident()
    try:
        for layer in range(adapter.n_layers) if layers is None else dict.fromkeys(layers):

            def hook(point: Any, _args: Any, output: Tensor, layer: int = layer) -> None:
                if not everywhere and threading.get_ident() != own:
                    return
                conversion = getattr(point, "hook_conversion", None)
                read(layer, output if conversion is None else conversion.convert(output))

            handles.append(adapter.point(layer, site).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def residual_norms(model: Any, *, site: str = "resid_post", prompts: Sequence[str] | None = None) -> dict[int, float]:
    """Median norm of the stream at a site, per layer: the unit in which coefficients are counted.

    Measured on the tokens of the prompts as the model sees them (in its chat template), first position left out.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        site: where in every block.
        prompts: the first 16 of the packaged everyday prompts where None.
    """
    adapter = adapt(model)
    texts = everyday(_NORM_PROMPTS) if prompts is None else prompts
    measured = capture(model, [(adapter.encode(text), ()) for text in texts], site=site, scope="all")
    return {layer: float(norm) for layer, norm in enumerate(measured.median_norm)}
