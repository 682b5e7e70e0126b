"""Every figure of the microscope, from the embedded model: ``python benchmarks/microscope.py docs/figures``.

A direction fitted to forty of the packaged pairs of a cheerful and a gloomy answer, measured on the others; and a small
run of the loop, for what iterations do. Writes PNGs (which needs a Chromium on the machine), prints the results to
``microscope.txt`` beside them, and a report page that holds it all.
"""

import argparse
import tempfile
from pathlib import Path

import plotly.graph_objects as go

import sims_lens as sims
from sims_lens import plots

TEXT = ("How was your day?", "It was awful at first, but then my friends came and we laughed.")


def results(model, train, test) -> dict[str, object]:
    """Of the fitted direction, by name."""
    fitted = sims.fit(model, train)
    behaviour = sims.PairBehaviour(test, name="cheerfulness")
    plan = fitted.plan(17, coefficient=0.2)
    others = {
        "mean difference": fitted,
        "logistic probe": sims.fit(model, train, estimator=sims.LogisticProbe()),
        "shuffled labels": sims.fit(model, train, estimator=sims.ShuffledLabels(sims.MeanDifference(), seed=1)),
    }
    return {
        "sweep": sims.layer_sweep(model, fitted, coefficients=(0.05, 0.1, 0.2, 0.4), behaviour=test),
        "norms": sims.vector_norms(model, fitted),
        "similarity": sims.direction_similarity(others, model=model),
        "readout": sims.readout(model, fitted, texts=[pair[:2] for pair in test[:4]]),
        "tokens": sims.token_scores(model, TEXT, fitted, layer=17, plan=plan),
        "leave_one_out": sims.leave_one_out(model, fitted.plan([13, 17, 21, 25], coefficient=0.08), behaviour),
        "components": sims.component_effects(model, plan, behaviour, exact=24),
        "readers": sims.direction_readers(model, plan, behaviour, exact=12),
        "ablation": sims.directional_ablation(model, fitted, behaviour, layer=17, controls=5),
        "logits": sims.logit_attribution(model, (test[0][0], "It was"), plan, answer=" wonderful", versus=" terrible"),
    }


def strength(model, train) -> dict[str, go.Figure]:
    """How strongly to steer, and two plans at once: on few prompts, to show the figures."""
    fitted = sims.fit(model, train)
    sampling = sims.SamplingConfig(responses=2, max_new_tokens=20)
    prompts = sims.everyday(24)
    early, late = fitted.plan(13, coefficient=0.15), fitted.plan(21, coefficient=0.15)
    common = {"sampling": sampling, "seed": 0}
    found = sims.calibrate(model, {"layer 13": early, "layer 21": late}, prompts=prompts, ranker=sims.Vader(), **common)
    together = sims.interaction(
        model,
        {"layer 13": early, "layer 21": late},
        {"vader": sims.Vader(), "reading ease": sims.ReadingEase()},
        prompts[:12],
        **common,
    )
    return {"calibration": plots.calibration(found), "interaction": plots.interaction(together)}


def small_run(model, out: Path) -> sims.Run:
    """Three iterations on 60 prompts."""
    config = sims.SIMSConfig(
        sampling=sims.SamplingConfig(max_new_tokens=24),
        steering=sims.SteeringConfig(layers=(22,)),
        evaluation=sims.EvaluationConfig(validation=0.0, controls=3, samples=2, measured=1),
    )
    return sims.improve(model, sims.everyday(60), ranker=sims.ReadingEase(), config=config, out=out)


def of_run(model, run: sims.Run) -> tuple[list[object], dict[str, go.Figure]]:
    """What the iterations of a run show: results, and figures that have a choice in them."""
    similarity = sims.direction_similarity(run, model=model, permutations=200)
    found = sims.readout(model, run)
    figures = {
        "trajectory": plots.trajectory(similarity, 22),
        "run_similarity": plots.similarity_profile(similarity),
        "run_readout_drift": plots.readout_drift(found),
        "sample_browser": plots.sample_browser(run),
        "reliability_card": plots.reliability_card(run.audit),
        "pair_selection": plots.pair_selection([i.pairs for i in run.iterations]),
        "slider": plots.slider(
            {str(k): plots.layer_similarity(run, k) for k in range(1, len(run.iterations) + 1)},
            label="iteration",
        ),
    }
    return [similarity, found, sims.vector_norms(model, run)], figures


def write(figures: dict[str, go.Figure], folder: Path) -> None:
    """PNGs on white."""
    for name, figure in figures.items():
        shown = go.Figure(figure).update_layout(paper_bgcolor="white")
        shown.write_image(folder / f"{name}.png", scale=2)
        print(folder / f"{name}.png", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("docs/figures"))
    parser.add_argument("--kind", default="bridge", help="hooked or bridge")
    parser.add_argument("--test", type=int, default=16, help="pairs to measure on, of the last 24")
    parser.add_argument("--run", type=Path, help="where the run of the loop is kept; a temporary folder by default")
    parser.add_argument("--report", type=Path, help="write the page with everything here")
    given = parser.parse_args()
    model, pairs = sims.load("embedded", kind=given.kind), sims.tone_pairs()
    given.out.mkdir(parents=True, exist_ok=True)
    found = results(model, pairs[:40], pairs[40 : 40 + given.test])
    figures = {f"{name}_{k}": f for name, r in found.items() for k, f in enumerate(plots.figures(r), start=1)}
    write(figures | strength(model, pairs[:40]), given.out)
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(model, given.run or Path(folder) / "run")
        about, drawn = of_run(model, run)
        write(drawn, given.out)
        text = "\n\n".join(str(result) for result in [*found.values(), *about])
        (given.out / "microscope.txt").write_text(text + "\n")
        if given.report:
            sims.write_report(run, given.report, analyses=[*about, *found.values()])


if __name__ == "__main__":
    main()
