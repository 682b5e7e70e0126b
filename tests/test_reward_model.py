"""Reward models as rankers: every shape of classifier, against single unbatched passes of the model itself."""

from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from sims_lens.errors import RankerError
from sims_lens.rankers import RewardModel, as_ranker

ITEMS = [
    ("Why?", ["Because.", "Because it is so, and it has always been so.", "", "No."]),
    ("What is the sea?", ["Water.", "A lot of salty water, with fish in it."]),
    ("Who?", []),
]


def randomise(model: Any) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def bert_tokenizer() -> Any:
    """Bytes, in the frame [CLS] a [SEP] b [SEP] with token types."""
    tokens = ["[PAD]", "[CLS]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    )


def write_bert(folder: Path, labels: int, names: tuple[str, ...] = ()) -> Path:
    tokenizer = bert_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = cast(Any, BertConfig)(
        vocab_size=len(tokenizer),
        max_position_embeddings=96,
        num_labels=labels,
        **({"id2label": dict(enumerate(names))} if names else {}),
        **sizes,
    )
    randomise(BertForSequenceClassification(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_llama(folder: Path, *, pad: bool) -> Path:
    tokenizer = tiny.tokenizer("llama")
    config = cast(Any, LlamaConfig)(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id if pad else None,
    )
    randomise(LlamaForSequenceClassification(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reward")
    return {
        "bert": write_bert(root / "bert", 1),
        "bert2": write_bert(root / "bert2", 2, ("bad", "good")),
        "bert3": write_bert(root / "bert3", 3, ("bad", "good", "odd")),
        "llama": write_llama(root / "llama", pad=True),
        "llama-without-pad": write_llama(root / "llama-without-pad", pad=False),
        "gpt2": tiny.write("gpt2", root / "gpt2"),
    }


def alone(folder: Path, prompt: str, response: str) -> torch.Tensor:
    """One unbatched pass of the model, with transformers' own means."""
    model = cast(Any, AutoModelForSequenceClassification).from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        inputs = dict(tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True))
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    else:
        inputs = dict(tokenizer(prompt, response, return_tensors="pt"))
        assert inputs["token_type_ids"].any() or not response
    with torch.no_grad():
        return cast(torch.Tensor, model(**inputs).logits[0].double())


@pytest.mark.parametrize("name", ["bert", "llama", "llama-without-pad"])
def test_a_score_is_the_logit_of_a_single_unbatched_pass(folders: dict[str, Path], name: str) -> None:
    ranker = RewardModel(folders[name], device="cpu", batch=3)
    scores = as_ranker(ranker).rank_all(ITEMS)
    assert ranker.name == name
    for (prompt, responses), found in zip(ITEMS, scores, strict=True):
        expected = [float(alone(folders[name], prompt, response)[0]) for response in responses]
        assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(scores[0])) == 4
    assert ranker.rank(*ITEMS[0]) == pytest.approx(scores[0], abs=1e-6)


def test_with_two_labels_the_score_is_the_difference_of_their_logits(folders: dict[str, Path]) -> None:
    logits = alone(folders["bert2"], "Why?", "Because.")
    for label, expected in ((None, logits[1] - logits[0]), ("bad", logits[0] - logits[1]), (1, logits[1] - logits[0])):
        (score,) = RewardModel(folders["bert2"], device="cpu", label=label).rank("Why?", ["Because."])
        assert score == pytest.approx(float(expected), abs=1e-5)


def test_with_more_labels_the_score_is_the_log_odds_of_one(folders: dict[str, Path]) -> None:
    logits = alone(folders["bert3"], "Why?", "Because.")
    (score,) = RewardModel(folders["bert3"], device="cpu", label="good").rank("Why?", ["Because."])
    assert score == pytest.approx(float(logits.softmax(0)[1].logit()), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [
        ("bert3", None, r"label None of bert3: say which .* one of \['bad', 'good', 'odd'\]"),
        ("bert2", "great", r"label 'great' of bert2: .* \['bad', 'good'\]"),
        ("bert2", 2, "label 2 of bert2"),
        ("bert", "good", "bert has a single output"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(
    folders: dict[str, Path], name: str, label: str | int | None, message: str
) -> None:
    with pytest.raises(RankerError, match=message):
        RewardModel(folders[name], device="cpu", label=label)


def test_cut_texts_are_counted_and_scored_as_they_are_cut(folders: dict[str, Path]) -> None:
    long = "word " * 40
    bert = RewardModel(folders["bert"], device="cpu")
    scores = bert.rank("Why?", [long, "Because."])
    assert bert.truncated == 1 and bert.count["truncated"] == 1 and bert.count["calls"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folders["bert"])
    assert scores[0] == pytest.approx(
        float(alone(folders["bert"], "Why?", long[: 96 - len(tokenizer("Why?", "x")["input_ids"]) + 1])[0]), abs=1e-5
    )
    # Of a chat the beginning goes: what comes before the last 40 tokens makes no difference.
    llama = RewardModel(folders["llama"], device="cpu", max_length=40)
    same = [llama.rank(prompt, ["y" * 60])[0] for prompt in ("Why?", "Who, when and where?")]
    assert same[0] == pytest.approx(same[1], abs=1e-6) and llama.truncated == 2
    assert llama.count["prefill"] == 80


def test_what_the_scores_depend_on_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = RewardModel(folders["llama"], device="cpu").settings
    assert settings == RewardModel(folders["llama"], device="cpu", batch=1).settings
    assert settings != RewardModel(folders["llama"], device="cpu", max_length=50).settings
    assert settings != RewardModel(folders["llama-without-pad"], device="cpu").settings
    assert as_ranker(RewardModel(folders["bert"], device="cpu")).pointwise is True


def test_the_global_random_state_is_left_alone(folders: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    RewardModel(folders["bert"], device="cpu").rank("p", ["a"])
    assert torch.equal(before, torch.get_rng_state())


def test_a_language_model_is_no_reward_model(folders: dict[str, Path]) -> None:
    with pytest.raises(RankerError, match=r"lacks 1 weights of a sequence classifier, such as score.weight"):
        RewardModel(folders["gpt2"], device="cpu")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    write_bert(tmp_path, 1)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(RankerError, match="no model.safetensors, and pickled weights"):
        RewardModel(tmp_path, device="cpu")


def test_what_cannot_be_read_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RankerError, match="has no config.json"):
        RewardModel(tmp_path, device="cpu")
    with pytest.raises(RankerError, match="revision 'main'.* is a folder"):
        RewardModel(folders["bert"], revision="main", device="cpu")
    with pytest.raises(RankerError, match="'no such/name/at all' is neither a folder nor one"):
        RewardModel("no such/name/at all", device="cpu")
    with pytest.raises(RankerError, match="device 'abacus'"):
        RewardModel(folders["bert"], device="abacus")
    with pytest.raises(RankerError, match="batch = 0 is less than 1"):
        RewardModel(folders["bert"], device="cpu", batch=0)
    with pytest.raises(RankerError, match="max_length = 97 is more than the 96 tokens that bert reads"):
        RewardModel(folders["bert"], device="cpu", max_length=97)


def test_a_template_that_fails_is_the_rankers_failure(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = "{{ raise_exception('no assistants here') }}"
    write_llama(tmp_path, pad=True)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RankerError, match="chat template .* can't be filled .*no assistants here"):
        RewardModel(tmp_path, device="cpu").rank("p", ["a"])
