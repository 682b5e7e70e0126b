"""Contrast sampling (SIMS-CS): a memory of ranked responses, and pairs chosen from it across iterations.

The best response of one iteration may meet the worst of another. Three things have to hold for that to mean something:

- **Scores are comparable within a prompt**, across iterations. An oracle that scores one response at a time (reading
  ease, a reward model) gives such scores. A judge that compares the K responses of one iteration with each other does
  not: a mean win rate is 0.5 in every iteration. Rank a prompt's responses of all iterations together then, and put
  the scores in with :meth:`MemoryBank.rescored`. A bank remembers its ranker and refuses another.
- **Both responses of a pair are read in the same state of the model.** Under the plans that wrote them, the difference
  of their activations would contain the difference of the plans, and the fit would find its own earlier vectors again
  (:attr:`PairDiagnostics.iteration_gap` says how much). So capture both under one plan: the one at hand.
- **Margins of a growing bank grow by themselves**: the expected range of 12 equal draws is 1.6 times that of 4
  (:func:`sims_lens.selection.expected_range`). A rise of the margins over iterations is no evidence of learning.

In our trials choosing pairs by margin gave no gain over taking all of them, so "all" is the default, and "random" at
equal size is the control for every other policy.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args

import numpy as np

from sims_lens.config import Policy
from sims_lens.contrast import (
    LENGTH_TOLERANCE,
    Contrast,
    all_equal,
    check_length_control,
    extremes,
    length_gap,
    length_slope,
    no_pair,
    reasons,
    regress_out_length,
)
from sims_lens.data import ContrastPair, Sample
from sims_lens.errors import BankError, ConfigError
from sims_lens.plan import SteeringPlan
from sims_lens.stats import Interval
from sims_lens.typed import read_as

LIMIT = 10_000
"""Entries that a bank holds unless told otherwise: some MB as JSON. 100 prompts, K = 4 and T = 3 fill 1,200."""

AGE_FACTOR = 0.5
"""What "recency" multiplies a pair's margin by for each iteration that its two responses are old on average. A half: in
a run of three iterations the first still counts a quarter, so that it yields to the new without being forgotten."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

FORMAT = "sims_lens.bank"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class BankEntry:
    """A ranked response, and where it came from.

    Args:
        sample: with its score; ``sample.prompt`` counts among the run's prompts.
        iteration: in which it was drawn, counted from 1.
        plan: digest of the plan that it was drawn under, of :func:`plan_digest`.
    """

    sample: Sample
    iteration: int
    plan: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.iteration, bool) or not isinstance(self.iteration, int) or self.iteration < 1:
            raise BankError(f"an entry's iteration is counted from 1, got {self.iteration!r}")
        score = self.sample.score
        if score is None or not math.isfinite(score):
            raise BankError(
                f"response {self.sample.draw} to prompt {self.sample.prompt} has the score {score!r}; "
                "rank responses before they go into a bank"
            )

    @property
    def prompt(self) -> int:
        """Index of its prompt."""
        return self.sample.prompt

    @property
    def score(self) -> float:
        """What the ranker gave it."""
        assert self.sample.score is not None
        return self.sample.score


@dataclass(frozen=True)
class MemoryBank:
    """Ranked responses of several iterations: each once, and no more than a limit.

    However it was filled, a bank of the same entries is the same bank: entries are kept in one order (by prompt, newest
    iteration, draw). A response that was drawn before (same tokens, or same text up to white space around it) replaces
    the older entry: it is what the model says now. Responses without a token are left out.

    When there are too many, those go first that can be neither best nor worst: with a prompt's responses in the order
    of their scores, the k-th best and the k-th worst make the k-th pair, and the innermost pairs of all prompts go
    before any outer one. Within one depth the pair of smallest margin goes first. With the policy "recency" depth is
    counted within each iteration, and the oldest go first. With room for two responses to each prompt the pairs that
    "all" chooses (one per prompt) are those of an unlimited bank, if the ranker scores a response the same each time;
    below that, eviction itself selects by margin.

    Args:
        model: the model that its responses are of; "" is not known, and not checked.
        ranker: whose scores they have; likewise.
        prompts: digest of the prompts that indices count among, of :func:`prompts_digest`; likewise.
        limit: entries, at most.
        policy: what eviction goes by: "recency", or one of the others, which all go by margin.
        entries: the responses.
        seen: prompts that ever had an entry, so that one which lost all of them is still counted as dropped.

    Raises:
        ConfigError: the limit or the policy is out of range.

    >>> sample = Sample(prompt=0, draw=0, tokens=(5,), text="Yes.", ended=True, score=1.0)
    >>> bank = MemoryBank(model="tiny").add([sample], iteration=1).add([sample], iteration=2)
    >>> len(bank), bank.entries[0].iteration
    (1, 2)
    """

    model: str = ""
    ranker: str = ""
    prompts: str = ""
    limit: int = LIMIT
    policy: str = "top_margin"
    entries: tuple[BankEntry, ...] = field(default=(), repr=False)
    seen: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _positive("limit", self.limit)
        _check_policy(self.policy)
        entries = _distinct(self.entries)
        object.__setattr__(self, "seen", tuple(sorted({*self.seen, *(e.prompt for e in self.entries)})))
        object.__setattr__(self, "entries", _fitting(entries, self.limit, self.policy))

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, samples: Iterable[Sample], *, iteration: int, plan: str = "") -> "MemoryBank":
        """A bank with these responses too.

        Args:
            samples: with scores.
            iteration: in which they were drawn, counted from 1.
            plan: digest of the plan that they were drawn under.

        Raises:
            BankError: a sample has no finite score.
        """
        new = tuple(BankEntry(sample, iteration, plan) for sample in samples)
        return replace(self, entries=self.entries + new)

    def rescored(self, scores: Sequence[float]) -> "MemoryBank":
        """The same responses with other scores, for rankers whose scores hold only among what they saw together.

        Args:
            scores: one per entry, in the order of ``entries``.

        Raises:
            BankError: not one finite score per entry.
        """
        if len(scores) != len(self.entries):
            raise BankError(f"the bank has {len(self.entries)} entries, got {len(scores)} scores; give one for each")
        entries = zip(self.entries, scores, strict=True)
        return replace(
            self, entries=tuple(replace(e, sample=replace(e.sample, score=float(score))) for e, score in entries)
        )

    def by_prompt(self) -> dict[int, list[BankEntry]]:
        """The entries of each prompt ever seen, the newest iteration first."""
        groups: dict[int, list[BankEntry]] = {prompt: [] for prompt in self.seen}
        for entry in self.entries:
            groups[entry.prompt].append(entry)
        return groups

    def check(self, *, model: str = "", ranker: str = "", prompts: str = "") -> "MemoryBank":
        """This bank, if it belongs to these; names that are empty here or there are not compared.

        Raises:
            BankError: it belongs to another model, ranker or set of prompts.
        """
        for what, ours, theirs in (
            ("model", self.model, model),
            ("ranker", self.ranker, ranker),
            ("set of prompts", self.prompts, prompts),
        ):
            if ours and theirs and ours != theirs:
                raise BankError(
                    f"the bank belongs to another {what}: {ours!r}, not {theirs!r}; start a new bank, or use the "
                    f"{what} that this one was filled with"
                )
        return self

    def to_rows(self) -> list[dict[str, Any]]:
        """Rows for a JSON-lines file: what it is, then one row per entry."""
        head = {name: getattr(self, name) for name in ("model", "ranker", "prompts", "limit", "policy")}
        first = {"format": FORMAT, "version": FORMAT_VERSION, **head, "seen": list(self.seen)}
        return [
            first,
            *(
                {**asdict(e.sample), "tokens": list(e.sample.tokens), "iteration": e.iteration, "plan": e.plan}
                for e in self.entries
            ),
        ]

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], *, model: str = "", ranker: str = "", prompts: str = ""
    ) -> "MemoryBank":
        """The inverse of :meth:`to_rows`.

        Args:
            rows: as they were written.
            model: the model at hand; a bank of another is refused. "" takes any.
            ranker: likewise.
            prompts: likewise.

        Raises:
            BankError: the rows are no bank, are damaged or of a newer version, or belong to another model, ranker or
                set of prompts.
        """
        head, *others = list(rows) or [{}]
        if not isinstance(head, Mapping) or head.get("format") != FORMAT:
            raise BankError(f"these rows are no memory bank: the first should have the format {FORMAT!r}")
        if not isinstance(head.get("version"), int) or not 1 <= head["version"] <= FORMAT_VERSION:
            raise BankError(f"the bank was written by a newer sims_lens (format {head.get('version')!r}); update it")
        try:
            bank = cls(
                model=str(head["model"]),
                ranker=str(head["ranker"]),
                prompts=str(head["prompts"]),
                limit=head["limit"],
                policy=head["policy"],
                entries=tuple(_entry(row) for row in others),
                seen=tuple(int(i) for i in head["seen"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BankError(f"the bank is damaged ({type(error).__name__}: {error}); start a new one") from error
        return bank.check(model=model, ranker=ranker, prompts=prompts)


def select_pairs(
    bank: MemoryBank,
    *,
    policy: str = "all",
    size: int | None = None,
    per_prompt: int = 1,
    min_margin: float = 0.0,
    length: str = "report",
    tolerance: float = LENGTH_TOLERANCE,
    seed: int = 0,
) -> Contrast:
    """Contrast pairs from all iterations of a bank.

    First each prompt gets its candidates: best against worst of everything in the bank, then the next best against
    the next worst, ``per_prompt`` at most; no response is in two. Policies differ in which candidates they take:

    - "all": every one.
    - "top_margin": the ``size`` of largest margin.
    - "stratified": the first pairs of the prompts before any second one, and so on; within a round by margin. It is
      "top_margin" while ``per_prompt`` is 1.
    - "recency": the ``size`` of largest margin, where a margin counts half (:data:`AGE_FACTOR`) for each iteration
      that its two responses are older than the newest in the bank, on average. The candidates go by that too.
    - "random": ``size`` of the candidates of "top_margin", drawn without replacement: the control at equal size.

    Args:
        bank: with scores that are comparable within a prompt, see the top of this module.
        policy: one of the five.
        size: pairs in all; None for every candidate.
        per_prompt: pairs of one prompt, at most. 1: a second pair lies closer together than the first.
        min_margin: the smallest difference of scores that still counts, exclusive (0 drops ties).
        length: "report", "match" or "regress", see :mod:`sims_lens.contrast`. The slope of "regress" is fitted within
            prompts *and* iterations, and the pairs carry the scores less the effect of length.
        tolerance: of "match".
        seed: of "random"; a larger size draws the same pairs and more.

    Returns:
        Pairs in the order of prompts, each with the iterations that its responses were drawn in. Every prompt that the
        bank has seen either has a pair or is counted as dropped.

    Raises:
        ConfigError: a choice is unknown or out of range; "all" is given a size.

    Reference: SIMS (arXiv 2507.08967), contrast sampling, is "top_margin". The paper leaves open how many pairs a
        prompt may give, what happens to duplicates, and in which state old responses are read.
    """
    _check_policy(policy)
    check_length_control(length, tolerance)
    _positive("per_prompt", per_prompt)
    if size is not None:
        _positive("size", size)
        if policy == "all":
            raise ConfigError(f"policy 'all' takes every pair and no size, got {size}; 'random' takes that many")
    if not (math.isfinite(min_margin) and min_margin >= 0):
        raise ConfigError(f"min_margin must be a number from 0 up, got {min_margin!r}")
    dropped = reasons(length) | ({} if size is None else {"size": 0})
    slope = length_slope(_by_draw(bank)) if length == "regress" else 0.0
    newest = max((e.iteration for e in bank.entries), default=0)
    candidates: list[_Candidate] = []
    for entries in bank.by_prompt().values():
        raw = [e.sample for e in entries]
        samples = regress_out_length(raw, slope=slope) if length == "regress" else raw
        weights = [AGE_FACTOR ** ((newest - e.iteration) / 2) if policy == "recency" else 1.0 for e in entries]
        found: list[tuple[int, int]] = []
        if not all_equal(raw):
            found = extremes(
                samples,
                count=per_prompt,
                min_margin=min_margin,
                tolerance=tolerance if length == "match" else None,
                weights=weights,
            )
        for turn, (b, w) in enumerate(found):
            pair = ContrastPair(samples[b].prompt, samples[b], samples[w], entries[b].iteration, entries[w].iteration)
            candidates.append(_Candidate(pair, turn, pair.margin * weights[b] * weights[w]))
        if not found:
            dropped[no_pair(raw if all_equal(raw) else samples, min_margin)] += 1
    chosen = _chosen(candidates, policy, size, seed)
    if size is not None:
        dropped["size"] = len({c.pair.prompt for c in candidates}) - len({c.pair.prompt for c in chosen})
    chosen.sort(key=lambda c: (c.pair.prompt, c.turn))
    return Contrast(tuple(c.pair for c in chosen), dropped)


def turnover(previous: Sequence[ContrastPair], pairs: Sequence[ContrastPair]) -> float:
    """Share of pairs that were not among the previous ones: 1 where all are new, 0 where all were there (or none is).

    A pair is known by its prompt and the tokens of both responses.
    """
    known = {_content(pair) for pair in previous}
    return sum(_content(pair) not in known for pair in pairs) / len(pairs) if pairs else 0.0


@dataclass(frozen=True)
class PairDiagnostics:
    """What pairs an iteration was fitted to.

    Args:
        iteration: counted from 1.
        pairs: how many.
        turnover: share of them that the iteration before did not have; 1 in the first.
        cross_share: share of them whose two responses were drawn in different iterations.
        iteration_gap: mean iteration of the best less mean iteration of the worst. Were each response read under the
            plan that wrote it, then with "accumulate" this many steps of the loop's own making, c / T of the residual
            norm each, would be added to the mean difference (which is itself 0.04 to 0.07 of it on SmolLM2-135M).
        margin: mean margin, in the ranker's units.
        margins: 5th, 25th, 50th, 75th and 95th percentile of the margin (:data:`QUANTILES`).
        length_gap: mean token length of the best less that of the worst.
    """

    iteration: int
    pairs: int
    turnover: float
    cross_share: float
    iteration_gap: float
    margin: float
    margins: tuple[float, ...]
    length_gap: Interval

    def to_json(self) -> dict[str, Any]:
        """A plain dict; the inverse of :meth:`from_json`."""
        return {**asdict(self), "margins": list(self.margins), "length_gap": self.length_gap.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PairDiagnostics":
        """The diagnostics that :meth:`to_json` described.

        Raises:
            ResultError: it is no such thing.
        """
        return read_as(cls, data)  # type: ignore[no-any-return]


def diagnose(
    pairs: Sequence[ContrastPair], *, iteration: int, previous: Sequence[ContrastPair] = ()
) -> PairDiagnostics:
    """Turnover, margins, mixture of iterations and length gap of an iteration's pairs.

    Args:
        pairs: of the iteration.
        iteration: counted from 1.
        previous: pairs of the iteration before.
    """
    margins = np.array([pair.margin for pair in pairs], dtype=np.float64)
    return PairDiagnostics(
        iteration=iteration,
        pairs=len(pairs),
        turnover=turnover(previous, pairs),
        cross_share=float(np.mean([pair.crosses for pair in pairs])) if pairs else 0.0,
        iteration_gap=float(np.mean([p.best_iteration - p.worst_iteration for p in pairs])) if pairs else 0.0,
        margin=float(margins.mean()) if pairs else 0.0,
        margins=tuple(float(q) for q in np.quantile(margins, QUANTILES)) if pairs else (0.0,) * len(QUANTILES),
        length_gap=length_gap(pairs),
    )


def plan_digest(plan: SteeringPlan) -> str:
    """Twelve hex digits that change when what a plan does changes: site, transform, strength, scope or decay.

    Names of models and sources do not enter.

    >>> plan_digest(SteeringPlan(())) == plan_digest(SteeringPlan(()))
    True
    """
    digest = hashlib.sha256()
    for i in plan.interventions:
        tensors = i.transform.tensors()
        what = [i.layer, i.site, i.transform.kind, i.coefficient, i.units, i.residual_norm, i.scope.to_json()]
        what += [] if i.half_life is None else [i.half_life]  # so that plans without one keep their digests
        digest.update(json.dumps([*what, sorted(tensors)], sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def prompts_digest(prompts: Sequence[str]) -> str:
    """Twelve hex digits that change when a prompt or their order does."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Candidate:
    pair: ContrastPair
    turn: int  # 0 for the first pair of a prompt, 1 for its second
    value: float  # what the policy compares: the margin, less for old responses under "recency"


def _chosen(candidates: Sequence[_Candidate], policy: str, size: int | None, seed: int) -> list[_Candidate]:
    if policy == "random":
        order = np.random.default_rng(seed).permutation(len(candidates))
        ordered = [candidates[i] for i in order]
    elif policy == "stratified":
        ordered = sorted(candidates, key=lambda c: (c.turn, -c.value, c.pair.prompt))
    else:
        ordered = sorted(candidates, key=lambda c: (-c.value, c.pair.prompt, c.turn))
    return ordered[:size]


def _order(entry: BankEntry) -> tuple[Any, ...]:
    """Prompts first, then the newest iteration: of equal scores the one nearest to the model as it is now is taken."""
    sample = entry.sample
    return (sample.prompt, -entry.iteration, sample.draw, sample.tokens, sample.text, entry.score, entry.plan)


def _distinct(entries: Iterable[BankEntry]) -> list[BankEntry]:
    """Entries with a token in them, in order, each response to a prompt once."""
    kept: list[BankEntry] = []
    known: set[tuple[int, object]] = set()
    for entry in sorted(entries, key=_order):
        marks = {(entry.prompt, entry.sample.tokens), (entry.prompt, entry.sample.text.strip())}
        if entry.sample.tokens and not known & marks:
            known |= marks
            kept.append(entry)
    return kept


def _fitting(entries: list[BankEntry], limit: int, policy: str) -> tuple[BankEntry, ...]:
    """The entries less those that have to go, in the same order."""
    excess = len(entries) - limit
    if excess <= 0:
        return tuple(entries)
    groups: dict[tuple[int, int], list[int]] = {}
    for position, entry in enumerate(entries):
        groups.setdefault((entry.prompt, entry.iteration if policy == "recency" else 0), []).append(position)
    claims: dict[int, tuple[float, ...]] = {}
    for members in groups.values():
        # both sorts are stable, so that of equal scores the same response is best (or worst) as in `extremes`
        down = sorted(members, key=lambda i: -entries[i].score)
        up = sorted(members, key=lambda i: entries[i].score)
        for depth, pair in reversed(list(enumerate(zip(down, up, strict=True)))):
            margin = entries[pair[0]].score - entries[pair[1]].score
            for member in pair:  # the outermost depth of each is written last
                age = -entries[member].iteration
                claims[member] = (depth, age, -margin) if policy == "recency" else (depth, -margin, age)
    # the first to go: deepest, then the policy's order, then the last of the bank
    going = set(sorted(claims, key=lambda i: (*claims[i], i), reverse=True)[:excess])
    return tuple(entry for position, entry in enumerate(entries) if position not in going)


def _by_draw(bank: MemoryBank) -> list[list[Sample]]:
    groups: dict[tuple[int, int], list[Sample]] = {}
    for entry in bank.entries:
        groups.setdefault((entry.prompt, entry.iteration), []).append(entry.sample)
    return list(groups.values())


def _content(pair: ContrastPair) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return pair.prompt, pair.best.tokens, pair.worst.tokens


def _entry(row: Mapping[str, Any]) -> BankEntry:
    sample = Sample(
        prompt=int(row["prompt"]),
        draw=int(row["draw"]),
        tokens=tuple(int(t) for t in row["tokens"]),
        text=str(row["text"]),
        ended=bool(row["ended"]),
        **{f.name: None if row[f.name] is None else float(row[f.name]) for f in fields(Sample) if f.default is None},
    )
    return BankEntry(sample, row["iteration"], str(row["plan"]))


def _check_policy(policy: str) -> None:
    if policy not in get_args(Policy):
        raise ConfigError(f"policy must be one of {', '.join(get_args(Policy))}, got {policy!r}")


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


__all__ = [
    "AGE_FACTOR",
    "LIMIT",
    "QUANTILES",
    "BankEntry",
    "MemoryBank",
    "PairDiagnostics",
    "Policy",
    "diagnose",
    "plan_digest",
    "prompts_digest",
    "select_pairs",
    "turnover",
]
