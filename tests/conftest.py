"""Tiny models of every architecture and both kinds, made once; each test must give them back as it got them."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Types and shapes are checked while the tests run; in the decoding loop that takes more time than the loop itself, so
# there test_shapes.py does it, once. SIMS_LENS_SHAPES=off leaves it out, as `make test-all` does the second time.
LOOP = {"sampling", "twin"}
ROOMS = {path.stem for path in (Path(__file__).parents[1] / "sims_lens").iterdir()} - {"__init__", "__pycache__", "py"}
if os.environ.get("SIMS_LENS_SHAPES") != "off":
    jaxtyping.install_import_hook([f"sims_lens.{room}" for room in sorted(ROOMS - LOOP)], "beartype.beartype")

import tiny  # noqa: E402
import torch  # noqa: E402
from common import KINDS, fingerprint  # noqa: E402

import sims_lens as sims  # noqa: E402

torch.set_num_threads(1)
# A machine that is shared may be busy for longer than hypothesis' 200 ms: that is no failure.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

LONG = {
    "test_actors",
    "test_artifact",
    "test_auditing",
    "test_bad_input",
    "test_bad_input_cli",
    "test_browser",
    "test_calibration",
    "test_cli",
    "test_comparison",
    "test_dpo",
    "test_endurance",
    "test_faults",
    "test_guard",
    "test_harness",
    "test_lab",
    "test_lab_corruption",
    "test_left_as_found",
    "test_loop",
    "test_models",
    "test_notebooks",
    "test_security",
    "test_shapes",
    "test_supervised",
    "test_vllm",
}
"""Files that take more than some seconds however few their cases."""

Load = Callable[..., Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each test, and none that takes many seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The notebooks take minutes each: first, so that no worker waits at the end for the other's."""
    items.sort(key=lambda item: "test_notebooks.py" not in item.nodeid)
    quick = config.getoption("--quick")
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
        if quick and item.path.stem in LONG:
            item.add_marker(pytest.mark.slow)
    for several in cases.values():
        marker = several[0].get_closest_marker("cases")
        wanted = 1 if quick else marker.args[0] if marker is not None else len(several)
        kept = {round((k + 0.5) * len(several) / wanted - 0.5) for k in range(wanted)}
        for k, item in enumerate(several):
            if k not in kept:
                item.add_marker(pytest.mark.slow)


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
