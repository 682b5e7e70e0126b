"""What does steering cost on easy questions? The packaged tasks on the embedded model, base against steered.

A cheerful direction (mean difference of ``sims.tone_pairs()``) at one layer, at rising coefficients, and a random
direction of the same size. ``python benchmarks/capability.py`` prints the table of ``docs/capability.md``; lm-eval has
to be installed. Some minutes of one core.
"""

import argparse
import time

import torch

import sims_lens as sims
from sims_lens.harness import PACKAGED
from sims_lens.plan import NOTHING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", type=int, default=22)
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8])
    parser.add_argument("--kind", default="bridge")
    parser.add_argument("--chat", action="store_true", help="documents in the chat template")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = sims.load("embedded", kind=given.kind)
    fitted = sims.fit(model, sims.tone_pairs())
    noise = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    random = {c: sims.SteeringPlan.addition({given.layer: noise}, coefficient=c, units="residual_norm") for c in (0.4,)}
    plans = {f"cheerful, {c:g}": fitted.plan(given.layer, coefficient=c) for c in given.coefficients}
    plans |= {f"random direction, {c:g}": plan for c, plan in random.items()}
    head = ("plan", "task", "metric", "base", "steered", "difference [95%]", "better", "worse")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    started = time.perf_counter()
    for name, plan in {**plans, "nothing": NOTHING}.items():
        found = sims.capability(model, plan, PACKAGED, chat=given.chat)
        for s in found.scores:
            d = s.difference
            shown = f"{d.estimate:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
            row = (
                name,
                s.task,
                s.name,
                f"{s.base.estimate:.3f}",
                f"{s.steered.estimate:.3f}",
                shown,
                s.better,
                s.worse,
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
