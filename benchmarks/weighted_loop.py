"""The loop with every response in its fit: two pairs a prompt, each weighted by its margin, against the loop as it is.

`benchmarks/composition.py` asks what other fits would have made of the loop's own responses; here the loop goes its own
way with them. Same prompts, layers, seeds, budget of KL and random numbers as `benchmarks/evidence.py`, whose runs
(--out) it is held against. `python benchmarks/weighted_loop.py --oracle vader`, after evidence.py: four CPU minutes a
seed.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import sims_lens as sims
from sims_lens.data import by_prompt
from sims_lens.evaluate import score_changes
from sims_lens.stats import crossed_mean, win_probability

sys.path.insert(0, str(Path(__file__).parent))
from evidence import ORACLES


def head_to_head(ours, theirs):
    """By prompt, how often a response of ours scores higher."""
    both = zip(by_prompt(ours), by_prompt(theirs), strict=True)
    return [win_probability(*(np.array([s.score for s in group]) for group in pair)) for pair in both]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracle", choices=sorted(ORACLES), required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent / "docs" / "data")
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier run")
    given = parser.parse_args()
    file = given.data / f"weighted_loop_{given.oracle}.json"
    if not given.table:
        model, rows = sims.load("embedded"), []
        ranker, evaluator, _, _ = ORACLES[given.oracle]
        for seed in range(given.seeds):
            plain = sims.open_run(given.out / given.oracle / f"seed_{seed}")
            (layer,) = plain.plan.layers
            config = replace(
                plain.config,
                contrast=replace(plain.config.contrast, per_prompt=2, weight="margin"),
                steering=replace(plain.config.steering, candidates=(layer / (model.cfg.n_layers - 1),)),
                evaluation=replace(plain.config.evaluation, controls=0),
            )
            run = sims.improve(
                model,
                plain.prompts,
                ranker=ranker(),
                evaluator=evaluator(),
                config=config,
                out=given.out / f"{given.oracle}_weighted" / f"seed_{seed}",
            )
            assert run.split == plain.split and run.plan.layers == (layer,)
            base = plain.samples(0)
            for t in range(1, 1 + len(run.iterations)):
                ours, theirs = run.samples(t), plain.samples(t)
                changes, others = score_changes(ours, base), score_changes(theirs, base)
                rows.append(
                    {
                        "seed": seed,
                        "iteration": t,
                        "changes": changes.tolist(),
                        "less": (changes - others).tolist(),
                        "head_to_head": head_to_head(ours, theirs),
                        "kl": [r.iterations[t - 1].evaluation.kl.estimate for r in (run, plain)],
                    }
                )
        file.write_text(json.dumps(rows))
    rows = json.loads(file.read_text())
    print("| iteration | effect [95%] | less the plain loop's [95%] | head to head [95%] | per seed | KL | KL, plain |")
    print("|---|---|---|---|---|---|---|")
    for t in sorted({r["iteration"] for r in rows}):
        own = [r for r in rows if r["iteration"] == t]
        effect, less = (crossed_mean(np.array([r[k] for r in own])).interval for k in ("changes", "less"))
        wins = crossed_mean(np.array([r["head_to_head"] for r in own]), low=0.0, high=1.0)
        seeds = ", ".join(f"{np.mean(r['less']):+.3g}" for r in own)
        gap = f"{less.estimate:+.3g} [{less.low:+.3g}, {less.high:+.3g}]"
        kl = np.mean([r["kl"] for r in own], axis=0)
        print(
            f"| {t} | {effect.estimate:+.3g} [{effect.low:+.3g}, {effect.high:+.3g}] "
            f"| {gap} | {wins} | {seeds} | {kl[0]:.2f} | {kl[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
