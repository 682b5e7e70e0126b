"""Rows of token ids in one block of memory, and two sequences of rows side by side."""

import sys
from array import array

import pytest

from sims_lens.token_rows import Joined, TokenRows

ROWS = [([1, 2, 3], [4]), ([50_000], []), ([7] * 40, [8, 9])]


def rows() -> TokenRows:
    made = TokenRows()
    for prompt, response in ROWS:
        made.append(prompt, response)
    return made


def plain(found: object) -> list[tuple[list[int], list[int]]]:
    return [(list(prompt), list(response)) for prompt, response in found]  # type: ignore[attr-defined]


def test_rows_come_back_as_they_were_put_in() -> None:
    made = rows()
    assert len(made) == 3 and plain(made) == ROWS and plain([made[-1]]) == ROWS[-1:]
    with pytest.raises(IndexError):
        made[3]


@pytest.mark.parametrize("part", [slice(0, None, 2), slice(1, None), slice(None, None, -1), slice(3, None)])
def test_a_slice_is_the_same_memory(part: slice) -> None:
    made = rows()
    some = made[part]
    assert plain(some) == ROWS[part] and plain(some[::-1]) == ROWS[part][::-1] and some._ids is made._ids


def test_joined_rows_are_those_of_both() -> None:
    joined = Joined(rows()[1:], ROWS)
    assert len(joined) == 5 and plain(joined) == ROWS[1:] + ROWS
    assert plain(joined[1:4]) == [ROWS[2], *ROWS[:2]] and plain([joined[-1]]) == ROWS[-1:]
    with pytest.raises(IndexError):
        joined[5]


def test_a_token_takes_four_bytes() -> None:
    made = TokenRows()
    for _ in range(1000):
        made.append(array("i", range(90)), array("i", range(10)))
    assert sys.getsizeof(made._ids) + sys.getsizeof(made._ends) < 1.3 * 400_000
