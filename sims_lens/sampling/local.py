"""The in-process sampler: one prefill per prompt, shared by its K responses; many rows decoded side by side."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sims_lens.adapter import Adapter, adapt, left_pad
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.hooks import steering
from sims_lens.plan import SteeringPlan
from sims_lens.sampling.base import TokenCount
from sims_lens.sampling.draw import choose, uniforms


class LocalSampler:
    """Samples from a model in this process.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``. Hooks that are attached to it act.
        config: how responses are drawn.
    """

    def __init__(self, model: Any, config: SamplingConfig | None = None) -> None:
        self.model = model
        self.config = config or SamplingConfig()
        self.count = TokenCount()

    def sample(self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int) -> Iterator[Sample]:
        """Yield the samples batch by batch, prompts of similar length together. See :class:`Sampler`."""
        adapter = adapt(self.model)
        encoded = [adapter.encode(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        group = max(1, self.config.batch_rows // n)
        for start in range(0, len(order), group):
            batch = order[start : start + group]
            noise = torch.stack(
                [uniforms(seed, prompts[i], k, self.config.max_new_tokens) for i in batch for k in range(n)]
            )
            with torch.inference_mode(), steering(self.model, plan) if plan.interventions else nullcontext():
                rows = self._decode(adapter, [encoded[i] for i in batch], n, noise)
            for row, (tokens, ended) in enumerate(rows):
                yield Sample(
                    prompt=batch[row // n], draw=row % n, tokens=tokens, text=adapter.decode(tokens), ended=ended
                )

    def _decode(
        self, adapter: Adapter, prompts: Sequence[Sequence[int]], n: int, noise: Tensor
    ) -> list[tuple[tuple[int, ...], bool]]:
        """Response tokens of each row (prompt-major), and whether it ended itself. Finished rows leave the batch."""
        config, device = self.config, adapter.device
        stops = torch.tensor(adapter.stop_ids, device=device)
        tokens, mask = left_pad(prompts, device)
        cache = adapter.new_cache(len(prompts))
        logits = adapter.logits(tokens, mask, keep=1, cache=cache)[:, -1]
        self.count.prefill += int(mask.sum())

        alive = torch.arange(len(prompts) * n, device=device)
        cache = adapter.select_rows(cache, alive // n)
        logits, mask, noise = logits[alive // n], mask[alive // n], noise.to(device)
        drawn: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        ended = [False] * len(drawn)
        for step in range(config.max_new_tokens):
            new = choose(
                logits,
                noise[alive, step],
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
            )
            going = ~torch.isin(new, stops)
            for row, token, goes in zip(alive.tolist(), new.tolist(), going.tolist(), strict=True):
                if goes:
                    drawn[row].append(token)
                else:
                    ended[row] = True
            if step == config.max_new_tokens - 1 or not bool(going.any()):
                break
            if not bool(going.all()):
                kept = going.nonzero()[:, 0]
                cache, mask, alive, new = adapter.select_rows(cache, kept), mask[kept], alive[kept], new[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = adapter.logits(new[:, None], mask, keep=1, cache=cache)[:, -1]
            self.count.decode += len(new)
        return [(tuple(row), end) for row, end in zip(drawn, ended, strict=True)]
