"""The guard: what it decides, that planted disasters are found and rolled back, and that a run says why."""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_loop import PROMPTS, config, improve, vowels

import sims_lens as sims
from sims_lens.cli import summary
from sims_lens.config import GuardConfig
from sims_lens.errors import ConfigError, TooFewPairsError
from sims_lens.guard import Checks, Decision, best_iteration, decide, gained
from sims_lens.report import write_report
from sims_lens.sampling import LocalSampler, TokenCount
from sims_lens.stats import Interval

FINE = Checks(
    effect=Interval(5.0, 2.0, 8.0),
    gain=Interval(1.0, -1.0, 3.0),
    kl_95=Interval(0.5, 0.4, 0.6),
    perplexity_ratio=Interval(1.3, 1.1, 1.5),
    diversity=0.95,
    turn=0.4,
    agreement=1.0,
)


def asked(tries: int = 1, idle: int = 0, **changes: Any) -> Decision:
    return decide(replace(FINE, **changes), GuardConfig(), tries=tries, idle=idle)


def test_what_has_an_effect_and_keeps_to_the_budgets_is_accepted() -> None:
    found = asked()
    assert (found.action, found.stop, found.shrink) == ("accept", False, 1.0)
    assert "+5 [+2, +8]" in found.reason and gained(found)
    assert Decision.from_json(json.loads(json.dumps(found.to_json()))) == found
    first = asked(gain=None, turn=None, agreement=None, kl_95=None, perplexity_ratio=None)
    assert first.action == "accept"
    assert Decision.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_what_is_not_shown_goes_on_and_what_is_shown_to_be_worse_does_not() -> None:
    unproven = asked(effect=Interval(5.0, -1.0, 8.0))
    assert unproven.action == "go on" and not unproven.stop and unproven.kept and gained(unproven)
    harmful = asked(effect=Interval(-3.0, -5.0, -1.0), gain=None)
    assert harmful.action == "roll back" and "worse than the base model" in harmful.reason
    worse = asked(gain=Interval(-3.0, -5.0, -1.0))
    assert worse.action == "roll back" and not worse.kept and "-3 [-5, -1]" in worse.reason and not gained(worse)
    assert asked(gain=Interval(-3.0, -7.0, 1.0)).action == "accept"  # not shown to be worse


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kl_95": Interval(6.0, 5.0, 7.0)}, "KL divergence reaches 6.00 nats"),
        ({"perplexity_ratio": Interval(4.0, 3.0, 5.0)}, "perplexity rises 4.00-fold"),
        ({"perplexity_ratio": Interval(float("inf"), float("inf"), float("inf"))}, "perplexity rises inf-fold"),
        ({"diversity": 0.2}, "distinct word pairs fall to 20%"),
        ({"diversity": 0.0}, "distinct word pairs fall to 0%"),
    ],
)
def test_a_step_over_budget_is_made_smaller_then_rolled_back(changes: dict[str, Any], word: str) -> None:
    limits = GuardConfig()
    for tries in range(1, limits.shrinks + 1):
        found = asked(tries, **changes)
        assert 0.1 <= found.shrink <= 0.7 and word in found.reason
    last = asked(limits.shrinks + 1, **changes)
    assert last.shrink == 1.0 and last.action == "roll back" and not last.stop
    assert last.reason.startswith("Rolled back to the base model: ") and "made smaller 2 times" in last.reason
    within = asked(2)
    assert within.action == "accept" and "made smaller once" in within.reason


@pytest.mark.parametrize("changes", [{"agreement": 0.1}, {"turn": -0.6}])
def test_a_ranker_that_changes_its_mind_ends_the_run(changes: dict[str, Any]) -> None:
    found = asked(**changes)
    assert found.action == "roll back" and found.stop and found.shrink == 1.0
    assert asked(agreement=0.7).action == asked(turn=-0.1).action == "accept"


def test_iterations_that_gain_nothing_end_the_run() -> None:
    nothing = {"gain": Interval(-1.0, -3.0, 1.0)}
    assert not asked(**nothing).stop
    second = asked(idle=1, **nothing)
    assert second.stop and "2 iterations in a row gained nothing" in second.reason and second.action == "accept"
    assert not asked(idle=1).stop


def test_the_runs_plan_is_that_of_the_best_accepted_iteration() -> None:
    accepted, unproven, back = asked(), asked(effect=Interval(5.0, -1.0, 8.0)), asked(turn=-1.0)
    assert best_iteration([accepted, accepted, unproven], [3.0, 2.0, 9.0]) == 0
    assert best_iteration([unproven, unproven, back], [3.0, 2.0, 9.0]) == 1
    assert best_iteration([back, back], [3.0, 2.0]) is None and best_iteration([], []) is None
    assert best_iteration([None, None], [3.0, 2.0]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "on"}, "act, report, off"),
        ({"kl_95": 0.0}, "kl_95"),
        ({"patience": 0}, "patience"),
        ({"turn": 2.0}, "turn"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GuardConfig(**wrong)


def report_page(run: sims.Run) -> str:
    """The report, and whatever else shows a run."""
    assert repr(run) and run._repr_html_() and summary(run)["verdict"] == run.verdict()
    return write_report(run).read_text()


# Disasters, on a real run of a tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return sims.load(str(tiny.write("llama", tmp_path_factory.mktemp("models") / "small")), kind="bridge")


def never_worse(run: sims.Run) -> bool:
    """On held-out prompts, than the best iteration that was accepted."""
    accepted = [i for i in run.iterations if i.decision is not None and i.decision.action == "accept"]
    if not accepted:
        return run.best is None or run.best.kept
    assert run.best is not None
    return run.best.evaluation.difference.estimate == max(i.evaluation.difference.estimate for i in accepted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.cases(1)
def test_a_coefficient_ten_times_too_big(model: Any, tmp_path: Path, seed: int) -> None:
    wanted = replace(config(steering={"strength": 3.0}, iterations=2), seed=seed)
    run = improve(model, tmp_path / "run", config=wanted)
    first = run.iterations[0]
    assert first.decision is not None and first.tries == 3 and run.complete and never_worse(run)
    # what was measured last is what the folder's plan and samples are
    assert sum(first.coefficients) < 1.5 and len(run.samples(1)) == 2 * len(run.indices("heldout"))
    assert (first.path / "heldout.jsonl").is_file() and (first.path / "heldout_3.jsonl").is_file()
    assert "The guard" in (page := report_page(run)) and html.escape(first.decision.reason) in page
    if not first.kept:
        assert "Rolled back" in first.decision.reason and run.before(2).interventions == ()
    again = improve(model, tmp_path / "run", config=wanted)
    assert [i.decision for i in again.iterations] == [i.decision for i in run.iterations]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.cases(1)
def test_an_oracle_that_turns_round(model: Any, tmp_path: Path, seed: int) -> None:
    second = tmp_path / "run" / "iterations" / "02.partial"

    def turning(prompt: str, responses: Sequence[str]) -> list[float]:
        sign = -1 if second.exists() else 1
        return [sign * score for score in vowels(prompt, responses)]

    run = improve(model, tmp_path / "run", turning, config=replace(config(iterations=3), seed=seed))
    last = run.iterations[-1]
    assert run.stopped and run.complete and len(run.iterations) == 2 and never_worse(run)
    assert last.decision is not None and not last.kept and last.decision.checks.agreement == 0.0
    assert "not the ranker that the run began with" in run.verdict() and run.best is not last


class Collapsing:
    """A sampler that says one thing only from its second training round on."""

    def __init__(self, model: Any, settings: sims.SamplingConfig) -> None:
        self.inner, self.rounds = LocalSampler(model, settings), 0

    @property
    def count(self) -> TokenCount:
        return self.inner.count

    def sample(self, prompts: Sequence[str], *, n: int, plan: sims.SteeringPlan, seed: int) -> Iterator[Any]:
        self.rounds += 1
        for sample in self.inner.sample(prompts, n=n, plan=plan, seed=seed):
            yield sample if self.rounds <= 3 else replace(sample, tokens=(5, 5), text="no no")


def test_a_sampler_that_collapses(model: Any, tmp_path: Path) -> None:
    sampler = Collapsing(model, config().sampling)
    run = improve(model, tmp_path / "run", config=config(iterations=3), sampler=sampler)
    assert run.stopped and run.complete and len(run.iterations) == 1 and never_worse(run)
    assert "Stopped in iteration 2" in run.verdict() and run.best is run.iterations[0]
    assert improve(model, tmp_path / "run", config=config(iterations=3), sampler=sampler).stopped == run.stopped
    reporting = config(iterations=3, guard=GuardConfig(mode="report"))
    with pytest.raises(TooFewPairsError):
        improve(model, tmp_path / "other", config=reporting, sampler=Collapsing(model, reporting.sampling))


def test_a_report_changes_nothing_and_off_asks_nothing(model: Any, tmp_path: Path) -> None:
    strong = config(steering={"strength": 3.0})
    told = improve(model, tmp_path / "told", config=replace(strong, guard=GuardConfig(mode="report")))
    silent = improve(model, tmp_path / "silent", config=replace(strong, guard=GuardConfig(mode="off")))
    assert told.best is told.iterations[-1] and told.iterations[-1].coefficients == (1.5, 1.5)
    assert told.iterations[0].decision is not None and "Over budget" in told.guard_text()
    assert told.guard_text().startswith("It only reports") and all(i.kept for i in told.iterations)
    assert told.before(2) == told.iterations[0].plan
    assert silent.iterations[0].decision is None and silent.guard_text() == ""
    assert told.samples(2) == silent.samples(2) and told.base == silent.base


# Strength "auto"


def test_strength_is_found_for_a_budget_of_divergence(model: Any, tmp_path: Path) -> None:
    wanted = config(steering={"strength": "auto", "kl": 0.2}, iterations=2)
    run = improve(model, tmp_path / "run", config=wanted)
    assert len(run.iterations) == 2 and run.cost["strength"].prefill > 0
    spent = [i.evaluation.kl.estimate for i in run.iterations]
    assert 0.04 < spent[0] < 0.2 and 0.08 < spent[1] < 0.4  # half of it, then all, on other text
    same = improve(model, tmp_path / "same", config=wanted)
    assert [i.coefficients for i in same.iterations] == [i.coefficients for i in run.iterations]
    assert "auto: 0.2 nats of KL per token" in repr(run)
    assert len(PROMPTS) == 20
