"""The built site loads nothing from a network: a page that would is an error. Links to follow are no matter."""

import re
from pathlib import Path
from typing import Any

from sphinx.errors import SphinxError

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel\s*=\s*["']?(?:stylesheet|preload|prefetch|icon|modulepreload))[^>]*?\shref\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|url\(\s*["']?((?:https?:)?//[^"')\s]+)|@import\s+["']((?:https?:)?//[^"']+)""",
    re.IGNORECASE,
)


def loaded(text: str) -> list[str]:
    """Addresses that a browser would load with this page or stylesheet.

    >>> loaded('<a href="https://x.org">x</a> <script async src="https://x.org/a.js"></script>')
    ['https://x.org/a.js']
    """
    return [address for found in LOADED.findall(text) for address in found if address]


def check(app: Any, error: Exception | None) -> None:
    """Raise where a page or stylesheet of the site names such an address."""
    if error is not None or app.builder.format != "html":
        return
    pages = [path for path in Path(app.outdir).rglob("*") if path.suffix in (".html", ".css")]
    bad = [f"{path.relative_to(app.outdir)}: {a}" for path in pages for a in loaded(path.read_text(encoding="utf-8"))]
    if bad:
        raise SphinxError("the site would load from a network: " + "; ".join(bad))


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
