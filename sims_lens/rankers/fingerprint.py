"""What a ranker's scores depend on, beside the texts: by this its verdicts are kept and found again."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, Final

from sims_lens.errors import RankerError
from sims_lens.rankers.base import CheckedRanker

_HEAP_TYPE: Final = 1 << 9  # CPython's flag of a class made by Python code, so that its objects' state is in __dict__


def settings_of(ranker: CheckedRanker) -> Any:
    """What a ranker's scores depend on.

    Its attribute ``settings`` where it has one. Otherwise a function is described by its code, its default values and
    what it closes over; an object by its attributes and its class's code and constants.

    Args:
        ranker: a checked ranker.

    Returns:
        Something that JSON can hold, the same for rankers that score alike.

    Raises:
        RankerError: the ranker depends on something that can't be described so.
    """
    found = getattr(ranker, "settings", None)
    if found is not None:
        return found
    what = f"the ranker {ranker.name!r} doesn't tell what its scores depend on"
    remedy = "give it an attribute settings that JSON can hold, or pass CachedRanker(..., settings=...)"
    try:
        plain = isinstance(ranker.inner, (FunctionType, BuiltinFunctionType, MethodType, partial))
        return _value(ranker.inner) if plain else _object(ranker.inner)
    except _UnknownError as error:
        raise RankerError(f"{what} ({error}); {remedy}") from error


def canonical(ranker: CheckedRanker, settings: Any = None) -> str:
    """The name and settings of a ranker as one string.

    Args:
        ranker: a checked ranker.
        settings: in place of :func:`settings_of` the ranker.

    Returns:
        JSON with sorted keys.

    Raises:
        RankerError: as for :func:`settings_of`, or JSON can't hold the settings.
    """
    settings = settings_of(ranker) if settings is None else settings
    try:
        return json.dumps([ranker.name, settings], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise RankerError(f"the settings of the ranker {ranker.name!r} don't fit into JSON: {error}") from error


class _UnknownError(Exception):
    """Something has a state that can't be described; the message says what."""


def _value(value: Any) -> Any:
    """Describe a value, in lists, strings and numbers."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (bytes, PurePath)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_value(item) for item in value), key=repr)
    if isinstance(value, Mapping):
        return sorted(([_value(key), _value(item)] for key, item in value.items()), key=repr)
    if isinstance(value, FunctionType):
        closed = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [value.__defaults__, value.__kwdefaults__, closed]
        return [f"{value.__module__}.{value.__qualname__}", _code(value.__code__), _value(parts)]
    if isinstance(value, partial):
        return ["partial", _value(value.func), _value(value.args), _value(value.keywords)]
    if isinstance(value, MethodType):
        return ["method", value.__func__.__qualname__, _object(value.__self__)]
    if isinstance(value, type) or (isinstance(value, BuiltinFunctionType) and not hasattr(value.__self__, "__dict__")):
        return f"{value.__module__}.{value.__qualname__}"
    if dataclasses.is_dataclass(value):
        return _object(value)
    raise _UnknownError(f"it holds a {type(value).__module__}.{type(value).__qualname__}")


def _object(value: Any) -> Any:
    """Describe an object by its attributes and its classes' code and constants."""
    described: list[Any] = []
    for kind in type(value).__mro__[:-1]:
        if not kind.__flags__ & _HEAP_TYPE or kind.__dict__.get("__slots__"):
            raise _UnknownError(f"it is a {kind.__module__}.{kind.__qualname__}, whose state is hidden")
        described.append([f"{kind.__module__}.{kind.__qualname__}", _members(kind)])
    return [described, _value(vars(value))]


def _members(kind: type) -> list[Any]:
    """Describe the methods and constants of a class."""
    found = []
    for name, member in sorted(vars(kind).items()):
        if name.startswith("_") and name.endswith("_") and name != "__call__":
            continue
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        elif isinstance(member, property):
            member = member.fget
        found.append([name, _value(member)])
    return found


def _code(code: CodeType) -> str:
    """A digest of compiled code that is the same in every process of one version of Python."""
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        digest.update((_code(constant) if isinstance(constant, CodeType) else repr(_constant(constant))).encode())
    digest.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    return digest.hexdigest()


def _constant(constant: Any) -> Any:
    """A set among constants has another order in each process."""
    if isinstance(constant, tuple):
        return tuple(map(_constant, constant))
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
