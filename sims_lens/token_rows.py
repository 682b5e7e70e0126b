"""Very many rows of token ids in little memory: lists of lists take some 40 bytes a token, these 4."""

from array import array
from collections.abc import Sequence
from typing import TypeAlias, overload

Row: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""A sequence as (prompt token ids, response token ids)."""


class TokenRows(Sequence[Row]):
    """Rows side by side in one block of memory; a slice of them looks into the same block.

    >>> rows = TokenRows()
    >>> rows.append([5, 6, 7], [8])
    >>> rows.append([9], [])
    >>> len(rows), [list(part) for part in rows[0]], len(rows[1:])
    (2, [[5, 6, 7], [8]], 1)
    """

    def __init__(self) -> None:
        self._ids, self._ends = array("i"), array("q", [0])  # of each prompt and each response in turn
        self._chosen: range | None = None

    def append(self, prompt: Sequence[int], response: Sequence[int]) -> None:
        """Add a row; not to a slice."""
        assert self._chosen is None
        for part in (prompt, response):
            self._ids.extend(part)
            self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) // 2 if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenRows": ...
    def __getitem__(self, index: int | slice) -> "Row | TokenRows":
        chosen = range(len(self)) if self._chosen is None else self._chosen
        if isinstance(index, slice):
            some = TokenRows()
            some._ids, some._ends, some._chosen = self._ids, self._ends, chosen[index]
            return some
        start, middle, end = self._ends[2 * (row := chosen[index]) : 2 * row + 3]
        return self._ids[start:middle], self._ids[middle:end]


class Joined(Sequence[Row]):
    """Two sequences of rows one after the other, neither of them copied."""

    def __init__(self, first: Sequence[Row], second: Sequence[Row]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> "Row | Sequence[Row]":
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        first = len(self._first)
        return self._first[places] if places < first else self._second[places - first]


__all__ = ["Joined", "Row", "TokenRows"]
