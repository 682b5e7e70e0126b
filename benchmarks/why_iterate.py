"""What a loop's later iterations have to learn from: spread of scores, pairs, reliability and turn of the direction.

Read off the runs that `benchmarks/evidence.py` has left; no model is run. The table, means over seeds, is printed by
`python benchmarks/why_iterate.py --out runs/evidence`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens.data import by_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    given = parser.parse_args()
    print(
        "| oracle | iteration | mean score | sd within a prompt | ties | pairs | margin | split-half | cosine with 1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for oracle in ("reading-ease", "vader"):
        runs = [sims.open_run(folder) for folder in sorted((given.out / oracle).glob("seed_*"))]
        for t in range(1, 4):
            rows = []
            for run in runs:
                i, (layer,) = run.iterations[t - 1], run.plan.layers
                groups = [np.array([s.score for s in g]) for g in by_prompt(run.samples(t, "train"))]
                rows.append(
                    [
                        np.mean([g.mean() for g in groups]),
                        np.sqrt(np.mean([g.var(ddof=1) for g in groups])),
                        np.mean([np.ptp(g) == 0 for g in groups]),
                        i.pairs.pairs,
                        i.pairs.margin,
                        float(i.tensors["split_half"][layer]),
                        float(torch.cosine_similarity(i.vectors[layer], run.iterations[0].vectors[layer], dim=0)),
                    ]
                )
            score, spread, ties, count, margin, half, turn = np.mean(rows, axis=0)
            print(
                f"| {oracle} | {t} | {score:.3g} | {spread:.3g} | {100 * ties:.0f}% | {count:.0f} | {margin:.3g} "
                f"| {half:.2f} | {turn:.2f} |"
            )


if __name__ == "__main__":
    main()
