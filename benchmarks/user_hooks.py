"""A user's hook on the model: our sampler beside ``HookedTransformer.generate`` on the same re-strided object.

Embedded model, float32, one thread; CPU seconds for the same number of new tokens, nothing ends before the limit; the
two take turns. ``generate`` gets what helps it most of what we know: all rows in one left-padded batch of 128, weights
re-strided. ``python benchmarks/user_hooks.py``; about twenty CPU minutes. ``--point blocks.10.attn.hook_z`` for one.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

import sims_lens as sims
from sims_lens.adapter import HookedAdapter, adapt, left_pad
from sims_lens.plan import NOTHING

EVERYWHERE = "blocks.*.attn.hook_pattern"
POINTS = (
    "none",
    "blocks.10.hook_resid_post",
    "blocks.10.attn.hook_q",
    "blocks.10.attn.hook_z",
    "blocks.10.attn.hook_attn_scores",
    "blocks.10.attn.hook_pattern",
    "blocks.10.attn.hook_rot_k",
    EVERYWHERE,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--point", action="append", choices=POINTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = sims.load("embedded", kind="hooked")
    prompts = sims.everyday(given.prompts)
    config = sims.SamplingConfig(max_new_tokens=given.tokens, temperature=0.8, top_k=50)
    lengths = [len(adapt(model).encode(prompt)) for prompt in prompts]
    print(f"{given.prompts} prompts of {min(lengths)} to {max(lengths)} tokens ({len(set(lengths))} lengths)")
    print(f"x K = {given.samples} x {given.tokens} new tokens, {given.rounds} rounds; new tokens per CPU second\n")
    print("| a hook at | ours | generate | ratio | road |\n|---|---|---|---|---|")
    for point in given.point or POINTS:
        sampler = sims.LocalSampler(model, config)
        times: list[tuple[float, float]] = []
        with hooked(model, point), endless():
            ours(sampler, prompts[:2], 2)  # the twin is made before the clock starts
            for _ in range(given.rounds):
                times.append(
                    (
                        clocked(lambda sampler=sampler: ours(sampler, prompts, given.samples)),
                        clocked(lambda: generate(model, prompts, given.samples, config)),
                    )
                )
        total = given.prompts * given.samples * given.tokens
        mine, own = np.median(times, axis=0)
        ratios = [theirs / us for us, theirs in times]
        spread = f"**{np.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| `{point}` | {total / mine:.0f} | {total / own:.0f} | {spread} | {sampler.road} |", flush=True)


def clocked(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@contextmanager
def hooked(model, point: str) -> Iterator[None]:
    """Inside, a hook that reads and gives back what it was shown."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    names = {"none": [], EVERYWHERE: names}.get(point, [point])
    with model.hooks(fwd_hooks=[(name, lambda value, hook: value) for name in names]):  # noqa: ARG005
        yield


@contextmanager
def endless() -> Iterator[None]:
    """Inside, nothing ends a response of ours."""
    HookedAdapter.stop_ids = property(lambda _: ())
    try:
        yield
    finally:
        del HookedAdapter.stop_ids


def ours(sampler, prompts: list[str], n: int) -> None:
    drawn = list(sampler.sample(prompts, n=n, plan=NOTHING, seed=0))
    assert all(len(sample.tokens) == sampler.config.max_new_tokens for sample in drawn)


def generate(model, prompts: list[str], n: int, config: sims.SamplingConfig) -> None:
    """One left-padded batch; ``generate`` finds the padding by the tokenizer's side and pad token."""
    rows = [adapt(model).encode(prompt) for prompt in prompts for _ in range(n)]
    tokens, mask = left_pad(rows, torch.device("cpu"))
    tokens[~mask] = model.tokenizer.pad_token_id
    with torch.inference_mode():
        model.generate(
            tokens,
            max_new_tokens=config.max_new_tokens,
            stop_at_eos=False,
            temperature=config.temperature,
            top_k=config.top_k,
            padding_side="left",
            prepend_bos=False,
            verbose=False,
        )


if __name__ == "__main__":
    main()
