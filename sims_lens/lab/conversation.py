"""Does the steering last when the user goes on? The effect by turn of a chat."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sims_lens.adapter import adapt, check_lengths
from sims_lens.checks import check_kind, check_list, check_seed
from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import PromptError
from sims_lens.evaluate import Evaluation, evaluate, score_changes
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.lab.drawing import check_count, draw, ranked
from sims_lens.lab.shown import Shown, columns, relation, signed
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.progress import Progress
from sims_lens.prompts import Chat, conversations
from sims_lens.rankers import bound_ranker
from sims_lens.stats import Interval, bootstrap_mean
from sims_lens.workbench import derive_seed

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class MultiTurn(Shown):
    """A plan's effect by turn of a chat; made by :func:`multi_turn`.

    Args:
        ranker: by which.
        evaluations: of each turn, the steered chat against the base model's chat; over conversations.
        trend: change of the effect from one turn to the next: the slope over turns of each conversation.
        conversations: how many.
        samples: chats from each, per arm.
        chats: what was said, ``(conversation, chat, steered)`` to the answers.
    """

    ranker: str
    evaluations: tuple[Evaluation, ...]
    trend: Interval
    conversations: int
    samples: int
    chats: dict[tuple[int, int, bool], tuple[str, ...]]

    def table(self) -> "pd.DataFrame":
        """One row per turn: effect, win rate, length, NLL, KL and repetition with their intervals."""
        import pandas as pd

        rows = []
        for turn, e in enumerate(self.evaluations, start=1):
            row: dict[str, Any] = {"turn": turn}
            row |= columns(effect=e.difference, win_rate=e.win_rate, nll=e.nll, kl=e.kl)
            rows.append(row | columns(length=e.length, repetition=e.repetition))
        return pd.DataFrame(rows).set_index("turn")

    def head(self) -> str:
        """One line."""
        return (
            f"Effect by {self.ranker} over {len(self.evaluations)} turns, {self.conversations} conversations x "
            f"{self.samples}"
        )

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text."""
        rows: list[tuple[str, ...]] = [("turn", "effect [95%]", "win rate", "NLL", "KL", "repeated", "length")]
        for turn, e in enumerate(self.evaluations, start=1):
            rest = (f"{e.nll.estimate:.2f}", f"{e.kl.estimate:.2f}", f"{e.repetition.estimate:.3f}")
            rows.append((f"{turn}", signed(e.difference), str(e.win_rate), *rest, f"{e.length.estimate:.1f}"))
        return rows

    def verdict(self) -> str:
        """Whether the effect lasts."""
        first, last = self.evaluations[0].difference, self.evaluations[-1].difference
        turns = len(self.evaluations)
        text = f"In the first turn the score {relation(first)} ({signed(first)})"
        if turns == 1:
            return text + "."
        trend = {"rises": "grows", "falls": "fades", "is not shown to change": "is not shown to grow or fade"}
        return (
            f"{text}, in turn {turns} it {relation(last)} ({signed(last)}); from turn to turn the effect "
            f"{trend[relation(self.trend)]} ({signed(self.trend)})."
        )


def multi_turn(
    model: Any,
    plan: SteeringPlan,
    conversations: Sequence[Sequence[str]] | None = None,
    *,
    ranker: object,
    turns: int = 3,
    samples: int = 2,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MultiTurn:
    """Let a user go on, and measure each turn: a steered chat against a base chat, each with its own answers so far.

    The answers of a turn are drawn with the same random numbers in both arms. The history is read anew in each turn, as
    by a server, so that a plan of scope "generation" steers the answer at hand and not the earlier ones' tokens.

    Args:
        model: unsteered, with a chat template.
        plan: what steers, in every turn of its arm.
        conversations: what the user says, turn by turn, whatever is answered; at least ``turns`` of it each. None: 14
            that come with the package.
        ranker: any that ``sims.improve`` accepts; it is shown the user's newest turn and the answer to it.
        turns: how many.
        samples: chats from each conversation, in each arm.
        sampling: how answers are drawn.
        seed: of the sampling and the intervals.
        progress: show a progress bar.

    Raises:
        PromptError: fewer than two conversations, one is shorter than ``turns``, or the model has no chat template, or
            the chat has grown longer than the context.
        ConfigError: ``turns`` or ``samples`` is no count.
    """
    check_unsteered(model)
    check_count("turns", turns)
    check_count("samples", samples)
    talks = _checked(conversations, turns)
    sampling = SamplingConfig() if sampling is None else sampling
    check_kind("sampling", sampling, SamplingConfig, "make one, as SamplingConfig(max_new_tokens=40)")
    check_seed(seed)
    adapter, judge, plan = adapt(model), bound_ranker(ranker, model), resolve(model, plan)
    answers: dict[tuple[int, int, bool], tuple[str, ...]] = {
        (i, k, steered): () for i in range(len(talks)) for k in range(samples) for steered in (False, True)
    }
    evaluations, changes = [], []
    with Progress(2 * turns * samples * len(talks), show=progress) as bar:
        for turn in range(turns):
            arms: dict[bool, list[Sample]] = {False: [], True: []}
            for k in range(samples):
                for steered in (False, True):
                    bar.phase(f"turn {turn + 1}, {'steered' if steered else 'base'}")
                    chats = [Chat(talk[: turn + 1], answers[i, k, steered]) for i, talk in enumerate(talks)]
                    check_lengths(adapter, chats, sampling.max_new_tokens)
                    drawn = draw(
                        model,
                        chats,
                        plan if steered else NOTHING,
                        n=1,
                        seed=derive_seed(seed, turn, k),
                        sampling=sampling,
                        bar=bar,
                    )
                    for sample in drawn:
                        arms[steered].append(replace(sample, draw=k))
                        answers[sample.prompt, k, steered] += (sample.text,)
            asked = [talk[turn] for talk in talks]
            ours, theirs = ranked(judge, asked, arms[True], arms[False])
            evaluations.append(evaluate(ours, theirs, seed=seed))
            changes.append(score_changes(ours, theirs))
    return MultiTurn(
        ranker=judge.name,
        evaluations=tuple(evaluations),
        trend=bootstrap_mean(_slopes(np.array(changes)), seed=seed),
        conversations=len(talks),
        samples=samples,
        chats=answers,
    )


def _slopes(changes: np.ndarray) -> np.ndarray:
    """Least-squares slope over turns, for each conversation; 0 of one turn.

    >>> _slopes(np.array([[1.0, 5.0], [2.0, 3.0]])).tolist()
    [1.0, -2.0]
    """
    turns = np.arange(len(changes)) - (len(changes) - 1) / 2
    slopes: np.ndarray = turns @ changes / max(float(turns @ turns), 1e-12)
    return slopes


def _checked(given: Sequence[Sequence[str]] | None, turns: int) -> list[tuple[str, ...]]:
    talks = conversations() if given is None else given
    check_list("conversations", talks, '[["Hi.", "Go on."], ...]', PromptError)
    if len(talks) < 2 or any(isinstance(talk, str) or not isinstance(talk, Sequence) for talk in talks):
        raise PromptError('give two or more conversations, each a list of what the user says: [["Hi.", "Go on."], ...]')
    for index, talk in enumerate(talks):
        if len(talk) < turns:
            raise PromptError(f"conversation {index} has {len(talk)} turns; give at least turns = {turns}, or lower it")
    return [tuple(talk) for talk in talks]


__all__ = ["MultiTurn", "multi_turn"]
