"""The fast road: a plain twin of a TransformerLens model, which shares its weights and fires its HookPoints.

A TransformerLens model lets one look into every corner, and pays for it at every forward pass. Where nobody looks, a
plain model with the same weights does the same work in a half to a quarter of the time. :func:`twin_of` makes one,
compares it with the model (log-probabilities, and the stream at every HookPoint that it fires), and says why there is
none where there is none; :func:`road` also looks at what is attached to the model now. A twin is derived from its
model, kept beside it as long as the model lives, and made anew when a weight has changed.
"""

from sims_lens.twin.attached import attached
from sims_lens.twin.attention import Memory, Prefixes, PromptMemory, ResponseMemory, SoloMemory
from sims_lens.twin.base import Cut, Points, Twin, Unsupported
from sims_lens.twin.making import twin_of
from sims_lens.twin.passes import Beside, Bodies, run_prompts, run_responses
from sims_lens.twin.road import Road, response_logits, road, telling

__all__ = [
    "Beside",
    "Bodies",
    "Cut",
    "Memory",
    "Points",
    "Prefixes",
    "PromptMemory",
    "ResponseMemory",
    "Road",
    "SoloMemory",
    "Twin",
    "Unsupported",
    "attached",
    "response_logits",
    "road",
    "run_prompts",
    "run_responses",
    "telling",
    "twin_of",
]
