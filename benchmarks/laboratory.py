"""The figures of docs/laboratory.md: what goes wrong when something is wrong, on the embedded model.

One run of the loop by reading ease on 100 everyday prompts, and every experiment of ``sims.lab`` on it.
``python benchmarks/laboratory.py`` prints their tables as Markdown and, with ``--out``, keeps runs and pictures.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import sims_lens as sims
from sims_lens import lab
from sims_lens.lab.corruption import Moments, corruption_curve

LAYER = 22
HACKED = 50  # prompts of each misled loop
SPREAD = 12.0  # points of reading ease: about the standard deviation among replies to one prompt


def config(iterations: int) -> sims.SIMSConfig:
    return sims.SIMSConfig(
        iterations=iterations,
        steering=sims.SteeringConfig(layers=(LAYER,)),
        evaluation=sims.EvaluationConfig(validation=0.0, controls=0, samples=2),
    )


def long_words(text: str) -> float:
    """Words of nine letters or more: a loophole for a judge that takes them for learning."""
    return float(sum(len(word.strip(".,;:!?")) >= 9 for word in text.split()))


def planted(datasets: int) -> str:
    """How often the interval of break-even holds the true one, and what theory and measurement are on average."""
    rng = np.random.default_rng(0)
    lines = ["| pairs | width | signal to noise of a pair | true | measured | in its interval | by theory | in its |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for n, width, signal in ((40, 32, 1.5), (60, 64, 1.5), (60, 576, 3.0), (100, 64, 1.2)):
        mean, scale = np.zeros(width), np.linspace(0.5, 1.5, width)
        mean[width // 2] = signal
        halves = (n - n // 2, n // 2)
        true = Moments.of_population(mean, np.diag(scale**2)).break_even(pairs=halves[0], reference=halves[1])
        found = []
        for k in range(datasets):
            pairs = mean + rng.normal(size=(n, width)) * scale
            found.append(corruption_curve(pairs, epsilons=lab.SHARES, repeats=100, seed=k))
        measured, theory = ([getattr(c, f) for c in found] for f in ("break_even", "expected_break_even"))
        cells = [f"{n}", f"{width}", f"{signal / scale[width // 2]:.2f}", f"{true:.3f}"]
        for some in (measured, theory):
            cells.append(f"{np.mean([i.estimate for i in some]):.3f} ± {np.std([i.estimate for i in some]):.3f}")
            cells.append(f"{np.mean([i.low <= true <= i.high for i in some]):.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(title: str, result, folder: Path | None) -> None:
    print(f"\n## {title}\n\n{result.head()}\n")
    head, *rows = result.cells()
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(f"\n{result.verdict()}", flush=True)
    if folder is not None:
        for index, figure in enumerate(sims.plots.figures(result)):
            name = title.split(":")[0].lower().replace(" ", "_")
            figure.write_json(folder / f"{name}_{index}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for runs and figures")
    parser.add_argument("--datasets", type=int, default=300, help="planted data sets of each kind")
    parser.add_argument("--only", nargs="*", default=[], help="planted noise negatives poison misled groups chats ...")
    given = parser.parse_args()
    folder = given.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    pictures = folder if given.out else None

    def wanted(name: str) -> bool:
        return not given.only or name in given.only

    def told(name: str, start: float) -> None:
        print(f"\n({name}: {time.perf_counter() - start:.0f} s)", flush=True)

    if wanted("planted"):
        start = time.perf_counter()
        print(f"## Planted pairs\n\n{planted(given.datasets)}")
        told("planted", start)
    if given.only == ["planted"]:
        return
    model, ease = sims.load("embedded"), sims.ReadingEase()
    start = time.perf_counter()
    everyday = sims.everyday(100)
    run = sims.improve(model, everyday, ranker=ease, config=config(1), out=folder / "run", progress=False)
    print(f"\n## The run\n\n{run.verdict()}")
    told("run", start)
    experiments = {
        "noise": ("Oracle noise", lambda: lab.oracle_noise(model, run, ranker=ease, fits=3, progress=False)),
        "negatives": ("Mistaken negatives", lambda: lab.oracle_noise(model, run, flip="negatives", progress=False)),
        "poison": (
            "Poisoned negatives",
            lambda: lab.poisoned_negatives(model, run, ranker=ease, effect_at=(0.5, 1.0), progress=False),
        ),
        "misled": (
            "Wrong oracles",
            lambda: lab.misled(
                model,
                sims.everyday(HACKED),
                lab.wrong_oracles(ease, spread=SPREAD) | {"long words": lab.Loophole(ease, long_words, 2 * SPREAD)},
                honest=ease,
                config=replace(config(2), ranking=sims.RankingConfig(audit="report")),
                out=folder / "misled",
                progress=False,
            ),
        ),
        "groups": (
            "Out of distribution",
            lambda: lab.out_of_distribution(model, run.plan, ranker=ease, samples=3, progress=False),
        ),
        "chats": ("Chats", lambda: lab.multi_turn(model, run.plan, ranker=ease, samples=3, progress=False)),
        "steerability": (
            "Steerability: of texts",
            lambda: lab.steerability(model, run.plan, sims.PairBehaviour(run.text_pairs()), progress=False),
        ),
        "sampled": (
            "Sampled steerability",
            lambda: lab.steerability(
                model,
                run.plan,
                prompts=[run.prompts[i] for i in run.indices("heldout")],
                ranker=ease,
                samples=3,
                progress=False,
            ),
        ),
        "failures": ("Failures", lambda: lab.failures(run)),
        "overdose": ("Failures at three times the strength", lambda: overdose(model, run)),
    }
    for name, (title, experiment) in experiments.items():
        if wanted(name):
            start = time.perf_counter()
            shown(title, experiment(), pictures)
            told(name, start)


def overdose(model, run: sims.Run) -> lab.FailureLedger:
    """The ledger of the same plan, three times as strong."""
    from sims_lens.workbench import derive_seed

    asked = run.indices("heldout")
    texts = [run.prompts[i] for i in asked]
    sampler, seed = sims.LocalSampler(model, run.config.sampling), derive_seed(run.config.seed, "heldout")
    drawn = sampler.sample(texts, n=run.config.evaluation.samples, plan=3.0 * run.plan, seed=seed)
    samples = [replace(s, prompt=asked[s.prompt]) for s in drawn]
    return lab.failures(samples, run.samples(0), run.prompts)


if __name__ == "__main__":
    main()
