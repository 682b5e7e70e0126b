"""The guard: is an iteration kept, made smaller, or rolled back, and does the run go on? Pure, and it says why.

What is looked at, on the held-out prompts:

- **budgets**, so that a behaviour is not bought with broken text: the divergence from the base model where it is
  largest (95th percentile of a response's tokens), perplexity under the base model, distinct word bigrams. A step
  over one of them is made smaller and measured again; if that doesn't help it is rolled back.
- **the ranker**: asked again about responses that it has scored before, does it stand by what it said? One that
  contradicts itself more often than not has changed; nothing that it says from now on can be compared, and the run
  stops. Does the direction turn round against the one before? The same.
- **the effect**: accepted where its lower bound lies above that of no effect; rolled back where it is shown to be
  worse than the best iteration so far; otherwise the loop goes on from it, because a small first step need not be
  visible alone. After some iterations in a row that gained nothing the run stops.

The run's plan is that of the accepted iteration with the largest effect. Choosing the largest of a few on the
prompts that it is reported on flatters it; the p-values are adjusted for their number (Holm).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from sims_lens.config import GuardConfig
from sims_lens.stats import Interval
from sims_lens.typed import known_fields, read_as

Action = Literal["accept", "go on", "roll back"]

OPPOSITE = 0.5
"""Share of comparisons in which a ranker must stand by what it said: below, it says the opposite more often."""

LEAST_SHRINK, MOST_SHRINK = 0.1, 0.7
"""A step over budget is multiplied by no less and no more than this."""


@dataclass(frozen=True)
class Checks:
    """What the guard looks at.

    Args:
        effect: change of the mean score against the base model.
        gain: change of the mean score against the best iteration so far; None where there is none.
        kl_95, perplexity_ratio: see :class:`~sims_lens.config.GuardConfig`; None where they were not measured.
        diversity: distinct word bigrams over those of the base model.
        turn: cosine of the direction with the newest that was kept, mean over the steered layers; None for the first.
        agreement: share of comparisons in which the ranker stands by its first verdicts; None where it was not asked.
    """

    effect: Interval
    gain: Interval | None
    kl_95: Interval | None
    perplexity_ratio: Interval | None
    diversity: float
    turn: float | None
    agreement: float | None

    def to_json(self) -> dict[str, Any]:
        """A plain dict; the inverse of :meth:`from_json`."""
        return {
            f.name: value.to_json() if isinstance(value := getattr(self, f.name), Interval) else value
            for f in fields(self)
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Checks":
        """What :meth:`to_json` described.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, data)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Decision:
    """What the guard has decided about an iteration.

    Args:
        action: "accept": it has an effect, and keeps to the budgets; "go on": it keeps to them, and has no effect that
            is shown; "roll back": the loop goes on from what was before it.
        reason: why, in one sentence.
        stop: whether the run ends here.
        checks: what that rests on.
        shrink: what the step is to be multiplied by, where it is to be tried again; 1.0 otherwise.
    """

    action: Action
    reason: str
    stop: bool
    checks: Checks
    shrink: float = 1.0

    @property
    def kept(self) -> bool:
        """Whether the loop goes on from the iteration."""
        return self.action != "roll back"

    def to_json(self) -> dict[str, Any]:
        """A plain dict; the inverse of :meth:`from_json`."""
        return {**asdict(self), "checks": self.checks.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Decision":
        """What :meth:`to_json` described; what a later version added is left out.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, known_fields(cls, data))  # type: ignore[no-any-return]


def decide(
    checks: Checks,
    limits: GuardConfig,
    *,
    tries: int,
    idle: int = 0,
    before: str = "the base model",
) -> Decision:
    """What is to be done about an iteration that was measured.

    Args:
        checks: what was measured.
        limits: what it must keep to.
        tries: how often it was measured: 1, and once more for each time its step was made smaller.
        idle: iterations in a row before this one that gained nothing.
        before: what the loop goes back to, in words.

    Returns:
        The decision. Where its ``shrink`` is below 1 it is none yet: the step should be tried again, smaller.
    """

    def decided(action: Action, reason: str, *, stop: bool = False, shrink: float = 1.0) -> Decision:
        return Decision(action, reason, stop, checks, shrink)

    smaller = f" after its step was made smaller {_times(tries - 1)}" if tries > 1 else ""
    if checks.agreement is not None and checks.agreement < OPPOSITE:
        return decided(
            "roll back",
            f"Rolled back to {before} and stopped: asked again, the ranker stands by only "
            f"{100 * checks.agreement:.0f}% of its first verdicts, so it is not the ranker that the run began with.",
            stop=True,
        )
    if checks.turn is not None and checks.turn < limits.turn:
        return decided(
            "roll back",
            f"Rolled back to {before} and stopped: the direction turned round, its cosine with the one before is "
            f"{checks.turn:.2f} (at least {limits.turn:g}), so the ranker or the responses are not what they were.",
            stop=True,
        )
    over = _over_budget(checks, limits)
    if over:
        what, share = max(over, key=lambda breach: breach[1])
        if tries <= limits.shrinks:
            shrink = min(MOST_SHRINK, max(LEAST_SHRINK, share**-0.5))
            return decided("roll back", f"Over budget: {what}.", shrink=shrink)
        return _idle(decided("roll back", f"Rolled back to {before}: {what}{smaller}."), limits, idle)
    for change, than in ((checks.gain, "the best iteration so far"), (checks.effect, "the base model")):
        if change is not None and change.high < 0:
            reason = f"Rolled back to {before}: it scores worse than {than}, {_change(change)}."
            return _idle(decided("roll back", reason), limits, idle)
    if checks.effect.low > 0:
        reason = f"Accepted{smaller}: its effect, {_change(checks.effect)}, is above 0 and it keeps to the budgets."
        found = decided("accept", reason)
    else:
        found = decided(
            "go on",
            f"Not accepted{smaller}: its effect, {_change(checks.effect)}, is not shown to be above 0; it keeps to the "
            "budgets, and the loop goes on from it.",
        )
    return found if gained(found) else _idle(found, limits, idle)


def _idle(found: Decision, limits: GuardConfig, idle: int) -> Decision:
    """A decision about an iteration that gained nothing: the last one, if there were enough of them."""
    if idle + 1 < limits.patience:
        return found
    rest = f" The run stops: {idle + 1} iteration{'s in a row' if idle else ''} gained nothing."
    return replace(found, reason=found.reason + rest, stop=True)


def best_iteration(decisions: Sequence[Decision | None], effects: Sequence[float]) -> int | None:
    """Which iteration a run's plan is taken from, counted from 0; None where all were rolled back.

    Args:
        decisions: about each; None where the guard did not act, then the last one is taken.
        effects: of each, on the held-out prompts.

    Returns:
        The accepted one with the largest effect; where none is, the last one that the loop went on from.
    """
    if not decisions or any(decision is None for decision in decisions):
        return len(decisions) - 1 if decisions else None
    made = [decision for decision in decisions if decision is not None]
    accepted = [i for i, decision in enumerate(made) if decision.action == "accept"]
    if accepted:
        return max(accepted, key=lambda i: effects[i])
    return next((i for i in reversed(range(len(made))) if made[i].kept), None)


def gained(decision: Decision) -> bool:
    """Whether an iteration gained anything."""
    checks = decision.checks
    ahead = checks.gain is None or checks.gain.estimate > 0
    return decision.kept and ahead and checks.effect.estimate > 0


def _over_budget(checks: Checks, limits: GuardConfig) -> list[tuple[str, float]]:
    """What is over budget: in words, and by what factor."""
    found = []
    if checks.kl_95 is not None and checks.kl_95.estimate > limits.kl_95:
        what = f"the KL divergence reaches {checks.kl_95.estimate:.2f} nats (95th percentile; at most {limits.kl_95:g})"
        found.append((what, checks.kl_95.estimate / limits.kl_95))
    ratio = checks.perplexity_ratio
    if ratio is not None and not ratio.estimate <= limits.perplexity_ratio:
        what = f"perplexity rises {ratio.estimate:.2f}-fold (at most {limits.perplexity_ratio:g})"
        found.append((what, ratio.estimate / limits.perplexity_ratio))
    if checks.diversity < limits.diversity:
        what = f"distinct word pairs fall to {100 * checks.diversity:.0f}% (at least {100 * limits.diversity:.0f}%)"
        found.append((what, limits.diversity / max(checks.diversity, 0.01)))
    return found


def _change(found: Interval) -> str:
    return f"{found.estimate:+.3g} [{found.low:+.3g}, {found.high:+.3g}]"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


__all__ = ["Action", "Checks", "Decision", "best_iteration", "decide", "gained"]
