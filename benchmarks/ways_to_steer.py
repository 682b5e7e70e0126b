"""Which estimator, which transform? Held-out effect of each pair of them at an equal fluency budget.

For each seed: responses of the base model to training prompts, ranked by reading ease; the best and the worst of each
prompt make the contrast pairs. Every estimator is fitted to the same pairs at one layer, every transform is made of its
direction, and each combination gets the strength with the largest effect within one fluency budget on one set of
prompts, searched as :func:`sims_lens.calibrate` does. The table is of another set.
``python benchmarks/ways_to_steer.py --help``.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens.activations import capture, capture_tokens
from sims_lens.adapter import adapt
from sims_lens.bank import MemoryBank, select_pairs
from sims_lens.calibration import Point, best_within, search
from sims_lens.estimators import ESTIMATORS, fit_layers
from sims_lens.evaluate import evaluate, perplexity_ratio, side_effects
from sims_lens.plan import NOTHING
from sims_lens.rankers import as_ranker, rank
from sims_lens.supervised import aligned
from sims_lens.workbench import derive_seed

DIRECTIONS = ("mean_difference", "pca", "pca_classes", "logistic_probe", "mass_mean", "whitened_mean_difference")
CONTROLS = ("random_direction", "shuffled_mean_difference")
STRENGTHS = (0.06, 0.12, 0.24)
"""Of additions and clamps in residual norms, of rotations in radians: much the same distance. Others are factors."""


def plan_of(transform: str, fitted, strength: float, norm: float, middle: float, layer: int) -> sims.SteeringPlan:
    """A plan of one strength. A clamp's is how far beyond the positive responses' mean projection it sets it."""
    if transform == "addition":
        options = {"units": "residual_norm", "residual_norms": {layer: norm}}
        return sims.SteeringPlan.addition({layer: fitted.vector}, coefficient=strength, **options)
    if transform == "clamp":
        return sims.SteeringPlan.of({layer: sims.Clamp(fitted.direction, middle + strength * norm)})
    made = sims.Rotation(fitted.direction) if transform == "rotation" else fitted
    return sims.SteeringPlan.of({layer: made}, coefficient=strength)


class Measured:
    """Draws and scores a plan's responses to a set of prompts, against the base model's, which are drawn once."""

    def __init__(self, model, ranker, prompts, seed: int) -> None:
        self.model, self.ranker, self.prompts, self.seed = model, ranker, prompts, seed
        self.sampler = sims.LocalSampler(model)
        self.base = self.samples(NOTHING)

    def samples(self, plan):
        """Two responses to each prompt, with scores, and the side effects of the first."""
        drawn = list(self.sampler.sample(self.prompts, n=2, plan=plan, seed=derive_seed(self.seed, "test")))
        scored = rank(self.ranker, self.prompts, drawn)
        first = side_effects(self.model, self.prompts, [s for s in scored if s.draw == 0], plan)
        return [*first, *(s for s in scored if s.draw > 0)]

    def point(self, name: str, plan, strength: float) -> Point:
        """The plan against the base model."""
        found = self.samples(plan)
        evaluation = evaluate(found, self.base)
        return Point(name, strength, strength, evaluation, perplexity_ratio(found, self.base))


def one_seed(model, seed: int, given, rows: list[dict]) -> None:
    prompts = sims.everyday(given.train + given.test)
    train, test = prompts[: given.train], prompts[given.train :]
    ranker = as_ranker(sims.ReadingEase())
    drawn = sims.LocalSampler(model).sample(train, n=4, plan=NOTHING, seed=derive_seed(seed, "train"))
    pairs = select_pairs(MemoryBank().add(rank(ranker, train, list(drawn)), iteration=1)).pairs
    ids = [adapt(model).encode(train[p.prompt]) for p in pairs]
    texts = [(i, p.best.tokens) for i, p in zip(ids, pairs, strict=True)]
    texts += [(i, p.worst.tokens) for i, p in zip(ids, pairs, strict=True)]
    layer, count, budget = given.layer, len(pairs), sims.FluencyBudget()
    read = capture(model, texts)
    means, norm = read.means[:, [layer]], float(read.median_norm[layer])
    tokens = capture_tokens(model, texts, layers=[layer])
    half = len(test) // 2
    calibration, report = (Measured(model, ranker, part, seed) for part in (test[:half], test[half:]))
    cells = [(name, "addition") for name in (*DIRECTIONS, *CONTROLS)] + [("hpr", "hpr")]
    crossed = DIRECTIONS[:1] if given.quick else DIRECTIONS
    cells += [(name, transform) for name in crossed for transform in ("rotation", "clamp")]
    fits = {}
    for name, transform in cells:
        if name not in fits:
            of = aligned(tokens[:count], tokens[count:]) if name == "hpr" else (means[:count], means[count:])
            fits[name] = fit_layers(ESTIMATORS[name](), *of)[0]
        fitted = fits[name]
        middle = float(means[:count, 0].mean(0) @ fitted.direction)

        def plan(strength, transform=transform, fitted=fitted, middle=middle):
            return plan_of(transform, fitted, strength, norm, middle, layer)

        grid = (0.5, 1.0, 2.0) if transform == "hpr" else STRENGTHS
        curve = search(lambda s, name=name, plan=plan: calibration.point(name, plan(s), s), grid, budget, refine=1)
        best = best_within(curve, budget)
        row = {"seed": seed, "estimator": name, "transform": transform, "curve": [p.to_json() for p in curve]}
        row["report"] = report.point(name, plan(best.factor), best.factor).to_json() if best else None
        rows.append(row)
        given.out.write_text(json.dumps(rows))
        said = f"{best.factor:.2f}: {row['report']['evaluation']['difference'][0]:+.1f}" if best else "nothing helps"
        print(seed, name, transform, said, file=sys.stderr, flush=True)


UNSTEERED = {
    "factor": 0.0,
    "perplexity_ratio": [1.0],
    "evaluation": {"difference": [0.0, 0.0, 0.0], "win_rate": [0.5], "kl": [0.0]},
}
"""Where nothing within the budget helps on the calibration prompts, one does not steer."""


def table(rows: list[dict]) -> str:
    """Means over seeds, with the smallest and the largest."""
    lines = [
        "| estimator | transform | strength, per seed | effect, mean [seeds] | effect [95% over prompts], per seed "
        "| win rate, mean [seeds] | perplexity ratio | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["estimator"], r["transform"]) for r in rows):
        points = [r["report"] or UNSTEERED for r in rows if (r["estimator"], r["transform"]) == key]
        effects = [p["evaluation"]["difference"] for p in points]
        wins = [p["evaluation"]["win_rate"][0] for p in points]
        ratio = np.mean([p["perplexity_ratio"][0] for p in points])
        kl = np.mean([p["evaluation"]["kl"][0] for p in points])
        middle = [e[0] for e in effects]
        each = [f"{e[0]:+.1f} [{e[1]:+.1f}, {e[2]:+.1f}]" if any(e) else "0 (unsteered)" for e in effects]
        lines.append(
            f"| {key[0]} | {key[1]} | {', '.join(format(p['factor'], '.2g') for p in points)} "
            f"| {np.mean(middle):+.1f} [{min(middle):+.1f}, {max(middle):+.1f}] | {'; '.join(each)} "
            f"| {np.mean(wins):.2f} [{min(wins):.2f}, {max(wins):.2f}] | {ratio:.2f} | {kl:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=90, help="prompts that the pairs come from")
    parser.add_argument("--test", type=int, default=60, help="prompts to calibrate on and to report on, half each")
    parser.add_argument("--layer", type=int, default=17)
    parser.add_argument("--quick", action="store_true", help="rotation and clamp of the mean difference only")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("docs/data/ways_to_steer.json"))
    parser.add_argument("--table", type=Path, nargs="+", help="only print the table of these earlier results")
    given = parser.parse_args()
    if given.table:
        print(table([row for path in given.table for row in json.loads(path.read_text())]))
        return
    model = sims.load("embedded", kind="bridge", dtype=getattr(torch, given.dtype))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed in given.seeds:
        one_seed(model, seed, given, rows)
    print(table(rows))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
