"""Base and steered model on the same documents of the same tasks, compared document by document."""

import html
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sims_lens.checks import check_integer, check_list, check_path, check_seed, shown
from sims_lens.errors import CapabilityError, SimsError
from sims_lens.harness.model import check_installed, lm_eval_model
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.stats import Interval, bca, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

TASKS = Path(__file__).parent / "tasks"
"""The packaged tasks: ``lm_eval --include_path`` takes this folder."""

PACKAGED = ("sims_plain_facts", "sims_plain_words")
"""Names of the packaged tasks: 24 questions with four choices, and 24 sentences to complete. Data are local."""

_DRAWS = 500
"""Bootstrap samples of a figure that is no mean: its whole aggregation is made anew for each."""

_JACKKNIFED = 1000
"""Documents up to which each one's influence on such a figure is measured; beyond, the correction for skewness is 0."""


@dataclass(frozen=True)
class CapabilityScore:
    """One task by one metric, base against steered.

    Args:
        task: its name in lm-eval.
        metric: its name in the task, for instance ``"acc"``.
        filter: what lm-eval did to responses before it scored them; ``"none"`` in most tasks.
        higher_is_better: None where the task doesn't say.
        documents: how many both were scored on.
        base: the unsteered model's figure, documents resampled.
        steered: the steered model's.
        difference: steered less base, paired by document.
        better: documents that the steered model scores better on; None where the figure is no mean over documents.
        worse: documents that it scores worse on; None as well.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    documents: int
    base: Interval
    steered: Interval
    difference: Interval
    better: int | None = None
    worse: int | None = None

    @property
    def name(self) -> str:
        """Metric, with its filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"

    @property
    def moved(self) -> bool:
        """Whether the difference's interval leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0

    @property
    def harmed(self) -> bool:
        """Whether it does, on the side that is worse."""
        down = self.difference.high < 0
        return self.moved and self.higher_is_better is not None and down is self.higher_is_better


@dataclass(frozen=True)
class Capability:
    """What a plan does to tasks that it isn't meant to change; made by :func:`capability`.

    Args:
        scores: one for each task and metric.
        plan: what steered.
        chat: whether documents were put into the model's chat template.
        shots: examples before each document, as asked for; None: as each task says.
    """

    scores: tuple[CapabilityScore, ...]
    plan: SteeringPlan = field(repr=False)
    chat: bool = False
    shots: int | None = None

    def table(self) -> "pd.DataFrame":
        """One row per task, metric and filter: base, steered and difference with their intervals, and counts."""
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for s in self.scores:
            row: dict[str, Any] = {"task": s.task, "metric": s.metric, "filter": s.filter, "documents": s.documents}
            for name, interval in (("base", s.base), ("steered", s.steered), ("difference", s.difference)):
                row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            rows.append(row | {"better": s.better, "worse": s.worse, "higher_is_better": s.higher_is_better})
        return pd.DataFrame(rows).set_index(["task", "metric", "filter"])

    @property
    def harmed(self) -> tuple[CapabilityScore, ...]:
        """Those that the interval says got worse."""
        return tuple(s for s in self.scores if s.harmed)

    def __repr__(self) -> str:
        head, *rows = self._cells()
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        lines = [self._head()]
        for row in (head, *rows):
            lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        notes = "<br>".join(html.escape(note) for note in self._notes())
        return f"<p>{html.escape(self._head())}</p><table><tr>{top}</tr>{body}</table><p>{notes}</p>"

    def _head(self) -> str:
        chat = ", in the chat template" if self.chat else ""
        shots = "" if self.shots is None else f", {self.shots} examples before each document"
        return f"Capability, base against steered on the same documents{chat}{shots}"

    def _cells(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = [
            ("task", "metric", "documents", "base", "steered", "difference [95%]", "better", "worse")
        ]
        for s in self.scores:
            d = s.difference
            counts = ("" if count is None else str(count) for count in (s.better, s.worse))
            shown = f"{d.estimate:+.3g} [{d.low:+.3g}, {d.high:+.3g}]"
            base, steered = f"{s.base.estimate:.3g}", f"{s.steered.estimate:.3g}"
            cells.append((s.task, s.name, str(s.documents), base, steered, shown, *counts))
        return cells

    def _notes(self) -> list[str]:
        moved = [s for s in self.scores if s.moved]
        names = ", ".join(f"{s.task} {s.name}" for s in self.harmed)
        notes = [
            f"{len(moved)} of {len(self.scores)} intervals leave out 0 (by chance about 1 in 20 does)"
            + (f"; worse: {names}" if names else "")
        ]
        # A bootstrap of documents that all agree has no width; the rule of three says what it leaves open.
        for s in self.scores:
            if s.better == 0 and s.worse == 0:
                notes.append(
                    f"{s.task} {s.name}: no document changed, which rules out a change of more than "
                    f"{min(1.0, 3 / s.documents):.2g} of all such documents (3 / {s.documents}), not a smaller one"
                )
        return notes


def capability(
    model: Any,
    plan: SteeringPlan,
    tasks: str | Sequence[Any] = PACKAGED,
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    include_path: str | Path | None = None,
    add_bos: bool | None = None,
    batch_rows: int | None = None,
    seed: int = 0,
) -> Capability:
    """Run lm-evaluation-harness on the base and the steered model, and compare them document by document.

    The packaged tasks need no network: a smoke test of a minute, easy enough for small models, not a benchmark. Any of
    lm-eval's tasks is taken by name; it downloads its data.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        plan: what steers.
        tasks: names of tasks, tags or groups, or lm-eval's own task objects or dicts.
        limit: only the first so many documents of each task; all where None.
        shots: examples before each document; None: as each task says.
        chat: put documents into the model's chat template. Off by default, as in lm-eval.
        include_path: a folder with task files of yours.
        add_bos: see :func:`~sims_lens.harness.lm_eval_model`.
        batch_rows: sequences side by side, at most; None takes what fits.
        seed: of the examples, the draws and the bootstrap.

    Raises:
        CapabilityError: lm-eval isn't installed, a task isn't known, its data can't be had, or it needs what a steered
            model doesn't do.
        ModelError: a plan is attached to the model.
        PlanError: the plan doesn't fit the model.
    """
    if limit is not None:
        check_integer("limit, the documents of each task (None takes all),", limit, error=CapabilityError)
    if shots is not None:
        check_integer("shots, the examples before each document,", shots, 0, error=CapabilityError)
    if batch_rows is not None:
        check_integer("batch_rows", batch_rows)
    if include_path is not None and not check_path(include_path).is_dir():
        raise CapabilityError(
            f"include_path {shown(str(include_path))} is no folder; give the one with your task files"
        )
    check_seed(seed)
    names = [tasks] if isinstance(tasks, str) else list(check_list("tasks", tasks, "['sims_plain_facts']"))
    if not all(isinstance(name, (str, Mapping)) or hasattr(name, "config") for name in names):
        raise CapabilityError(f"a task is given by its name, got {shown(tasks)}")
    if "" in names:
        raise CapabilityError(f"a task has the name '', empty; give names, for instance {list(PACKAGED)}")
    if not names:
        raise CapabilityError(f"there are no tasks; give names, for instance {list(PACKAGED)}")
    check_unsteered(model)
    check_installed()
    plan = resolve(model, plan)
    manager, loaded = _load(names, include_path)
    found: list[dict[str, list[dict[str, Any]]]] = []
    for each in (NOTHING, plan):
        lm = lm_eval_model(model, each, add_bos=add_bos, batch_rows=batch_rows, seed=seed)
        found.append(_evaluate(lm, manager, loaded, limit=limit, shots=shots, chat=chat, seed=seed))
    scores: list[CapabilityScore] = []
    for name, task in loaded.items():
        scores += _compare(name, task, found[0][name], found[1][name], seed=seed)
    if not scores:
        raise CapabilityError(f"the tasks {', '.join(loaded)} gave no scores to compare")
    return Capability(tuple(scores), plan, chat, shots)


def _load(names: Sequence[Any], include_path: str | Path | None) -> tuple[Any, dict[str, Any]]:
    """lm-eval's task manager, and task objects by name, loaded once: both models get the very same documents."""
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS), *([] if include_path is None else [str(include_path)])]
    manager: Any = TaskManager(include_path=folders, include_defaults=False)
    unknown = _unknown(manager, names)
    if unknown:  # only then, because to look through lm-eval's 13,000 task files takes many seconds
        manager = TaskManager(include_path=folders)
        unknown = _unknown(manager, names)
    if unknown:
        every = sorted(manager.all_tasks)
        near = [task for task in every if any(name.lower() in task.lower() for name in unknown)][:5]
        raise CapabilityError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}"
            + (f"; there are {', '.join(near)}" if near else "")
            + "; `lm_eval ls tasks` lists all, include_path= adds a folder of your own"
        )
    try:
        with _quiet():
            loaded = manager.load(list(names))
    except ImportError as error:
        raise CapabilityError(f"the task needs the package {error.name!r}; install it") from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise CapabilityError(
            f"{', '.join(map(str, names))}: lm-eval can't load the task or its data ({type(error).__name__}: {first}); "
            f"go online, or use a task with local data such as {PACKAGED[0]!r}"
        ) from error
    return manager, dict(loaded["tasks"])


def _unknown(manager: Any, names: Sequence[Any]) -> list[str]:
    return [name for name in names if isinstance(name, str) and not manager.match_tasks([name])]


def _evaluate(
    lm: Any, manager: Any, loaded: Mapping[str, Any], *, limit: int | None, shots: int | None, chat: bool, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval logs of each document, by task."""
    import lm_eval

    try:
        # Seeds of None: lm-eval would set those of random, numpy and torch for the whole process.
        with _quiet():
            result = lm_eval.simple_evaluate(
                model=lm,
                tasks=list(loaded.values()),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=chat,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=seed,
            )
    except SimsError:
        raise
    except ValueError as error:  # a task that runs code of a model's, or wants images
        first = (str(error).splitlines() or [""])[0][:200]
        raise CapabilityError(f"lm-eval can't run {', '.join(loaded)}: {first}") from error
    samples: dict[str, list[dict[str, Any]]] = result["samples"]
    return samples


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, lm-eval logs errors only: what it says of defaults at every load is no news here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _compare(
    name: str, task: Any, base: Sequence[dict[str, Any]], steered: Sequence[dict[str, Any]], *, seed: int
) -> list[CapabilityScore]:
    """Every metric and filter of a task."""
    aggregations: Mapping[str, Callable[[list[Any]], Any]] = task.aggregation()
    directions: Mapping[str, Any] = task.higher_is_better()
    by_filter: list[dict[str, dict[int, dict[str, Any]]]] = []
    for rows in (base, steered):
        grouped: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            grouped.setdefault(str(row["filter"]), {})[int(row["doc_id"])] = row
        by_filter.append(grouped)
    scores = []
    for which, theirs in by_filter[0].items():
        ours = by_filter[1][which]
        same = theirs.keys() == ours.keys() and all(theirs[i]["prompt_hash"] == ours[i]["prompt_hash"] for i in theirs)
        if not same:
            raise CapabilityError(f"{name} gave the two models different documents; it can't be compared in pairs")
        for metric in next(iter(theirs.values()))["metrics"]:
            if metric not in aggregations or metric == "bypass":
                continue
            values = [[rows[i][metric] for i in sorted(rows)] for rows in (theirs, ours)]
            direction = directions.get(metric)
            up = None if direction is None else bool(direction)
            scores.append(score(name, metric, which, values[0], values[1], aggregations[metric], up, seed=seed))
    return scores


def score(
    task: str,
    metric: str,
    which: str,
    base: Sequence[Any],
    steered: Sequence[Any],
    aggregate: Callable[[list[Any]], Any],
    higher_is_better: bool | None,
    *,
    seed: int,
) -> CapabilityScore:
    """Compare values of the same documents.

    Args:
        task: its name.
        metric: its name.
        which: the filter.
        base: of each document, the unsteered model's value: a number, or what ``aggregate`` takes.
        steered: the steered model's, in the same order.
        aggregate: from the values to the task's figure.
        higher_is_better: None where it isn't known.
        seed: of the bootstrap.
    """
    numbers = all(isinstance(v, (bool, int, float, np.number)) for v in (*base, *steered))
    better = worse = None
    if numbers and getattr(aggregate, "__name__", "") == "mean":
        b, s = (np.array([float(v) for v in values]) for values in (base, steered))
        intervals = [bootstrap_mean(values, seed=seed) for values in (b, s, s - b)]
        up, down = int((s > b).sum()), int((s < b).sum())
        better, worse = (down, up) if higher_is_better is False else (up, down)
    else:
        intervals = _resampled(base, steered, aggregate, seed=seed)
    before, after, difference = intervals
    return CapabilityScore(task, metric, which, higher_is_better, len(base), before, after, difference, better, worse)


def _resampled(
    base: Sequence[Any], steered: Sequence[Any], aggregate: Callable[[list[Any]], Any], *, seed: int
) -> list[Interval]:
    """Intervals of base, steered and their difference, where the figure is no mean: documents are resampled, and the
    whole aggregation is made anew each time."""

    def figures(indices: Sequence[int]) -> tuple[float, float, float]:
        b, s = (float(aggregate([values[i] for i in indices])) for values in (base, steered))
        return b, s, s - b

    n = len(base)
    whole = figures(range(n))
    rng = np.random.default_rng(seed)
    drawn = np.array([figures(rng.integers(0, n, size=n).tolist()) for _ in range(_DRAWS)])
    influence = np.zeros((n, 3))
    if 2 <= n <= _JACKKNIFED:
        left_out = np.array([figures([k for k in range(n) if k != i]) for i in range(n)])
        influence = np.nan_to_num(left_out.mean(axis=0) - left_out)
    return [bca(whole[k], drawn[:, k], influence[:, k]) for k in range(3)]
