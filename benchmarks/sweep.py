"""How long does a layer sweep take? 30 layers x 5 coefficients of the embedded model, teacher-forced on 64 pairs.

The pairs are warm and cold answers to everyday prompts, of about 10 and of about 40 tokens; the directions are fitted
to others. Each length is swept adaptively and in full, and what the two choose is compared.
``python benchmarks/sweep.py --help``; ``python benchmarks/sweep.py --out sweep.json`` does it all.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.analysis.sweep import COEFFICIENTS, LayerSweep, layer_sweep

WARM = (
    "What a lovely question, I am so glad you asked!",
    "I would be delighted to help you with this.",
    "It is wonderful to talk with you about it.",
    "You are doing great, and it will be fun.",
    "Thank you, this makes me really happy today!",
    "Let us enjoy this together, step by step!",
    "That is a beautiful idea, I love it.",
)
COLD = (
    "What a dull question, I wish you had not asked.",
    "I do not want to help you with this.",
    "It is tedious to talk with you about it.",
    "You are doing badly, and it will be boring.",
    "Go away, this makes me really angry today.",
    "Do not waste my time with this, just stop.",
    "That is a terrible idea, I hate it.",
)


def pairs_of(prompts, sentences: int, *, seed: int):
    """A warm and a cold answer to each prompt, of that many sentences, mirrored."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(len(WARM))[:sentences] for _ in prompts]
    return [
        (prompt, *(" ".join(texts[k] for k in pick) for texts in (WARM, COLD)))
        for prompt, pick in zip(prompts, chosen, strict=True)
    ]


def measured(model, source, pairs, given, *, adaptive: bool) -> tuple[LayerSweep, dict]:
    """One sweep with what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    layers = None if given.layers is None else list(range(0, model.cfg.n_layers, given.layers))
    sweep = layer_sweep(
        model, source, behaviour=pairs, coefficients=COEFFICIENTS, layers=layers, adaptive=adaptive, seed=given.seed
    )
    adapter = adapt(model)
    tokens = [len(adapter.encode_response(text)) for _, *both in pairs for text in both]
    spent = sum(cell.count for cell in sweep.cells)
    best = sweep.best
    record = {
        "adaptive": adaptive,
        "pairs": len(pairs),
        "tokens_per_answer": float(np.mean(tokens)),
        "cells": len(sweep.cells),
        "share_measured": spent / (len(sweep.cells) * len(pairs)),
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "best": best.to_json() if best else None,
        "sweep": sweep.to_json(),
    }
    print(sweep)
    print(
        f"{record['tokens_per_answer']:.0f} tokens per answer, {'adaptive' if adaptive else 'full'}: "
        f"{record['wall_seconds']:.0f} s wall, {record['cpu_seconds']:.0f} s CPU, "
        f"{100 * record['share_measured']:.0f}% of the cells' pairs\n",
        flush=True,
    )
    return sweep, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 4], help="in an answer; about 10 tokens each")
    parser.add_argument("--modes", nargs="+", choices=("adaptive", "full"), default=["adaptive", "full"])
    parser.add_argument("--layers", type=int, help="every so many layers only, for a quick look")
    parser.add_argument("--kind", default="hooked", choices=("hooked", "bridge"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = sims.load("embedded", kind=given.kind)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": given.threads,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kind": given.kind,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    prompts = sims.everyday(given.pairs + 32)
    fitted = sims.fit(model, pairs_of(prompts[given.pairs :], 1, seed=given.seed + 1))
    records = []
    for sentences in given.sentences:
        pairs = pairs_of(prompts[: given.pairs], sentences, seed=given.seed)
        found = {}
        for mode in given.modes:
            found[mode], record = measured(model, fitted, pairs, given, adaptive=mode == "adaptive")
            records.append(record)
        if len(found) == 2:
            chosen, truth = found["adaptive"].best, found["full"].best
            same = bool(chosen and truth) and (chosen.layer, chosen.coefficient) == (truth.layer, truth.coefficient)
            print(f"adaptive and full choose {'the same cell' if same else 'different cells'}\n", flush=True)
    if given.out:
        given.out.write_text(json.dumps({"machine": machine, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
