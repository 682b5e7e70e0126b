"""Reading the residual stream: averages over the tokens in scope, all layers in one forward pass.

No activation outlives its block: a hook at each site reduces it at once, so memory does not depend on the number
of layers times the length of the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sims_lens.adapter import Adapter, adapt, left_pad
from sims_lens.errors import ModelError
from sims_lens.prompts import everyday
from sims_lens.scope import RESPONSE, TRACKER, TokenScope, left_padded_regions
from sims_lens.sites import check_layer

Row = tuple[Sequence[int], Sequence[int]]
"""A sequence as (prompt token ids, response token ids)."""

_NORM_PROMPTS = 16


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
        batch_rows: sequences in one forward pass.
        advance: called with the number of rows after each pass, for a progress bar.

    Raises:
        ModelError: a row has no token in scope.
    """
    n_layers, d_model = adapt(model).n_layers, adapt(model).d_model
    means = torch.empty(len(rows), n_layers, d_model)
    norms: list[list[Tensor]] = [[] for _ in range(n_layers)]

    def read(seen: _Seen, stream: Float[Tensor, "batch pos d_model"]) -> None:
        means[seen.rows, seen.layer] = masked_mean(stream, seen.wanted).cpu()
        norms[seen.layer].append(stream.norm(dim=-1)[seen.wanted & ~seen.first].cpu())

    _forward(model, rows, read, site=site, scope=scope, batch_rows=batch_rows, advance=advance)
    medians = [torch.cat(values).median() if values else torch.tensor(torch.nan) for values in norms]
    return Activations(means=means, median_norm=torch.stack(medians))


def capture_tokens(
    model: Any,
    rows: Sequence[Row],
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    scope: TokenScope | str = RESPONSE,
    batch_rows: int = 32,
    advance: Callable[[int], None] | None = None,
) -> list[Float[Tensor, "_pos layer d_model"]]:
    """Like :func:`capture`, but every token in scope, for estimators that need them (HPR).

    Memory grows with the tokens: 4 bytes * tokens * layers * d_model; choose layers where that is too much.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        rows: prompt and response token ids of each sequence.
        layers: which; all of them where None.
        site: where in every block.
        scope: which tokens.
        batch_rows: sequences in one forward pass.
        advance: called with the number of rows after each pass, for a progress bar.

    Returns:
        For each row its tokens in scope, in order, float32, on the CPU.

    Raises:
        ModelError: a row has no token in scope.
        PlanError: the model has no such layer.
    """
    adapter = adapt(model)
    chosen = list(range(adapter.n_layers) if layers is None else layers)
    for layer in chosen:
        check_layer(layer, adapter.n_layers, adapter.name)
    place = {layer: index for index, layer in enumerate(chosen)}
    found: list[Tensor] = [torch.empty(0)] * len(rows)

    def read(seen: _Seen, stream: Float[Tensor, "batch pos d_model"]) -> None:
        if seen.layer not in place:
            return
        for row, values, wanted in zip(seen.rows, stream, seen.wanted, strict=True):
            kept = values[wanted].cpu()
            if not len(found[row]):
                with torch.inference_mode(False):  # or no estimator could train on it
                    found[row] = torch.empty(len(kept), len(chosen), adapter.d_model)
            found[row][:, place[seen.layer]] = kept

    _forward(model, rows, read, site=site, scope=scope, batch_rows=batch_rows, advance=advance)
    return found


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a stream that is being read is: a layer's, of these rows, with the tokens that count."""

    layer: int
    rows: list[int]
    wanted: Bool[Tensor, "batch pos"]
    first: Bool[Tensor, "batch pos"]


def _forward(
    model: Any,
    rows: Sequence[Row],
    read: Callable[[_Seen, Tensor], None],
    *,
    site: str,
    scope: TokenScope | str,
    batch_rows: int,
    advance: Callable[[int], None] | None,
) -> None:
    """Run the rows through the model, those of a length together, and hand every block's stream to ``read``."""
    scope = TokenScope.of(scope)
    adapter = adapt(model)
    for index, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        if not bool(scope.mask(left_padded_regions([len(prompt)], [length], length)).any()):
            raise ModelError(f"row {index} has no token in scope {scope.name!r}; leave such rows out")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        tokens, mask = left_pad([[*rows[i][0], *rows[i][1]] for i in batch], adapter.device)
        lengths = [len(rows[i][0]) + len(rows[i][1]) for i in batch]
        regions = left_padded_regions([len(rows[i][0]) for i in batch], lengths, tokens.shape[1])
        wanted = scope.mask(regions).to(adapter.device)
        first = torch.arange(tokens.shape[1])[None] == (tokens.shape[1] - torch.tensor(lengths))[:, None]
        seen = _Seen(0, batch, wanted, first.to(adapter.device))

        def at(layer: int, stream: Tensor, seen: _Seen = seen) -> None:
            read(replace(seen, layer=layer), stream.float())

        boundary = [tokens.shape[1] - len(rows[i][1]) for i in batch]
        tracker = model.__dict__.get(TRACKER)
        declared = tracker.prompt(boundary) if tracker is not None else nullcontext()
        with torch.inference_mode(), listening(adapter, site, at), declared:
            adapter.logits(tokens, mask, keep=1)
        if advance is not None:
            advance(len(batch))


def masked_mean(
    stream: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the tokens where ``mask`` is True."""
    total = torch.where(mask[..., None], stream, 0.0).sum(1)  # not a product: padding may hold anything
    return total / mask.sum(-1, keepdim=True)


@contextmanager
def listening(adapter: Adapter, site: str, read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``read(layer, stream)`` for every block's value at a site while the block is open.

    Plain forward hooks on TransformerLens' HookPoints: they see what hooks before them left, so a plan that is
    attached already has acted.
    """
    handles = []
    try:
        for layer in range(adapter.n_layers):

            def hook(point: Any, _args: Any, output: Tensor, layer: int = layer) -> None:
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
