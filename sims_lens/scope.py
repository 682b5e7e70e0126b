"""Which tokens: one object says it for steering and for capture.

Every token of a sequence lies in one *region*: padding, prompt (all but its last token), the last prompt token,
or response. A :class:`TokenScope` is a set of regions. The last prompt token is a region of its own because it
is the one whose output *produces* the first response token: whether it belongs to "the response" is a choice, and
it is made here, in the open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sims_lens.checks import check_choice
from sims_lens.errors import PlanError

TRACKER = "_sims_lens_tracker"
"""The attribute under which a steered model keeps what knows the regions of its tokens (``hooks.TokenTracker``)."""


class Region(IntEnum):
    """What a token position is. The codes are those of the ``regions`` tensors."""

    PAD = 0
    PROMPT = 1
    LAST_PROMPT = 2
    RESPONSE = 3


@dataclass(frozen=True)
class TokenScope:
    """A set of token regions, for instance ``TokenScope.of("response")``.

    The named scopes:

    ========================  ==================================================================================
    ``"all"``                 every token that is not padding
    ``"prompt"``              the prompt, with its last token
    ``"last_prompt"``         only the last prompt token
    ``"response"``            generated tokens only
    ``"generation"``          last prompt token and response: every position whose output predicts a response
                              token. The default for steering.
    ========================  ==================================================================================

    >>> TokenScope.of("generation")
    TokenScope('generation')
    >>> TokenScope.of("prompt") | TokenScope.of("response") == TokenScope.of("all")
    True
    """

    prompt: bool = False
    last_prompt: bool = False
    response: bool = False

    @classmethod
    def of(cls, scope: "TokenScope | str") -> "TokenScope":
        """The scope of that name; a scope is returned as it is.

        Raises:
            PlanError: there is no scope of that name.
        """
        if isinstance(scope, TokenScope):
            return scope
        return _NAMED[check_choice("scope", scope, tuple(_NAMED), PlanError)]

    def __post_init__(self) -> None:
        if not (self.prompt or self.last_prompt or self.response):
            raise PlanError("a token scope must hold at least one of prompt, last_prompt, response")

    def __or__(self, other: "TokenScope") -> "TokenScope":
        return TokenScope(
            prompt=self.prompt or other.prompt,
            last_prompt=self.last_prompt or other.last_prompt,
            response=self.response or other.response,
        )

    @property
    def name(self) -> str:
        """``"all"``, ``"response"``, ... or the regions joined by ``+``."""
        for name, scope in _NAMED.items():
            if scope == self:
                return name
        return "+".join(name for name in ("prompt", "last_prompt", "response") if getattr(self, name))

    def __repr__(self) -> str:
        return f"TokenScope({self.name!r})"

    def holds(self, region: Region) -> bool:
        """Whether tokens of ``region`` are in the scope. Padding never is."""
        return {
            Region.PAD: False,
            Region.PROMPT: self.prompt,
            Region.LAST_PROMPT: self.last_prompt,
            Region.RESPONSE: self.response,
        }[region]

    def mask(self, regions: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """True where a token is in the scope."""
        table = torch.tensor([self.holds(region) for region in Region], device=regions.device)
        return table[regions]

    def to_json(self) -> dict[str, bool]:
        """A plain dict, the inverse of ``TokenScope(**...)``."""
        return {"prompt": self.prompt, "last_prompt": self.last_prompt, "response": self.response}


_NAMED = {
    "all": TokenScope(prompt=True, last_prompt=True, response=True),
    "prompt": TokenScope(prompt=True, last_prompt=True),
    "last_prompt": TokenScope(last_prompt=True),
    "response": TokenScope(response=True),
    "generation": TokenScope(last_prompt=True, response=True),
}

ALL, PROMPT, LAST_PROMPT, RESPONSE, GENERATION = _NAMED.values()


def left_padded_regions(prompt_lengths: Sequence[int], lengths: Sequence[int], width: int) -> Int[Tensor, "batch pos"]:
    """Regions of left-padded rows: ``width - length`` of padding, the prompt, its last token, the response.

    Args:
        prompt_lengths: tokens of each row that belong to the prompt.
        lengths: tokens of each row, prompt and response.
        width: columns of the batch.

    >>> left_padded_regions([2], [4], 5).tolist()
    [[0, 1, 2, 3, 3]]
    """
    column = torch.arange(width)
    start = width - torch.tensor(list(lengths))[:, None]
    boundary = start + torch.tensor(list(prompt_lengths))[:, None]
    return regions_at(column[None] - start, boundary - start)


def regions_at(position: Int[Tensor, "batch pos"], prompt_length: Int[Tensor, "batch 1"]) -> Int[Tensor, "batch pos"]:
    """Regions from positions counted within each row; a negative position is padding."""
    regions = torch.full_like(position, int(Region.RESPONSE))
    regions = torch.where(position < prompt_length, int(Region.PROMPT), regions)
    regions = torch.where(position == prompt_length - 1, int(Region.LAST_PROMPT), regions)
    return torch.where(position < 0, int(Region.PAD), regions)
