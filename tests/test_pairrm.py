"""PairRM on a tiny random model of its architecture, in the layout of llm-blender/PairRM-hf.

The reference puts the input together as the model card does, with transformers' tokenizer, and runs it alone.
"""

import json
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast

from sims_lens.errors import RankerError
from sims_lens.rankers import PairRM, as_ranker
from sims_lens.rankers.pairrm import scores_of

PROMPT = "hello, who are you?"
RESPONSES = ["i am fine", "go away", "i love you too, and all of the others", ""]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
PREFIXES = ["<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"]
WORDS = ["\u2581", "\u2581you", "\u2581hello", *" ,.?!", *"abcdefghijklmnopqrstuvwxyz"]


def tokenizer_json() -> dict[str, Any]:
    """As the fast DeBERTa-v3 tokenizer was saved by transformers 4, with four tokens added."""

    def added(index: int, content: str, *, special: bool) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        return {"id": index, "content": content, **flags, "normalized": not special, "special": special}

    vocab = [[token, 0.0] for token in SPECIAL] + [[word, -4.0 - len(word)] for word in WORDS]
    mask = len(vocab)
    frame = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    end = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    space = {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [
            *(added(index, token, special=True) for index, token in enumerate(SPECIAL)),
            added(mask, "[MASK]", special=True),
            *(added(mask + 1 + index, token, special=False) for index, token in enumerate(PREFIXES)),
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Strip", "strip_left": True, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [space]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*frame, end],
            "pair": [*frame, end, {"Sequence": {"id": "B", "type_id": 1}}, end],
            "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for i, t in ((1, "[CLS]"), (2, "[SEP]"))},
        },
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab},
    }


def write(folder: Path) -> Path:
    """A tiny model in the layout, with every name as it is there."""
    ids = {token: len(SPECIAL) + len(WORDS) + 1 + index for index, token in enumerate(PREFIXES)}
    config = cast(Any, DebertaV2Config)(
        vocab_size=len(SPECIAL) + len(WORDS) + 1 + len(PREFIXES),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        # as in deberta-v3-large
        attention_probs_dropout_prob=0.1,
        max_position_embeddings=512,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        pad_token_id=0,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        position_buckets=8,
        relative_attention=True,
        share_att_key=True,
        type_vocab_size=0,
        # PairRM's own
        n_tasks=1,
        drop_out=0.05,
        source_prefix_id=ids["<|source|>"],
        cand1_prefix_id=ids["<|candidate1|>"],
        cand2_prefix_id=ids["<|candidate2|>"],
        cand_prefix_id=ids["<|candidate|>"],
        architectures=["DebertaV2PairRM"],
    )
    generator = torch.Generator().manual_seed(0)
    backbone = DebertaV2Model(config).state_dict()
    weights = {f"pretrained_model.{name}": torch.randn(t.shape, generator=generator) for name, t in backbone.items()}
    for name, shape in (("1.weight", (16, 32)), ("1.bias", (16,)), ("4.weight", (1, 16)), ("4.bias", (1,))):
        weights[f"head_layer.{name}"] = torch.randn(shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DebertaV2Tokenizer", **names}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairrm") / "PairRM-hf")


@pytest.fixture(scope="module")
def ranker(folder: Path) -> PairRM:
    return PairRM(folder, device="cpu", batch=5)


def alone(folder: Path, prompt: str, first: str, second: str, source: int = 1224, candidate: int = 412) -> float:
    """The logit of one ordered pair, put together and read as the model card and pairrm.py do."""
    config = cast(Any, DebertaV2Config).from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    model = DebertaV2Model(config).eval()
    model.load_state_dict({n.removeprefix("pretrained_model."): w for n, w in weights.items() if n[0] == "p"})
    tokenizer = cast(Any, PreTrainedTokenizerFast).from_pretrained(folder)
    ids = tokenizer.encode("<|source|>" + prompt, max_length=source, truncation=True)
    rest = (source + 2 * candidate - len(ids)) // 2
    ids = ids + tokenizer.encode("<|candidate1|>" + first, max_length=rest, truncation=True)
    ids = torch.tensor([ids + tokenizer.encode("<|candidate2|>" + second, max_length=rest, truncation=True)])
    with torch.no_grad():
        states = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[-1][0]

    def head(prefix: int) -> torch.Tensor:
        both = torch.cat([states[ids[0] == config.source_prefix_id][0], states[ids[0] == prefix][0]])
        inner = torch.tanh(weights["head_layer.1.weight"] @ both + weights["head_layer.1.bias"])
        return weights["head_layer.4.weight"] @ inner + weights["head_layer.4.bias"]

    return float((head(config.cand1_prefix_id) - head(config.cand2_prefix_id)).mean())


def test_the_scores_are_those_of_single_passes_over_all_ordered_pairs(folder: Path, ranker: PairRM) -> None:
    k = len(RESPONSES)
    logits = np.full((k, k), np.nan)
    for i, j in permutations(range(k), 2):
        logits[i, j] = alone(folder, PROMPT, RESPONSES[i], RESPONSES[j])
    expected = [sum(logits[i, j] - logits[j, i] for j in range(k) if j != i) / (k - 1) for i in range(k)]
    assert max(map(abs, expected)) > 0.1
    assert as_ranker(ranker).rank(PROMPT, RESPONSES) == pytest.approx(expected, abs=1e-4)
    matrix = ranker.matrix(PROMPT, RESPONSES)
    assert np.isnan(np.diag(matrix)).all()
    off = ~np.eye(k, dtype=bool)
    np.testing.assert_allclose(matrix[off], 1 / (1 + np.exp(-logits[off])), atol=1e-5)


def test_many_prompts_at_once_give_the_same(ranker: PairRM) -> None:
    items = [(PROMPT, RESPONSES), ("go", ["a"]), ("go away", []), ("who?", ["me", "you"])]
    together = as_ranker(ranker).rank_all(items)
    assert [len(scores) for scores in together] == [4, 1, 0, 2]
    assert together[1] == (0.0,)
    for (prompt, responses), scores in zip(items, together, strict=True):
        assert ranker.rank(prompt, responses) == pytest.approx(scores, abs=1e-5)
        assert sum(scores) == pytest.approx(0, abs=1e-5)
    assert ranker.matrix("go", ["a"]).shape == (1, 1) and ranker.matrix("go", []).shape == (0, 0)


def test_what_is_too_long_is_cut_as_the_model_card_does_and_counted(folder: Path) -> None:
    prompt, long, short = "why " * 10, "because " * 10, "so"
    ranker = PairRM(folder, device="cpu", source_max_length=16, candidate_max_length=12)
    expected = alone(folder, prompt, long, short, 16, 12) - alone(folder, prompt, short, long, 16, 12)
    assert ranker.rank(prompt, [long, short])[0] == pytest.approx(expected, abs=1e-4)
    assert ranker.truncated == 2  # the prompt and a response, each once
    assert ranker.count["calls"] == 2 and ranker.count["truncated"] == 2
    assert ranker.count["prefill"] == 2 * (16 + 12 + 6)  # [CLS] prefix _ s o [SEP]
    # A short prompt leaves its room to the responses.
    roomy = PairRM(folder, device="cpu", source_max_length=80, candidate_max_length=12)
    assert roomy.rank("y", ["because " * 5, short])[0] == pytest.approx(
        alone(folder, "y", "because " * 5, short, 80, 12) - alone(folder, "y", short, "because " * 5, 80, 12), abs=1e-4
    )
    assert roomy.truncated == 0


def test_a_text_may_contain_the_prefixes(ranker: PairRM) -> None:
    texts = ["a <|candidate2|> b", "<|source|> <|candidate1|>", "c"]
    scores = ranker.rank("<|candidate1|> what?", texts)
    assert np.isfinite(scores).all() and sum(scores) == pytest.approx(0, abs=1e-5)


def test_the_tokenizer_is_read_as_it_was_saved(folder: Path, ranker: PairRM) -> None:
    (row,) = ranker._encode("<|source|>", ["  hello   you "], 1224)
    tokens = [ranker._tokenizer.id_to_token(token) for token in row]
    assert tokens == ["[CLS]", "<|source|>", "\u2581hello", "\u2581you", "[SEP]"]


def test_without_a_tokenizer_json_the_slow_one_is_converted(folder: Path, tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text(
        "\n".join(f"hello world number {i}, this is a tiny corpus" for i in range(200))
    )
    names = {
        f"{name}_piece": f"[{text}]" for name, text in (("pad", "PAD"), ("bos", "CLS"), ("eos", "SEP"), ("unk", "UNK"))
    }
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=len(SPECIAL) + len(WORDS),
        model_type="unigram",
        minloglevel=2,
        **names,
        **ids,
    )
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    first = len(SPECIAL) + len(WORDS)
    flags = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "special": False}
    added = {str(first + i): {"content": token, **flags} for i, token in enumerate(["[MASK]", *PREFIXES])}
    settings = {"tokenizer_class": "DebertaV2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ranker = PairRM(tmp_path, device="cpu")
    (row,) = ranker._encode("<|candidate2|>", ["hello world"], 412)
    assert row[:2] == [1, first + 3] and row[-1] == 2
    assert np.isfinite(ranker.rank("hello", ["world", "number"])).all()


def test_what_the_scores_depend_on_is_said(folder: Path, ranker: PairRM) -> None:
    assert ranker.name == "PairRM-hf" and as_ranker(ranker).pointwise is False
    assert ranker.settings == PairRM(folder, device="cpu").settings
    assert ranker.settings != PairRM(folder, device="cpu", candidate_max_length=100).settings


def test_other_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    def copy(name: str, **config: object) -> Path:
        target = tmp_path / name
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        values = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(values))
        return target

    with pytest.raises(RankerError, match=r"is no PairRM: its config and tokenizer don't agree .* 7 and \d+"):
        PairRM(copy("other-ids", cand1_prefix_id=7), device="cpu")
    with pytest.raises(RankerError, match="aren't a PairRM's: .*size mismatch"):
        PairRM(copy("wider", intermediate_size=48), device="cpu")
    headless = copy("headless")
    save_file({"pretrained_model.x": torch.zeros(1)}, headless / "model.safetensors")
    with pytest.raises(RankerError, match="aren't a PairRM's: .*Missing key"):
        PairRM(headless, device="cpu")
    for name in ("model.safetensors", "tokenizer.json"):
        broken = copy(f"broken-{name}")
        (broken / name).write_text("{")
        with pytest.raises(RankerError, match="can't be read as a PairRM"):
            PairRM(broken, device="cpu")
    with pytest.raises(RankerError, match="candidate_max_length = 2 is less than 8"):
        PairRM(folder, device="cpu", candidate_max_length=2)


def test_scores_from_logits() -> None:
    nan = np.nan
    logits = np.array([[nan, 1.0, 4.0], [-3.0, nan, 0.0], [2.0, 0.0, nan]])
    assert scores_of(logits) == ((4.0 + 2.0) / 2, (-4.0 + 0.0) / 2, (-2.0 + 0.0) / 2)
    assert scores_of(np.full((1, 1), nan)) == (0.0,) and scores_of(np.zeros((0, 0))) == ()
