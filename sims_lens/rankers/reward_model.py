"""A reward model as a ranker: any sequence classifier of the Hugging Face hub that scores an answer to a prompt."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sims_lens.checks import one_line
from sims_lens.errors import RankerError
from sims_lens.rankers.base import Item
from sims_lens.rankers.checkpoint import at_least, device_of, locate, quiet


class RewardModel:
    """Scores each response by a reward model (``AutoModelForSequenceClassification``).

    The model reads the tokenizer's chat template filled with a user's and an assistant's turn, or, where the tokenizer
    has none, the text pair (prompt, response). Text beyond ``max_length`` is cut, and counted in :attr:`truncated`: of
    a chat the beginning goes, since these models read their score off the end; of a text pair the end of the longer
    text.

    Only safetensors are read, and code from a checkpoint is never run. Weights are float32 on a CPU, else of the
    checkpoint's own type. Padding doesn't change a score: where a model has no padding token, an id that is nowhere in
    the batch is taken.

    Args:
        path_or_id: a folder with a checkpoint, or a hub id.
        revision: branch, tag or commit on the hub; only for a hub id.
        device: such as "cpu" or "cuda:0"; by default CUDA where there is one.
        batch: responses per pass.
        max_length: tokens of prompt and response together; by default what the model can read.
        label: the class that means "good", by its name or index, for a classifier with several. With two the second
            one is taken unless told otherwise.

    Attributes:
        name: the hub id, or the folder's name.
        count: what was spent so far: ``calls`` (responses scored), ``prefill`` (tokens read), and how many inputs were
            ``truncated``.

    Raises:
        RankerError: the checkpoint can't be found or read, has no classification head, or ``label`` doesn't fit it.

    Reference:
        With one label the score is its logit; with several it is the log-odds of ``label``,
        ``l_label - logsumexp(l_others)``, which for two labels is the difference of their logits.
    """

    pointwise = True
    judges = True

    def __init__(
        self,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        batch: int = 8,
        max_length: int | None = None,
        label: str | int | None = None,
    ) -> None:
        at_least(1, batch=batch)
        target = device_of(device)
        self._source = locate(path_or_id, revision)
        self.name = self._source.label
        self.count = {"calls": 0, "prefill": 0, "decode": 0, "truncated": 0}
        self._model, self._tokenizer = _read(self._source.folder, target)
        self._batch, self._label = batch, _label(self._model.config, label, self.name)
        longest = _longest(self._model.config, self._tokenizer)
        if max_length is not None:
            at_least(8, max_length=max_length)
            if longest is not None and max_length > longest:
                raise RankerError(f"max_length = {max_length} is more than the {longest} tokens that {self.name} reads")
        self._max_length = max_length or longest
        self._reads = set(inspect.signature(self._model.forward).parameters)

    def __repr__(self) -> str:
        return f"RewardModel({self.name!r})"

    @property
    def truncated(self) -> int:
        """How many inputs were cut, so far."""
        return self.count["truncated"]

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on, beside the texts."""
        return {"model": self._source.identity, "max_length": self._max_length, "label": self._label}

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score the responses to one prompt.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            One score for each response, higher for better, in the model's own units.
        """
        return self.rank_all([(prompt, responses)])[0]

    def rank_all(self, items: Sequence[Item]) -> list[tuple[float, ...]]:
        """Score the responses to many prompts, batched over all of them, texts of like length together.

        Args:
            items: pairs of a prompt and the responses to it.

        Returns:
            The scores of each item's responses.
        """
        texts = [(prompt, response) for prompt, responses in items for response in responses]
        rows = [self._encode(prompt, response) for prompt, response in texts]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self._batch):
            chosen = order[start : start + self._batch]
            for index, score in zip(chosen, self._score([rows[index] for index in chosen]), strict=True):
                scores[index] = score
        self.count["calls"] += len(rows)
        self.count["prefill"] += sum(len(row["input_ids"]) for row in rows)
        found = iter(scores)
        return [tuple(next(found) for _ in responses) for _, responses in items]

    def _encode(self, prompt: str, response: str) -> dict[str, list[int]]:
        """Token ids, and token types where the model knows them, cut to the limit."""
        limit, tokenizer = self._max_length, self._tokenizer
        if tokenizer.chat_template is None:
            row: dict[str, list[int]] = dict(tokenizer(prompt, response))
            if limit is not None and len(row["input_ids"]) > limit:
                self.count["truncated"] += 1
                row = dict(tokenizer(prompt, response, truncation="longest_first", max_length=limit))
            return row
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template is code of the checkpoint's author, run in jinja's sandbox
            raise RankerError(f"the chat template of {self.name} can't be filled ({one_line(error)})") from error
        row = dict(tokenizer(text, add_special_tokens=False))  # the template has them
        if limit is not None and len(row["input_ids"]) > limit:
            self.count["truncated"] += 1
            row = {key: list(values)[-limit:] for key, values in row.items()}
        return row

    def _score(self, rows: Sequence[dict[str, list[int]]]) -> list[float]:
        """One padded pass."""
        import torch

        config = self._model.config.get_text_config()
        pad, before = config.pad_token_id, config.pad_token_id
        if pad is None:  # decoders look for the last token that isn't this one
            used = {token for row in rows for token in row["input_ids"]}
            pad = next(token for token in range(len(used) + 1) if token not in used)
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": pad}
        inputs = {
            key: torch.tensor([row[key] + [fill.get(key, 0)] * (width - len(row[key])) for row in rows])
            for key in rows[0]
            if key in self._reads  # not all that a tokenizer gives: Llama knows no token_type_ids
        }
        try:
            config.pad_token_id = pad
            with torch.inference_mode():
                logits = self._model(**{key: value.to(self._model.device) for key, value in inputs.items()}).logits
        finally:
            config.pad_token_id = before
        logits = logits.float().cpu()
        if self._label is None:
            scores: list[float] = logits[:, 0].tolist()
        else:
            others = [index for index in range(logits.shape[1]) if index != self._label]
            scores = (logits[:, self._label] - logits[:, others].logsumexp(1)).tolist()
        return scores


def _read(folder: Path, device: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    auto: Any = AutoModelForSequenceClassification
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # a head that is missing would be drawn at random
            model, report = auto.from_pretrained(
                folder,
                dtype=torch.float32 if device.type == "cpu" else "auto",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RankerError(f"transformers can't read {folder} as a sequence classifier: {one_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise RankerError(
            f"{folder} lacks {len(missing)} weights of a sequence classifier, such as {missing[0]}, so it is no "
            "reward model; its scores would be random"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer


def _label(config: Any, label: str | int | None, name: str) -> int | None:
    """The index of the class that means "good"; None for a model with a single output."""
    names = {str(config.id2label.get(index, index)): index for index in range(config.num_labels)}
    if config.num_labels == 1:
        if label is not None:
            raise RankerError(f"label {label!r}: {name} has a single output, which is the score; leave label out")
        return None
    if label is None and config.num_labels == 2:
        return 1
    found = names.get(label) if isinstance(label, str) else label
    if found is None or not 0 <= found < config.num_labels:
        raise RankerError(f"label {label!r} of {name}: say which of its classes means good, one of {list(names)}")
    return found


def _longest(config: Any, tokenizer: Any) -> int | None:
    """How many tokens the model reads; None where nothing says so."""
    config = config.get_text_config()
    limits = [tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions and "roberta" in config.model_type:  # their positions start after the padding token's
        positions -= (config.pad_token_id or 0) + 1
    if positions:
        limits.append(positions)
    limit = min(limits)
    return int(limit) if limit < 10**9 else None
