"""A model's own axes, and random directions that know its residual stream: what a direction is compared with."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import capture_tokens
from sims_lens.adapter import Adapter, adapt
from sims_lens.analysis.directions import Directions
from sims_lens.analysis.norms import SeenBatch, StreamText, encode_texts, read_stream, scope_for
from sims_lens.checks import check_integer, check_list, check_seed
from sims_lens.errors import ConfigError, PromptError
from sims_lens.prompts import quote
from sims_lens.scope import TokenScope
from sims_lens.sites import check_layers

_DRAWS = 100


def stream_directions(
    model: Any,
    *,
    texts: Sequence[StreamText] | None = None,
    draws: int = _DRAWS,
    site: str = "resid_post",
    scope: TokenScope | str | None = None,
    seed: int = 0,
) -> Float[Tensor, "draw layer d_model"]:
    """Random directions with the covariance of the residual stream, first positions left out.

    A draw is a sum of all tokens' streams less their mean, with Gaussian weights: normal, with exactly their sample
    covariance, and without a matrix of d_model^2 values.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, as it is now.
        texts: prompts, or (prompt, response) pairs; the packaged everyday prompts where None.
        draws: how many.
        site: where in every block.
        scope: which tokens; by default the response, or of prompts alone all tokens.
        seed: of the weights.

    Raises:
        PromptError: there are no texts, or fewer than two tokens in them.
    """
    check_integer("draws", draws)
    check_seed(seed)
    adapter = adapt(model)
    rows, _ = encode_texts(adapter, texts)
    weighted = torch.zeros(adapter.n_layers, draws, adapter.d_model, dtype=torch.float64)
    weights = torch.zeros(adapter.n_layers, draws, 1, dtype=torch.float64)
    total = torch.zeros(adapter.n_layers, 1, adapter.d_model, dtype=torch.float64)
    counts = [0] * adapter.n_layers
    generator = torch.Generator().manual_seed(seed)

    def read(layer: int, stream: Float[Tensor, "batch pos d_model"], seen: SeenBatch) -> None:
        tokens = stream[seen.wanted].double().cpu()
        gaussian = torch.randn(draws, len(tokens), generator=generator, dtype=torch.float64)
        weighted[layer] += gaussian @ tokens
        weights[layer] += gaussian.sum(1, keepdim=True)
        total[layer] += tokens.sum(0)
        counts[layer] += len(tokens)

    read_stream(model, rows, read, site=site, scope=scope_for(rows, scope))
    if min(counts) < 2:
        raise PromptError(f"{len(rows)} texts have {min(counts)} tokens in scope after the first one; give more")
    drawn = (weighted - weights * total / counts[0]) / math.sqrt(counts[0])
    return drawn.transpose(0, 1).float()


def model_axes(
    model: Any,
    *,
    tokens: Sequence[str | int] = (),
    texts: Sequence[StreamText] | None = None,
    components: int = 3,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
) -> dict[str, Directions]:
    """A model's own axes, to compare directions with: the mean of its residual stream, the stream's largest principal
    components, and the directions that raise tokens' logits.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, as it is now.
        tokens: each a token id, or a text of one token (with the space before it, where it has one). The direction of a
            token is its column of the unembedding less the mean of all columns, as the final norm's weight scales it;
            the same at every layer.
        texts: on which the stream is read: prompts, all of whose tokens count, or (prompt, response) pairs, of which
            the response counts; the packaged everyday prompts where None. The first position is left out. Memory grows
            with their tokens: 4 bytes * tokens * layers * d_model.
        components: how many; each as long as the stream's standard deviation along it, with the sign that the mean
            has along it.
        layers: which; all where None.
        site: where in every block.

    Returns:
        ``"mean stream"``, ``"component 1"``, ..., ``"unembed ' yes'"``, ...

    Raises:
        PromptError: there are no texts, too few tokens in them, or a text in ``tokens`` is not one token.
        PlanError: the model has no such layer.
        ConfigError: ``tokens`` is a text, not a list of them.
    """
    if isinstance(tokens, str):
        raise ConfigError(f"tokens must be a list, such as [{tokens!r}], got {tokens!r}")
    check_list("tokens", tokens, "[' yes']")
    check_integer("components", components, 0)
    adapter = adapt(model)
    chosen = tuple(sorted(check_layers(layers, adapter.n_layers, adapter.name)))
    rows, _ = encode_texts(adapter, texts)
    scope = scope_for(rows, None)
    read = capture_tokens(model, rows, layers=chosen, site=site, scope=scope)
    stream = torch.cat([found[1:] if scope.prompt else found for found in read])
    if components < 0 or len(stream) <= max(1, components):
        raise PromptError(f"{len(stream)} tokens give no {components} principal components; give more texts")
    means = stream.mean(0)
    parts = torch.empty(components, len(chosen), adapter.d_model)
    for at in range(len(chosen)):
        _, values, right = torch.linalg.svd(stream[:, at] - means[at], full_matrices=False)
        sign = torch.where(right[:components] @ means[at] < 0, -1.0, 1.0)
        parts[:, at] = right[:components] * (sign * values[:components] / math.sqrt(len(stream)))[:, None]
    norms = stream.norm(dim=-1).median(0).values

    def named(name: str, vectors: Tensor) -> Directions:
        return Directions(name=name, layers=chosen, vectors=vectors, site=site, residual_norm=norms)

    found = {"mean stream": named("mean stream", means)}
    found |= {f"component {k}": named(f"component {k}", part) for k, part in enumerate(parts, start=1)}
    for token in tokens:
        index = _token(adapter, token)
        name = f"unembed {token!r}" if isinstance(token, str) else f"unembed {adapter.decode([token])!r} ({token})"
        found[name] = named(name, unembedding(model, index).expand(len(chosen), -1).clone())
    return found


def unembedding(model: Any, token: int) -> Float[Tensor, " d_model"]:
    """The direction at the end of the residual stream that raises a token's logit over the mean of all logits.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        token: its id.
    """
    adapter = adapt(model)
    adapter.check_runs()
    check_integer("token", token, 0, int(adapter.cfg.d_vocab) - 1)
    with torch.inference_mode():
        columns = adapter.floats("W_U", model.W_U).float().cpu()
        direction: Tensor = columns[:, token] - columns.mean(1)
        norm = getattr(model, "ln_final", None)
        if adapter.cfg.normalization_type is None or norm is None:
            return direction.clone()
        # What the norm multiplies by is seen in what it does to values of +1 and -1: they have mean 0 (but for an odd
        # d_model) and size 1. So it is the same for both kinds, and for weights that are stored less 1.
        probe = torch.where(torch.arange(adapter.d_model) % 2 == 0, 1.0, -1.0).to(adapter.device, model.W_U.dtype)
        at = probe[None, None]
        up, down, beside = (norm(x)[0, 0].float().cpu() for x in (at, -at, at + 1.0))
        weight = (up - down) / 2 * probe.float().cpu()
        direction = direction * weight
        if bool(torch.allclose(beside, up, rtol=1e-2, atol=1e-3)):  # it takes the mean over d_model off
            direction = direction - direction.mean()
    return direction.clone()


def _token(adapter: Adapter, token: str | int) -> int:
    if isinstance(token, str):
        ids = adapter.encode_response(token)
        if len(ids) != 1:
            raise PromptError(f"{quote(token)} has {len(ids)} tokens for {adapter.name}, not 1; give a token's text")
        return ids[0]
    size = int(adapter.model.W_U.shape[1])
    if type(token) is not int or not 0 <= token < size:
        raise PromptError(f"token {token!r} is not in 0..{size - 1} of {adapter.name}")
    return token


__all__ = ["model_axes", "stream_directions", "unembedding"]
