"""The console: what it steers is what a plan would, errors are one line, and no text becomes markup.

And the rich forms of the objects that a notebook shows.
"""

import html
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import D_MODEL, plan_of, vector
from test_plots import write_run

import sims_lens as sims
from sims_lens import widgets as module
from sims_lens.activations import residual_norms
from sims_lens.adapter import adapt
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import PlanError, PromptError, RunError, SimsError
from sims_lens.evaluate import side_effects
from sims_lens.plan import NOTHING, Provenance, SteeringPlan
from sims_lens.widgets import Console, ConsoleView, console

SAMPLING = SamplingConfig(max_new_tokens=5, temperature=1.0, top_k=None)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"q\" 'a'"


def plan(layer: int = 1, coefficient: float = 0.3, **options: Any) -> SteeringPlan:
    return SteeringPlan.addition({layer: vector(layer)}, coefficient=coefficient, units="residual_norm", **options)


@pytest.fixture(scope="module")
def fit(zoo: Any) -> Any:
    pairs = [(f"Tell me of {x}.", f"I like {x}!", f"{x} is bad.") for x in ("rain", "tea", "snow", "dogs")]
    return sims.fit(zoo("llama", "bridge"), pairs)


def test_it_steers_as_the_plan_does(llama: Any) -> None:
    given = plan()
    found = Console(llama, given, sampling=SAMPLING, seed=3)
    layer, coefficient = found.start
    assert (layer, coefficient) == (1, 0.3) and found.layers == (0, 1, 2)
    view = found.steer(layer, coefficient, "Hi")
    sampler = sims.LocalSampler(llama, SAMPLING)
    for plan_, ours in ((NOTHING, view.base), (given, view.steered)):
        (drawn,) = side_effects(llama, ["Hi"], list(sampler.sample(["Hi"], n=1, plan=plan_, seed=3)), plan_)
        assert ours == drawn
    assert view.steered.tokens != view.base.tokens and view.steered.kl and view.base.kl == 0


def test_another_layer_gets_the_direction_in_its_own_norm(llama: Any) -> None:
    found = Console(llama, plan(), sampling=SAMPLING)
    norms = residual_norms(llama)
    for layer in range(3):
        (i,) = found.plan(layer, -0.2).interventions
        assert (i.layer, i.coefficient, i.scope) == (layer, -0.2, plan().interventions[0].scope)
        assert i.strength == pytest.approx(-0.2 * norms[layer])
        torch.testing.assert_close(i.transform.tensors()["vector"], vector(1) / vector(1).norm())


def test_several_layers_each_keep_their_own(llama: Any) -> None:
    found = Console(llama, plan_of(0, 2), sampling=SAMPLING)
    for layer, own in ((0, 0), (1, 0), (2, 2)):  # the nearest; of two the lower
        torch.testing.assert_close(found.direction(layer), vector(own) / vector(own).norm())
    assert found.start[0] == 0
    assert found.start[1] == pytest.approx(2.0 * float(vector(0).norm()) / residual_norms(llama)[0], rel=1e-4)


def test_the_sign_stays_where_the_user_put_it(llama: Any) -> None:
    assert Console(llama, plan(coefficient=-0.3)).start == (1, -0.3)
    twice = plan(coefficient=0.1) + plan(coefficient=0.25)
    found = Console(llama, twice)
    assert found.start == (1, pytest.approx(0.35))
    torch.testing.assert_close(found.direction(1), vector(1) / vector(1).norm())


def test_site_scope_decay_and_provenance_are_kept(llama: Any) -> None:
    about = Provenance(model=adapt(llama).name, source="by hand")
    given = plan(site="mlp_out", scope="all", provenance=about).decaying(4.0)
    made = Console(llama, given).plan(2, 0.1)
    (i,) = made.interventions
    assert (i.site, i.scope.name, i.half_life, made.provenance) == ("mlp_out", "all", 4.0, about)


def test_a_fit_has_a_direction_of_its_own_at_each_layer(fit: Any, zoo: Any) -> None:
    model = zoo("llama", "bridge")
    found = Console(model, fit, sampling=SAMPLING)
    assert found.layers == fit.layers and found.start == (fit.best()[0], 0.2)
    for layer in fit.layers:
        ours, theirs = found.plan(layer, 0.4).interventions[0], fit.plan(layer, coefficient=0.4).interventions[0]
        assert ours.strength == pytest.approx(theirs.strength)
        torch.testing.assert_close(ours.transform.tensors()["vector"], theirs.transform.tensors()["vector"])


@pytest.mark.parametrize("compose", ["accumulate", "replace"])
def test_a_run_starts_with_its_own_plan(compose: str, llama: Any, tmp_path: Path) -> None:
    """As the loop composes it, at the layer that it chose; at the others what it would have added there."""
    from sims_lens.iteration import compose as composed

    run = write_run(tmp_path / "run", heldout=4, choice=False)
    config = replace(run.config, steering=replace(run.config.steering, compose=compose))
    cut = [torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    norms = torch.tensor([10.0, 20.0, 30.0])
    iterations = []
    for k, i in enumerate(run.iterations):
        shares = [0.0] * k + [0.2] if compose == "replace" else [0.2 / 3] * (k + 1)
        made = composed(cut[: k + 1], shares, [1], norms, config.steering, Provenance())
        i = replace(i, plan=made, coefficients=tuple(shares))
        i.__dict__["tensors"] = {
            "mean_difference": cut[k],
            "median_norm": norms,
            "split_half": torch.ones(3),
            "shuffled": torch.ones(1, 3, D_MODEL),
        }
        iterations.append(i)
    run = replace(run, config=config, iterations=tuple(iterations))
    found = Console(llama, run, sampling=SAMPLING)
    layer, coefficient = found.start
    (ours,), (theirs,) = found.plan(layer, coefficient).interventions, run.plan.interventions
    assert ours.strength == pytest.approx(theirs.strength, rel=1e-4) and ours.layer == theirs.layer == 1
    torch.testing.assert_close(ours.transform.tensors()["vector"], theirs.transform.tensors()["vector"])
    assert found.layers == (0, 1, 2) and found.norm(2) == 30.0


def test_the_unsteered_response_is_drawn_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[SteeringPlan] = []
    original = sims.LocalSampler.sample

    def counting(self: Any, prompts: Any, *, n: int, plan: SteeringPlan, seed: int) -> Iterator[Sample]:
        drawn.append(plan)
        return original(self, prompts, n=n, plan=plan, seed=seed)

    monkeypatch.setattr(sims.LocalSampler, "sample", counting)
    found = Console(llama, plan(), sampling=SAMPLING)
    bases = [found.steer(layer, 0.2, "Hi").base for layer in (0, 1)]
    assert bases[0] is bases[1] and len(drawn) == 3
    assert found.steer(0, 0.0, "Hi").steered == bases[0] and len(drawn) == 3
    found.steer(0, 0.2, "Hi", tokens=3)
    found.steer(0, 0.2, "Ho")
    assert len(drawn) == 7


def test_the_heat_map_is_that_of_the_steered_response(llama: Any) -> None:
    view = Console(llama, plan(), sampling=SAMPLING).steer(2, 0.3, "Hi")
    assert view.scores is not None and view.scores.layers == (2,) and view.scores.plan == view.plan
    assert view.scores._repr_html_() in view._repr_html_()
    assert view.scores.steered is not None and not torch.equal(view.scores.steered, view.scores.unsteered)


@pytest.mark.parametrize(
    ("prompt", "tokens", "error", "said"),
    [
        ("", 5, PromptError, "white space"),
        ("x" * 400, 5, PromptError, "context of 128"),
        ("Hi", 500, SimsError, "does not fit the context"),
    ],
)
def test_bad_questions_are_refused(prompt: str, tokens: int, error: Any, said: str, llama: Any) -> None:
    with pytest.raises(error, match=said):
        Console(llama, plan(), sampling=SAMPLING).steer(1, 0.1, prompt, tokens=tokens)


def test_bad_sources_are_refused(llama: Any, tmp_path: Path) -> None:
    direction = vector() / vector().norm()
    for source, said in (
        (NOTHING, "steers nothing"),
        (SteeringPlan.of({1: sims.Ablation(direction)}), r"plan\.using\(sims\.Addition\)"),
        (plan() + plan(site="mlp_out"), "several sites"),
        (SteeringPlan.addition({1: torch.ones(7)}), "7 entries"),
        (plan(5), "not in 0..2"),
        (plan(provenance=Provenance(model="another")), "made for 'another'"),
    ):
        with pytest.raises(PlanError, match=said):
            Console(llama, source)
    with pytest.raises(RunError, match="no finished iteration"):
        Console(llama, write_run(tmp_path / "run", finished=0, heldout=4))
    found = Console(llama, plan())
    for layer in (-1, 3):
        with pytest.raises(PlanError, match=r"0\.\.2"):
            found.steer(layer, 0.1, "Hi")


@pytest.mark.usefixtures("unchecked")
def test_a_source_of_another_kind_is_refused(llama: Any) -> None:
    with pytest.raises(PlanError, match="got dict"):
        Console(llama, {1: vector()})  # type: ignore[arg-type]


def sample(text: str, **options: Any) -> Sample:
    return Sample(**{"prompt": 0, "draw": 0, "tokens": (1, 2), "text": text, "ended": True, "nll": 1.5} | options)


def test_a_view_escapes_what_the_model_says() -> None:
    view = ConsoleView(HOSTILE, plan(), 1, 0.3, sample(HOSTILE), sample(HOSTILE, kl=0.25, ended=False), None)
    shown = view._repr_html_()
    assert shown.count(html.escape(HOSTILE)) == 2 and "<script" not in shown and "<img" not in shown
    assert "NLL 1.50" in shown and "KL 0.25" in shown and "&hellip;" in shown
    assert "(empty)" in replace(view, base=sample("", tokens=()))._repr_html_()


# The widgets


@pytest.fixture
def parts(llama: Any) -> dict[str, Any]:
    """The console's widgets by what they are called."""
    pytest.importorskip("ipywidgets")
    box = console(llama, plan(), prompt="Hi", sampling=SAMPLING)
    found = {w.description: w for w in box.children[:-2]}
    return found | {"status": box.children[-2], "output": box.children[-1]}


def test_it_opens_with_the_plans_own_answer(parts: dict[str, Any], llama: Any) -> None:
    view = Console(llama, plan(), sampling=SAMPLING).steer(1, 0.3, "Hi")
    assert parts["output"].value == view._repr_html_() and parts["status"].value == ""
    assert (parts["layer"].value, parts["coefficient"].value, parts["tokens"].value) == (1, 0.3, 5)
    assert (parts["coefficient"].min, parts["coefficient"].max, parts["coefficient"].step) == (-0.5, 0.5, 0.02)
    assert list(parts["layer"].options) == [0, 1, 2]
    assert not any(parts[name].continuous_update for name in ("layer", "coefficient", "tokens"))


def test_letting_go_of_a_slider_asks_again(parts: dict[str, Any], llama: Any) -> None:
    parts["layer"].value = 2
    parts["coefficient"].value = -0.4
    parts["tokens"].value = 3
    expected = Console(llama, plan(), sampling=SAMPLING)
    assert parts["output"].value == expected.steer(2, -0.4, "Hi", tokens=3)._repr_html_()
    parts["prompt"].value = "Ho"
    assert parts["output"].value == expected.steer(2, -0.4, "Hi", tokens=3)._repr_html_()
    parts["Generate"].click()
    assert parts["output"].value == expected.steer(2, -0.4, "Ho", tokens=3)._repr_html_()


def test_errors_are_one_line_and_everything_is_enabled_again(parts: dict[str, Any]) -> None:
    assert parts["output"].value
    for prompt, said in (("", "white space"), (f"<b>{'x' * 400}", "&lt;b&gt;xxx")):
        parts["prompt"].value = prompt
        parts["Generate"].click()
        assert said in parts["status"].value and "\n" not in parts["status"].value
        assert "<b>" not in parts["status"].value and parts["output"].value == ""
        assert not any(parts[name].disabled for name in ("prompt", "layer", "coefficient", "tokens", "Generate"))
    parts["prompt"].value = "Hi"
    parts["Generate"].click()
    assert parts["status"].value == ""


def test_nothing_can_be_pressed_while_it_computes(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def failing(self: Any, *args: Any, **options: Any) -> None:
        seen.extend(parts[name].disabled for name in ("prompt", "layer", "coefficient", "tokens", "Generate"))
        raise RuntimeError("out of\nmemory <i>")

    monkeypatch.setattr(Console, "steer", failing)
    parts["Generate"].click()
    assert seen == [True] * 5
    assert "RuntimeError: out of memory &lt;i&gt;" in parts["status"].value


def test_a_strong_plan_stretches_the_slider(llama: Any) -> None:
    pytest.importorskip("ipywidgets")
    box = console(llama, plan(coefficient=0.83), prompt="Hi", sampling=SAMPLING)
    slider = next(w for w in box.children if getattr(w, "description", "") == "coefficient")
    assert (slider.value, slider.max, slider.min) == (0.83, 0.9, -0.9)


def test_without_ipywidgets_it_says_what_to_install(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(SimsError, match=r"pip install 'sims-lens\[jupyter\]'"):
        console(llama, plan())
    assert module.Console(llama, plan()).layers


# What else a notebook shows


def test_a_steering_shows_its_plan(llama: Any) -> None:
    given = plan().decaying(8.0)
    with sims.steering(llama, given) as steered:
        shown = steered._repr_html_()
        assert "attached" in shown and steered.plan._repr_html_() in shown and "8 tokens" in shown
    assert "detached" in steered._repr_html_()


def test_a_plan_escapes_its_provenance(llama: Any) -> None:
    shown = plan(provenance=Provenance(model=HOSTILE, source=HOSTILE))._repr_html_()
    assert "<script" not in shown and "<img" not in shown and html.escape(HOSTILE) in shown


def test_what_a_notebook_shows_is_rich() -> None:
    from sims_lens.analysis.interactions import Interaction
    from sims_lens.auditing import Audit, PairAudit

    shown = (SteeringPlan, sims.Run, sims.SteeringFit, sims.Calibration, sims.Steering, Interaction, Audit, PairAudit)
    assert [c.__name__ for c in shown if not hasattr(c, "_repr_html_")] == []


_IN_A_KERNEL = """
import sys
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3")
cell = '''
import sys
sys.modules.update({missing})
from sims_lens.progress import Progress
with Progress(3) as bar:
    bar.phase("sampling")
    bar.advance(3)
'''
try:
    done = client.execute_interactive(cell, timeout=100, output_hook=lambda m: print(m["msg_type"], m["content"]))
    print(done["content"]["status"])
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


@pytest.mark.parametrize("missing", ["", "ipywidgets=None"])
def test_in_a_notebook_there_is_one_bar_and_no_warning(missing: str) -> None:
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    code = _IN_A_KERNEL.replace("{missing}", missing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=150)
    assert done.stdout.endswith("ok\n") and "Warning" not in done.stdout, done.stdout
    assert done.stdout.count("display_data") == (0 if missing else 1)
    assert ("sampling: 100%" in done.stdout) is bool(missing)
    assert ("'bar_style': 'success'" in done.stdout) is (not missing)
