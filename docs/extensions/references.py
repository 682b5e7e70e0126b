"""References of docstrings, which name a thing by the module that it is in or by its own name alone.

The reference documents public names where users find them (``sims_lens.Run``); a docstring may say
``sims_lens.run.Run`` or ``Run``. What belongs to other packages is shown as it is: the site is built without a network.
"""

import pkgutil
from typing import Any

from docutils import nodes
from sphinx.util.nodes import make_refnode


def resolve(app: Any, env: Any, node: Any, content: nodes.Element) -> nodes.Node | None:
    """The link to what the reference means, or its text where it is not ours or is internal."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    if "." in target and not target.startswith("sims_lens."):
        return content
    known = env.domains["py"].objects
    parts = target.split(".")
    for count in (2, 1):
        ending = "." + ".".join(parts[-count:])
        found = sorted(name for name in known if name.endswith(ending))
        if found:
            page, anchor = known[found[0]].docname, known[found[0]].node_id
            return make_refnode(app.builder, node["refdoc"], page, anchor, content, found[0])
    return content if "." not in target or exists(target) else None


def exists(target: str) -> bool:
    """Whether there is such a module, or such a thing in one; a slip in a docstring is to be warned of.

    >>> exists("sims_lens.plan.SteeringPlan.load"), exists("sims_lens.plan.SteringPlan")
    (True, False)
    """
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
