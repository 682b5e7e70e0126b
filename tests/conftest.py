"""Tiny models of every architecture and both kinds, made once; each test must give them back as it got them."""

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import tiny
import torch
from common import KINDS, fingerprint

import sims_lens as sims

torch.set_num_threads(1)

Load = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks take minutes each: first, so that no worker waits at the end for the other's."""
    items.sort(key=lambda item: "test_notebooks.py" not in item.nodeid)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """``fresh(architecture, kind, **options)`` loads a tiny model that no other test sees."""
    folder = tmp_path_factory.mktemp("tiny")

    def load(architecture: str, kind: str, **options: Any) -> Any:
        checkpoint = folder / f"tiny-{architecture}"
        if not checkpoint.exists():
            tiny.write(architecture, checkpoint)
        return sims.load(checkpoint, kind=kind, **options)

    return load


class Zoo:
    """``zoo(architecture, kind)`` is a tiny model shared by the whole session: leave it as it was."""

    def __init__(self, fresh: Load) -> None:
        self.fresh = fresh
        self.models: dict[tuple[str, str], Any] = {}

    def __call__(self, architecture: str, kind: str) -> Any:
        if (architecture, kind) not in self.models:
            new = self.models[architecture, kind] = self.fresh(architecture, kind)
            new.run_with_cache(torch.arange(8)[None])  # TransformerLens and transformers keep things of their own
            new.generate(torch.arange(8)[None], max_new_tokens=2, verbose=False)
        return self.models[architecture, kind]

    def lend(self, architecture: str, kind: str) -> Iterator[Any]:
        """The model, for a test that is made to fail if it has left anything on it."""
        model = self(architecture, kind)
        before = fingerprint(model)
        yield model
        if fingerprint(model) != before:
            del self.models[architecture, kind]  # so that no other test fails for it
            pytest.fail("the test has left something on the shared model")


@pytest.fixture(scope="session")
def zoo(fresh: Load) -> Zoo:
    return Zoo(fresh)


@pytest.fixture(params=[f"{name}-{kind}" for name in tiny.ARCHITECTURES for kind in KINDS])
def model(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[Any]:
    """Every architecture as every kind."""
    yield from zoo.lend(*request.param.split("-"))


@pytest.fixture(params=KINDS)
def llama(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[Any]:
    """One architecture as every kind, where the architecture makes no difference."""
    yield from zoo.lend("llama", request.param)


@pytest.fixture(params=tiny.ARCHITECTURES)
def pair(request: pytest.FixtureRequest, zoo: Zoo) -> tuple[Any, Any]:
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
