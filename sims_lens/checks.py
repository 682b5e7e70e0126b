"""Checks of one argument each: the value comes back, or one line says what it is and what is wanted."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sims_lens.errors import ConfigError, SimsError

_LONGEST_SEED = 2**63 - 1
_LONGEST_NAME = 255
"""Bytes that a file's name may have nearly everywhere."""


def shown(value: object, width: int = 60) -> str:
    """A value for a message: on one line, shortened to ``width`` characters.

    >>> shown("a" * 9, 6)
    "'aaaa…"
    """
    return one_line(repr(value), width)


def one_line(text: object, width: int = 200) -> str:
    r"""What something says, an error for instance, as one line of a bearable length: it may be a stranger's text.

    >>> one_line("no\n  room."), one_line(KeyError())
    ('no room', 'KeyError()')
    """
    joined = " ".join(str(text).split()).rstrip(".") or repr(text)
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in joined)
    return line if len(line) <= width else line[: width - 1] + "…"


def check_integer(
    name: str, value: Any, low: int = 1, high: int | None = None, error: type[SimsError] = ConfigError
) -> int:
    """A whole number from ``low`` up, or up to ``high``.

    Raises:
        ConfigError: it is not.

    >>> check_integer("samples", 2)
    2
    """
    if type(value) is not int or value < low or (high is not None and value > high):
        wanted = f"in {low}..{high}" if high is not None else f"of at least {low}" if low else "from 0 up"
        raise error(f"{name} must be an integer {wanted}, got {shown(value)}")
    return value


def check_seed(value: Any, name: str = "seed") -> int:
    """What random numbers can be drawn from: a whole number from 0 up.

    Raises:
        ConfigError: it is not.
    """
    check_integer(name, value, 0)
    return check_integer(name, value, 0, _LONGEST_SEED)


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    error: type[SimsError] = ConfigError,
) -> float:
    """A finite number in a range.

    Args:
        name: of the argument.
        value: what was given.
        low: the smallest.
        high: the largest.
        open_low: whether ``low`` itself is too small.
        error: what is raised.

    """
    if not is_number(value) or value < low or value > high or (open_low and value == low):
        wanted = "" if low == -math.inf and high == math.inf else f" {'above' if open_low else 'from'} {low} to {high}"
        raise error(f"{name} must be a finite number{wanted}, got {shown(value)}")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, finite as a float, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def check_list(name: str, value: Any, example: str, error: type[SimsError] = ConfigError) -> Sequence[Any]:
    """A list or a tuple: no text, no mapping, no number.

    Args:
        name: of the argument.
        value: what was given.
        example: of what is wanted, as one types it.
        error: what is raised.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise error(f"{name} must be a list such as {example}, got {shown(value)}")
    return value


def check_mapping(name: str, value: Any, example: str, error: type[SimsError] = ConfigError) -> Mapping[str, Any]:
    """A mapping from names, with something in it; as :func:`check_list`."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(key, str) for key in value):
        raise error(f"{name} must have names, such as {example}, got {shown(value)}")
    return value


def check_kind(
    name: str, value: Any, kinds: type | tuple[type, ...], remedy: str, error: type[SimsError] = ConfigError
) -> None:
    """Raise ``error`` unless a value is of one of some classes.

    >>> check_kind("config", 3, str, "leave it out")
    Traceback (most recent call last):
    sims_lens.errors.ConfigError: config must be a str, got 3; leave it out
    """
    if not isinstance(value, kinds):
        names = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise error(f"{name} must be a {names}, got {shown(value)}; {remedy}")


def check_choice(name: str, value: Any, choices: Sequence[str], error: type[SimsError] = ConfigError) -> str:
    """One of some names.

    >>> check_choice("by", "head", ("component", "head"))
    'head'
    """
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name} {shown(value)} is not one of {', '.join(choices)}")
    return value


def check_dimensions(name: str, value: Any, dimensions: int, error: type[SimsError] = ConfigError) -> None:
    """Raise ``error`` unless a value is a dense tensor of real floats with that many dimensions, and with values."""
    import torch

    good = isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided
    if not good or value.is_meta or value.ndim != dimensions or not value.numel():
        got = shown(value)
        if isinstance(value, torch.Tensor):
            got = f"{list(value.shape)} of {value.dtype} on {value.device}, {value.layout}"
        raise error(f"{name} must be a dense tensor of floats with {dimensions} dimensions, got {got}")


def check_path(value: Any, error: type[SimsError] = ConfigError) -> Path:
    """A path that a file system can hold; whether anything is there is another question.

    Raises:
        SimsError: it is no text and no ``Path``, or has a character or a length that no file's name has.
    """
    if not isinstance(value, (str, Path)):
        raise error(f"a path must be a string or a Path, got {shown(value)}")
    path = Path(value)
    try:
        encoded = [part.encode() for part in path.parts]
    except UnicodeEncodeError:
        raise error(f"path {shown(str(path))} has half of a surrogate pair; remove it") from None
    if "\x00" in str(path) or any(len(part) > _LONGEST_NAME for part in encoded):
        raise error(f"path {shown(str(path))} has a null character, or a name of more than {_LONGEST_NAME} bytes")
    return path


def check_folder(value: Any, error: type[SimsError] = ConfigError) -> Path:
    """A path where a folder is or can be made: neither it nor anything above it is a file."""
    path = check_path(value, error)
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                raise error(f"{place} is a file where a folder is needed; give another path")
            break
    return path
