"""Lanes: on a CPU with several cores, several decoders side by side, each with its own rows and its share of the cores.

Products of small matrices, norms, softmaxes and Python itself gain little from a second core; a second decoder can
use the whole of it. A row's result does not depend on its lane.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sims_lens.cost import TokenCount
from sims_lens.sampling.decode import Decoder, Row
from sims_lens.sampling.reading import Ear, Following, Reader, Reading
from sims_lens.twin import Road

LANE_ROWS = 64
"""Rows that a lane must have to be worth its while: every step of a lane reads all weights. See ``docs/speed.md``."""


@dataclass
class Lane:
    """A decoder, and what reads along."""

    decoder: Decoder
    reader: Reader | None

    def run(self, enough: Callable[[], bool], way: Road, tracker: Any, ear: Ear | None) -> None:
        """Go on until that is enough."""
        watch = Following(tracker) if self.reader is None else self.reader.following(tracker)
        self.decoder.watched = way.watched
        hearing = nullcontext() if ear is None or self.reader is None else ear.telling(self.reader)
        with torch.inference_mode(), hearing:
            self.decoder.run(enough, way.points, watch)


class Lanes:
    """Some lanes, run side by side.

    Args:
        lanes: at least one.
        ear: what hears the model's HookPoints, where there are readers.

    :attr:`failed` is what stopped a lane, if anything did; the other lanes' rows, and those that it had done, are
    there to be taken all the same.
    """

    def __init__(self, lanes: Sequence[Lane], ear: Ear | None) -> None:
        self.lanes, self.ear = list(lanes), ear
        self.failed: Exception | None = None
        self.count = TokenCount()

    @property
    def size(self) -> int:
        """Rows side by side in a lane, at most."""
        return max(lane.decoder.size for lane in self.lanes)

    @property
    def finished(self) -> bool:
        """Whether no row is left to be drawn."""
        return all(lane.decoder.finished for lane in self.lanes)

    @property
    def unfinished(self) -> list[Row]:
        """Rows that are not done, from their start."""
        return [row for lane in self.lanes for row in lane.decoder.unfinished]

    def run(self, enough: int, way: Road, tracker: Any) -> None:
        """Go on until ``enough`` rows of all lanes are done, or all that there are, or a lane has failed."""
        busy = [lane for lane in self.lanes if not lane.decoder.finished]
        stop = False

        def reached() -> bool:
            return stop or sum(len(lane.decoder.done) for lane in self.lanes) >= enough

        if len(busy) < 2 or way.watched:  # who looks on is not to be called from several threads
            for lane in busy:
                try:
                    lane.run(reached, way, tracker, self.ear)
                except Exception as error:  # the caller hands it on, after the rows that are done
                    self.failed = error
        else:
            with _threads(len(busy)) as submit:
                futures = [submit(lane.run, reached, way, tracker, self.ear) for lane in busy]
                try:
                    wait(futures)
                finally:
                    stop = True  # when this thread is interrupted, the others end their steps
            for thrown in filter(None, (future.exception() for future in futures)):
                if not isinstance(thrown, Exception):
                    raise thrown
                self.failed = thrown
        for lane in self.lanes:
            self.count.take(lane.decoder.count)

    def take(self) -> Iterator[tuple[Row, Reading | None]]:
        """The rows that are done, with their readings; they are gone from here."""
        for lane in self.lanes:
            done, lane.decoder.done = lane.decoder.done, []
            for row in done:
                yield row, None if lane.reader is None else lane.reader.take(row)


def split(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """Deal the prompts out to lanes, all rows of a prompt to one."""
    order = {prompt: index for index, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    parts: list[list[Row]] = [[] for _ in range(min(count, len(order)))]
    for row in rows:
        parts[order[row.prompt] % len(parts)].append(row)
    return parts


@contextmanager
def _threads(count: int) -> Iterator[Callable[..., "Future[None]"]]:
    """So many threads, among which PyTorch's are shared out."""
    before = torch.get_num_threads()
    share = max(1, before // count)
    try:
        with ThreadPoolExecutor(
            count, thread_name_prefix="sims_lens", initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            yield pool.submit
    finally:
        torch.set_num_threads(before)


__all__ = ["LANE_ROWS", "Lane", "Lanes", "split"]
