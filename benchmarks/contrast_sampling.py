"""Does it matter which pairs are contrasted? All, by margin, at random, and across iterations, at equal norm.

For each oracle and seed: two iterations of responses to the same training prompts, the second from the model as
steered by the first; directions from seven choices of pairs, each applied at the same layer and strength; win rate and
effect on the same held-out prompts with the same random numbers. ``python benchmarks/contrast_sampling.py --help``.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens.bank import MemoryBank, select_pairs
from sims_lens.config import SIMSConfig
from sims_lens.evaluate import side_effects
from sims_lens.iteration import compose, fit_contrast
from sims_lens.plan import NOTHING
from sims_lens.rankers import as_ranker, rank
from sims_lens.stats import bootstrap_mean, win_probability
from sims_lens.workbench import derive_seed

LAYER = {"reading-ease": 17, "vader": 22}
STRENGTH = 0.2


def one_seed(model, oracle, seed, prompts, heldout, samples, size, rows):
    ranker = as_ranker({"reading-ease": sims.ReadingEase, "vader": sims.Vader}[oracle]())
    settings = SIMSConfig(iterations=1, evaluation=sims.EvaluationConfig(controls=0))
    sampler = sims.LocalSampler(model, settings.sampling)
    layer = LAYER[oracle]

    def draw(texts, plan, n, *labels):
        drawn = sampler.sample(texts, n=n, plan=plan, seed=derive_seed(seed, *labels))
        return rank(ranker, texts, sorted(drawn, key=lambda s: (s.prompt, s.draw)))

    def direction(contrast, plan):
        return fit_contrast(model, prompts, contrast, plan, settings, seed=seed)

    first = draw(prompts, NOTHING, 4, "train", 1)
    bank = MemoryBank().add(first, iteration=1)
    fit = direction(select_pairs(bank), NOTHING)
    norms = fit.median_norm
    plan = compose(
        [fit.mean_difference], [STRENGTH], [layer], norms, settings.steering, sims.SteeringPlan(()).provenance
    )
    second = draw(prompts, plan.scaled(0.5), 4, "train", 2)
    both = bank.add(second, iteration=2)
    chosen = {
        "all pairs": (select_pairs(bank), NOTHING),
        f"top margin, {size}": (select_pairs(bank, policy="top_margin", size=size), NOTHING),
        f"random, {size}": (select_pairs(bank, policy="random", size=size, seed=seed), NOTHING),
        "bank of 2 iterations, all pairs": (select_pairs(both), plan.scaled(0.5)),
        f"bank, top margin, {size}": (select_pairs(both, policy="top_margin", size=size), plan.scaled(0.5)),
        f"bank, random, {size}": (select_pairs(both, policy="random", size=size, seed=seed), plan.scaled(0.5)),
        "iteration 2, all pairs": (select_pairs(MemoryBank().add(second, iteration=2)), plan.scaled(0.5)),
    }
    base = draw(heldout, NOTHING, samples, "heldout")
    base_scores = np.array([s.score for s in base]).reshape(len(heldout), samples)
    for name, (contrast, under) in chosen.items():
        vectors = direction(contrast, under).mean_difference
        steer = compose([vectors], [STRENGTH], [layer], norms, settings.steering, plan.provenance)
        drawn = draw(heldout, steer, samples, "heldout")
        nll = np.mean([s.nll for s in side_effects(model, heldout, [s for s in drawn if s.draw == 0], steer)])
        scores = np.array([s.score for s in drawn]).reshape(len(heldout), samples)
        rows.append(
            {
                "oracle": oracle,
                "seed": seed,
                "pairs": name,
                "count": len(contrast.pairs),
                "margin": float(np.mean([p.margin for p in contrast.pairs])),
                "norm": float(vectors[layer].norm() / norms[layer]),
                "difference": (scores - base_scores).mean(1).tolist(),
                "wins": [win_probability(a, b) for a, b in zip(scores, base_scores, strict=True)],
                "nll": float(nll),
            }
        )
        print(oracle, seed, name, len(contrast.pairs), f"{np.mean(rows[-1]['wins']):.3f}", file=sys.stderr, flush=True)


def table(rows) -> str:
    lines = ["| oracle | pairs | number | margin | effect [95%] | win rate [95%] | per seed | NLL |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for oracle in dict.fromkeys(r["oracle"] for r in rows):
        for name in dict.fromkeys(r["pairs"] for r in rows):
            own = [r for r in rows if r["oracle"] == oracle and r["pairs"] == name]
            if not own:
                continue
            effect = bootstrap_mean(np.mean([r["difference"] for r in own], axis=0))
            wins = bootstrap_mean(np.mean([r["wins"] for r in own], axis=0))
            seeds = ", ".join(f"{np.mean(r['wins']):.2f}" for r in own)
            digits = 1 if abs(effect.estimate) > 2 else 3
            lines.append(
                f"| {oracle} | {name} | {np.mean([r['count'] for r in own]):.0f} "
                f"| {np.mean([r['margin'] for r in own]):.3g} "
                f"| {effect.estimate:+.{digits}f} [{effect.low:+.{digits}f}, {effect.high:+.{digits}f}] "
                f"| {wins} | {seeds} | {np.mean([r['nll'] for r in own]):.2f} |"
            )
    return "\n".join(lines)


def paired(rows) -> str:
    """The comparisons that the choices are for, paired by prompt and by seed: equal size, equal norm."""
    size = next(r["pairs"] for r in rows if r["pairs"].startswith("random")).partition(", ")[2]
    comparisons = [
        (f"top margin, {size}", f"random, {size}"),
        (f"top margin, {size}", "all pairs"),
        (f"bank, top margin, {size}", f"bank, random, {size}"),
        ("bank of 2 iterations, all pairs", "all pairs"),
        ("bank of 2 iterations, all pairs", "iteration 2, all pairs"),
    ]
    lines = ["| oracle | less | effect, difference [95% over prompts] | per seed |", "|---|---|---|---|"]
    for oracle in dict.fromkeys(r["oracle"] for r in rows):
        found = {(r["pairs"], r["seed"]): np.array(r["difference"]) for r in rows if r["oracle"] == oracle}
        seeds = sorted({seed for _, seed in found})
        for ours, theirs in comparisons:
            gaps = [found[ours, seed] - found[theirs, seed] for seed in seeds]
            gap = bootstrap_mean(np.mean(gaps, axis=0))
            digits = 1 if oracle == "reading-ease" else 3
            each = ", ".join(f"{g.mean():+.{digits}f}" for g in gaps)
            lines.append(
                f"| {oracle} | {ours} − {theirs} "
                f"| {gap.estimate:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}] | {each} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=90)
    parser.add_argument("--heldout", type=int, default=50)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--size", type=int, default=45)
    parser.add_argument("--out", type=Path, default=Path("docs/data/contrast_sampling.json"))
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier run")
    given = parser.parse_args()
    if not given.table:
        model = sims.load("embedded", kind="bridge")
        prompts = sims.everyday(given.train + given.heldout)
        rows: list[dict] = []
        given.out.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(given.seeds):
            for oracle in ("reading-ease", "vader"):
                held = prompts[given.train :]
                one_seed(model, oracle, seed, prompts[: given.train], held, given.samples, given.size, rows)
                given.out.write_text(json.dumps(rows))
    rows = json.loads(given.out.read_text())
    print(f"{table(rows)}\n\n{paired(rows)}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
