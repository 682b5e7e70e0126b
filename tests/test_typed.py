"""JSON read as types: what was written comes back, and a value of another type is named where it is read."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from sims_lens.errors import ResultError
from sims_lens.stats import Interval
from sims_lens.typed import known_fields, read_as


@dataclass(frozen=True)
class Inner:
    value: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    good: bool
    interval: Interval | None
    inner: tuple[Inner, ...]
    pair: tuple[int, str]
    table: dict[str, list[float]] = field(default_factory=dict)
    layers: dict[int, int] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "name": "n",
    "count": 3,
    "good": True,
    "interval": [1, 0.5, 2.0],
    "inner": [{"value": 1}, {"value": 2.5, "kind": "b"}],
    "pair": [1, "x"],
    "table": {"a": [1, 2.0]},
    "layers": {"7": 1},
}


def test_everything_comes_back() -> None:
    found = read_as(Outer, json.loads(json.dumps(GOOD)))
    assert found == Outer(
        "n", 3, True, Interval(1.0, 0.5, 2.0), (Inner(1.0), Inner(2.5, "b")), (1, "x"), {"a": [1.0, 2.0]}, {7: 1}
    )
    assert type(found.inner[0].value) is float
    assert read_as(Outer, {**GOOD, "interval": None}).interval is None
    assert math.isnan(read_as(float, float("nan"))) and read_as(None, None) is None and read_as(Any, {"a"}) == {"a"}
    assert known_fields(Inner, {"value": 1, "later": 2}) == {"value": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "name must be a text, got a int"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"count": 2**63}, "count must be a whole number"),
        ({"count": "3"}, "count must be a whole number, got '3'"),
        ({"good": 1}, "good must be true or false"),
        ({"interval": [1, 2]}, r"interval must be \[estimate, low, high\]"),
        ({"interval": [1, 2, "3"]}, "interval must be a number"),
        ({"interval": [1, 2, 10**400]}, "a whole number that is too large"),
        ({"inner": {}}, "inner must be a list, got a dict"),
        ({"inner": [{"value": None}]}, r"inner\[0\].value must be a number, got None"),
        ({"inner": [{}]}, r"inner\[0\] lacks 'value'"),
        ({"inner": [{"value": 1, "kind": "c"}]}, r"inner\[0\].kind must be one of \('a', 'b'\), got 'c'"),
        ({"inner": [3]}, r"inner\[0\] must be an object"),
        ({"pair": [1]}, "pair must be a list of 2"),
        ({"table": {"a": [[]]}}, r"table.a\[0\] must be a number, got a list"),
        ({"layers": {"x": 1}}, "layers must be a whole number, got 'x'"),
        ({"other": 1}, "Outer has 'other'"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        read_as(Outer, GOOD | changes)


def test_what_is_no_object_and_what_is_no_type_of_json() -> None:
    with pytest.raises(ResultError, match="must be an object, got a list"):
        known_fields(Outer, [])
    with pytest.raises(TypeError, match="not a type that JSON"):
        read_as(set[int], [1])
    with pytest.raises(TypeError, match="not a type that JSON tells apart"):
        read_as(int | str, 1)
