"""Does steering that a model learns from its own responses pay, and does iterating? The loop and what it has to beat.

For each oracle `sims.compare` runs the loop and every baseline with each seed on the same 100 held-out prompts, at
matched dose and budget. `python benchmarks/evidence.py --oracle reading-ease` (or vader) writes
docs/data/comparison_ORACLE.json and prints its table; `--table` prints it again. About 20 CPU minutes for each seed and
oracle, on a CPU that multiplies in bfloat16. What was computed is kept in `--out`; a second call goes on from there.

`--small` is one seed with 50 of 80 prompts held out, one answer to each, two iterations at a given layer, no controls.
`--dpo` trains the weights on the loop's pairs as well (`pip install "sims-lens[dpo]"`). With either, the file is
comparison_ORACLE_small.json, comparison_ORACLE_dpo.json or comparison_ORACLE_small_dpo.json.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import sims_lens as sims

HERE = Path(__file__).parent
ORACLES = {
    "reading-ease": (sims.ReadingEase, sims.Vader, "Use short, simple words and short sentences.", "plain"),
    "vader": (sims.Vader, sims.ReadingEase, "Be cheerful.", "tone"),
}


def settings(dtype: str | None = "bfloat16") -> sims.SIMSConfig:
    """The demo's, with 100 of 200 prompts held out; the guard reports, so that nothing is chosen on them."""
    return sims.SIMSConfig(
        sampling=sims.SamplingConfig(dtype=dtype),
        evaluation=sims.EvaluationConfig(heldout=0.5, validation=0.1, samples=2),
        guard=sims.GuardConfig(mode="report"),
    )


def small() -> sims.SIMSConfig:
    """What a quarter of an hour of one core allows."""
    return sims.SIMSConfig(
        iterations=2,
        steering=sims.SteeringConfig(layers=(22,)),
        evaluation=sims.EvaluationConfig(heldout=0.625, validation=0.0, samples=1, controls=0),
        guard=sims.GuardConfig(mode="report"),
    )


def markdown(cells) -> str:
    """A table for the docs."""
    head, *rows = cells
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracle", choices=sorted(ORACLES), required=True)
    parser.add_argument("--seeds", type=int, help="3, or 1 with --small")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--dpo", action="store_true")
    parser.add_argument("--rates", type=float, nargs="*", help="learning rates of DPO; by default that of DPOConfig")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--data", type=Path, default=HERE.parent / "docs" / "data")
    parser.add_argument("--figure", type=Path, help="write the figure here, .png; needs kaleido and a Chromium")
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier run")
    given = parser.parse_args()
    name = given.oracle + "_small" * given.small
    file = given.data / f"comparison_{name}{'_dpo' * given.dpo}.json"
    dpo = [replace(sims.DPOConfig(), learning_rate=rate) for rate in given.rates or ()] or [sims.DPOConfig()]
    if not given.table:
        ranker, evaluator, instruction, pairs = ORACLES[given.oracle]
        found = sims.compare(
            sims.load("embedded"),
            sims.everyday(80 if given.small else 200),
            ranker=ranker(),
            evaluator=evaluator(),
            instruction=instruction,
            pairs=sims.tone_pairs() if pairs == "tone" else sims.read_pairs(HERE / "data" / "plain_pairs.jsonl"),
            dpo=dpo if given.dpo else (),
            seeds=range(given.seeds or (1 if given.small else 3)),
            config=small() if given.small else settings(),
            out=given.out / name,
        )
        found.save(file)
    found = sims.open_comparison(file)
    print(markdown(found.cells()), "", found.verdict(), sep="\n")
    if given.figure is not None:
        sims.plots.comparison(found).write_image(given.figure, scale=1.5)


if __name__ == "__main__":
    main()
