"""How much noise does the loop's direction bear? Oracles that err at random, and negatives that an attacker wrote.

The theory, the definition of break-even and its measurement are in :mod:`sims_lens.lab.corruption`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sims_lens.activations import capture
from sims_lens.adapter import adapt
from sims_lens.checks import check_list, check_number, shown
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import ConfigError, PlanError, PromptError, RunError
from sims_lens.estimators import unit
from sims_lens.evaluate import score_changes
from sims_lens.hooks import check_unsteered
from sims_lens.iteration import candidate_layers
from sims_lens.lab.corruption import Curve, corruption_curve
from sims_lens.lab.drawing import check_count, draw, ranked
from sims_lens.lab.shown import Shown, columns, share, signed
from sims_lens.plan import SteeringPlan
from sims_lens.progress import Progress
from sims_lens.rankers import bound_ranker
from sims_lens.run import Run
from sims_lens.sites import check_layer
from sims_lens.stats import Interval, bootstrap_mean, win_probability
from sims_lens.store import Folder
from sims_lens.workbench import derive_seed

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Of wrong labels: at a half nothing is left."""

WHOLE = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of negatives that are replaced."""

_WHAT = {
    "flips": "labels flipped",
    "negatives": "negatives mistaken",
    "poison": "negatives poisoned",
}


@dataclass(frozen=True)
class CorruptedEffect:
    """What directions of a share of corrupted pairs do to held-out responses, at one norm.

    Args:
        epsilon: the share.
        difference: mean score less the base model's, averaged over ``fits`` corruptions; over prompts. The interval
            does not cover which pairs were corrupted.
        win_rate: probability that a steered response scores higher than a base response, ties half.
        nll: see :class:`~sims_lens.data.Sample`.
        each: the difference of each corruption. Where few pairs are right it is what a random direction does: compare
            it with the run's null band.
        cosines: of each corruption's direction with the clean one.
    """

    epsilon: float
    difference: Interval
    win_rate: Interval
    nll: Interval
    each: tuple[float, ...]
    cosines: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class CorruptedPairs(Shown):
    """What corrupted pairs do to a mean difference; made by :func:`oracle_noise` and :func:`poisoned_negatives`.

    Args:
        kind: "flips", "negatives" or "poison".
        layer, site: where.
        curve: cosine, projection and break-even, measured and expected.
        effects: at some of the shares, on held-out prompts; empty where they were not asked for.
        prompts: held-out prompts that the effects are of.
        ranker: by which.
    """

    kind: str
    layer: int
    site: str
    curve: Curve
    effects: tuple[CorruptedEffect, ...]
    prompts: int
    ranker: str

    def table(self) -> "pd.DataFrame":
        """One row per share: cosines and projection with their intervals, what theory expects, and effects."""
        import pandas as pd

        found = {e.epsilon: e for e in self.effects}
        rows = []
        for k, epsilon in enumerate(self.curve.epsilons):
            row: dict[str, Any] = {"epsilon": epsilon}
            for name in ("cosine", "independent", "projection"):
                row |= columns(**{name: getattr(self.curve, name)[k]})
                row[f"{name}_expected"] = getattr(self.curve, f"expected_{name}")[k]
            if epsilon in found:
                row |= columns(effect=found[epsilon].difference, win_rate=found[epsilon].win_rate)
            rows.append(row)
        return pd.DataFrame(rows).set_index("epsilon")

    def head(self) -> str:
        """One line."""
        return (
            f"{_WHAT[self.kind].capitalize()}: {self.curve.pairs} pairs, layer {self.layer} {self.site}, "
            f"halves of {self.curve.halves[0]} and {self.curve.halves[1]}"
        )

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text."""
        c, found = self.curve, {e.epsilon: e for e in self.effects}
        head = ["share", "cosine, same pairs [95%]", "theory", "cosine, other half [95%]", "theory"]
        head += ["projection [95%]", "theory", *(["effect [95%]", "each fit (cosine)", "NLL"] if found else [])]
        rows = [tuple(head)]
        for k, epsilon in enumerate(c.epsilons):
            row = [f"{epsilon:g}", signed(c.cosine[k]), f"{c.expected_cosine[k]:+.3f}", signed(c.independent[k])]
            row += [f"{c.expected_independent[k]:+.3f}", signed(c.projection[k]), f"{c.expected_projection[k]:+.3g}"]
            if found:
                e = found.get(epsilon)
                each = (
                    ""
                    if e is None
                    else ", ".join(f"{v:+.3g} ({c:.2f})" for v, c in zip(e.each, e.cosines, strict=True))
                )
                row += ["", "", ""] if e is None else [signed(e.difference), each, f"{e.nll.estimate:.2f}"]
            rows.append(tuple(row))
        return rows

    def verdict(self) -> str:
        """Where break-even lies, whether theory agrees, and what the effects say."""
        c = self.curve
        measured, theory = c.break_even, c.expected_break_even
        if measured.estimate < 0:
            text = (
                "Even without corruption half of these pairs cannot be told from shuffled labels: there are too few of "
                "them, or they have no common direction."
            )
        elif measured.estimate > 1:
            text = f"There is no break-even: with every pair corrupted ({_WHAT[self.kind]}) the direction still stands."
        else:
            text = (
                f"Break-even of a fit to {c.halves[0]} pairs: {share(measured)} of {_WHAT[self.kind]}; theory says "
                f"{share(theory)}, "
                f"{'within' if c.agrees else 'NOT within'} the measured interval"
                f" (theory less measured {signed(c.gap)})."
            )
            if 0 < c.with_all < 1:
                text += f" With all {c.pairs} pairs and the direction known, theory says {100 * c.with_all:.0f}%."
        shown = [e for e in self.effects if e.difference.low > 0]
        if self.effects:
            largest = max((e.epsilon for e in shown), default=None)
            text += f" By {self.ranker}, on {self.prompts} held-out prompts, the effect at one norm is "
            text += "; ".join(f"{signed(e.difference)} at {e.epsilon:g}" for e in self.effects)
            text += "; none is above 0." if largest is None else f"; above 0 up to {largest:g}."
        return text


def oracle_noise(
    model: Any,
    source: Run | Sequence[tuple[str, str, str]],
    *,
    epsilons: Sequence[float] | None = None,
    flip: str = "all",
    repeats: int = 400,
    layer: int | None = None,
    ranker: object | None = None,
    effect_at: Sequence[float] = (0.0, 0.3, 0.5),
    fits: int = 2,
    heldout: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CorruptedPairs:
    """Let an oracle err on a share of the pairs, fit the mean difference again, and compare.

    The responses are read once. What an error is:

    - ``flip="all"``: best and worst are swapped, as by an oracle that turns its ranking round;
    - ``flip="negatives"``: only the negative is wrong. The best response stays, and in the worst one's place is another
      response to the same prompt, drawn at random from those that are neither best nor worst. Such a pair still has the
      right sign on average, so that this noise weakens the direction and never turns it.

    Args:
        model: the one that the run was made on.
        source: a run: the pairs of its first iteration, of each prompt the one of largest margin. Or pairs of texts,
            ``(prompt, better, worse)``, for ``flip="all"`` without effects.
        epsilons: probabilities that a pair is wrong, rising; by default 0 to 0.5, of negatives only 0 to 1.
        flip: "all" or "negatives".
        repeats: random halves and errors, for cosines and break-even.
        layer: where; the run's first steered layer by default, or 60% of the depth.
        ranker: scores held-out responses that are sampled under the noisy directions, each scaled to the norm of the
            run's plan at the layer; None samples nothing.
        effect_at: probabilities at which to do so.
        fits: random corruptions of all pairs, each sampled under.
        heldout: at most so many of the run's held-out prompts; None for all.
        seed: of halves, errors and intervals.
        progress: show a progress bar.

    Raises:
        ConfigError: an option is out of range, or does not go with the source.
        PlanError: effects are wanted of a run whose plan steers nothing at the layer.
        TooFewPairsError: fewer than eight pairs.
    """
    if flip not in ("all", "negatives"):
        raise ConfigError(f'flip must be "all" or "negatives", got {flip!r}')
    found = _read(model, source, layer=layer, others=flip == "negatives")
    corrupted = None
    if flip == "negatives":
        if not found.others.shape[1]:
            raise ConfigError(
                'flip="negatives" needs responses that are neither best nor worst: a run whose sampling.responses is 3 '
                "or more"
            )
        corrupted = found.best[:, None] - found.others
    return _result(
        model,
        source,
        found,
        corrupted,
        kind="flips" if flip == "all" else "negatives",
        epsilons=(SHARES if flip == "all" else WHOLE) if epsilons is None else epsilons,
        repeats=repeats,
        ranker=ranker,
        effect_at=effect_at,
        fits=fits,
        heldout=heldout,
        seed=seed,
        progress=progress,
    )


def poisoned_negatives(
    model: Any,
    source: Run | Sequence[tuple[str, str, str]],
    *,
    texts: Sequence[str] | None = None,
    shares: Sequence[float] = WHOLE,
    repeats: int = 400,
    layer: int | None = None,
    ranker: object | None = None,
    effect_at: Sequence[float] = (0.0, 0.5, 1.0),
    fits: int = 2,
    heldout: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CorruptedPairs:
    """Replace a share of the worst responses by an attacker's texts, fit the mean difference again, and compare.

    An attacker who can write negatives writes what the oracle likes: then "better" and "worse" look alike, and what is
    left of their difference is what else tells them apart, such as the topic.

    Args:
        model: see :func:`oracle_noise`.
        source: see :func:`oracle_noise`.
        texts: the attacker's, each read as an answer to the prompt that it lands on; the texts are dealt out in a
            random order, again and again. None: the best responses to *other* prompts.
        shares: of the pairs whose negative is replaced, rising.
        repeats: random halves and replacements, for cosines and break-even.
        layer: where; the run's first steered layer by default, or 60% of the depth.
        ranker: as in :func:`oracle_noise`.
        effect_at: shares at which held-out responses are sampled.
        fits: random choices of the replaced negatives, each sampled under.
        heldout: at most so many of the run's held-out prompts; None for all.
        seed: of everything that is random.
        progress: show a progress bar.

    Raises:
        ConfigError: ``texts`` is a bare string or empty; or as for :func:`oracle_noise`.
    """
    if texts is not None and (isinstance(texts, str) or not texts):
        raise ConfigError(f"texts must be a list of at least one text, got {texts!r}")
    found = _read(model, source, layer=layer, others=False)
    adapter = adapt(model)
    rng = np.random.default_rng(derive_seed(seed, "poison"))
    n = len(found.rows)
    if texts is not None:
        check_list("texts", texts, "['a bad response']", PromptError)
    if texts is None:
        shift = int(rng.integers(1, n))  # nobody gets their own
        dealt = [found.rows[(i + shift) % n][1] for i in range(n)]
    else:
        order = rng.permutation(np.arange(n) % len(texts))
        dealt = [tuple(adapter.encode_response(texts[k])) for k in order]
    rows = [(prompt, tokens) for (prompt, _), tokens in zip(found.rows, dealt, strict=True)]
    means = capture(model, rows, site=found.site).means[:, found.layer].numpy()
    corrupted = (found.best - means)[:, None]
    return _result(
        model,
        source,
        found,
        corrupted,
        kind="poison",
        epsilons=shares,
        repeats=repeats,
        ranker=ranker,
        effect_at=effect_at,
        fits=fits,
        heldout=heldout,
        seed=seed,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs as they were read at one layer: one for each prompt."""

    layer: int
    site: str
    rows: list[tuple[list[int], tuple[int, ...]]]
    best: Float[np.ndarray, "pair d_model"]
    worst: Float[np.ndarray, "pair d_model"]
    others: Float[np.ndarray, "pair choice d_model"]


def _read(model: Any, source: Run | Sequence[tuple[str, str, str]], *, layer: int | None, others: bool) -> _Pairs:
    check_unsteered(model)
    adapter = adapt(model)
    site = "resid_post"
    middle: list[list[tuple[int, ...]]] = []
    if isinstance(source, Run):
        site = source.config.steering.site
        prompts, groups = source.prompts, {g[0].prompt: g for g in by_prompt(source.samples(1, "train"))}
        chosen: dict[int, tuple[Sample, Sample]] = {}
        pairs = sorted(Folder(source.iterations[0].path).read_rows("pairs"), key=lambda p: -p["margin"])
        for pair in pairs:
            group = {s.draw: s for s in groups[pair["prompt"]]}
            chosen.setdefault(pair["prompt"], (group[pair["best"]], group[pair["worst"]]))
        asked = sorted(chosen)
        encoded = [adapter.encode(prompts[i]) for i in asked]
        best, worst = ([chosen[i][k].tokens for i in asked] for k in (0, 1))
        if others:
            middle = [[s.tokens for s in groups[i] if s.tokens and s not in chosen[i]] for i in asked]
            most = min(len(group) for group in middle)
            middle = [group[:most] for group in middle]
        first = source.plan.layers[0] if source.plan.layers else None
        layer = first if layer is None else layer
    else:
        if others:
            raise ConfigError('flip="negatives" needs other responses to each prompt: give a run, not pairs of texts')
        check_list("source", source, "[(prompt, better, worse), ...], or a run,")
        for index, pair in enumerate(source):
            if not (isinstance(pair, (tuple, list)) and len(pair) == 3 and all(isinstance(t, str) for t in pair)):
                raise ConfigError(
                    f"pair {index} is {shown(pair)}; give a run, or pairs of texts as [(prompt, better, worse), ...]"
                )
        unique = {pair[0]: pair for pair in reversed(source)}  # one of each prompt: others would not be independent
        encoded = [adapter.encode(prompt) for prompt in unique]
        best, worst = ([tuple(adapter.encode_response(pair[k])) for pair in unique.values()] for k in (1, 2))
    layer = candidate_layers((0.6,), adapter.n_layers)[0] if layer is None else layer
    check_layer(layer, adapter.n_layers, adapter.name)
    rows = [*zip(encoded, best, strict=True), *zip(encoded, worst, strict=True)]
    rows += [(prompt, tokens) for prompt, group in zip(encoded, middle, strict=False) for tokens in group]
    if not rows:
        raise RunError("there are no contrast pairs to corrupt")
    means = capture(model, rows, site=site).means[:, layer].numpy()
    n = len(encoded)
    return _Pairs(
        layer=layer,
        site=site,
        rows=[(prompt, tuple(tokens)) for prompt, tokens in zip(encoded, best, strict=True)],
        best=means[:n],
        worst=means[n : 2 * n],
        others=means[2 * n :].reshape(n, -1, means.shape[1]),
    )


def _result(
    model: Any,
    source: Any,
    found: _Pairs,
    corrupted: Float[np.ndarray, "pair choice d_model"] | None,
    *,
    kind: str,
    epsilons: Sequence[float],
    repeats: int,
    ranker: object | None,
    effect_at: Sequence[float],
    fits: int,
    heldout: int | None,
    seed: int,
    progress: bool,
) -> CorruptedPairs:
    check_count("repeats", repeats)
    check_count("fits", fits)
    clean = found.best - found.worst
    shares = tuple(check_number("a share", e) for e in check_list("shares", epsilons, "[0.0, 0.5]"))
    curve = corruption_curve(clean, corrupted, epsilons=shares, repeats=repeats, seed=derive_seed(seed, "halves"))
    effects: list[CorruptedEffect] = []
    count, name = 0, ""
    if ranker is not None:
        if not isinstance(source, Run):
            raise ConfigError("effects need held-out prompts and a norm: give a run, or leave ranker out")
        levels = sorted({float(e) for e in effect_at})
        if not levels or levels[0] < 0 or levels[-1] > 1:
            raise ConfigError(f"effect_at must be probabilities from 0 to 1, got {list(effect_at)}")
        judge = bound_ranker(ranker, model)
        bench = _Bench(model, source, found, judge, heldout, seed)
        count, name = len(bench.prompts), judge.name
        with Progress(bench.responses * (1 + len(levels) * fits - (fits - 1) * (0.0 in levels)), show=progress) as bar:
            bench.start(bar)
            effects = [bench.effect(clean, corrupted, epsilon, fits) for epsilon in levels]
    return CorruptedPairs(kind, found.layer, found.site, curve, tuple(effects), count, name)


class _Bench:
    """Held-out prompts, and plans of one norm that are measured on them."""

    def __init__(self, model: Any, run: Run, found: _Pairs, judge: Any, heldout: int | None, seed: int) -> None:
        vectors = run.plan.vectors()
        if (found.layer, found.site) not in vectors:
            raise PlanError(
                f"the run's plan adds nothing at layer {found.layer} {found.site}, so there is no norm to steer with; "
                f"it steers layers {list(run.plan.layers)}"
            )
        self.model, self.run, self.found, self.judge, self.seed = model, run, found, judge, seed
        self.norm = float(vectors[found.layer, found.site].norm())
        self.prompts = [run.prompts[i] for i in run.indices("heldout")][:heldout]
        self.responses = len(self.prompts) * run.config.evaluation.samples

    def start(self, bar: Progress) -> None:
        """Draw the base model's responses."""
        self.bar = bar
        bar.phase("base model")
        self.base = self._draw(SteeringPlan(()))

    def effect(
        self,
        clean: Float[np.ndarray, "pair d_model"],
        corrupted: Float[np.ndarray, "pair choice d_model"] | None,
        epsilon: float,
        fits: int,
    ) -> CorruptedEffect:
        """The mean effect of some fits to corrupted pairs; of one where nothing is random."""
        rng = np.random.default_rng(derive_seed(self.seed, "effect"))  # the same luck at every share
        changes, wins, nll, cosines = [], [], [], []
        real = torch.tensor(clean.mean(0), dtype=torch.float32)
        for k in range(fits if epsilon > 0 else 1):
            self.bar.phase(f"{epsilon:g} of the pairs corrupted, fit {k + 1}")
            luck, choice = rng.random(len(clean)), rng.random(len(clean))
            rows = corrupt(clean, corrupted, luck < epsilon, choice)
            direction = torch.tensor(rows.mean(0), dtype=torch.float32)
            cosines.append(float(torch.cosine_similarity(direction, real, dim=0)))
            steered = self._draw(self._plan(direction))
            ours, theirs = ranked(self.judge, self.prompts, steered, self.base)
            changes.append(score_changes(ours, theirs))
            paired = zip(by_prompt(ours), by_prompt(theirs), strict=True)
            wins.append([win_probability(*(np.array([s.score for s in g]) for g in both)) for both in paired])
            nll.append([np.mean([s.nll for s in g if s.nll is not None]) for g in by_prompt(ours)])
        return CorruptedEffect(
            epsilon=epsilon,
            difference=bootstrap_mean(np.mean(changes, axis=0), seed=self.seed),
            win_rate=bootstrap_mean(np.mean(wins, axis=0), seed=self.seed),
            nll=bootstrap_mean(np.mean(nll, axis=0), seed=self.seed),
            each=tuple(float(c.mean()) for c in changes),
            cosines=tuple(cosines),
        )

    def _plan(self, direction: Float[Tensor, " d_model"]) -> SteeringPlan:
        settings = self.run.config.steering
        vectors = {self.found.layer: unit(direction) * self.norm}
        return SteeringPlan.addition(vectors, site=self.found.site, scope=settings.scope)

    def _draw(self, plan: SteeringPlan) -> list[Sample]:
        config = self.run.config
        seed = derive_seed(config.seed, "heldout")
        n = config.evaluation.samples
        return draw(self.model, self.prompts, plan, n=n, seed=seed, sampling=config.sampling, bar=self.bar)


def corrupt(
    clean: Float[np.ndarray, "pair d_model"],
    corrupted: Float[np.ndarray, "pair choice d_model"] | None,
    bad: Any,
    choice: Float[np.ndarray, " pair"],
) -> Float[np.ndarray, "pair d_model"]:
    """The differences with the bad ones replaced: by their negative, or by one of what they may become.

    Args:
        clean: differences of the pairs.
        corrupted: what each may become; None for its negative.
        bad: which pairs.
        choice: in [0, 1), one per pair: which of the possibilities.

    >>> corrupt(np.array([[1.0], [2.0]]), None, np.array([False, True]), np.zeros(2)).ravel().tolist()
    [1.0, -2.0]
    """
    if corrupted is None:
        worse = -clean
    else:
        which = (choice * corrupted.shape[1]).astype(int)
        worse = corrupted[np.arange(len(clean)), which]
    return np.where(np.asarray(bad)[:, None], worse, clean)


__all__ = ["SHARES", "CorruptedEffect", "CorruptedPairs", "corrupt", "oracle_noise", "poisoned_negatives"]
