"""Text for a terminal: what a prompt, a model or a file says is shown, and never obeyed."""

import sys
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"
"""Invisible, but Persian and many emoji need them, and they move nothing."""


def plain(text: str) -> str:
    r"""Text on one line with its control characters shown as escapes: it can't move the cursor or turn its neighbours.

    Line feeds become spaces. Escapes stand for everything that a terminal obeys (ESC, CR, BEL, the C1 codes) and for
    what is invisible or changes the direction of writing.

    >>> plain("a\x1b[31mb\nc\u202e")
    'a\\x1b[31mb c\\u202e'
    """
    return _shown(text.replace("\n", " "))


def lines(text: str) -> str:
    r"""The same of text in several lines, which stay.

    >>> lines("a\rb\nc")
    'a\\rb\nc'
    """
    return "\n".join(_shown(line) for line in text.split("\n"))


def say(text: object, *, file: Any = None) -> None:
    """Print something, with :func:`lines`; what the terminal's encoding lacks is written as an escape too.

    Args:
        text: printed as ``print`` would.
        file: a text stream; standard output by default.
    """
    target = sys.stdout if file is None else file
    encoding = getattr(target, "encoding", None) or "utf-8"
    print(lines(str(text)).encode(encoding, "backslashreplace").decode(encoding), file=target, flush=True)


def _shown(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_harmless(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


__all__ = ["lines", "plain", "say"]
