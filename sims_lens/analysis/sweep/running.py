"""The sweep itself."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sims_lens.adapter import adapt
from sims_lens.analysis.sweep.candidates import COEFFICIENTS, candidates_of, checked_grid, digest_of, listed, plan_at
from sims_lens.analysis.sweep.ledger import Ledger
from sims_lens.analysis.sweep.measuring import Bench, bench_for
from sims_lens.analysis.sweep.race import Race, cells_of, rounds_of
from sims_lens.analysis.sweep.result import LayerSweep
from sims_lens.behaviour import PairBehaviour, TextPair
from sims_lens.calibration import FluencyBudget
from sims_lens.checks import check_folder
from sims_lens.config import SamplingConfig
from sims_lens.errors import ConfigError, RunError
from sims_lens.hooks import check_unsteered, resolve
from sims_lens.plan import SteeringPlan
from sims_lens.progress import Progress
from sims_lens.run import Run
from sims_lens.scope import TokenScope


def layer_sweep(
    model: Any,
    source: Any,
    *,
    coefficients: Sequence[float] | Float[np.ndarray, " coefficient"] | Float[Tensor, " coefficient"] = COEFFICIENTS,
    units: str = "residual_norm",
    layers: Sequence[int] | None = None,
    sites: Sequence[str] | None = None,
    behaviour: PairBehaviour | Sequence[TextPair] | None = None,
    ranker: object | None = None,
    prompts: Sequence[str] | None = None,
    samples: int = 1,
    sampling: SamplingConfig | None = None,
    scope: TokenScope | str = "generation",
    budget: FluencyBudget | None = None,
    adaptive: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerSweep:
    """Measure directions at every layer with every coefficient: effect, win rate and fluency, with intervals.

    Teacher-forced with ``behaviour=``, in generation mode with ``ranker=`` and ``prompts=``. In both the intervals are
    95% bootstrap intervals over prompts, those of each cell by itself; pairs of one prompt are drawn together.

    With ``adaptive`` the pairs (prompts) come in rounds, each as large as all before it. After each round a cell goes
    on unless it is surely beyond the budget, surely worse than not steering, or surely behind the best one within the
    budget on the pairs that both have had ("surely": by a 95% Student interval, which holds for few pairs). The best
    one goes on with its four neighbours in any case. So the best cell and what may equal it are measured on everything,
    the others on as much as it took to tell: their intervals are wider, and the effects of those that fell out lean
    downwards a little, because a run of bad luck ends the race too. Without it every cell gets everything.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``, unsteered.
        source: what is swept, anything that :func:`~sims_lens.analysis.directions.directions_of` takes: a
            :class:`~sims_lens.run.Run` (the newest iteration's directions), a
            :class:`~sims_lens.supervised.SteeringFit`, a plan, vectors by layer, or several by name; also a list of
            :class:`~sims_lens.analysis.directions.Directions`. A transform other than an addition is swept as it is.
        coefficients: to try, positive or negative; 0 is the unsteered model and costs nothing. Of a transform other
            than an addition they are the strength.
        units: of additions. "residual_norm": of a vector at norm 1, in multiples of the median residual norm, that
            which the source was fitted with where it has one; at a site other than the stream's ("resid_pre",
            "resid_post") of the median norm of the output there. "absolute": of the vector as it was given.
        layers: only these; all that a direction has where None.
        sites: apply the same directions at each of these; each one's own where None.
        behaviour: pairs of texts; those of the run, where the source is one and there is no ranker.
        ranker: any that ``sims.improve`` accepts. A prompt's unsteered responses are ranked with each lot of steered
            ones: put a pointwise ranker that costs much into a ``CachedRanker``.
        prompts: on which responses are drawn; a run's held-out prompts, where the source is one.
        samples: responses to each prompt in each cell.
        sampling: how they are drawn, with the same random numbers in every cell.
        scope: the tokens that are steered.
        budget: what counts as fluent. Teacher-forced, its two limits are held against figures of the fixed texts.
        adaptive: spend pairs (prompts) where they matter.
        out: a folder. What is finished is kept there, and a sweep that was interrupted goes on from it with the same
            result, bit for bit. The ranker must be one that can be known again: by its attribute ``settings``, or by
            its code and the plain values that it uses.
        seed: of the order of pairs or prompts, of sampling and of the bootstrap.
        progress: show a progress bar.

    Raises:
        ConfigError: a setting is out of range, or it is not clear what to measure.
        ModelError: a plan is attached to the model.
        PlanError: a direction does not fit the model, is zero, or is not at the layers that were named.
        PromptError: prompts or texts are empty, duplicate, or longer than the context.
        RankerError: the ranker failed, or with ``out`` can't be known again.
        RunError: ``out`` holds another sweep, or is damaged.

    Reference: racing as in Maron & Moore 1994, "Hoeffding races", with Student intervals in place of Hoeffding's.
    """
    began = time.perf_counter()
    check_unsteered(model)
    limits = FluencyBudget() if budget is None else budget
    if not isinstance(limits, FluencyBudget):
        raise ConfigError(f"budget must be a FluencyBudget, such as FluencyBudget(1.5, 0.5), got {budget!r}")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"seed must be an integer from 0 up, got {seed!r}")
    adapter, steered, grid = adapt(model), TokenScope.of(scope), checked_grid(coefficients)
    layers = None if layers is None else listed(layers, "layers", "[17]")
    sites = None if sites is None else listed(sites, "sites", '["resid_post"]')
    if isinstance(source, Run) and ranker is None and behaviour is None:
        behaviour = PairBehaviour(source.text_pairs())
    if isinstance(source, Run) and ranker is not None and prompts is None:
        prompts = [source.prompts[i] for i in source.indices("heldout")]
    places, plan, kind = candidates_of(adapter, source, layers, sites, units, steered)
    bench = bench_for(model, behaviour, ranker, prompts, samples, sampling, steered, seed)
    levels = rounds_of(bench, adaptive, seed)
    settings: dict[str, Any] = {}
    if out is not None:
        settings = {
            "model": {**asdict(adapter.provenance), "kind": adapter.kind, "dtype": str(adapter.cfg.dtype)},
            "directions": {"places": [list(place) for place in places], "sha256": digest_of(plan)},
            "coefficients": list(grid),
            "units": units,
            "scope": steered.name,
            "budget": limits.to_json(),
            "adaptive": adaptive,
            "seed": seed,
            **bench.settings(),
        }
    ledger = Ledger(None if out is None else check_folder(out, RunError), json.loads(json.dumps(settings)))
    plan = ledger.steering(lambda: resolve(model, plan), plan)
    bench.ledger = ledger
    race = Race(places, list(product(range(len(places)), [c for c in grid if c])), bench.prompt_of, limits)
    with Progress(len(race.cells) * len(bench.prompt_of) * bench.responses, show=progress) as bar:
        _run(race, levels, bench, ledger, plan, bar)
    sweep = LayerSweep(
        model=adapter.name,
        behaviour=bench.name,
        measure=bench.measure_name,
        mode=bench.mode,
        units=kind,
        scope=steered.name,
        budget=limits,
        cells=cells_of(race, places, grid, seed),
        total=len(bench.prompt_of),
        samples=bench.responses if bench.unit == "prompt" else 0,
        adaptive=adaptive,
        seed=seed,
        seconds=time.perf_counter() - began,
        steering=plan,
    )
    ledger.finish(sweep)
    return sweep


def _run(
    race: Race, levels: Sequence[Sequence[int]], bench: Bench, ledger: Ledger, plan: SteeringPlan, bar: Progress
) -> None:
    """Round by round, until no cell that can still be the best lacks one."""
    everything = set(range(len(race.cells)))
    chunks = [[tuple(chunk) for chunk in bench.chunks(level)] for level in levels]
    for level, new in enumerate(levels):
        measured: set[int] = set()
        going = race.going() if level else everything
        while behind := race.behind(going, level):
            bar.phase(f"{len(going)} cells on {sum(map(len, levels[: level + 1]))} {bench.unit}s")
            for k, cells in behind.items():
                for index, chunk in enumerate(chunks[k]):
                    for _ in _measured(bench, ledger, race, plan, (k, index), chunk, cells):
                        bar.advance(len(chunk) * bench.responses if k == level else 0)
                race.done |= {(cell, k) for cell in cells}
                measured |= set(cells) if k == level else set()
            going = race.going()  # again: the best one may be another one now, with other neighbours
        bar.advance((len(everything) - len(measured)) * len(new) * bench.responses)


def _measured(
    bench: Bench,
    ledger: Ledger,
    race: Race,
    candidates: SteeringPlan,
    name: tuple[int, int],
    chunk: tuple[int, ...],
    cells: Sequence[int],
) -> Iterator[int]:
    """Measure some cells on some units, those that the ledger does not have, and yield each as it is done."""
    units = list(chunk)
    known = ledger.read(name, len(chunk))
    missing = {cell: plan_at(candidates, *race.cells[cell]) for cell in cells if cell not in known}
    try:
        for cell, values in ((c, known[c]) for c in cells if c in known):
            race.found[cell, units], race.seen[cell, units] = values, True
            yield cell
        for cell, values in bench.measure(chunk, missing) if missing else ():
            race.found[cell, units], race.seen[cell, units] = values, True
            ledger.add(cell, values)
            yield cell
    finally:
        ledger.flush()


__all__ = ["layer_sweep"]
