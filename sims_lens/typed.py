"""JSON back into frozen dataclasses: each value is of the type that its field says, or one line tells which isn't.

What was written by :func:`dataclasses.asdict` or a ``to_json`` may come back from a stranger, or damaged. A figure that
turns out to be a string breaks long after it was read, in a table or a figure; so it is refused where it is read.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sims_lens.errors import ResultError
from sims_lens.stats import Interval

_MOST = 1 << 63
"""Whole numbers are smaller: no count is larger, and NumPy and pandas hold no larger one."""


def read_as(kind: Any, data: Any, where: str = "") -> Any:
    """A value of JSON as a value of a type.

    Args:
        kind: a dataclass, ``bool``, ``int``, ``float``, ``str``, ``None``, a literal; a ``tuple``, ``list`` or ``dict``
            of such; such or None; or ``Any``. A whole number is taken for a ``float`` too. An :class:`Interval` is a
            list of three numbers. A dict's keys are read from strings.
        data: as ``json.loads`` gives it.
        where: what it is, for messages.

    Returns:
        The value; lists have become tuples where the type says so.

    Raises:
        ResultError: it is of another type, or a field is missing or unknown.

    >>> read_as(tuple[int, ...], [1, 2])
    (1, 2)
    """
    if kind is Any:
        return data
    if kind is None or kind is NoneType:
        return _is(data is None, data, "null", where)
    if kind is float:
        return _float(data, where)
    if kind is int:
        return _is(type(data) is int and -_MOST < data < _MOST, data, "a whole number", where)
    if kind in (str, bool):
        return _is(type(data) is kind, data, {str: "a text", bool: "true or false"}[kind], where)
    if kind is Interval:
        numbers = _is(isinstance(data, list) and len(data) == 3, data, "[estimate, low, high]", where)
        return Interval(*(_float(number, where) for number in numbers))
    if is_dataclass(kind):
        return _dataclass(kind, data, where)
    return _composed(kind, get_origin(kind), get_args(kind), data, where)


def known_fields(kind: Any, data: Any) -> Any:
    """What of an object a dataclass has fields for: what another version has written beside is left out."""
    _is(isinstance(data, Mapping), data, "an object", kind.__name__)
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def _composed(kind: Any, origin: Any, inner: tuple[Any, ...], data: Any, where: str) -> Any:
    if origin is Literal:
        return _is(data in inner if isinstance(data, (str, int)) else False, data, f"one of {inner}", where)
    if origin in (Union, UnionType):
        if data is None and NoneType in inner:
            return None
        others = [each for each in inner if each is not NoneType]
        if len(others) > 1:
            raise TypeError(f"{kind} is not a type that JSON tells apart")
        return read_as(others[0], data, where)
    if origin is dict:
        items = _is(isinstance(data, Mapping), data, "an object", where).items()
        return {_key(inner[0], name, where): read_as(inner[1], value, f"{where}.{name}") for name, value in items}
    if origin in (tuple, list):
        _is(isinstance(data, (list, tuple)), data, "a list", where)
        if origin is tuple and inner[-1] is not Ellipsis:
            _is(len(data) == len(inner), data, f"a list of {len(inner)}", where)
            return tuple(read_as(each, value, where) for each, value in zip(inner, data, strict=True))
        return origin(read_as(inner[0], value, f"{where}[{k}]") for k, value in enumerate(data))
    raise TypeError(f"{kind} is not a type that JSON can be read as")


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    _is(isinstance(data, Mapping), data, "an object", where)
    hints, needed = _fields(kind)
    if unknown := sorted(str(name) for name in data.keys() - hints.keys()):
        raise ResultError(f"{where or kind.__name__} has {unknown[0]!r:.60}, which a {kind.__name__} has not")
    if missing := sorted(needed - data.keys()):
        raise ResultError(f"{where or kind.__name__} lacks {missing[0]!r}")
    return kind(**{name: read_as(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in data.items()})


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a dataclass's fields, and the names of those without a default value."""
    hints, own = get_type_hints(kind), fields(kind)
    needed = frozenset(f.name for f in own if f.default is MISSING and f.default_factory is MISSING)
    return {f.name: hints[f.name] for f in own}, needed


def _float(data: Any, where: str) -> float:
    _is(type(data) in (int, float), data, "a number", where)
    try:
        return float(data)
    except OverflowError as error:
        raise ResultError(f"{where or 'a number'} is a whole number that is too large") from error


def _key(kind: Any, name: Any, where: str) -> Any:
    if kind is str:
        return _is(isinstance(name, str), name, "a name", where)
    text = str(name)
    _is(text.isascii() and text.isdecimal() and len(text) < 19, name, "a whole number", where)
    return int(text)


def _is(good: bool, data: Any, what: str, where: str) -> Any:
    if not good:
        held = f"{data!r:.60}" if isinstance(data, (str, float, bool, NoneType)) else f"a {type(data).__name__}"
        raise ResultError(f"{where or 'it'} must be {what}, got {held}")
    return data


__all__ = ["known_fields", "read_as"]
