"""What a ranker is, and the one place where its scores are checked.

A ranker scores the responses to one prompt, higher for better. It can be a plain function ``f(prompt, responses)``, an
object with a method ``rank(prompt, responses)``, or a reward function as trainers have them,
``f(prompts=..., completions=...)``. :func:`as_ranker` makes all three look the same and lets no bad score through.

What else a ranker may have, and keeps when it is checked: ``rank_all(items)`` for many prompts in one go (checked like
``rank``), and the attributes in :data:`KEPT`.
"""

import inspect
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any, Final, Protocol, runtime_checkable

from sims_lens.checks import one_line
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import RankerError
from sims_lens.prompts import quote

KEPT: Final = ("bind", "count", "keep", "matrix", "pointwise", "settings", "steered", "uncached")
"""What a checked ranker hands through from the user's object, where that has it.

``matrix(prompt, responses)`` has P(i better than j | i shown first) in row i, column j; ``count`` what the ranker has
spent, with tokens under ``prefill`` and ``decode``; ``pointwise`` whether a response's score depends on no other
response; ``settings`` what, beside the name, its scores depend on; ``steered`` whether it judges with the steered
model; ``bind(...)`` makes it judge with a given one; ``uncached()`` gives the ranker that answers anew each time;
``keep(known, tell)`` is a ``with`` block inside which the single answers that a verdict is made of are told,
``tell(key, answer)``, and those in ``known`` aren't asked for.
"""

Item = tuple[str, Sequence[str]]
"""A prompt and the responses to it."""


@runtime_checkable
class Ranker(Protocol):
    """Something that scores responses. No inheritance is needed."""

    @property
    def name(self) -> str:
        """A short name, for messages and for the record of a run."""
        ...

    def rank(self, prompt: str, responses: Sequence[str]) -> Sequence[float]:
        """Score the responses to one prompt.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            One finite score for each response, in their order, higher for better.
        """
        ...


@dataclass(frozen=True)
class CheckedRanker:
    """A ranker whose scores are checked; made by :func:`as_ranker`.

    Args:
        name: the name in messages and in the record of a run.
        score: the user's function, called with the prompt and a list of responses of its own.
        inner: what the user passed, for ``rank_all`` and the attributes in :data:`KEPT`.
    """

    name: str
    score: Callable[[str, list[str]], object]
    inner: object = field(default=None, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        if name not in KEPT:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.inner, name)
        return partial(_bind, self.inner) if name == "bind" else found

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score the responses to one prompt.

        Args:
            prompt: what was asked.
            responses: what was answered; for no response nothing is called.

        Returns:
            One finite float for each response, in their order, higher for better.

        Raises:
            RankerError: ``responses`` is a bare string, the user's function raised, or what it returned isn't one
                finite number per response.
        """
        where = self._where(prompt, responses)
        if not responses:
            return ()
        result = self._call(where, self.score, prompt, list(responses))
        return _checked(where, result, len(responses))

    def rank_all(self, items: Sequence[Item]) -> list[tuple[float, ...]]:
        """Score the responses to many prompts, in one go where the user's object has a ``rank_all`` of its own.

        Args:
            items: pairs of a prompt and the responses to it.

        Returns:
            What :meth:`rank` returns, for each item in their order.

        Raises:
            RankerError: as for :meth:`rank`; or the user's ``rank_all`` returned something else than one list of
                scores per item.
        """
        together = getattr(self.inner, "rank_all", None)
        if not callable(together):
            return [self.rank(prompt, responses) for prompt, responses in items]
        places = [self._where(prompt, responses) for prompt, responses in items]
        asked = [index for index, (_, responses) in enumerate(items) if responses]
        found: list[tuple[float, ...]] = [()] * len(items)
        if not asked:
            return found
        where = f"ranker {self.name!r} on {_counted(len(asked), 'prompt')}"
        result = _plain(self._call(where, together, [(items[index][0], list(items[index][1])) for index in asked]))
        if not isinstance(result, Sequence) or isinstance(result, (str, bytes)) or len(result) != len(asked):
            raise RankerError(f"{where} returned {reprlib.repr(result)}; return one list of scores per prompt")
        for index, scores in zip(asked, result, strict=True):
            found[index] = _checked(places[index], scores, len(items[index][1]))
        return found

    def _where(self, prompt: str, responses: object) -> str:
        where = f"ranker {self.name!r} on the prompt {quote(prompt)}"
        if isinstance(responses, str):
            raise RankerError(f"{where}: the responses are the bare string {quote(responses)}; wrap it in a list")
        return where

    @staticmethod
    def _call(where: str, function: Callable[..., object], *args: object) -> object:
        try:
            return function(*args)
        except RankerError:
            raise
        except Exception as error:  # whatever a user's function raises is reported as the ranker's failure
            raise RankerError(f"{where} raised {type(error).__name__}: {one_line(error, 160)}") from error


def as_ranker(ranker: object) -> CheckedRanker:
    """Give a ranker of any accepted shape a name and checked scores.

    The shapes are: an object with a method ``rank(prompt, responses)``; a reward function with keyword parameters
    ``prompts`` and ``completions`` (lists of equal length; ``prompts`` may be left to its ``**kwargs``); any other
    callable, called as ``f(prompt, responses)``. The name is the object's ``name``, else its ``__name__``, else that of
    its class. A ranker that is checked already is returned as it is.

    Args:
        ranker: the function or object.

    Returns:
        A ranker that returns tuples of finite floats, or raises :class:`~sims_lens.errors.RankerError`.

    Raises:
        RankerError: ``ranker`` isn't of one of the shapes.

    Examples:
        >>> def brevity(prompt, responses):
        ...     return [-len(response) for response in responses]
        >>> as_ranker(brevity).rank("Hi?", ["Hello!", "Hi"])
        (-6.0, -2.0)
    """
    if isinstance(ranker, CheckedRanker):
        return ranker
    name = _name(ranker)
    if isinstance(ranker, type):
        raise RankerError(f"the ranker {name} is a class; pass an instance of it, such as {name}()")
    if isinstance(ranker, str):
        raise RankerError(f"the ranker {ranker!r} is a string; rankers.get_ranker({ranker!r}) looks a name up")
    method = getattr(ranker, "rank", None)
    call = method if callable(method) else ranker
    if not callable(call):
        raise RankerError(
            f"a ranker is a function of (prompt, responses) or has a method rank(prompt, responses); "
            f"{reprlib.repr(ranker)} is neither"
        )
    if inspect.iscoroutinefunction(call):
        raise RankerError(f"the ranker {name!r} is an async function; pass a plain one")
    if _is_reward_function(call):
        _check_callable_with(name, call, prompts=[], completions=[])
        return CheckedRanker(name, partial(_score_as_reward, call), ranker)
    _check_callable_with(name, call, "", [])
    return CheckedRanker(name, call, ranker)


def bound_ranker(ranker: object, model: Any) -> CheckedRanker:
    """The ranker with checked scores; one that judges with a model is given this one."""
    bind = getattr(ranker, "bind", None)
    return as_ranker(bind(model) if callable(bind) else ranker)


def rank(ranker: CheckedRanker, prompts: Sequence[str], samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the ranker's scores, ordered by prompt and draw."""
    groups = by_prompt(samples)
    scores = ranker.rank_all([(prompts[group[0].prompt], [s.text for s in group]) for group in groups])
    return [
        replace(sample, score=score)
        for group, given in zip(groups, scores, strict=True)
        for sample, score in zip(group, given, strict=True)
    ]


def _name(ranker: object) -> str:
    for candidate in (getattr(ranker, "name", None), getattr(ranker, "__name__", None)):
        if isinstance(candidate, str) and candidate:
            return candidate
    return type(ranker).__name__


def _signature(call: Callable[..., object]) -> inspect.Signature | None:
    """Read a signature; some built-in functions have none."""
    try:
        return inspect.signature(call)
    except (TypeError, ValueError):
        return None


def _is_reward_function(call: Callable[..., object]) -> bool:
    signature = _signature(call)
    if signature is None:
        return False
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
    return kinds.get("completions") in keyword and (kinds.get("prompts") in keyword or takes_any)


def _check_callable_with(name: str, call: Callable[..., object], *args: object, **kwargs: object) -> None:
    """Bind the arguments without calling, so that a wrong shape fails before anything is sampled."""
    signature = _signature(call)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise RankerError(
            f"the ranker {name!r} with the parameters {signature} cannot be called ({error}); "
            "make it f(prompt, responses) or f(prompts=, completions=), with a default for every other parameter"
        ) from error


def _score_as_reward(call: Callable[..., object], prompt: str, responses: list[str]) -> object:
    return call(prompts=[prompt] * len(responses), completions=responses)


def _bind(inner: Any, *args: object, **kwargs: object) -> CheckedRanker:
    """Bind the user's ranker and check the bound one; a ``bind`` that returns nothing has bound the ranker itself."""
    bound = inner.bind(*args, **kwargs)
    return as_ranker(inner if bound is None else bound)


def _checked(where: str, result: object, count: int) -> tuple[float, ...]:
    try:
        return _finite_scores(result, count)
    except RankerError as error:
        raise RankerError(f"{where} {error}; return one finite number per response, in their order") from None


def _finite_scores(result: object, count: int) -> tuple[float, ...]:
    """Turn what a ranker returned into floats; the message of the error goes on from "the ranker ..."."""
    values = _plain(result)
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        raise RankerError(f"returned {reprlib.repr(result)}, which is not a list")
    if len(values) != count:
        counts = f"{_counted(len(values), 'score')} for {_counted(count, 'response')}"
        raise RankerError(f"returned {counts}: {reprlib.repr(values)}")
    scores = []
    for index, value in enumerate(map(_plain, values)):
        if not isinstance(value, Real):
            raise RankerError(f"returned {reprlib.repr(value)} for response {index}, which is not a number")
        try:
            score = float(value)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise RankerError(f"returned {reprlib.repr(value)} for response {index}, which is not finite")
        scores.append(score)
    return tuple(scores)


def _plain(value: object) -> object:
    """Turn an array, tensor or scalar of numpy, torch or pandas into Python numbers, without importing any of them."""
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) else value


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
