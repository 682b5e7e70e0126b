"""Which threads hold a model, so that none of them changes it under another's hands.

A plan is attached to a model, and acts on whoever runs it. One thread may attach plans while others run the model with
them; but two threads that attach plans of their own would each get the sum of both, and responses that are drawn while
another thread attaches would be drawn partly with its plan. Both are refused.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from sims_lens.errors import ModelError

_HOLDERS: "WeakKeyDictionary[Any, dict[int, threading.Thread]]" = WeakKeyDictionary()
_LOCK = threading.Lock()


def hold(model: Any, key: int, *, name: str) -> None:
    """This thread has attached something to a model, until :func:`release` is called with the same key.

    Args:
        model: the model.
        key: of this hold.
        name: what the model is called in a message.

    Raises:
        ModelError: another thread holds the model. One that has ended holds nothing.
    """
    me = threading.current_thread()
    with _LOCK:
        holders = _HOLDERS.setdefault(model, {})
        other = next((thread for thread in holders.values() if thread is not me and thread.is_alive()), None)
        if other is not None:
            raise ModelError(
                f"thread {other.name!r} is steering {name} or drawing from it, so thread {me.name!r} can't attach a "
                "plan: wait for it, or give each thread a copy.deepcopy(model)"
            )
        holders[key] = me


def release(model: Any, key: int) -> None:
    """End a hold; from any thread, and any number of times."""
    with _LOCK:
        _HOLDERS.get(model, {}).pop(key, None)


@contextmanager
def holding(model: Any) -> Iterator[None]:
    """Inside, no other thread can attach anything to a model. Several threads may be inside at once."""
    key = object()
    with _LOCK:
        _HOLDERS.setdefault(model, {})[id(key)] = threading.current_thread()
    try:
        yield
    finally:
        release(model, id(key))


__all__ = ["hold", "holding", "release"]
