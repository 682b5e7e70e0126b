"""PairRM: a small model that reads a prompt and two responses side by side, and says which is better."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from sims_lens.checks import one_line
from sims_lens.errors import RankerError
from sims_lens.rankers.base import Item
from sims_lens.rankers.checkpoint import at_least, device_of, locate, quiet

SOURCE, FIRST, SECOND = "<|source|>", "<|candidate1|>", "<|candidate2|>"
_IDS: Final = {SOURCE: "source_prefix_id", FIRST: "cand1_prefix_id", SECOND: "cand2_prefix_id"}
_BACKBONE, _HEAD = "pretrained_model.", "head_layer."

Triple = tuple[list[int], list[int], list[int]]


class PairRM:
    """Ranks responses by PairRM, a pairwise reward model of 0.4 B parameters (DeBERTa-v3-large).

    Each ordered pair of responses is one pass: the model is not symmetric, so both orders are asked. With the logit
    L_ij (response i first, j second; positive if i is better) a response's score is mean_j (L_ij - L_ji), and
    P(i better than j) = sigmoid((L_ij - L_ji) / 2).

    A prompt is cut after ``source_max_length`` tokens. The two responses share evenly what the prompt leaves of
    ``source_max_length + 2 * candidate_max_length`` tokens, hence each gets ``candidate_max_length`` or more. Texts
    that were cut are counted in :attr:`truncated`.

    Args:
        path: a folder with a checkpoint in the layout of ``llm-blender/PairRM-hf``, or a hub id.
        revision: branch, tag or commit on the hub; only for a hub id.
        device: such as "cpu" or "cuda:0"; by default CUDA where there is one. Weights are float32.
        batch: ordered pairs per pass.
        source_max_length: tokens of a prompt, its three special tokens included.
        candidate_max_length: tokens that each response can count on, likewise.

    Attributes:
        name: the hub id, or the folder's name.
        count: what was spent so far: ``calls`` (ordered pairs), ``prefill`` (tokens read), and how many texts (prompts
            and responses) were ``truncated``.

    Raises:
        RankerError: the checkpoint can't be found or read, or isn't of this architecture.

    Reference:
        D. Jiang, X. Ren and B. Y. Lin, "LLM-Blender", ACL 2023; the layout, the way in which inputs are put together
        and their limits after the model card of llm-blender/PairRM-hf and ``pair_ranker/pairrm.py`` of
        github.com/yuchenlin/LLM-Blender. An input is ``[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> first [SEP]
        [CLS] <|candidate2|> second [SEP]``; with e the last hidden states at the three prefix tokens and h the
        two-layer head, L = h(e_source, e_first) - h(e_source, e_second). Our deviations: batches are padded to their
        longest row rather than to 2,048, and the prefix tokens are found by their place, so that a text may contain
        them.
    """

    pointwise = False
    judges = True

    def __init__(
        self,
        path: str | Path = "llm-blender/PairRM-hf",
        *,
        revision: str | None = None,
        device: str | None = None,
        batch: int = 8,
        source_max_length: int = 1224,
        candidate_max_length: int = 412,
    ) -> None:
        at_least(1, batch=batch)
        at_least(8, source_max_length=source_max_length, candidate_max_length=candidate_max_length)
        target = device_of(device)
        self._source = locate(path, revision)
        self.name = self._source.label
        self.count = {"calls": 0, "prefill": 0, "decode": 0, "truncated": 0}
        self._tokenizer, self._backbone, self._head = _read(self._source.folder, target)
        self._batch, self._limits = batch, (source_max_length, candidate_max_length)

    def __repr__(self) -> str:
        return f"PairRM({self.name!r})"

    @property
    def truncated(self) -> int:
        """How many texts were cut, so far."""
        return self.count["truncated"]

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on, beside the texts."""
        return {"model": self._source.identity, "limits": list(self._limits)}

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:
        """Score the responses to one prompt by all ordered pairs.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            mean_j (L_ij - L_ji) for each response i, in logits; they add up to 0, and a single response has 0.
        """
        return self.rank_all([(prompt, responses)])[0]

    def rank_all(self, items: Sequence[Item]) -> list[tuple[float, ...]]:
        """Score the responses to many prompts, batched over all of them.

        Args:
            items: pairs of a prompt and the responses to it.

        Returns:
            The scores of each item's responses.
        """
        return [scores_of(logits) for logits in self._logits(items)]

    def matrix(self, prompt: str, responses: Sequence[str]) -> Float[np.ndarray, "response response"]:
        """Every verdict as it was given, for an audit of the ranker.

        Args:
            prompt: what was asked.
            responses: what was answered.

        Returns:
            sigmoid(L_ij) = P(i better than j | i shown first) in row i, column j; NaN on the diagonal.
        """
        (logits,) = self._logits([(prompt, responses)])
        return 0.5 + 0.5 * np.tanh(logits / 2)

    def _logits(self, items: Sequence[Item]) -> list[Float[np.ndarray, "response response"]]:
        """L_ij for each item, NaN on the diagonal."""
        rows: list[Triple] = []
        for prompt, responses in items:
            (source,) = self._encode(SOURCE, [prompt], self._limits[0])
            left = (self._limits[0] + 2 * self._limits[1] - len(source)) // 2
            first = self._encode(FIRST, responses, left)
            second = self._encode(SECOND, responses, left, again=True)
            rows += [(source, first[i], second[j]) for i, j in permutations(range(len(responses)), 2)]
        lengths = [sum(map(len, row)) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        values = np.empty(len(rows))
        for start in range(0, len(order), self._batch):
            chosen = order[start : start + self._batch]
            values[chosen] = self._pass([rows[index] for index in chosen])
        self.count["calls"] += len(rows)
        self.count["prefill"] += sum(lengths)
        matrices = []
        begin = 0
        for _, responses in items:
            logits = np.full((len(responses), len(responses)), np.nan)
            off_diagonal = ~np.eye(len(responses), dtype=bool)
            end = begin + int(off_diagonal.sum())
            logits[off_diagonal] = values[begin:end]  # in the order of permutations: by row, then by column
            matrices.append(logits)
            begin = end
        return matrices

    def _encode(self, prefix: str, texts: Sequence[str], limit: int, *, again: bool = False) -> list[list[int]]:
        """``[CLS] prefix text [SEP]`` as ids, cut to the limit; a text encoded again isn't counted again."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch([prefix + text for text in texts])]
        self.count["truncated"] += 0 if again else sum(len(row) > limit for row in rows)
        return [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows]

    def _pass(self, rows: Sequence[Triple]) -> list[float]:
        """The logits of one padded batch."""
        import torch

        width = max(sum(map(len, row)) for row in rows)
        pad = self._backbone.config.pad_token_id or 0
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        # The prefix of each part follows its [CLS].
        places = torch.tensor([[1, len(s) + 1, len(s) + len(first) + 1] for s, first, _ in rows])
        for index, row in enumerate(rows):
            joined = torch.tensor([token for part in row for token in part])
            ids[index, : len(joined)], mask[index, : len(joined)] = joined, 1
        device = self._backbone.device
        with torch.inference_mode():
            states = self._backbone(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
            source, first, second = states[torch.arange(len(rows))[:, None], places].unbind(1)
            better, worse = (torch.cat([source, candidate], -1) for candidate in (first, second))
            logits = (self._head(better) - self._head(worse)).mean(-1)
        found: list[float] = logits.double().cpu().tolist()
        return found


def scores_of(logits: Float[np.ndarray, "response response"]) -> tuple[float, ...]:
    """A score for each response from the logits of all ordered pairs: mean_j (L_ij - L_ji).

    Args:
        logits: L_ij, positive if i is better with i shown first; the diagonal isn't looked at.

    Returns:
        One score per response; they add up to 0.

    Examples:
        >>> scores_of(np.array([[np.nan, 2.0], [-1.0, np.nan]]))
        (3.0, -3.0)
    """
    margins = np.where(np.eye(len(logits), dtype=bool), 0.0, logits - logits.T)
    return tuple(float(score) for score in margins.sum(1) / max(len(logits) - 1, 1))


def _read(folder: Path, device: Any) -> tuple[Any, Any, Any]:
    """Tokenizer, encoder and head of a checkpoint."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import DebertaV2Config, DebertaV2Model

    configs: Any = DebertaV2Config
    try:
        config = configs.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        tokenizer = _tokenizer(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise RankerError(f"{folder} can't be read as a PairRM ({one_line(error)}); get a complete copy") from error
    ids = {prefix: (tokenizer.token_to_id(prefix), getattr(config, name, None)) for prefix, name in _IDS.items()}
    if any(here is None or here != there for here, there in ids.values()):
        raise RankerError(
            f"{folder} is no PairRM: its config and tokenizer don't agree on the ids of {', '.join(ids)} "
            f"({', '.join(f'{there} and {here}' for here, there in ids.values())}); "
            "PairRM reads the layout of llm-blender/PairRM-hf"
        )
    size = config.hidden_size
    with quiet(), torch.random.fork_rng(devices=[]):  # weights are drawn, then overwritten
        backbone: Any = DebertaV2Model(config)
        head = torch.nn.Sequential(
            torch.nn.Dropout(),
            torch.nn.Linear(2 * size, size),
            torch.nn.Tanh(),
            torch.nn.Dropout(),
            torch.nn.Linear(size, getattr(config, "n_tasks", 1)),
        )
    for module, start in ((backbone, _BACKBONE), (head, _HEAD)):
        own = {name.removeprefix(start): value.float() for name, value in weights.items() if name.startswith(start)}
        own.pop("embeddings.position_ids", None)  # old versions of transformers saved it
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise RankerError(f"the weights in {folder} aren't a PairRM's: {one_line(error)}") from error
        module.to(device).eval().requires_grad_(False)
    return tokenizer, backbone, head


def _tokenizer(folder: Path) -> Any:
    """The tokenizer as it was saved: transformers 5 would build another normalizer around the same vocabulary."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the class that the Rust library raises
            raise ValueError(f"tokenizer.json: {error}") from error
    else:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
