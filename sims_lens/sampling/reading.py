"""Reading the stream while responses are drawn: the decode loop has just computed those very activations."""

import base64
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sims_lens.activations import listening
from sims_lens.adapter import Adapter
from sims_lens.sampling.decode import Row, Watch


@dataclass(frozen=True, eq=False)
class Reading:
    """The stream at one site over the tokens of one response, under the plan that it was drawn with.

    Args:
        mean: over the response's tokens, float32, on the CPU.
        norms: of the stream at each token, float32, on the CPU.
    """

    mean: Float[Tensor, "layer d_model"]
    norms: Float[Tensor, "token layer"]

    def to_json(self) -> dict[str, Any]:
        """As JSON, bit for bit."""
        return {"layers": len(self.mean), "mean": _text(self.mean), "norms": _text(self.norms)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Reading":
        """The inverse of :meth:`to_json`."""
        layers = int(data["layers"])
        return cls(_floats(data["mean"]).reshape(layers, -1), _floats(data["norms"]).reshape(-1, layers))


def _text(values: Float[Tensor, "..."]) -> str:
    return base64.b64encode(values.contiguous().numpy().astype("<f4").tobytes()).decode()


def _floats(text: str) -> Float[Tensor, " n"]:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))


@dataclass(frozen=True, eq=False)
class Readings:
    """The readings of many samples, as tensors that a file can hold.

    Args:
        samples: prompt and draw of each.
        lengths: tokens of each.
        means: over the tokens of each.
        norms: of all tokens, sample after sample.
    """

    samples: Int[Tensor, "sample 2"]
    lengths: Int[Tensor, " sample"]
    means: Float[Tensor, "sample layer d_model"]
    norms: Float[Tensor, "token layer"]

    @classmethod
    def of(cls, found: Mapping[tuple[int, int], Reading]) -> "Readings":
        """Of readings by (prompt, draw); at least one."""
        keys = sorted(found)
        return cls(
            samples=torch.tensor(keys),
            lengths=torch.tensor([len(found[key].norms) for key in keys]),
            means=torch.stack([found[key].mean for key in keys]),
            norms=torch.cat([found[key].norms for key in keys]),
        )

    def select(
        self, samples: Sequence[tuple[int, int]]
    ) -> tuple[Float[Tensor, "sample layer d_model"], Float[Tensor, "token layer"]]:
        """Means and norms of some samples, in the order given.

        Raises:
            KeyError: a sample is not among them.
        """
        place = {(int(prompt), int(draw)): index for index, (prompt, draw) in enumerate(self.samples)}
        chosen = [place[sample] for sample in samples]
        parts = self.norms.split(self.lengths.tolist())  # type: ignore[no-untyped-call]
        return self.means[chosen], torch.cat([parts[index] for index in chosen])


class Following(Watch):
    """Tells the token tracker, where a plan is attached, what each pass is about."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def prompts(self, width: int, length: int) -> None:
        """See :class:`Watch`."""
        if self.tracker is not None:
            self.tracker.expect(width, length)

    def steps(self, at: Sequence[int]) -> None:
        """See :class:`Watch`."""
        if self.tracker is not None:
            self.tracker.expect(1, 1, offset=1, before=at)


class _ReadingAlong(Following):
    """Also tells a reader."""

    def __init__(self, tracker: Any, reader: "Reader") -> None:
        super().__init__(tracker)
        self.reader = reader

    def prompts(self, width: int, length: int) -> None:
        """See :class:`Watch`."""
        super().prompts(width, length)
        self.reader.at = None

    def steps(self, at: Sequence[int]) -> None:
        """See :class:`Watch`."""
        super().steps(at)
        self.reader.begin(at)

    def ends(self, row: Row, place: int) -> None:
        """See :class:`Watch`."""
        self.reader.end(row, place)

    def keeps(self, places: Sequence[int]) -> None:
        """See :class:`Watch`."""
        self.reader.keep(places)


class Ear:
    """Listens to a model's HookPoints at a site, and tells the reader of the thread that runs it.

    Args:
        adapter: of the model.
        site: where in every block.
    """

    def __init__(self, adapter: Adapter, site: str) -> None:
        self.adapter, self.site = adapter, site
        self._now = threading.local()

    def listening(self) -> AbstractContextManager[None]:
        """A ``with`` block inside which the model's HookPoints are heard."""
        return listening(self.adapter, self.site, self._hear, everywhere=True)

    @contextmanager
    def telling(self, reader: "Reader") -> Iterator[None]:
        """Inside, what this thread runs is told to a reader."""
        self._now.reader = reader
        try:
            yield
        finally:
            del self._now.reader

    def _hear(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> None:
        reader = getattr(self._now, "reader", None)
        if reader is not None:
            reader.read(layer, stream)


class Reader:
    """Sums the stream of every place of the batch, layer by layer, as its tokens pass.

    Args:
        adapter: of the model.
        longest: tokens of a response, at most.
    """

    def __init__(self, adapter: Adapter, longest: int) -> None:
        self.adapter, self.longest = adapter, longest
        self.at: Tensor | None = None
        self._sums: Float[Tensor, "layer place d_model"] = torch.empty(adapter.n_layers, 0, adapter.d_model)
        self._norms: Float[Tensor, "layer place token"] = torch.empty(adapter.n_layers, 0, longest)
        self._done: dict[tuple[int, int], Reading] = {}

    def following(self, tracker: Any) -> Watch:
        """What tells this reader, and the tracker, of every pass."""
        return _ReadingAlong(tracker, self)

    def begin(self, at: Sequence[int]) -> None:
        """The newest token of each place is to come: number ``at`` of its row."""
        if len(at) > self._sums.shape[1]:
            more = len(at) - self._sums.shape[1]
            layers, _, d_model = self._sums.shape
            device = self.adapter.device
            self._sums = torch.cat([self._sums.to(device), torch.zeros(layers, more, d_model, device=device)], dim=1)
            self._norms = torch.cat(
                [self._norms.to(device), torch.zeros(layers, more, self.longest, device=device)], dim=1
            )
        new = [place for place, number in enumerate(at) if number == 0]
        if new:
            self._sums[:, new] = 0.0
        self.at = torch.tensor(at, device=self.adapter.device)
        self._places = torch.arange(len(at), device=self.adapter.device)

    def read(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> None:
        """A block's stream has passed."""
        if self.at is None:
            return
        newest = stream[:, -1].float()
        self._sums[layer, : len(newest)] += newest
        self._norms[layer, self._places, self.at] = newest.norm(dim=-1)

    def end(self, row: Row, place: int) -> None:
        """The row in a place is done: every token of it has passed."""
        count = len(row.tokens)
        if count:
            self._done[row.prompt, row.draw] = Reading(
                mean=(self._sums[:, place] / count).cpu(), norms=self._norms[:, place, :count].T.cpu().clone()
            )

    def keep(self, places: Sequence[int]) -> None:
        """Only these places are left."""
        self._sums, self._norms = self._sums[:, list(places)], self._norms[:, list(places)]

    def take(self, row: Row) -> Reading | None:
        """The reading of a row that is done; None where it has no tokens."""
        return self._done.pop((row.prompt, row.draw), None)
