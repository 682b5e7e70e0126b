"""Fixed texts, run teacher-forced again and again: what the runs share is computed once.

A sweep or an ablation study asks the same question of the same texts hundreds of times. Here the tokens that no plan
touches (the prompt up to its last token) are run once and kept in a KV cache, and the unsteered model's stream after
every block is recorded, so that a run which changes the model from layer l on starts at layer l.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sims_lens.activations import Row
from sims_lens.adapter import Adapter, adapt, left_pad
from sims_lens.errors import PromptError
from sims_lens.scope import GENERATION, TRACKER, TokenScope

BATCH_TOKENS = 512
"""Response positions in one batch: their logits take 100 MB with a vocabulary of 50,000."""


@dataclass(frozen=True, eq=False)
class ForcedBatch:
    """Some rows, each a prompt and a response to it, ready to be run any number of times. Made by :func:`force`.

    The columns of a run are those from ``start`` on, of rows that are laid out as ``[padding, prompt, response,
    padding]`` with the last token of the response left off: column ``boundary - start - 1 + k`` predicts token k.

    Args:
        model: the model.
        rows: index of each row among those that :func:`force` was given.
        tokens: what is run, from column ``start`` on.
        mask: real tokens, over all columns.
        start: the columns before it are in ``cache``; 0 where there is none.
        boundary: the first column of a response.
        targets: response tokens; 0 beyond a response's end.
        counted: where there is a response token.
        cache: the KV cache of the columns before ``start``.
        streams: the unsteered model's stream after each block, at the columns that are run.
        logits: the unsteered model's logits for each response token.
    """

    model: Any
    rows: tuple[int, ...]
    tokens: Int[Tensor, "row column"]
    mask: Bool[Tensor, "row all_columns"]
    start: int
    boundary: int
    targets: Int[Tensor, "row pos"]
    counted: Bool[Tensor, "row pos"]
    cache: Any
    streams: tuple[Float[Tensor, "row column d_model"], ...]
    logits: Float[Tensor, "row pos d_vocab"]

    def run(
        self, *, layer: int = 0, stream: Float[Tensor, "row column d_model"] | None = None
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of each response token under the hooks and the plan that are attached now.

        Args:
            layer: the first block that is run: blocks below it are taken as the unsteered model left them, so nothing
                that is attached may act there. 0 runs them all.
            stream: what the block below gave, where that is not what the unsteered model's gave: then what is attached
                in the blocks below may act, and this is how it left the stream.
        """
        adapter = adapt(self.model)
        tracker = self.model.__dict__.get(TRACKER)
        declared = tracker.prompt(self.boundary) if tracker is not None else nullcontext()
        cache = None if self.cache is None else adapter.fork(self.cache)
        below = self.streams[layer - 1] if stream is None and layer else stream
        replayed = nullcontext() if below is None else adapter.replaying(layer, below)
        with declared, replayed:
            return adapter.logits(self.tokens, self.mask, keep=self.targets.shape[1], cache=cache)

    def logprobs(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row pos"]:
        """Log-probability of each response token, in nats; 0 beyond a response's end."""
        chosen = logits.gather(-1, self.targets[..., None])[..., 0].float() - logits.float().logsumexp(-1)
        return torch.where(self.counted, chosen, 0.0)

    def mean(self, values: Float[Tensor, "row pos"]) -> Float[Tensor, " row"]:
        """Mean over the tokens of each response."""
        return torch.where(self.counted, values, 0.0).sum(-1) / self.counted.sum(-1)

    def columns(self, values: Float[Tensor, "row column *rest"]) -> Float[Tensor, "row pos *rest"]:
        """Of values at the columns that are run, those that predict a response token."""
        return values[:, -self.targets.shape[1] :]


def force(
    model: Any,
    rows: Sequence[Row],
    *,
    scope: TokenScope | str = GENERATION,
    together: int = 1,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[ForcedBatch]:
    """Rows in batches of about one length, each run once through the model as it is now.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        rows: token ids of prompts and responses.
        scope: the tokens that the plans to come may steer. Where that leaves the prompt alone, all of it but its last
            token is run once.
        together: that many rows in a row stay in one batch, for instance 2 for the two texts of a pair.
        batch_tokens: response tokens in a batch, about.

    Yields:
        Batches that hold every row once, with the longest responses last.

    Raises:
        PromptError: a row has an empty prompt or response, or is longer than the context.
    """
    adapter = adapt(model)
    for index, (prompt, response) in enumerate(rows):
        if not prompt or not response:
            raise PromptError(f"row {index} has {len(prompt)} prompt and {len(response)} response tokens; give some")
        if len(prompt) + len(response) > adapter.n_ctx:
            raise PromptError(
                f"row {index} has {len(prompt) + len(response)} tokens, the context {adapter.n_ctx}: shorten it"
            )
    groups = [list(range(k, min(k + together, len(rows)))) for k in range(0, len(rows), together)]
    groups.sort(key=lambda group: max(len(rows[i][1]) for i in group))
    batch: list[int] = []
    for group in groups:
        width = max(len(rows[i][1]) for i in group)
        if batch and width * (len(batch) + len(group)) > batch_tokens:
            yield _batch(model, adapter, rows, batch, TokenScope.of(scope))
            batch = []
        batch += group
    if batch:
        yield _batch(model, adapter, rows, batch, TokenScope.of(scope))


def _batch(model: Any, adapter: Adapter, rows: Sequence[Row], chosen: list[int], scope: TokenScope) -> ForcedBatch:
    prompts, mask = left_pad([rows[i][0] for i in chosen], adapter.device)
    responses = [list(rows[i][1]) for i in chosen]
    width = max(len(response) for response in responses)
    targets = torch.tensor([r + [0] * (width - len(r)) for r in responses], device=adapter.device)
    counted = torch.arange(width)[None] < torch.tensor([len(r) for r in responses])[:, None]
    counted = counted.to(adapter.device)
    tokens = torch.cat([prompts, targets[:, :-1]], dim=1)
    mask = torch.cat([mask, counted[:, 1:]], dim=1)  # the last token of a response predicts nothing that is asked
    boundary = prompts.shape[1]
    shared = not scope.prompt and min(len(rows[i][0]) for i in chosen) > 1
    start = boundary - 1 if shared else 0
    streams: list[Tensor] = []
    with torch.no_grad():
        cache = None
        if shared:
            unique = list(dict.fromkeys(tuple(rows[i][0]) for i in chosen))
            once, once_mask = left_pad([prompt[:-1] for prompt in unique], adapter.device)
            padding = start - once.shape[1]
            assert padding == 0
            cache = adapter.new_cache(len(unique))
            adapter.logits(once, once_mask, keep=1, cache=cache)
            index = torch.tensor([unique.index(tuple(rows[i][0])) for i in chosen], device=adapter.device)
            cache = adapter.select_rows(cache, index)
        own, handles = threading.get_ident(), []

        def record(_block: Any, _args: Any, output: Any) -> None:
            if threading.get_ident() == own:
                streams.append(_stream(output))

        try:
            for layer in range(adapter.n_layers):
                handles.append(adapter.block(layer).register_forward_hook(record))
            forked = None if cache is None else adapter.fork(cache)
            logits = adapter.logits(tokens[:, start:], mask, keep=width, cache=forked)
        finally:
            for handle in handles:
                handle.remove()
    return ForcedBatch(
        model=model,
        rows=tuple(chosen),
        tokens=tokens[:, start:],
        mask=mask,
        start=start,
        boundary=boundary,
        targets=targets,
        counted=counted,
        cache=cache,
        streams=tuple(streams),
        logits=logits,
    )


def _stream(output: Any) -> Tensor:
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream.detach()


__all__ = ["BATCH_TOKENS", "ForcedBatch", "force"]
