"""Figures: what is drawn is what the run measured, and every figure looks like its siblings."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from sims_lens import plots
from sims_lens.bank import diagnose
from sims_lens.config import EvaluationConfig, SIMSConfig, SteeringConfig
from sims_lens.cost import Cost
from sims_lens.data import Sample
from sims_lens.errors import RunError
from sims_lens.estimators import unit
from sims_lens.evaluate import evaluate
from sims_lens.plan import Provenance, SteeringPlan
from sims_lens.run import Run, open_run
from sims_lens.stats import Interval, null_band
from sims_lens.store import Folder, RunStore

LAYERS, D_MODEL, STEERED = 12, 16, 8
FIGURES = (
    plots.win_rate,
    plots.effect,
    plots.vector_norms,
    plots.layer_similarity,
    plots.iteration_similarity,
    plots.side_effects,
)


def write_run(
    path: Path,
    *,
    iterations: int = 3,
    finished: int | None = None,
    controls: int = 5,
    heldout: int = 30,
    ranker: str = "reading-ease",
    model: str = "tiny-model",
    prompt: str = "What is a prompt?",
    response: str = "It is what one asks.",
    choice: bool = True,
) -> Run:
    """Write a run directory as the loop does, with made-up samples and vectors, and open it.

    Args:
        path: where.
        iterations: that the config asks for.
        finished: that are there; controls are only written when all are.
        controls: that the config asks for.
        heldout: held-out prompts; as many again train and four validate.
        ranker: its name.
        model: its name.
        prompt: what each prompt begins with.
        response: what each response begins with.
        choice: whether the layer was chosen.
    """
    finished = iterations if finished is None else finished
    generator = torch.Generator().manual_seed(0)
    evaluation, steering = EvaluationConfig(controls=controls, samples=2), SteeringConfig(strength=0.2)
    config = SIMSConfig(iterations=iterations, steering=steering, evaluation=evaluation)
    provenance = Provenance(model=model, n_layers=LAYERS, d_model=D_MODEL)
    split = ["heldout"] * heldout + ["validation"] * 4 + ["train"] * heldout
    store = RunStore(path)
    store.begin(
        {"config": config.to_json(), "model": asdict(provenance), "ranker": ranker, "versions": {"python": "3.11.7"}},
        [{"prompt": f"{prompt} {i}", "split": name} for i, name in enumerate(split)],
    )

    def samples(effect: float, count: int = heldout, start: int = 0) -> list[Sample]:
        noise = torch.randn(count, 2, 3, generator=generator).tolist()
        return [
            Sample(
                prompt=start + i,
                draw=draw,
                tokens=tuple(range(8 + (i + draw) % 5)),
                text=f"{response} {i} and {draw}, {effect:.2f} a b c d {'a b c d' if (i + draw) % 7 == 0 else ''}",
                ended=(i + draw) % 4 == 0,
                score=50 + 10 * effect + 12 * noise[i][draw][0],
                nll=1.5 + 0.2 * effect + 0.2 * noise[i][draw][1],
                kl=0.05 * effect**2 * (1 + abs(noise[i][draw][2])),
            )
            for i in range(count)
            for draw in range(2)
        ]

    def finish(folder: Folder, metrics: object, seconds: float) -> None:
        folder.json("metrics", lambda: metrics)
        folder.spend("sample", Cost(seconds=seconds, prefill=1000, decode=2345, flops=3e12, peak=2 * 10**9))
        folder.finish()

    base = samples(0.0)
    folder = store.folder("base")
    folder.samples("heldout", lambda: base)
    finish(folder, {"evaluation": evaluate(base, base).to_json()}, 1.5)

    if choice:
        start = heldout
        validation = samples(0.0, 4, start)
        tried = {layer: evaluate(samples(layer / 6, 4, start), validation) for layer in (7, STEERED, 11)}
        metrics = {"chosen": STEERED, "layers": {str(layer): e.to_json() for layer, e in tried.items()}}
        finish(store.folder("choice"), metrics, 2.0)

    common, norms = torch.randn(LAYERS, D_MODEL, generator=generator), torch.linspace(40, 700, LAYERS)
    for t in range(1, finished + 1):
        noise = torch.randn(LAYERS, D_MODEL, generator=generator)
        vectors = (common.cumsum(0) + 0.5 * t * noise) * norms[:, None] / 100
        folder = store.iteration(t)
        tensors = {
            "mean_difference": vectors,
            "shuffled": torch.randn(controls, LAYERS, D_MODEL, generator=generator),
            "median_norm": norms,
            "split_half": torch.linspace(0.3, 0.8, LAYERS),
        }
        folder.tensors("vectors", lambda tensors=tensors: tensors)
        plan = SteeringPlan.addition({STEERED: vectors[STEERED]}, provenance=provenance)
        folder.write("plan.safetensors", plan.to_bytes())
        heldout_samples = samples(0.6 * t)
        folder.samples("heldout", lambda drawn=heldout_samples: drawn)
        metrics = {
            "evaluation": evaluate(heldout_samples, base).to_json(),
            "diagnostics": replace(diagnose((), iteration=t), pairs=heldout - t, margin=20.0 / t).to_json(),
            "dropped": {"empty": 0, "margin": 0, "tie": t},
            "audit": None,
        }
        finish(folder, metrics, 10.0)
    if finished == iterations and controls:
        nulls = [evaluate(samples(0.2 * (k - 1)), base) for k in range(controls)]
        finish(store.folder("controls"), {"controls": [e.to_json() for e in nulls]}, 5.0)
    return open_run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


def trace(figure: go.Figure, name: str) -> Any:
    found = [t for t in figure.data if t.name == name]
    assert found, f"{name!r} is not among {[t.name for t in figure.data]}"
    return found[0]


def assert_draws(drawn: Any, intervals: list[Interval]) -> None:
    """The trace shows these estimates, and its error bars end where the intervals end."""
    assert list(drawn.y) == [i.estimate for i in intervals]
    ups, downs = drawn.error_y.array, drawn.error_y.arrayminus
    assert [y + up for y, up in zip(drawn.y, ups, strict=True)] == pytest.approx([i.high for i in intervals])
    assert [y - down for y, down in zip(drawn.y, downs, strict=True)] == pytest.approx([i.low for i in intervals])


@pytest.mark.parametrize("draw", FIGURES)
def test_every_figure_has_the_template_a_title_and_named_axes(draw: Any, run: Run) -> None:
    figure = draw(run)
    assert figure.layout.template == plots.TEMPLATE
    assert figure.layout.title.text
    axes = [*figure.select_xaxes(), *figure.select_yaxes()]
    alone = {axis.anchor for axis in axes if axis.matches and not axis.title.text}  # upper axes of small multiples
    assert len(axes) - len(alone) >= 2
    assert all(axis.title.text for axis in axes if axis.anchor not in alone)
    assert plots.TEMPLATE.layout.paper_bgcolor == plots.TEMPLATE.layout.plot_bgcolor == "rgba(0,0,0,0)"


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_are_made_anew_from_an_unchanged_run(draw: Any, run: Run) -> None:
    vectors = run.iterations[0].vectors.clone()
    assert draw(run).to_json() == draw(run).to_json()
    assert torch.equal(run.iterations[0].vectors, vectors)


@pytest.mark.parametrize("draw", FIGURES)
def test_no_free_text_enters_a_figure(draw: Any, tmp_path: Path) -> None:
    mark = "zqx-free-text"
    run = write_run(tmp_path / "run", heldout=4, ranker=mark, model=mark, prompt=mark, response=mark)
    assert mark not in draw(run).to_json()


@pytest.mark.parametrize("draw", FIGURES)
def test_a_run_without_an_iteration_says_what_to_do(draw: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=0, heldout=4)
    with pytest.raises(RunError, match="improve"):
        draw(run)


@pytest.mark.parametrize("draw", FIGURES)
def test_an_unfinished_run_of_one_iteration_is_drawn(draw: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=1, heldout=4, choice=False)
    assert not run.controls
    assert draw(run).data


@pytest.mark.parametrize(
    ("draw", "field", "unit"),
    [(plots.win_rate, "win_rate", "share of comparisons"), (plots.effect, "difference", "ranker's units")],
)
def test_progress_shows_the_estimates_and_the_controls(draw: Any, field: str, unit: str, run: Run) -> None:
    figure = draw(run)
    assert_draws(trace(figure, "steered"), [getattr(i.evaluation, field) for i in run.iterations])
    assert list(trace(figure, "steered").x) == [1, 2, 3]
    nulls = [getattr(control, field) for control in run.controls]
    controls = trace(figure, "shuffled labels, same norm")
    assert_draws(controls, nulls)
    assert min(controls.x) > 3 and max(controls.x) <= figure.layout.xaxis.range[1]
    (band,) = [s for s in figure.layout.shapes if s.name == "null band"]
    expected = null_band([n.estimate for n in nulls])
    assert expected is not None and (band.y0, band.y1) == (expected.low, expected.high)
    assert unit in figure.layout.yaxis.title.text


def test_win_rate_spans_the_whole_scale_and_marks_one_half(run: Run) -> None:
    figure = plots.win_rate(run)
    low, high = figure.layout.yaxis.range
    assert -0.1 < low < 0 and 1 < high < 1.1 and set(figure.layout.yaxis.tickvals) >= {0, 1}
    assert set(trace(figure, "no difference").y) == {0.5}
    assert set(trace(plots.effect(run), "base model").y) == {0.0}


def test_vector_norms_are_those_of_the_vectors(run: Run) -> None:
    figure = plots.vector_norms(run)
    for iteration in run.iterations:
        drawn = trace(figure, f"iteration {iteration.index}")
        assert list(drawn.y) == pytest.approx(iteration.vectors.norm(dim=-1).tolist())
    assert list(trace(figure, "residual stream (median)").y) == run.iterations[0].tensors["median_norm"].tolist()
    assert figure.layout.yaxis.type == "log"
    assert "units of the residual stream" in figure.layout.yaxis.title.text
    assert [shape.x0 for shape in figure.layout.shapes] == [STEERED]
    assert len({drawn.line.color for drawn in figure.data}) == len(figure.data)


def test_a_zero_vector_is_left_out_of_the_log_axis(run: Run) -> None:
    first = run.iterations[0]
    changed = first.vectors.clone()
    changed[2] = 0
    first.__dict__["tensors"] = {**first.tensors, "mean_difference": changed}
    try:
        assert trace(plots.vector_norms(run), "iteration 1").y[2] is None
        assert plots.layer_similarity(run, 1).data[0].z[2][2] == 0.0
    finally:
        del first.__dict__["tensors"]


def test_layer_similarity_is_a_cosine_matrix(run: Run) -> None:
    figure = plots.layer_similarity(run)
    z = torch.tensor(figure.data[0].z)
    directions = unit(run.iterations[-1].vectors)
    torch.testing.assert_close(z, directions @ directions.T)
    torch.testing.assert_close(z.diagonal(), torch.ones(LAYERS))
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)
    assert figure.layout.yaxis.scaleanchor == "x"
    assert plots.layer_similarity(run, 1).data[0].z != figure.data[0].z


@pytest.mark.parametrize("iteration", [0, 4, True])
def test_layer_similarity_refuses_an_iteration_that_is_not_there(iteration: int, run: Run) -> None:
    with pytest.raises(RunError, match=r"1\.\.3"):
        plots.layer_similarity(run, iteration)


def test_iteration_similarity_compares_with_the_first(run: Run) -> None:
    figure = plots.iteration_similarity(run)
    first = run.iterations[0]
    for later in run.iterations[1:]:
        cosines = torch.nn.functional.cosine_similarity(later.vectors, first.vectors, dim=-1)
        assert list(trace(figure, f"iteration {later.index}").y) == pytest.approx(cosines.tolist())
    reference = trace(figure, "halves of iteration 1")
    assert list(reference.y) == first.tensors["split_half"].tolist()
    assert reference.line.dash == "dash"
    assert len(figure.data) == len(run.iterations)


def test_side_effects_show_each_quantity_beside_the_base(run: Run) -> None:
    figure = plots.side_effects(run)
    quantities = ("nll", "kl", "distinct_2", "repetition", "length", "ended")
    steered, base = ([t for t in figure.data if t.name == name] for name in ("steered", "base model"))
    for name, drawn, reference in zip(quantities, steered, base, strict=True):
        assert_draws(drawn, [getattr(i.evaluation, name) for i in run.iterations])
        assert set(reference.y) == {getattr(run.base, name).estimate}
        assert reference.line.dash == "dash"
    units = [axis.title.text for axis in figure.select_yaxes()]
    assert units[:2] == ["nats per token"] * 2 and units[4] == "tokens"
    assert sum(bool(t.showlegend) for t in figure.data) == 2


def test_many_iterations_get_distinct_colours_and_few_ticks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", iterations=23, heldout=4, controls=1)
    assert len({t.line.color for t in plots.vector_norms(run).data}) == 24
    ticks = plots.win_rate(run).layout.xaxis.tickvals
    assert 23 in ticks and len(ticks) <= 12
