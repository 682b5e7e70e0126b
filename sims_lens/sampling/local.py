"""The in-process sampler: on the model's twin with continuous batching, or on the model itself where it has none."""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from sims_lens.adapter import Adapter, adapt, check_lengths, left_pad
from sims_lens.checks import check_integer, check_kind, check_list, check_seed
from sims_lens.config import SamplingConfig
from sims_lens.cost import TokenCount, out_of_memory
from sims_lens.data import Sample
from sims_lens.errors import ModelError, PromptError
from sims_lens.holders import holding
from sims_lens.hooks import Steering, check_plan, steering, steerings
from sims_lens.plan import SteeringPlan
from sims_lens.sampling.base import Drawn
from sims_lens.sampling.decode import Decoder, Job, Row
from sims_lens.sampling.draw import choose, cut_at, uniforms
from sims_lens.sampling.lanes import LANE_ROWS, Lane, Lanes, split
from sims_lens.sampling.reading import Ear, Reader, Reading
from sims_lens.scope import TRACKER
from sims_lens.twin import Beside, Bodies, Road, Twin, road

logger = logging.getLogger("sims_lens")

ROWS = {"cpu": 128, "cuda": 512, "mps": 128}
"""Rows side by side in a lane, at most, where the config leaves it open. On a CPU more don't help: see
``docs/speed.md``."""

_MEMORY_SHARE = 0.5
"""Of the free memory, what the rows' keys and values may take."""

_AT_ONCE = 16
"""Responses that are drawn before they are handed out; the model is unsteered again meanwhile."""


class LocalSampler:
    """Samples from a model in this process.

    The model's twin is run (:mod:`sims_lens.twin`): the same weights, the same HookPoints, a fraction of the time.
    Where it has none, or something is attached that the twin can't honour, the model itself is run; :attr:`road` says
    which, and the log says why.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``. Hooks that are attached to it act.
        config: how responses are drawn.
        solo: a request for one response to one prompt is run as is fastest for one row: its logits are those that it
            has in a larger request up to rounding (1e-4, tested), not bit for bit. False for whoever cuts one
            request into several, so that a sample is the same however they are cut.
    """

    def __init__(self, model: Any, config: SamplingConfig | None = None, *, solo: bool = True) -> None:
        adapt(model)
        self.model, self.solo = model, solo
        self.config = SamplingConfig() if config is None else config
        check_kind("config", self.config, SamplingConfig, "make one, as SamplingConfig(max_new_tokens=40)")
        self.count = TokenCount()
        self.road = "not run yet"
        self._bodies: Bodies | None = None

    def sample(
        self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int, skip: Drawn = ()
    ) -> Iterator[Sample]:
        """Yield the samples as they finish, those of short prompts first. See :class:`Sampler`.

        Args:
            prompts: texts.
            n: responses to each.
            plan: what steers.
            seed: of the draws.
            skip: prompt and draw of samples that are there already; the others don't depend on it.
        """
        for sample, _ in self._sample(prompts, n=n, plan=plan, seed=seed, skip=skip):
            yield sample

    def complete(
        self, texts: Sequence[str], tokens: Sequence[Sequence[int]], *, plan: SteeringPlan, seed: int
    ) -> Iterator[Sample]:
        """Yield one continuation of each text, tokenised already: no chat template is put around it.

        Args:
            texts: what seeds the draws; two that are the same are continued in the same way.
            tokens: their token ids.
            plan: what steers.
            seed: of the draws.
        """
        for sample, _ in self._sample(texts, n=1, plan=plan, seed=seed, encoded=tokens):
            yield sample

    def sample_and_measure(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        plan: SteeringPlan,
        seed: int,
        measured: int | None = None,
        skip: Drawn = (),
    ) -> Iterator[Sample]:
        """Like :meth:`sample`, and with each sample its ``nll`` and ``kl``, measured while it was drawn.

        They are what :func:`~sims_lens.evaluate.side_effects` finds in two passes of their own. Here the blocks below
        the first steered one are run once, and those above it once with the plan and once without.

        Args:
            prompts: texts.
            n: responses to each.
            plan: what steers.
            seed: of the draws.
            measured: only the first so many responses to each prompt are measured; all where None.
            skip: see :meth:`sample`.

        Raises:
            ModelError: :meth:`reads` is False, or a plan is attached to the model.
        """
        if self.model.__dict__.get(TRACKER) is not None:
            raise ModelError("side effects are measured against the unsteered model; detach the plan that is attached")
        sides = n if measured is None else measured
        for sample, _ in self._sample(prompts, n=n, plan=plan, seed=seed, measured=sides, skip=skip):
            yield sample

    def sample_and_read(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        plan: SteeringPlan,
        seed: int,
        site: str = "resid_post",
        skip: Drawn = (),
    ) -> Iterator[tuple[Sample, Reading | None]]:
        """Like :meth:`sample`, and with each sample the stream of its own tokens, read while they were drawn.

        What is read is what ``capture`` with ``scope="response"`` reads in a pass of its own under the same plan; the
        only extra work is one more step for responses that reach the token limit.

        Yields:
            The sample, and its reading: None for a response without tokens.

        Raises:
            ModelError: :meth:`reads` is False: use ``capture`` then.
        """
        yield from self._sample(prompts, n=n, plan=plan, seed=seed, site=site, skip=skip)

    def reads(self, plan: SteeringPlan, site: str = "resid_post") -> bool:
        """Whether :meth:`sample_and_read` and :meth:`sample_and_measure` work under a plan, for the model as it is now.

        Not where the model has to be run by itself, with stop strings, or where somebody else's hooks are attached:
        they would see some blocks twice.
        """
        return not self._obstacle(plan, site)

    def _obstacle(self, plan: SteeringPlan, site: str) -> str:
        """Why nothing can be measured while sampling, or ""."""
        if self.config.stop:
            return "there are stop strings"
        with self._attached(plan, Ear(adapt(self.model), site)):
            way = road(self.model, self._dtype())
        return way.reason or ("somebody else's hooks are attached" if way.watched else "")

    def _dtype(self) -> torch.dtype | None:
        return None if self.config.dtype is None else getattr(torch, self.config.dtype)

    def _sample(
        self,
        prompts: Sequence[str],
        *,
        n: int,
        plan: SteeringPlan,
        seed: int,
        site: str | None = None,
        measured: int = 0,
        encoded: Sequence[Sequence[int]] | None = None,
        skip: Drawn = (),
    ) -> Iterator[tuple[Sample, Reading | None]]:
        adapter, config = adapt(self.model), self.config
        adapter.check_runs()
        check_plan(plan)
        check_integer("n, the responses to each prompt,", n, 0)
        check_seed(seed)
        if encoded is None:
            encoded = [adapter.encode(prompt) for prompt in check_list("prompts", prompts, "['Hello.']", PromptError)]
        check_lengths(adapter, prompts, config.max_new_tokens, encoded)
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        rows = [
            Row(i, k, uniforms(seed, prompts[i], k, config.max_new_tokens).tolist())
            for i in order
            for k in range(n)
            if (i, k) not in skip
        ]
        if not rows:
            return
        if (site is not None or measured) and (why := self._obstacle(plan, site or "resid_post")):
            raise ModelError(f"nothing can be measured while sampling, because {why}; do it afterwards")
        outer = steerings(self.model)
        solo = self.solo and n == len(prompts) == 1 and site is None and not measured
        with self._drawing(plan, None, outer):
            way = road(self.model, self._dtype(), solo=solo)
        first = self.road == "not run yet"
        self.road = "twin" if way.twin is not None else f"the model itself, because {way.reason}"
        if way.twin is None:
            logger.warning("sampling on the slow road: %s", way.reason)
            for row in self._slowly(adapter, encoded, rows, plan, outer):
                yield self._finished(adapter, row), None
            return
        if first and way.twin.dtype == torch.bfloat16 and adapter.device.type == "cpu" and not _multiplies_bfloat16():
            logger.warning("this CPU has no bfloat16 products, so that float32 is faster on it")
        job = Job(encoded, rows, frozenset(adapter.stop_ids), self._cut(adapter), config)
        ear = None if site is None else Ear(adapter, site)
        for row, reading in self._quickly(adapter, job, way, plan, ear, outer, measured=measured, solo=solo):
            yield self._finished(adapter, row, measured=row.draw < measured), reading

    def _quickly(
        self,
        adapter: Adapter,
        job: Job,
        way: Road,
        plan: SteeringPlan,
        ear: Ear | None,
        outer: tuple[Steering, ...],
        *,
        measured: int,
        solo: bool,
    ) -> Iterator[tuple[Row, Reading | None]]:
        """The fast road: rows as they finish. Between some and the next the model is as it was."""
        count, bodies = self._lanes(adapter, way, len(job.rows)), self._kept_bodies(way)
        most = self._rows(adapter, way, count)

        def made(rows: Sequence[Row], twin: Twin) -> Lane:
            size = most
            if self.config.batch_rows is None:  # in waves of one size, not a last one that is nearly empty
                size = -(-len(rows) // -(-len(rows) // most))
            decoder = Decoder(
                twin,
                replace(job, rows=rows),
                size,
                device=adapter.device,
                whole=ear is not None,
                measured=measured,
                beside=self._beside(plan) if measured else None,
                bodies=bodies,
                solo=solo,
            )
            return Lane(decoder, None if ear is None else Reader(adapter, self.config.max_new_tokens))

        lanes: Lanes | None = None
        while lanes is None or lanes.failed or not lanes.finished:
            with self._drawing(plan, ear, outer) as tracker:
                way = road(self.model, self._dtype(), twin=way.twin)
                if way.twin is None:
                    raise ModelError(f"the model was changed while it was sampled from: {way.reason}")
                if lanes is None:
                    lanes = Lanes([made(rows, way.twin) for rows in split(job.rows, count)], ear)
                lanes.run(_AT_ONCE, way, tracker)
            failed = lanes.failed
            self.count.take(lanes.count)
            yield from lanes.take()
            if failed is None:
                continue
            size = lanes.size
            if size == 1 or not out_of_memory(failed):
                raise failed
            most = size // 2
            logger.warning("out of memory with %d rows side by side; going on with %d", size, most)
            job, lanes = replace(job, rows=lanes.unfinished), None
            if adapter.device.type == "cuda":
                torch.cuda.empty_cache()

    def _finished(self, adapter: Adapter, row: Row, *, measured: bool = False) -> Sample:
        tokens, count = tuple(row.tokens), max(1, len(row.tokens))
        return Sample(
            prompt=row.prompt,
            draw=row.draw,
            tokens=tokens,
            text=adapter.decode(tokens),
            ended=row.ended,
            nll=row.nll / count if measured else None,
            kl=sum(row.kls) / count if measured else None,
            kl_95=float(np.quantile(row.kls, 0.95)) if measured and row.kls else None,
        )

    def _kept_bodies(self, way: Road) -> Bodies | None:
        """What this model made of prompts before, where nothing that is attached now would change it."""
        if way.twin is None or not way.spares_prompts:
            return None
        if self._bodies is None or self._bodies.twin is not way.twin:
            self._bodies = Bodies(way.twin)
        return self._bodies

    def _beside(self, plan: SteeringPlan) -> Beside | None:
        """The model without the plan; None where there is no plan."""
        if not plan.interventions:
            return None

        def unsteered() -> AbstractContextManager[None]:
            return self.model.__dict__[TRACKER].paused()  # type: ignore[no-any-return]

        return Beside(min(plan.layers), adapt(self.model).n_layers, unsteered)

    def _cut(self, adapter: Adapter) -> Any:
        """What :attr:`Job.cut` is: looks for a stop string in the text so far."""
        stops = self.config.stop
        return partial(cut_at, stops, adapter.decode) if stops else lambda _tokens: None

    def _lanes(self, adapter: Adapter, way: Road, rows: int) -> int:
        """How many decoders side by side: one for each core, where there are rows enough for them."""
        if adapter.device.type != "cpu" or way.watched:
            return 1
        return max(1, min(torch.get_num_threads(), min(rows, self.config.batch_rows or rows) // LANE_ROWS))

    def _rows(self, adapter: Adapter, way: Road, lanes: int) -> int:
        """Rows side by side in each lane: what the config says, and what finds room."""
        most = self.config.batch_rows // lanes if self.config.batch_rows else ROWS.get(adapter.device.type, 128)
        assert way.twin is not None
        cfg = adapter.cfg
        heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        size = torch.empty(0, dtype=way.twin.dtype).element_size()
        each = 2 * adapter.n_layers * heads * cfg.d_head * self.config.max_new_tokens * size + 16 * cfg.d_vocab
        return max(1, min(most, int(_MEMORY_SHARE * _free_memory(adapter.device) / each / lanes)))

    @contextmanager
    def _attached(self, plan: SteeringPlan, ear: Ear | None) -> Iterator[Any]:
        """The model as it is sampled from: in inference mode, steered, and read. Gives the token tracker, if any."""
        with ExitStack() as stack:
            stack.enter_context(holding(self.model))
            stack.enter_context(torch.inference_mode())
            if plan.interventions:
                stack.enter_context(steering(self.model, plan))
            if ear is not None:
                stack.enter_context(ear.listening())
            yield self.model.__dict__.get(TRACKER)

    @contextmanager
    def _drawing(self, plan: SteeringPlan, ear: Ear | None, outer: tuple[Steering, ...]) -> Iterator[Any]:
        """:meth:`_attached`, while responses are drawn: under ``outer``, the plans that were attached at their start,
        and no others."""

        def unchanged() -> None:
            if steerings(self.model) != outer:
                raise ModelError(
                    f"a plan was attached to {adapt(self.model).name}, or detached, while responses were being drawn "
                    "from it: take them all first, or draw from a copy.deepcopy(model)"
                )

        with holding(self.model):
            unchanged()
            with self._attached(plan, ear) as tracker:
                yield tracker
            unchanged()

    # The slow road: the model itself, batch by batch

    def _slowly(
        self,
        adapter: Adapter,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Row],
        plan: SteeringPlan,
        outer: tuple[Steering, ...],
    ) -> Iterator[Row]:
        size = self.config.batch_rows or 2 * ROWS["cpu"]
        at, stops = 0, frozenset(adapter.stop_ids)
        while at < len(rows):
            batch = rows[at : at + size]
            try:
                with self._drawing(plan, None, outer):
                    self._decode(adapter, prompts, batch, stops)
            except (MemoryError, RuntimeError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
                logger.warning("out of memory with %d rows side by side; going on with %d", size, size // 2)
                size //= 2
                for row in batch:
                    row.tokens, row.ended = [], False
                continue
            at += len(batch)
            yield from batch

    def _decode(
        self, adapter: Adapter, prompts: Sequence[Sequence[int]], rows: Sequence[Row], stops: frozenset[int]
    ) -> None:
        """Draw a batch of rows to their ends. Prompts are run once; finished rows leave the batch."""
        config, device, cut = self.config, adapter.device, self._cut(adapter)
        asked = list(dict.fromkeys(row.prompt for row in rows))
        tokens, mask = left_pad([prompts[prompt] for prompt in asked], device)
        cache = adapter.new_cache(len(asked))
        logits = adapter.logits(tokens, mask, keep=1, cache=cache)[:, -1]
        self.count.take(TokenCount.forced(mask.sum(dim=1).tolist(), logits=len(asked)))
        expanded = torch.tensor([asked.index(row.prompt) for row in rows], device=device)
        cache, logits, mask = adapter.select_rows(cache, expanded), logits[expanded], mask[expanded]
        alive = list(rows)
        for step in range(config.max_new_tokens):
            noise = torch.tensor([row.noise[step] for row in alive], dtype=torch.float64)
            new = choose(
                logits,
                noise.to(device) if device.type != "mps" else noise.float().to(device),
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
            )
            for row, token in zip(alive, new.tolist(), strict=True):
                if token in stops:
                    row.ended = True
                    continue
                row.tokens.append(token)
                if (kept := cut(row.tokens)) is not None:
                    row.ended = True
                    del row.tokens[kept:]
            going = [place for place, row in enumerate(alive) if not row.ended]
            if step == config.max_new_tokens - 1 or not going:
                return
            if len(going) < len(alive):
                kept_rows = torch.tensor(going, device=device)
                cache, mask, new = adapter.select_rows(cache, kept_rows), mask[kept_rows], new[kept_rows]
                alive = [alive[place] for place in going]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = adapter.logits(new[:, None], mask, keep=1, cache=cache)[:, -1]
            self.count.take(TokenCount(decode=len(alive), attended=int(mask.sum()), logits=len(alive)))


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True  # not known: say nothing


def _free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device."""
    import psutil

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)  # "mps" shares the machine's
