"""Where in a block the residual stream is read and written: names of sites and hook points.

A *site* is one of TransformerLens' canonical places in a block. All four carry ``d_model`` values per token and
agree on ``HookedTransformer`` and ``TransformerBridge``. ``resid_mid`` is left out on purpose: on a bridge an edit
there reaches only the MLP branch, and an *addition* at ``attn_out`` is the same thing on both kinds.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from sims_lens.checks import check_list, one_line, shown
from sims_lens.errors import PlanError

Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]

SITES: tuple[str, ...] = get_args(Site)

STEERING = ".steer_"
"""In the names of the hook points that a plan brings along, and of no other."""


def check_site(site: str) -> None:
    """Raise :class:`PlanError` unless ``site`` is one that can be steered.

    >>> check_site("resid_post")
    """
    if not isinstance(site, str) or site not in SITES:
        hint = "; add at 'attn_out' instead, it is the same thing" if site == "resid_mid" else ""
        raise PlanError(f"site {shown(site)} is not one of {', '.join(SITES)}{hint}")


def check_layer(layer: int, n_layers: int, model_name: str) -> None:
    """Raise :class:`PlanError` unless ``0 <= layer < n_layers``.

    >>> check_layer(3, 4, "tiny")
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise PlanError(
            f"layer {one_line(layer, 60)} is not in 0..{n_layers - 1} of {model_name}; see model.cfg.n_layers"
        )


def check_layers(layers: Sequence[int] | None, n_layers: int, model_name: str) -> tuple[int, ...]:
    """The layers that are meant, in their order and each once; all of them where None.

    Raises:
        PlanError: it is no list of them, or one is not in the model.

    >>> check_layers(None, 2, "tiny"), check_layers([3, 1, 3], 4, "tiny")
    ((0, 1), (3, 1))
    """
    if layers is None:
        return tuple(range(n_layers))
    for layer in check_list("layers", layers, "[17]", PlanError):
        check_layer(layer, n_layers, model_name)
    if not layers:
        raise PlanError(f"layers is empty, {layers!r}; name at least one, or leave it out for all of them")
    return tuple(dict.fromkeys(layers))


def hook_name(layer: int, site: str) -> str:
    """The name of TransformerLens' own hook point at a site.

    >>> hook_name(14, "resid_post")
    'blocks.14.hook_resid_post'
    """
    return f"blocks.{layer}.hook_{site}"


def steer_name(site: str, depth: int = 1) -> str:
    """The name, within its block, of the module that steers a site; nested plans count from 2.

    >>> steer_name("resid_post"), steer_name("resid_post", 2)
    ('steer_resid_post', 'steer_resid_post_2')
    """
    return f"steer_{site}" if depth == 1 else f"steer_{site}_{depth}"
