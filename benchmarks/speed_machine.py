"""What the machine can do, and where our time goes: the limits and the profile of ``speed.py``."""

import os
import platform
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

GROUPS = {
    "attention products": r"scaled_dot_product|flash_attention|bmm|baddbmm",
    "matrix products": r"addmm|aten::mm$|aten::mv|linear|mkldnn|mkl",
    "sampling": r"topk|sort|cumsum|multinomial|aten::gather|isin|exponential",
}
"""Operators by what they are for; the rest is norms, rotary embeddings, activations, sums and copies."""


def facts(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    root = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True).stdout.strip()

    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens", "numpy")},
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "sims_lens") else ""),
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def shapes(config: dict[str, Any]) -> dict[tuple[int, int], int]:
    """(in, out) of every matrix product of a Llama-shaped model, for one token, and how many there are of it."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    block = [(width, queries), (width, keys), (width, keys), (queries, width), *2 * [(width, inner)], (inner, width)]
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for shape in block:
        counts[shape] += config["num_hidden_layers"]
    counts[width, config["vocab_size"]] += 1
    return dict(counts)


def limits(config: dict[str, Any], *, rows: list[int], seconds: float, device: str) -> dict[str, Any]:
    """Memory bandwidth, and the time of all of a decoding step's matrix products, plain and prepacked.

    Every weight of the model is there once, so that it comes from memory as it does in a model.

    Args:
        config: of the model.
        rows: batch sizes.
        seconds: how long to measure each thing.
        device: where.
    """
    big = torch.ones(2**27, device=device)
    bandwidth = big.nbytes / _median(big.sum, seconds, device)
    del big
    each = [shape for shape, count in shapes(config).items() for _ in range(count)]
    numbers = sum(n_in * n_out for n_in, n_out in each)
    products = []
    for name in ("float32", "bfloat16"):
        kind = getattr(torch, name)
        weights = [torch.randn(n_out, n_in, device=device).to(kind) for n_in, n_out in each]
        for row in rows:
            inputs = {n_in: torch.randn(row, n_in, device=device).to(kind) for n_in, _ in each}
            step = {"plain": _median(_plain(weights, inputs), seconds, device)}
            if device == "cpu" and torch.backends.mkldnn.is_available():
                step["prepacked"] = _median(_prepacked(weights, inputs, row), seconds, device)
            best = min(step.values())
            products.append(
                {
                    "dtype": name,
                    "rows": row,
                    **{f"{how}_ms": 1000 * spent for how, spent in step.items()},
                    "gflops": 2 * row * numbers / best / 1e9,
                    "tokens_per_second": row / best,
                    "bandwidth_tokens_per_second": row * bandwidth / (numbers * torch.finfo(kind).bits / 8),
                }
            )
    return {"bandwidth_gb_per_second": bandwidth / 1e9, "weights": numbers, "products": products}


def _plain(weights: list[Tensor], inputs: dict[int, Tensor]) -> Callable[[], Any]:
    return lambda: [linear(inputs[weight.shape[1]], weight) for weight in weights]


def _prepacked(weights: list[Tensor], inputs: dict[int, Tensor], rows: int) -> Callable[[], Any]:
    """The products with oneDNN's own layout of the weights."""
    mkldnn: Any = torch.ops.mkldnn
    packed = [(mkldnn._reorder_linear_weight(weight, rows), inputs[weight.shape[1]]) for weight in weights]
    return lambda: [mkldnn._linear_pointwise(x, weight, None, "none", [], "") for weight, x in packed]


def _median(call: Callable[[], Any], seconds: float, device: str) -> float:
    """The median time of a call, over as many as fit."""
    times = []
    call()
    while sum(times) < seconds or len(times) < 3:
        start = clock(device)
        call()
        times.append(clock(device) - start)
    return sorted(times)[len(times) // 2]


def clock(device: str) -> float:
    """Seconds: of the CPU, so that other processes don't count, or on the wall of a GPU that has nothing left to do."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def profiled(call: Callable[[], Any]) -> dict[str, Any]:
    """Shares of the time of operators by group, and the longest of them."""
    gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=kinds) as profile:
        start = time.process_time()
        call()
        total = time.process_time() - start
    spent = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6 for e in profile.key_averages()}
    groups = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for name, seconds in spent.items():
        groups[next((g for g, pattern in GROUPS.items() if re.search(pattern, name)), "the rest")] += seconds
    everything = sum(spent.values())
    longest = sorted(spent.items(), key=lambda item: -item[1])[:12]
    return {
        "seconds": total,
        "shares": {name: seconds / everything for name, seconds in groups.items()},
        "longest": {name: seconds / everything for name, seconds in longest},
    }
