"""Direct preference optimisation on the loop's own pairs: what else one could do with the same responses.

Steering adds a vector to the stream; DPO moves the weights until the better response of each pair has gained in
likelihood over the worse one, held back by beta::

    loss = -log sigmoid(beta * [log p(best) / p0(best) - log p(worst) / p0(worst)])        p0: before training

TRL trains the Hugging Face model whose checkpoint the TransformerLens model was loaded from, on the very token ids that
the loop sampled. What comes out is a TransformerLens model of the same kind, so that it is sampled from and measured as
the model itself is. The model that was given is not touched.

Reference: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290, equation 7); Hu et al. 2021, "LoRA"
    (arXiv 2106.09685).
"""

import copy
import io
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sims_lens.adapter import Adapter, adapt
from sims_lens.checks import check_integer, check_list, check_number, one_line, shown
from sims_lens.cost import Arithmetic, TokenCount
from sims_lens.data import ContrastPair, Sample
from sims_lens.errors import ConfigError, ModelError
from sims_lens.models import checkpoint_of, load, read_checkpoint, write_checkpoint

_SAME = 1e-3
"""Mean difference of log-probabilities, nats, that float32 leaves between a checkpoint and a model made of it."""

_SAME_HALF = 0.3
"""The same where weights have 8 or 11 bits."""


@dataclass(frozen=True)
class DPOConfig:
    """How weights are trained on contrast pairs; for :func:`sims_lens.compare`.

    Args:
        beta: how dearly divergence from the model before training is paid for, per nat; a smaller one lets it go
            further.
        learning_rate: of the first step; it falls linearly to 0. Every weight wants about a tenth of what LoRA does.
        epochs: times that each pair is seen.
        batch: pairs in a step.
        rank: of LoRA, on every linear layer of the blocks, with a scale of 2; None trains every weight.

    Raises:
        ConfigError: a value is out of range.

    >>> DPOConfig(epochs=1).name
    'DPO (beta 0.1, rate 0.0005, 1 epoch, batch 8, rank 16)'
    """

    beta: float = 0.1
    learning_rate: float = 5e-4
    epochs: int = 2
    batch: int = 8
    rank: int | None = 16

    def __post_init__(self) -> None:
        check_number("beta", self.beta, 0.0, open_low=True)
        check_number("learning_rate", self.learning_rate, 0.0, 1.0, open_low=True)
        check_integer("epochs", self.epochs)
        check_integer("batch", self.batch)
        if self.rank is not None:
            check_integer("rank", self.rank)

    @property
    def name(self) -> str:
        """Of the method in a comparison: every choice, so that no two have the same."""
        turns = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}"
        what = "every weight" if self.rank is None else f"rank {self.rank}"
        return f"DPO (beta {self.beta:g}, rate {self.learning_rate:g}, {turns}, batch {self.batch}, {what})"


@dataclass(frozen=True)
class Training:
    """What a training came to.

    Args:
        pairs: that were trained on.
        loss: of the last epoch, averaged; log 2 before the first step.
        accuracy: share of the last epoch's pairs whose better response had gained more than the worse one.
        seconds: of wall-clock time.
        flops: floating-point operations, of :func:`training_flops`.
    """

    pairs: int
    loss: float
    accuracy: float
    seconds: float
    flops: float


def check_dpo(model: Any, configs: object) -> tuple[DPOConfig, ...]:
    """The configs, if the model can be trained with each: known before hours of other work.

    Args:
        model: to be trained a copy of.
        configs: of the trainings; with none nothing is asked of the model.

    Raises:
        ConfigError: something else than distinct configs, or a package is missing.
        ModelError: the model's checkpoint isn't known.
    """
    found = tuple(check_list("dpo", configs, "[DPOConfig()]"))
    for config in found:
        if not isinstance(config, DPOConfig):
            raise ConfigError(f"dpo must be a list such as [DPOConfig()], got {shown(config)} in it")
        for package in ("trl",) + (() if config.rank is None else ("peft",)):
            if find_spec(package) is None:
                other = " (Python 3.11 or newer)" if package == "trl" else ", or train every weight, with rank=None"
                raise ConfigError(f'DPO needs the package {package}: pip install "sims-lens[dpo]"{other}')
    if len({config.name for config in found}) < len(found):
        raise ConfigError(f"the configs of dpo must be distinct, got {shown([config.name for config in found], 200)}")
    if found:
        checkpoint_of(model)
    return found


def tune(
    model: Any, prompts: Sequence[str], pairs: Sequence[ContrastPair], config: DPOConfig, *, seed: int
) -> tuple[Any, Training]:
    """A copy of a model, trained on contrast pairs.

    Args:
        model: loaded with :func:`sims_lens.load`; it stays as it is.
        prompts: those that ``ContrastPair.prompt`` counts.
        pairs: sampled by this model, so that they are trained on as they were drawn, token by token; the token that
            ends a response is one of them where the model ended it itself.
        config: of the training.
        seed: of LoRA's first weights and of the order of the pairs. Random numbers elsewhere stay what they were.

    Returns:
        A model of the same kind on the same device, with its tokenizer, and what the training came to.

    Raises:
        ConfigError: TRL, or PEFT, is missing, or TRL is a version that can't be used.
        ModelError: the model's checkpoint isn't known, or the model isn't what its checkpoint holds.
    """
    check_dpo(model, [config])
    adapter, source = adapt(model), checkpoint_of(model)
    end = _end(adapter)
    rows = [
        {
            "prompt_ids": adapter.encode(prompts[pair.prompt]),
            "chosen_ids": _ended(pair.best, end),
            "rejected_ids": _ended(pair.worst, end),
        }
        for pair in pairs
    ]
    plain = read_checkpoint(source, dtype=adapter.dtype)
    _check_same(adapter, plain, rows[0]["prompt_ids"] + rows[0]["chosen_ids"])
    if config.rank is None:
        plain = plain.float()  # steps of training are smaller than what 8 bits can tell apart
    with _left_as_found(), tempfile.TemporaryDirectory(prefix="sims-dpo-") as temporary:
        trained, training = _train(adapter, plain, rows, config, seed, Path(temporary) / "trainer")
        made = Path(temporary) / "tuned"
        write_checkpoint(trained.to("cpu", adapter.dtype), made, tokenizer_of=source)
        del plain, trained
        kind = "hooked" if adapter.kind == "HookedTransformer" else "bridge"
        tuned = load(made, kind=kind, device=str(adapter.device), dtype=adapter.dtype)
    tuned.tokenizer = model.tokenizer  # prompts become the same tokens, whatever was set on it
    return tuned, training


def training_flops(
    arithmetic: Arithmetic, rows: Sequence[tuple[int, int]], *, epochs: int, adapters: int | None
) -> float:
    """Floating-point operations of a training, padding left out.

    The reference is read once. In each epoch there is a forward pass, the gradient of each activation, which takes as
    much, and that of each weight that is trained: as much again where all are, six operations for each weight of LoRA
    and token in all, its own passes included, where LoRA's are. Distributions are computed at each token, of the prompt
    too, and take three passes in either case: that is how TRL does it (``tests/test_dpo.py`` counts).

    Args:
        arithmetic: of the model.
        rows: tokens of the prompt and of the response, for each response.
        epochs: times that each is seen.
        adapters: weights of LoRA; None where every weight of the model is trained.

    >>> training_flops(Arithmetic(1.0, 0.0, 0.0), [(3, 2)], epochs=1, adapters=None)
    20.0
    """
    tokens = sum(p + r for p, r in rows)
    blocks = arithmetic.flops(TokenCount.forced(p + r for p, r in rows))
    passes = 1 + epochs * (3 if adapters is None else 2)
    head = arithmetic.flops(TokenCount(logits=tokens)) * (1 + 3 * epochs)
    return float(passes * blocks + head + 6.0 * (adapters or 0) * tokens * epochs)


def _end(adapter: Adapter) -> int | None:
    """The token that the model ends a response with: what its chat template writes there, else EOS."""
    eos = adapter.tokenizer.eos_token_id
    return next((token for token in adapter.stop_ids if token != eos), eos)


def _ended(sample: Sample, end: int | None) -> list[int]:
    return [*sample.tokens, end] if sample.ended and end is not None else list(sample.tokens)


def _check_same(adapter: Adapter, plain: Any, tokens: Sequence[int]) -> None:
    """Raise :class:`ModelError` unless the checkpoint still is the model: one could have changed since it was read."""
    ids = torch.tensor([list(tokens)])
    with torch.inference_mode():
        mask = torch.ones_like(ids, dtype=torch.bool, device=adapter.device)
        ours = adapter.logits(ids.to(adapter.device), mask, keep=len(tokens)).float().cpu().log_softmax(-1)
        theirs = plain.eval()(ids).logits.float().log_softmax(-1)
    difference = float((ours - theirs).abs().mean())
    if not difference < (_SAME if adapter.dtype == torch.float32 else _SAME_HALF):
        raise ModelError(
            f"{adapter.name} is not what the checkpoint holds that it was loaded from (log-probabilities differ by "
            f"{difference:.2g} on average), so that DPO would train another model; load it again with sims_lens.load"
        )


def _train(
    adapter: Adapter, plain: Any, rows: list[dict[str, list[int]]], config: DPOConfig, seed: int, folder: Path
) -> tuple[Any, Training]:
    """Train a plain Hugging Face model; what is returned may be the same object, changed."""
    from datasets import Dataset
    from transformers import PrinterCallback

    try:
        from trl import DPOConfig as Arguments
        from trl import DPOTrainer
    except (ImportError, RuntimeError) as error:  # of a part that doesn't go with the other versions at hand
        raise ConfigError(
            f'TRL can\'t be used here ({one_line(error, 120)}): pip install "sims-lens[dpo]" in a new environment'
        ) from error

    class Trainer(DPOTrainer):  # type: ignore[misc]
        """One that takes token ids as they are: text would be tokenised anew, and not always into the same ids."""

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

    on_cpu = adapter.device.type == "cpu"
    steps = -(-len(rows) // config.batch)
    arguments = Arguments(
        output_dir=str(folder),
        beta=config.beta,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch,
        precompute_ref_log_probs=True,  # once, not in each epoch
        max_length=None,
        seed=seed % 2**32,  # what NumPy takes
        use_cpu=on_cpu,
        bf16=not on_cpu and adapter.dtype == torch.bfloat16,
        fp16=not on_cpu and adapter.dtype == torch.float16,
        dataloader_pin_memory=not on_cpu,
        logging_steps=steps,  # one line for each epoch
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # TRL refuses to share a model out among several
    lora = None
    if config.rank is not None:
        from peft import LoraConfig

        lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = copy.deepcopy(adapter.tokenizer)  # it is given a pad token
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # pads are masked: any token will do
    start = time.perf_counter()
    with redirect_stderr(io.StringIO()):  # progress bars
        trainer: Any = Trainer(
            model=plain,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
        held = [{name: row[name] for name in rows[0]} for row in trainer.train_dataset]
        if held != rows:
            from trl import __version__

            raise ConfigError(f'TRL {__version__} changes the token ids that it is given: pip install "sims-lens[dpo]"')
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = time.perf_counter() - start
    trained = trainer.accelerator.unwrap_model(trainer.model)
    adapters = None
    if lora is not None:
        adapters = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        trained = trained.merge_and_unload()
    last = next(line for line in reversed(trainer.state.log_history) if "loss" in line)
    lengths = [(len(row["prompt_ids"]), len(row[side])) for row in rows for side in ("chosen_ids", "rejected_ids")]
    training = Training(
        pairs=len(rows),
        loss=float(last["loss"]),
        accuracy=float(last["rewards/accuracies"]),
        seconds=seconds,
        flops=training_flops(adapter.arithmetic, lengths, epochs=config.epochs, adapters=adapters),
    )
    return trained, training


@contextmanager
def _left_as_found() -> Iterator[None]:
    """Put back what a trainer sets for the whole process: random numbers, and the device that accelerate remembers."""
    from accelerate.state import AcceleratorState, PartialState

    states = random.getstate(), np.random.get_state()
    own = not PartialState._shared_state
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries among themselves
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if own:
            AcceleratorState._reset_state(reset_partial_state=True)


__all__ = ["DPOConfig", "Training", "check_dpo", "training_flops", "tune"]
