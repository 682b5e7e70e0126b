"""Actors on a real Ray: the same samples, whoever is lost meanwhile. Slow: Ray takes its time to start.

Where Ray is not installed, nothing runs here; what actors do is tested without it, in ``test_actors.py``.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from common import plan_of, random_rows

import sims_lens as sims
from sims_lens.data import Sample
from sims_lens.errors import ModelError, PlanError, SamplerError
from sims_lens.plan import NOTHING
from sims_lens.scale import Actors, DataActors, KeptActors

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its processes to the operating system
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = sims.SamplingConfig(responses=2, max_new_tokens=8)
LONG = sims.SamplingConfig(responses=8, max_new_tokens=60)
WORDS = ("sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf")
PROMPTS = [f"Say {word}." for word in WORDS]
MANY = [f"Say {word} {count} times." for word in WORDS for count in range(2, 14)]
PLAN = plan_of(1, coefficient=3.0)
POOLS = pytest.mark.parametrize("pool", [KeptActors, DataActors])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module", autouse=True)
def settings() -> None:
    """A machine that does other things as well, where Ray's processes would otherwise come last."""
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def ordered(samples: Any) -> list[Sample]:
    return sorted(samples, key=lambda sample: (sample.prompt, sample.draw))


def workers(name: str) -> list[int]:
    """Processes of Ray's, on this machine and begun from here, that hold an actor of some class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


class Killer(threading.Thread):
    """Kills a process at random instants, so many times, while something runs."""

    def __init__(self, find: Callable[[], Sequence[int]], times: int, *, seed: int) -> None:
        super().__init__(daemon=True)
        self.find, self.times, self.random = find, times, random.Random(seed)
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.times and not self.over.wait(self.random.uniform(0.05, 0.5)):
            victims = [pid for pid in self.find() if pid not in self.killed]
            if victims:
                self.killed.append(self.random.choice(victims))
                os.kill(self.killed[-1], signal.SIGKILL)


@pytest.mark.usefixtures("cluster")
class TestOneMachine:
    @POOLS
    def test_samples_are_bit_for_bit_those_of_the_local_sampler(self, folder: Path, pool: Any) -> None:
        local = sims.LocalSampler(sims.load(folder), CONFIG)
        with sims.RaySampler(folder, CONFIG, batch_rows=3, pool=pool) as sampler:
            asked: dict[str, Any] = {"n": 2, "plan": PLAN, "seed": 7}
            assert ordered(sampler.sample(PROMPTS, **asked)) == ordered(local.sample(PROMPTS, **asked))
            assert sampler.count.decode > 0
            with pytest.raises(PlanError):
                list(sampler.sample(PROMPTS, n=1, plan=plan_of(40), seed=0))

    def test_a_loop_is_the_same_file_for_file(self, folder: Path, tmp_path: Path) -> None:
        config = sims.SIMSConfig(
            iterations=2,
            sampling=CONFIG,
            ranking=sims.RankingConfig(audit="off"),
            steering=sims.SteeringConfig(layers=(1,), strength=0.3),
            evaluation=sims.EvaluationConfig(samples=2, controls=1),
            guard=sims.GuardConfig(mode="report"),
        )

        def letters(prompt: str, responses: Sequence[str]) -> list[float]:
            return [float(sum(map(ord, response)) % 101) for response in responses]

        model, runs = sims.load(folder), []
        with sims.RaySampler(folder, config.sampling, batch_rows=4) as sampler:
            for name, engine in (("local", None), ("ray", sampler)):
                out = tmp_path / name
                runs.append(
                    sims.improve(model, PROMPTS, ranker=letters, config=config, out=out, sampler=engine, progress=False)
                )
        names = [f"iterations/0{i}/{name}" for i in (1, 2) for name in ("samples.jsonl", "heldout.jsonl")]
        for name in [*names, "iterations/02/plan.safetensors"]:
            one, other = ((run.path / name).read_bytes() for run in runs)
            assert one == other, name

    @pytest.mark.parametrize(("pool", "name"), [(KeptActors, "_Host"), (DataActors, "MapWorker")])
    def test_three_actors_are_killed(self, folder: Path, pool: Any, name: str) -> None:
        want = ordered(sims.LocalSampler(sims.load(folder), LONG).sample(MANY, n=8, plan=PLAN, seed=1))
        with sims.RaySampler(folder, LONG, batch_rows=8, pool=pool, actors=Actors(2, tries=8)) as sampler:
            found: list[Sample] = []
            killer = Killer(lambda: workers(name), 3, seed=4)
            for sample in sampler.sample(MANY, n=8, plan=PLAN, seed=1):
                if not found:
                    killer.start()
                found.append(sample)
                if len(killer.killed) < 3:
                    time.sleep(0.02)  # or a tiny model is done before anything is lost
            killer.over.set()
            killer.join()
            assert len(killer.killed) == 3
            assert ordered(found) == want
            assert pool is DataActors or sampler.lost == 3

    def test_an_actor_that_is_ended_for_good_is_replaced(self, folder: Path) -> None:
        with sims.RaySampler(folder, CONFIG, batch_rows=2) as sampler:
            first = ordered(sampler.sample(PROMPTS, n=2, plan=NOTHING, seed=1))
            ray.kill(next(iter(sampler._pool._up)))  # type: ignore[attr-defined]
            assert ordered(sampler.sample(PROMPTS, n=2, plan=NOTHING, seed=1)) == first

    def test_a_batch_that_always_ends_its_actor_is_given_up(self) -> None:
        class Mortal:
            def answer(self, question: Any) -> Any:
                os._exit(1)

        pool = KeptActors(Mortal, Actors(1, tries=2))
        with pytest.raises(SamplerError, match="lost its actor 2 times"):
            list(pool.ask([1]))
        pool.close()

    @POOLS
    def test_a_model_that_is_not_there_is_said(self, tmp_path: Path, pool: Any) -> None:
        with (
            sims.RaySampler(tmp_path / "none", CONFIG, pool=pool) as sampler,
            pytest.raises((ModelError, SamplerError), match="none"),
        ):
            list(sampler.sample(PROMPTS, n=1, plan=NOTHING, seed=0))

    def test_more_than_the_cluster_has_is_refused(self, folder: Path) -> None:
        sampler = sims.RaySampler(folder, CONFIG, actors=Actors(1, cpus=64))
        with pytest.raises(SamplerError, match="64 CPU"):
            list(sampler.sample(PROMPTS, n=1, plan=NOTHING, seed=0))

    def test_merged_moments_are_those_of_one_process(self, folder: Path) -> None:
        positive = random_rows([(3 + i % 5, 2 + i % 7) for i in range(50)])
        negative = random_rows([(3 + i % 5, 3 + i % 4) for i in range(50)])
        model = sims.load(folder)
        with sims.steering(model, PLAN):
            whole = sims.capture_moments(model, positive, negative)["resid_post"].moments
        with sims.RaySampler(folder, CONFIG) as sampler:
            parts = [
                sampler.capture_moments(positive, negative, plan=PLAN, batch_pairs=size)["resid_post"]
                for size in (3, 3, 20)
            ]
        for found in parts:
            for one, other in zip(
                (found.positive, found.negative, found.difference),
                (whole.positive, whole.negative, whole.difference),
                strict=True,
            ):
                assert one.count == other.count == 50
                torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(one.variance, other.variance, rtol=1e-6, atol=1e-6)
        assert torch.equal(parts[0].difference.mean, parts[1].difference.mean)

    def test_judging(self) -> None:
        def brevity(prompt: str, responses: Sequence[str]) -> list[float]:
            return [-len(response) - float(prompt[1:]) for response in responses]

        items = [(f"p{i}", ["a" * k for k in range(1 + i % 3)]) for i in range(20)]
        with sims.RayRanker(brevity, batch_prompts=3) as ranker:
            assert ranker.rank_all(items) == [tuple(brevity(p, r)) for p, r in items]

    def test_a_stream_over_actors(self, folder: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"n": 2, "plan": PLAN, "shard_prompts": 5, "progress": False}
        with sims.RaySampler(folder, CONFIG) as sampler:
            done = sims.stream(sampler, MANY, tmp_path / "ray", **options)
        whole = sims.stream(sims.LocalSampler(sims.load(folder), CONFIG), MANY, tmp_path / "local", **options)
        assert done.samples == whole.samples == 2 * len(MANY)
        assert list(sims.read_stream(done.path)) == list(sims.read_stream(whole.path))


def test_a_node_is_removed(folder: Path) -> None:
    from ray.cluster_utils import Cluster

    ray.shutdown()
    many = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = many.add_node(num_cpus=1)
        ray.init(address=many.address, log_to_driver=False)
        want = ordered(sims.LocalSampler(sims.load(folder), LONG).sample(MANY, n=8, plan=PLAN, seed=1))
        with sims.RaySampler(folder, LONG, batch_rows=8) as sampler:
            found: list[Sample] = []
            removed = False
            for sample in sampler.sample(MANY, n=8, plan=PLAN, seed=1):
                found.append(sample)
                if not removed and len(sampler._pool.pids) == 2:  # type: ignore[attr-defined]
                    many.remove_node(node, allow_graceful=False)
                    removed = True
                time.sleep(0.0 if removed else 0.05)
            assert removed and sampler.lost == 1
            assert ordered(found) == want
    finally:
        ray.shutdown()
        many.shutdown()
