"""Does a baked checkpoint cost anything? Decoding with the plain model, the baked one, and the plan as hook points.

The three take turns on the same prompts in one process; CPU seconds are compared turn by turn. ``--layers all`` steers
every block, ``--layers 17`` one. ``python benchmarks/baked.py --help``.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens.plan import NOTHING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="all", help="all, or numbers with commas")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = sims.load("embedded", kind="bridge")
    layers = range(model.cfg.n_layers) if given.layers == "all" else map(int, given.layers.split(","))
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(model.cfg.d_model, generator=generator) for layer in layers}
    plan = sims.SteeringPlan.addition(vectors, coefficient=0.02, units="residual_norm", scope="all")
    plan = sims.resolve(model, plan)
    with tempfile.TemporaryDirectory() as temporary:
        done = sims.export.bake(model, plan, Path(temporary) / "baked")
        print(f"{len(vectors)} layers; logits within {done.error:.2g} of the hooked model's at {done.tokens} tokens")
        baked = sims.load(done.path, kind="bridge")
    sampling = sims.SamplingConfig(max_new_tokens=given.tokens, batch_rows=given.rows)
    prompts = sims.everyday(given.rows // 2)
    contestants = {"plain": (model, NOTHING), "baked": (baked, NOTHING), "hooks": (model, plan)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(given.turns + 1):
        for name, (each, steered) in contestants.items():
            sampler = sims.LocalSampler(each, sampling)
            start = time.process_time()
            drawn = list(sampler.sample(prompts, n=2, plan=steered, seed=0))
            spent = (time.process_time() - start) / sum(len(s.tokens) for s in drawn)
            if turn:  # the first one warms up
                seconds[name].append(spent)
    plain = np.array(seconds["plain"])
    for name, values in seconds.items():
        ratio = np.array(values) / plain
        print(
            f"{name}: {1 / np.median(values):.0f} new tokens per CPU second; time against plain "
            f"{np.median(ratio):.3f} [{ratio.min():.3f}, {ratio.max():.3f}] over {given.turns} turns"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
