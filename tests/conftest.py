"""Tiny models of every architecture and both kinds, made once; each test must give them back as it got them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import tiny
import torch
from common import KINDS, fingerprint

import sims_lens as sims

torch.set_num_threads(1)

Load = Callable[..., Any]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """``fresh(architecture, kind, **options)`` loads a tiny model that no other test sees."""
    folder = tmp_path_factory.mktemp("tiny")

    def load(architecture: str, kind: str, **options: Any) -> Any:
        checkpoint: Path = folder / f"tiny-{architecture}"
        if not checkpoint.exists():
            tiny.write(architecture, checkpoint)
        return sims.load(checkpoint, kind=kind, **options)

    return load


@pytest.fixture(scope="session")
def zoo(fresh: Load) -> Load:
    """``zoo(architecture, kind)`` is a tiny model shared by the whole session: leave it as it was."""
    shared: dict[tuple[str, str], Any] = {}

    def get(architecture: str, kind: str) -> Any:
        if (architecture, kind) not in shared:
            new = shared[architecture, kind] = fresh(architecture, kind)
            new.run_with_cache(torch.arange(8)[None])  # where TransformerLens and transformers keep things of their own
            new.generate(torch.arange(8)[None], max_new_tokens=2, verbose=False)
        return shared[architecture, kind]

    return get


def untouched(model: Any) -> Iterator[Any]:
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before, "the test has left something on the shared model"


@pytest.fixture(params=[f"{name}-{kind}" for name in tiny.ARCHITECTURES for kind in KINDS])
def model(request: pytest.FixtureRequest, zoo: Load) -> Iterator[Any]:
    """Every architecture as every kind."""
    yield from untouched(zoo(*request.param.split("-")))


@pytest.fixture(params=KINDS)
def llama(request: pytest.FixtureRequest, zoo: Load) -> Iterator[Any]:
    """One architecture as every kind, where the architecture makes no difference."""
    yield from untouched(zoo("llama", request.param))


@pytest.fixture(params=tiny.ARCHITECTURES)
def pair(request: pytest.FixtureRequest, zoo: Load) -> tuple[Any, Any]:
    """The same weights as both kinds."""
    if "hooked" not in KINDS:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    return zoo(request.param, "hooked"), zoo(request.param, "bridge")


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded model, of the default kind: for the few tests that need a real one."""
    return sims.load("embedded")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without run-time type checks: what a user sees who passes a value of the wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
