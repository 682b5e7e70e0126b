"""The executed notebooks as pages: their stored outputs, with figures that can be moved and plotly.js beside them.

A notebook is copied to ``docs/notebooks/`` (which git ignores). A stored figure becomes the few lines of HTML that draw
it, in place of its picture; plotly.js is written once, to ``_static``, out of the installed plotly.
"""

import json
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

FIGURE = "application/vnd.plotly.v1+json"
SOURCES = Path(__file__).parents[2] / "notebooks"
PAGES = Path(__file__).parents[1] / "notebooks"
SCRIPT = "plotly.min.js"


def drawn(figure: dict[str, Any], name: str) -> str:
    """HTML and script that draw a figure.

    >>> drawn({"data": [], "layout": {}, "config": {"plotlyServerURL": "https://plot.ly"}}, "a")[:32]
    '<div id="a" class="plotly"></div'
    """
    settings = {"displaylogo": False, "responsive": True}
    parts = [json.dumps(part) for part in (figure["data"], figure["layout"], settings)]
    frames = json.dumps(figure.get("frames", []))
    script = f"Plotly.newPlot({name!r}, {', '.join(parts)}).then(g => Plotly.addFrames(g, {frames}))"
    script = f'window.addEventListener("load", () => {script});'  # plotly.js is loaded at the end of the page
    script = script.replace("</", "<\\/")  # no text in a figure ends the script
    return f'<div id="{name}" class="plotly"></div><script>{script}</script>'


def page(notebook: dict[str, Any], stem: str) -> dict[str, Any]:
    """The notebook with its figures as HTML."""
    number = 0
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if FIGURE in data:
                number += 1
                output["data"] = {"text/html": drawn(data[FIGURE], f"figure-{stem}-{number}")}
    return notebook


def make_pages(app: Any) -> None:
    """Write the pages before Sphinx looks for its sources; one that hasn't changed is left alone."""
    PAGES.mkdir(exist_ok=True)
    for source in sorted(SOURCES.glob("[0-9]*.ipynb")):
        text = json.dumps(page(json.loads(source.read_text(encoding="utf-8")), source.stem))
        target = PAGES / source.name
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def link_script(app: Any, pagename: str, template: str, context: Any, doctree: Any) -> None:
    """Load plotly.js, on the notebooks' pages only."""
    if pagename.startswith("notebooks/"):
        app.add_js_file(SCRIPT)


def write_script(app: Any, error: Exception | None) -> None:
    """Put plotly.js where the pages look for it."""
    static = Path(app.outdir) / "_static"
    if error is None and static.is_dir():
        (static / SCRIPT).write_text(get_plotlyjs(), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("builder-inited", make_pages, priority=1)
    app.connect("html-page-context", link_script)
    app.connect("build-finished", write_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
