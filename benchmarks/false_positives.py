"""How often is it said that a loop has learnt something, when it can't have? Whole loops on shuffled labels.

In each run the ranker gives reading ease to the wrong responses, at random, as long as the loop learns; so all that it
fits, iteration by iteration, is noise with the norm and the shape of the real thing. Reading ease itself judges the
held-out responses. Counted is how often "the effect lies above the null band" would be said, and, for what it is worth,
how often the prompts' own interval alone would have called the effect positive. `python benchmarks/false_positives.py`:
100 runs of the embedded model, two iterations each, half a minute a run on one core.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import sims_lens as sims
from sims_lens.stats import null_band

COUNT = 24


class Shuffled:
    """Reading ease of another response to the same prompt."""

    name = "shuffled reading ease"

    def __init__(self, seed: int) -> None:
        self.seed, self.inner = seed, sims.ReadingEase()

    def rank(self, prompt, responses):
        """See :class:`sims_lens.Ranker`."""
        scores = list(self.inner.rank(prompt, responses))
        random.Random(f"{self.seed}\0{prompt}\0{responses}").shuffle(scores)
        return scores


def one(model, seed: int, dtype: str | None) -> dict:
    """A run's effects by the honest ranker: of its plan, and of its controls."""
    config = sims.SIMSConfig(
        iterations=2,
        seed=seed,
        sampling=sims.SamplingConfig(max_new_tokens=16, dtype=dtype),
        steering=sims.SteeringConfig(layers=(17,)),
        ranking=sims.RankingConfig(audit="off"),
        evaluation=sims.EvaluationConfig(validation=0.0, samples=2, measured=1),
        guard=sims.GuardConfig(mode="off"),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = sims.improve(
            model,
            sims.everyday(COUNT),
            ranker=Shuffled(seed),
            evaluator=sims.ReadingEase(),
            config=config,
            out=Path(folder) / "run",
            progress=False,
        )
        return {
            "seed": seed,
            "iterations": [i.evaluation.independent.difference.to_json() for i in run.iterations],
            "p": [i.evaluation.independent.p for i in run.iterations],
            "controls": [c.independent.difference.estimate for c in run.controls],
        }


def table(rows) -> str:
    """What would have been said."""
    count, bands = len(rows), [null_band(r["controls"]) for r in rows]
    last = [r["iterations"][-1] for r in rows]
    found = {
        "the effect lies above the null band": sum(e[0] > b.high for e, b in zip(last, bands, strict=True)),
        "the effect lies below the null band": sum(e[0] < b.low for e, b in zip(last, bands, strict=True)),
        "iteration 1: the prompts' interval lies above 0": sum(r["iterations"][0][1] > 0 for r in rows),
        "iteration 2: the prompts' interval lies above 0": sum(e[1] > 0 for e in last),
        "the effect is larger than that of all 5 controls": sum(
            e[0] > max(r["controls"]) for e, r in zip(last, rows, strict=True)
        ),
    }
    lines = ["| said of a loop that has learnt nothing | runs | share [95%] |", "|---|---|---|"]
    for what, number in found.items():
        low, high = wilson(number, count)
        lines.append(f"| {what} | {number} of {count} | {number / count:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The interval of a share (Wilson 1927)."""
    share, z = successes / count, 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, centre - reach), min(1.0, centre + reach)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("docs/data/false_positives.json"))
    parser.add_argument("--dtype", help="to decode in: bfloat16 takes half the time on a CPU that multiplies in it")
    parser.add_argument("--table", action="store_true", help="only print the table of earlier runs")
    given = parser.parse_args()
    rows = json.loads(given.out.read_text()) if given.out.is_file() else []
    if not given.table:
        model, done = sims.load("embedded"), {row["seed"] for row in rows}
        for seed in range(given.first, given.first + given.runs):
            if seed not in done:
                rows.append(one(model, seed, given.dtype))
                given.out.write_text(json.dumps(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
