"""Where a run stands: what was fitted so far, how much of it was kept, and what it was fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.bank import MemoryBank
from sims_lens.data import ContrastPair, Sample
from sims_lens.guard import Decision, best_iteration, gained
from sims_lens.plan import NOTHING, SteeringPlan


@dataclass
class Memory:
    """What an iteration knows of those before it; made anew from the disk when a run goes on."""

    bank: MemoryBank = field(default_factory=MemoryBank)
    samples: list[Sample] = field(default_factory=list)
    pairs: tuple[ContrastPair, ...] = ()

    def add(self, samples: Sequence[Sample], t: int, plan: str, iterations: int | None) -> MemoryBank:
        """The bank with an iteration's responses, and without what is older than ``iterations`` turns: nobody looks at
        that again, and in a full bank it would push out what is new."""
        oldest = 1 if iterations is None else t - iterations + 1
        kept = tuple(entry for entry in self.bank.entries if entry.iteration >= oldest)
        self.bank = replace(self.bank, entries=kept).add(samples, iteration=t, plan=plan)
        return self.bank


@dataclass(frozen=True, eq=False)
class Turn:
    """An iteration as it was measured in the end."""

    decision: Decision | None
    plan: SteeringPlan
    coefficients: tuple[float, ...]
    changes: Float[np.ndarray, " prompt"]


@dataclass
class Course:
    """Where the steering stands: what was fitted, and how much of it was kept."""

    directions: list[Tensor] = field(default_factory=list)
    shuffled: list[Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    norms: Tensor = field(default_factory=lambda: torch.empty(0))
    turns: list[Turn] = field(default_factory=list)
    trust: float = 1.0
    idle: int = 0

    @property
    def kept(self) -> int | None:
        """The newest iteration that the loop went on from, counted from 0; None where it starts from the base model."""
        kept = [i for i, turn in enumerate(self.turns) if turn.decision is None or turn.decision.kept]
        return kept[-1] if kept else None

    @property
    def plan(self) -> SteeringPlan:
        """What the next responses are drawn under."""
        return NOTHING if self.kept is None else self.turns[self.kept].plan

    @property
    def coefficients(self) -> list[float]:
        """Of the directions so far, in that plan."""
        given = () if self.kept is None else self.turns[self.kept].coefficients
        return [*given, *[0.0] * (len(self.turns) - len(given))]

    @property
    def newest(self) -> Tensor | None:
        """The newest direction that was kept."""
        return None if self.kept is None else self.directions[self.kept]

    @property
    def before(self) -> str:
        """What the loop goes back to, in words."""
        return "the base model" if self.kept is None else f"iteration {self.kept + 1}"

    @property
    def best(self) -> Float[np.ndarray, " prompt"] | None:
        """Changes of the mean score, by prompt, in the best iteration that was kept."""
        kept = [t.changes for t in self.turns if t.decision is None or t.decision.kept]
        return max(kept, key=lambda changes: float(changes.mean())) if kept else None

    @property
    def chosen(self) -> Turn | None:
        """The iteration that the run's plan is taken from."""
        best = best_iteration([t.decision for t in self.turns], [float(t.changes.mean()) for t in self.turns])
        return None if best is None else self.turns[best]

    def take(
        self,
        decision: Decision | None,
        plan: SteeringPlan,
        coefficients: Sequence[float],
        changes: Float[np.ndarray, " prompt"],
    ) -> None:
        """Add an iteration that was measured."""
        self.turns.append(Turn(decision, plan, tuple(coefficients), changes))
        self.idle = 0 if decision is None or gained(decision) else self.idle + 1


__all__ = ["Course", "Memory", "Turn"]
