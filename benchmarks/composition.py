"""Could the loop make more of the responses that it has drawn? Other directions and other sums, at equal KL divergence.

For each run that `benchmarks/evidence.py` has left (--out), with all responses as they are: the directions of its
iterations are fitted and composed in other ways, scaled to the KL divergence of the loop's own last plan, and measured
on the same held-out prompts with the same random numbers. `python benchmarks/composition.py --oracle reading-ease`,
after evidence.py: about eight CPU minutes a seed. `--table` prints docs/data/composition_ORACLE.json as a table again.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import sims_lens as sims
from sims_lens.activations import capture
from sims_lens.bank import MemoryBank, select_pairs
from sims_lens.data import by_prompt
from sims_lens.estimators import unit
from sims_lens.evaluate import score_changes
from sims_lens.iteration import compose, fit_contrast
from sims_lens.sampling import Readings
from sims_lens.stats import crossed_mean, win_probability
from sims_lens.store import RunStore
from sims_lens.strength import Divergence, find_strength
from sims_lens.workbench import Workbench

sys.path.insert(0, str(Path(__file__).parent))
from evidence import ORACLES


class Read:
    """Responses, and the stream over each of them, averaged over its tokens, under the plan that it was drawn under."""

    def __init__(self, samples, means):
        self.samples, self.means = [s for s in samples if s.tokens], means

    def all_responses(self):
        """The covariance of score and activation within prompts: every response counts, by how far its score is from
        the mean of its prompt's."""
        total = 0.0
        for group in by_prompt(self.samples):
            scores = np.array([s.score for s in group])
            for s, weight in zip(group, scores - scores.mean(), strict=True):
                total = total + float(weight) * self.means[s.prompt, s.draw]
        return total

    def pairs(self, per_prompt):
        """The mean difference of the best and the worst."""
        chosen = select_pairs(MemoryBank().add(self.samples, iteration=1), per_prompt=per_prompt).pairs
        ends = [self.means[p.prompt, p.best.draw] - self.means[p.prompt, p.worst.draw] for p in chosen]
        return torch.stack(ends).mean(0)


def pool(run):
    """The unsteered model's responses, as many as the loop has drawn in all; the first are those of iteration 1."""
    folder = RunStore(run.path).folder("compared")
    readings = Readings(**folder.read_tensors("readings"))
    means = {tuple(key): mean for key, mean in zip(readings.samples.tolist(), readings.means, strict=True)}
    return Read(folder.read_samples("pool"), means)


def drawn(model, run, t):
    """The training responses of an iteration."""
    samples = [s for s in run.samples(t, "train") if s.tokens]
    adapter = sims.adapter.adapt(model)
    with sims.steering(model, run.before(t)):
        rows = [(adapter.encode(run.prompts[s.prompt]), s.tokens) for s in samples]
        means = capture(model, rows, site=run.config.steering.site).means
    return Read(samples, {(s.prompt, s.draw): mean for s, mean in zip(samples, means, strict=True)})


def bank(model, run, per_prompt):
    """The mean difference of the best and the worst of all iterations' responses, read under the last one's plan."""
    every = MemoryBank()
    for i in run.iterations:
        every = every.add(run.samples(i.index, "train"), iteration=i.index)
    config = replace(run.config, evaluation=replace(run.config.evaluation, controls=0))
    pairs = select_pairs(every, per_prompt=per_prompt)
    under = run.before(len(run.iterations))
    return fit_contrast(model, run.prompts, pairs, under, config, seed=0).mean_difference


def variants(model, run):
    """Directions at every layer, by what is summed."""
    learnt = [i.vectors for i in run.iterations]
    halves = [i.tensors["split_half"].clamp(min=0)[:, None] for i in run.iterations]
    many = pool(run)
    first = Read([s for s in many.samples if s.draw < run.config.sampling.responses], many.means)
    reads = [first, *(drawn(model, run, i.index) for i in run.iterations[1:])]
    two, every = [r.pairs(2) for r in reads], [r.all_responses() for r in reads]
    last, before = unit(learnt[-1]), unit(sum(unit(d) for d in learnt[:-1]))
    return {
        "one-shot, 12 responses a prompt, best and worst": many.pairs(1),
        "one-shot, 12 responses a prompt, every one by its score": many.all_responses(),
        "every response by its score, sum of unit vectors": sum(unit(d) for d in every),
        "every response by its score, natural lengths": sum(every),
        "two pairs a prompt, sum of unit vectors": sum(unit(d) for d in two),
        "three pairs a prompt of all iterations' responses": bank(model, run, 3),
        "sum, natural lengths": sum(learnt),
        "sum of unit vectors by split-half reliability": sum(unit(d) * h for d, h in zip(learnt, halves, strict=True)),
        "the last, orthogonal to those before, added to them": before
        + unit(last - (last * before).sum(-1, keepdim=True) * before),
        "the last iteration only": learnt[-1],
        "iteration 1 only": learnt[0],
        "every response by its score, iteration 1 only": every[0],
    }


def one_seed(model, folder, oracle, rows):
    ranker, evaluator, _, _ = ORACLES[oracle]
    run = sims.open_run(folder)
    bench = Workbench.begin(model, run.prompts, ranker=ranker(), evaluator=evaluator(), config=run.config, out=folder)
    kept, base = bench.store.folder("variants"), run.samples(0)
    divergence = Divergence(model, run.prompts, run.samples(1, "train"))
    layers, norms = list(run.plan.layers), run.iterations[0].tensors["median_norm"]
    wanted = divergence.of(run.plan)
    found = {"the loop": run.samples(len(run.iterations))}
    for name, direction in variants(model, run).items():
        plan = compose([direction], [0.2], layers, norms, run.config.steering, run.plan.provenance)
        plan = plan.scaled(find_strength(divergence, plan, kl=wanted).factor)
        found[name], _ = bench.measure(kept, name.replace(" ", "_").replace(",", ""), "heldout", plan, name, base)
    for name, samples in found.items():
        groups, others = by_prompt(samples), by_prompt(found["the loop"])
        rows.append(
            {
                "seed": run.config.seed,
                "variant": name,
                "changes": score_changes(samples, base).tolist(),
                "less": score_changes(samples, found["the loop"]).tolist(),
                "head_to_head": [
                    win_probability(*(np.array([s.score for s in g]) for g in pair))
                    for pair in zip(groups, others, strict=True)
                ],
                "kl": float(np.mean([s.kl for s in samples if s.kl is not None])),
                "nll": float(np.mean([s.nll for s in samples if s.nll is not None])),
            }
        )
        print(oracle, run.config.seed, name, f"{np.mean(rows[-1]['less']):+.3g}", file=sys.stderr, flush=True)


def table(rows) -> str:
    """One row per variant, paired with the loop's own plan by prompt and seed."""
    lines = ["| directions | effect [95%] | less the loop's [95%] | head to head [95%] | per seed | KL | NLL |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(r["variant"] for r in rows):
        own = [r for r in rows if r["variant"] == name]
        effect, less = (crossed_mean(np.array([r[k] for r in own])).interval for k in ("changes", "less"))
        wins = crossed_mean(np.array([r["head_to_head"] for r in own]), low=0.0, high=1.0)
        seeds = ", ".join(f"{np.mean(r['less']):+.3g}" for r in own)
        lines.append(
            f"| {name} | {effect.estimate:+.3g} [{effect.low:+.3g}, {effect.high:+.3g}] "
            f"| {less.estimate:+.3g} [{less.low:+.3g}, {less.high:+.3g}] | {wins} | {seeds} "
            f"| {np.mean([r['kl'] for r in own]):.2f} | {np.mean([r['nll'] for r in own]):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracle", choices=sorted(ORACLES), required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent / "docs" / "data")
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier run")
    given = parser.parse_args()
    file = given.data / f"composition_{given.oracle}.json"
    if not given.table:
        model, rows = sims.load("embedded"), []
        for seed in range(given.seeds):
            one_seed(model, given.out / given.oracle / f"seed_{seed}", given.oracle, rows)
        file.write_text(json.dumps(rows))
    print(table(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
