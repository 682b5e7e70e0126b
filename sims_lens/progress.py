"""One progress bar for a whole run: it says which phase is running and how long is left."""

import warnings
from types import TracebackType

from sims_lens.terminal import plain

with warnings.catch_warnings():
    # In a notebook without ipywidgets it says so on import, and then writes the bar as text, which is as good.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tqdm.auto import tqdm


class Progress:
    """A bar that counts responses (drawn and measured), with the phase as its text.

    Args:
        total: responses in the whole run.
        show: False for a silent one.
    """

    def __init__(self, total: int, *, show: bool = True) -> None:
        self._bar = tqdm(total=total, unit="resp", disable=not show, dynamic_ncols=True, smoothing=0.05)

    def phase(self, text: str) -> None:
        """Say what is happening now."""
        self._bar.set_description_str(plain(text))

    def advance(self, count: int = 1) -> None:
        """Count responses as done."""
        self._bar.update(count)

    def more(self, count: int) -> None:
        """Count on more responses than was known before."""
        self._bar.total = (self._bar.total or 0) + count
        self._bar.refresh()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
