"""Google docstrings for autodoc, by napoleon, with two habits of this house.

A property's or attribute's first line is a sentence, which may hold a colon: napoleon would read a type before it. And
a bar is a norm, ``|d|``, not the substitution of reStructuredText.
"""

import re
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

SETTINGS = Config(napoleon_use_ivar=True, napoleon_numpy_docstring=False)
LITERAL = re.compile(r"(``.*?``)")


def without_bars(line: str) -> str:
    r"""The line with its bars escaped, but in literals and examples.

    >>> without_bars("the norm |d| is not ``a | b``")
    'the norm \\|d\\| is not ``a | b``'
    """
    if line.lstrip().startswith((">>>", "...")):
        return line
    return "".join(p if p.startswith("``") else p.replace("|", r"\|") for p in LITERAL.split(line))


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a Google docstring into reStructuredText, in place."""
    kind = "method" if what in ("attribute", "data", "property") else what
    escaped = [without_bars(line) for line in lines]
    lines[:] = GoogleDocstring(escaped, SETTINGS, app, kind, name, obj, options).lines()


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
