"""Rankers: what decides which of a model's responses is better.

Pass a function, a reward function or an object with ``.rank`` (see :func:`as_ranker`); names are for the command line.
"""

from collections.abc import Callable
from importlib import import_module

from sims_lens.errors import RankerError
from sims_lens.rankers.base import CheckedRanker, Ranker, as_ranker, bound_ranker, rank
from sims_lens.rankers.cache import CachedRanker
from sims_lens.rankers.endpoint import EndpointJudge
from sims_lens.rankers.ensemble import Ensemble
from sims_lens.rankers.oracles import ReadingEase, Vader, reading_ease
from sims_lens.rankers.pairrm import PairRM
from sims_lens.rankers.recorded import RecordedRanker
from sims_lens.rankers.reward_model import RewardModel

__all__ = [
    "RANKERS",
    "CachedRanker",
    "CheckedRanker",
    "EndpointJudge",
    "Ensemble",
    "PairRM",
    "Ranker",
    "RecordedRanker",
    "ReadingEase",
    "RewardModel",
    "Vader",
    "as_ranker",
    "bound_ranker",
    "get_ranker",
    "rank",
    "reading_ease",
]


def _self_judge() -> Ranker:
    from sims_lens.rankers.self_judge import SelfJudge  # needs torch, which the other names don't

    return SelfJudge()


RANKERS: dict[str, Callable[[], Ranker]] = {
    "reading-ease": ReadingEase,
    "self": _self_judge,
    "vader": Vader,
}
"""What the command line calls each ranker, and what makes it."""


def get_ranker(name: str) -> CheckedRanker:
    """Look a ranker up by name, or import one.

    Args:
        name: a key of :data:`RANKERS`, or ``package.module:function`` for one of your own: a function, an object, or a
            class that needs no arguments. The module is imported as Python would, so its folder must be on the path.

    Returns:
        The ranker, with checked scores.

    Raises:
        RankerError: there is no such name, module or attribute, or what is there isn't a ranker.

    Examples:
        >>> get_ranker("reading-ease").name
        'reading-ease'
    """
    if name in RANKERS:
        return as_ranker(RANKERS[name]())
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise RankerError(
            f"no ranker is called {name!r}; there are {', '.join(sorted(RANKERS))}, "
            "and your own as package.module:function"
        )
    try:
        found: object = import_module(module_name)
    except Exception as error:  # importing runs the user's code, which can raise anything
        raise RankerError(
            f"the ranker {name!r}: importing {module_name!r} raised {type(error).__name__}: {error}; "
            "a module of your own needs its folder on the path, for instance PYTHONPATH=."
        ) from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise RankerError(f"the ranker {name!r}: {module_name} has no {path!r}; check the part after the colon")
        found = getattr(found, attribute)
    if isinstance(found, type):
        try:
            return as_ranker(found())
        except RankerError:
            raise
        except Exception as error:  # the user's constructor, as above
            raise RankerError(
                f"the ranker {name!r}: {path}() raised {type(error).__name__}: {error}; "
                "name a function, or an instance made in the module"
            ) from error
    return as_ranker(found)
