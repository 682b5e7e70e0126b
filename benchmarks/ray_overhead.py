"""What Ray costs, what a second actor gives, and what is left when actors are killed, on the embedded model.

Local sampling and one actor have the same threads (one) and the same batches; start-up is timed apart. Rounds of local,
one actor, and of local and two actors, follow each other, so that a machine with other work slows both. Then, in three
passes, one of two actors is killed (SIGKILL) at a random instant, and what arrives is compared with what the local
sampler drew.

    python benchmarks/ray_overhead.py --prompts 16 --n 4 --tokens 32 --rounds 3 --out docs/data/ray.json
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import sims_lens as sims
from sims_lens.data import Sample
from sims_lens.plan import SteeringPlan
from sims_lens.scale import DataActors, KeptActors


def ordered(samples: list[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: (sample.prompt, sample.draw))


def timed(sampler: Any, prompts: list[str], options: dict[str, Any]) -> tuple[float, list[Sample]]:
    """Seconds, and the samples in order."""
    start = time.perf_counter()
    found = list(sampler.sample(prompts, **options))
    return time.perf_counter() - start, ordered(found)


def busy(pids: list[int]) -> float:
    """Seconds of processor time that this process and some others have had."""
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in [os.getpid(), *pids])


def pids_of(sampler: Any) -> list[int]:
    """Processes of the actors that are up."""
    pool = getattr(sampler, "_pool", None)
    return pool.pids if isinstance(pool, KeptActors) else []


def cores_at_once(seconds: float = 3.0) -> float:
    """How much more two processes get done than one, of products like the model's: what two actors could gain."""
    context = torch.multiprocessing.get_context("spawn")

    def done(count: int) -> int:
        queue = context.Queue()
        processes = [context.Process(target=_products, args=(queue, seconds)) for _ in range(count)]
        for process in processes:
            process.start()
        total = sum(queue.get() for _ in processes)
        for process in processes:
            process.join()
        return total

    return statistics.median(done(2) / done(1) for _ in range(3))


def _products(queue: Any, seconds: float) -> None:
    torch.set_num_threads(1)
    left, right = torch.randn(64, 576), torch.randn(576, 1536)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        left @ right
        count += 1
    queue.put(count)


def killed_once(sampler: sims.RaySampler, wait: float, seed: int, ask: Callable[[], Any]) -> dict[str, Any]:
    """Ask, and kill one of the actors meanwhile, after ``wait`` seconds."""
    pool: Any = sampler._pool
    assert isinstance(pool, KeptActors)
    lost, victims = sampler.lost, pool.pids

    def kill() -> None:
        time.sleep(wait)
        os.kill(random.Random(seed).choice(victims), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    seconds, found = ask()
    over = not killer.is_alive()  # or the pass was over before
    killer.join()
    return {
        "killed_after_s": round(wait, 2),
        "during_the_pass": over,
        "actors": len(victims),
        "lost": sampler.lost - lost,
        "seconds": seconds,
        "rows": len(found),
        "twice": len(found) - len({(s.prompt, s.draw) for s in found}),
        "found": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", action="store_true", help="time Ray Data's actors too, which start for each pass")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)

    os.environ |= {"RAY_worker_niceness": "0"}  # as urgent as what is local
    import ray

    start = time.perf_counter()
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    seconds: dict[str, Any] = {"ray_init": time.perf_counter() - start}
    config = sims.SamplingConfig(max_new_tokens=given.tokens, batch_rows=given.batch_rows)
    prompts = sims.everyday(given.prompts)
    start = time.perf_counter()
    model = sims.load(given.model)
    seconds["load_here"] = time.perf_counter() - start
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    plan = SteeringPlan.addition({model.cfg.n_layers // 2: vector / vector.norm()}, coefficient=5.0)
    options: dict[str, Any] = {"n": given.n, "plan": plan, "seed": 0}
    local = sims.LocalSampler(model, config)
    samplers: dict[str, Any] = {"local": local}
    for count in (1, 2):
        sampler = sims.RaySampler(given.model, config, actors=count, batch_rows=given.batch_rows)
        start = time.perf_counter()
        list(sampler.sample(prompts[:1], n=1, plan=plan, seed=1))
        seconds[f"start_{count}_to_first_sample"] = time.perf_counter() - start
        while len(pids_of(sampler)) < count:
            list(sampler.sample(prompts[:2], n=1, plan=plan, seed=1))
        list(sampler.sample(prompts, n=1, plan=plan, seed=1))  # every actor has its twin then
        samplers[f"actors_{count}"] = sampler
    _, want = timed(local, prompts, options)
    rounds: list[dict[str, Any]] = []
    for number in range(given.rounds):
        row: dict[str, Any] = {"load": round(os.getloadavg()[0], 1)}
        for name, sampler in samplers.items():
            pids = pids_of(sampler)
            before = busy(pids)
            row[name], found = timed(sampler, prompts, options)
            row[f"{name}_cpu"] = busy(pids) - before
            row[f"{name}_same"] = found == want
        rounds.append(row)
        print(f"round {number + 1}:", {k: round(v, 2) for k, v in row.items()}, flush=True)
    samplers["actors_1"].close()

    def ratio(one: str, other: str) -> float:
        return statistics.median(row[one] / row[other] for row in rounds)

    sampler, usual = samplers["actors_2"], statistics.median(row["actors_2"] for row in rounds)
    kills = []
    for seed in range(3):
        while len(pids_of(sampler)) < 2:
            list(sampler.sample(prompts[:4], n=1, plan=plan, seed=1))  # until the one in its place is up
        wait = usual * random.Random(seed).uniform(0.1, 0.9)
        kills.append(killed_once(sampler, wait, seed, lambda: timed(sampler, prompts, options)))
        kills[-1] |= {"rows_wanted": len(want), "bitwise_same": kills[-1].pop("found") == want}
        print(kills[-1], flush=True)
    sampler.close()
    summary = {
        "overhead": ratio("actors_1", "local") - 1,
        "overhead_cpu": ratio("actors_1_cpu", "local_cpu") - 1,
        "one_to_two": ratio("actors_1", "actors_2"),
        "two_processes_to_one": cores_at_once(),
        "bitwise_same": all(row[f"{name}_same"] for row in rounds for name in samplers),
    }
    if given.data:
        with sims.RaySampler(given.model, config, batch_rows=given.batch_rows, pool=DataActors) as sampler:
            seconds["data_pass_with_start"], found = timed(sampler, prompts, options)
            seconds["data_second_pass_with_start"], again = timed(sampler, prompts, options)
            summary["data_bitwise_same"] = found == again == want
    ray.shutdown()
    print(json.dumps(summary | seconds, indent=1))
    if given.out:
        about = {
            "date": time.strftime("%F"),
            "model": given.model,
            "prompts": given.prompts,
            "n": given.n,
            "tokens": given.tokens,
            "batch_rows": given.batch_rows,
            "threads": 1,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("ray", "torch", "transformers", "transformer-lens")},
        }
        data = {"about": about, "summary": summary, "seconds": seconds, "rounds": rounds, "kills": kills}
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
