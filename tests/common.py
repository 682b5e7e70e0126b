"""What several test modules share: kinds of model, random inputs, a fingerprint of what steering could leave."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sims_lens as sims
from sims_lens.sites import SITES

try:
    from transformer_lens import HookedTransformer  # noqa: F401

    KINDS: tuple[str, ...] = ("hooked", "bridge")
except ImportError:  # TransformerLens 4
    KINDS = ("bridge",)

D_MODEL = 32

__all__ = [
    "D_MODEL",
    "KINDS",
    "SITES",
    "difference",
    "everything",
    "fingerprint",
    "log_probs",
    "plan_of",
    "random_rows",
    "random_tokens",
    "vector",
]


def log_probs(logits: Tensor) -> Tensor:
    return logits.detach().float().log_softmax(-1)


def difference(left: Tensor, right: Tensor) -> float:
    """The largest difference between two logits' log-probabilities."""
    return float((log_probs(left) - log_probs(right)).abs().max())


def vector(seed: int = 0, *, size: int = D_MODEL) -> Tensor:
    """A random direction: a constant one would vanish in a LayerNorm."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_tokens(batch: int = 2, width: int = 9, *, seed: int = 0) -> Tensor:
    """Token ids that no tiny tokenizer takes for special ones."""
    return torch.randint(10, 250, (batch, width), generator=torch.Generator().manual_seed(seed))


def random_rows(lengths: Sequence[tuple[int, int]]) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of the given lengths."""
    return [
        (random_tokens(1, prompt, seed=2 * i)[0].tolist(), random_tokens(1, response, seed=2 * i + 1)[0].tolist())
        for i, (prompt, response) in enumerate(lengths)
    ]


def plan_of(*layers: int, seed: int = 0, **options: Any) -> sims.SteeringPlan:
    """A plan that adds a random vector at each layer, at every token unless told otherwise."""
    vectors = {layer: vector(seed + layer) for layer in layers}
    return sims.SteeringPlan.addition(vectors, **{"coefficient": 2.0, "scope": "all", **options})


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything about a model that attaching and detaching must leave alone, to be compared with ``==``."""
    modules = dict(model.named_modules())
    return {
        "hook names": list(model.hook_dict.items()),
        "hooks": {name: (list(p.fwd_hooks), list(p.bwd_hooks), dict(p.ctx)) for name, p in model.hook_dict.items()},
        "modules": {name: (module, module.training) for name, module in modules.items()},
        "torch hooks": {
            (name, key): list(value.items()) if isinstance(value, dict) else list(value)
            for name, module in modules.items()
            for key, value in vars(module).items()
            if key.endswith(("_hooks", "_hooks_with_kwargs")) and value
        },
        "weights": {
            name: (id(value), value._version, value.requires_grad, id(value.grad) if value.grad is not None else None)
            for name, value in model.named_parameters()
        },
        "replaced": {name: sorted(set(vars(m)) & {"forward", "generate"}) for name, m in modules.items()},
        "buffers": [name for name, _ in model.named_buffers()],
        "state": list(model.state_dict()),
        "attributes": {key: dict(value) if isinstance(value, dict) else value for key, value in vars(model).items()},
    }


def everything(model: Any) -> dict[str, Any]:
    """The model's fingerprint and PyTorch's and Python's own settings, to be compared with ``==``."""
    return fingerprint(model) | {
        "random state": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "hooks on all modules": [
            dict(getattr(torch.nn.modules.module, f"_global_{what}"))
            for what in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
        ],
        "warnings": list(warnings.filters),
        "logging": (logging.getLogger("sims_lens").level, list(logging.getLogger("sims_lens").handlers)),
    }
