"""Does the guard see planted disasters, and is the run's plan none of them? On real runs of the embedded model.

A coefficient ten times too big, an oracle whose sign flips at iteration 2, a sampler that says one thing only from
iteration 2 on; beside them runs in which nothing is wrong, for false alarms. `python benchmarks/disasters.py` makes
100 runs of each and prints a table; what is there already in `--out` is not made again.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import sims_lens as sims

COUNT = 24  # prompts; a run takes some seconds


class Flipping:
    """Reading ease, upside down once a folder exists."""

    name = "flipping"

    def __init__(self, folder: Path) -> None:
        self.folder, self.inner = folder, sims.ReadingEase()

    def rank(self, prompt, responses):
        """See :class:`sims_lens.Ranker`."""
        sign = -1 if self.folder.exists() else 1
        return [sign * score for score in self.inner.rank(prompt, responses)]


class Collapsing:
    """The model's own sampler, until a folder exists."""

    def __init__(self, model, settings, folder: Path) -> None:
        self.inner, self.folder = sims.LocalSampler(model, settings), folder

    @property
    def count(self):
        """See :class:`sims_lens.Sampler`."""
        return self.inner.count

    def sample(self, prompts, *, n, plan, seed):
        """See :class:`sims_lens.Sampler`."""
        for sample in self.inner.sample(prompts, n=n, plan=plan, seed=seed):
            yield replace(sample, tokens=sample.tokens[:1] * 8, text="the the the the") if self._broken else sample

    @property
    def _broken(self) -> bool:
        return self.folder.with_name("01").exists()


def one(model, disaster: str, seed: int, dtype: str | None) -> tuple[bool, bool, bool]:
    """Was it seen; is the run's plan free of it; was nothing else rolled back?"""
    with tempfile.TemporaryDirectory() as folder:
        second = Path(folder) / "iterations" / "02.partial"
        steering = sims.SteeringConfig(layers=(17,))
        config = sims.SIMSConfig(
            iterations=2,
            seed=seed,
            sampling=sims.SamplingConfig(max_new_tokens=16, dtype=dtype),
            steering=replace(steering, strength=2.0) if disaster == "coefficient" else steering,
            evaluation=sims.EvaluationConfig(validation=0.0, controls=0, samples=2, measured=1),
        )
        ranker = Flipping(second) if disaster == "flip" else sims.ReadingEase()
        sampler = Collapsing(model, config.sampling, second) if disaster == "collapse" else None
        run = sims.improve(
            model, sims.everyday(COUNT), ranker=ranker, config=config, out=folder, sampler=sampler, progress=False
        )
        rolled = [i for i in run.iterations if not i.kept]
        if disaster == "coefficient":
            seen = run.iterations[0].tries > 1
            safe = run.best is None or run.best.evaluation.kl_95.estimate <= config.guard.kl_95
        elif disaster == "nothing":
            seen, safe = not rolled and not run.stopped, True
        else:
            seen = bool(run.stopped) and all(i.kept for i in run.iterations[:1])
            safe = run.best is None or run.best.index == 1
        accepted = [
            i.evaluation.difference.estimate for i in run.iterations if i.kept and i.decision.action == "accept"
        ]
        best = not accepted or (run.best is not None and run.best.evaluation.difference.estimate == max(accepted))
        return seen, safe, best


NAMES = {
    "coefficient": "a coefficient ten times too big",
    "flip": "an oracle whose sign flips at iteration 2",
    "collapse": "a sampler that collapses at iteration 2",
    "nothing": "none (seen: nothing was rolled back or stopped)",
}


def table(rows) -> str:
    """How often each was seen, of so many runs."""
    lines = ["| disaster | runs | seen | the run's plan is free of it | never worse than the best accepted iteration |"]
    lines.append("|---|---|---|---|---|")
    for disaster, name in NAMES.items():
        found = [row["found"] for row in rows if row["disaster"] == disaster]
        if found:
            shares = [f"{sum(column)} of {len(found)}" for column in zip(*found, strict=True)]
            lines.append(f"| {name} | {len(found)} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--dtype", help="to decode in: bfloat16 takes half the time on a CPU that multiplies in it")
    parser.add_argument("--only", choices=sorted(NAMES))
    parser.add_argument("--out", type=Path, default=Path("docs/data/disasters.json"))
    parser.add_argument("--table", action="store_true", help="only print the table of earlier runs")
    given = parser.parse_args()
    rows = json.loads(given.out.read_text()) if given.out.is_file() else []
    if not given.table:
        model, done = sims.load("embedded"), {(row["disaster"], row["seed"]) for row in rows}
        for seed in range(given.first, given.first + given.runs):
            for disaster in NAMES if given.only is None else [given.only]:
                if (disaster, seed) not in done:
                    rows.append({"disaster": disaster, "seed": seed, "found": one(model, disaster, seed, given.dtype)})
                    given.out.write_text(json.dumps(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
