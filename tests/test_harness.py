"""A steered model in lm-evaluation-harness: what it computes, and the comparison of base and steered."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from common import fingerprint, plan_of

import sims_lens as sims
from sims_lens.adapter import adapt
from sims_lens.errors import CapabilityError, ModelError
from sims_lens.harness import PACKAGED, TASKS, Capability, CapabilityScore, SteeredTexts
from sims_lens.harness.measuring import score
from sims_lens.plan import NOTHING
from sims_lens.plots import TEMPLATE
from sims_lens.stats import Interval

REASON = "lm-eval isn't installed: pip install 'sims-lens[lm-eval]'"
LONG = [40 + i % 60 for i in range(150)]  # longer than the context of 128 tokens


def by_hand(model: Any, plan: sims.SteeringPlan, context: list[int], continuation: list[int]) -> float:
    """Log-likelihood of a continuation in one plain forward pass."""
    tokens = torch.tensor([[*context, *continuation[:-1]]])
    with torch.no_grad(), sims.steering(model, plan) as steered, steered.prompt(len(context)):
        log_probs = adapt(model).logits(tokens, torch.ones_like(tokens).bool(), keep=tokens.shape[1]).log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return float(sum(log_probs[0, at, token] for at, token in zip(places, continuation, strict=True)))


@pytest.mark.parametrize("scope", ["generation", "all", "prompt", "response", "last_prompt"])
def test_log_likelihoods_honour_the_scope(llama: Any, scope: str) -> None:
    plan = plan_of(1, scope=scope, coefficient=4.0)
    requests = [([40, 41, 42], [50]), ([60], [70, 71, 72]), ([40, 41, 42], [51, 52]), ([44, 45], [50, 51, 52, 53])]
    found = SteeredTexts(llama, plan).log_likelihoods(requests)
    expected = [by_hand(llama, plan, *request) for request in requests]
    assert [nats for nats, _ in found] == pytest.approx(expected, abs=2e-4)
    base = [by_hand(llama, NOTHING, *request) for request in requests]
    assert max(abs(a - b) for a, b in zip(expected, base, strict=True)) > 0.1  # the plan does something
    if scope == "response":  # a first token is predicted before any response token is read
        assert found[0][0] == pytest.approx(base[0], abs=2e-4)


def test_decay_counts_continuation_tokens(llama: Any) -> None:
    plan = plan_of(1, scope="generation", coefficient=4.0).decaying(2.0)
    request = ([40, 41, 42], [50, 51, 52, 53, 54])
    found = SteeredTexts(llama, plan).log_likelihoods([request])[0][0]
    assert found == pytest.approx(by_hand(llama, plan, *request), abs=2e-4)


def test_batches_change_nothing_and_keep_the_order(llama: Any) -> None:
    plan, rng = plan_of(1, scope="generation", coefficient=3.0), np.random.default_rng(0)
    requests = [
        (rng.integers(10, 250, int(rng.integers(1, 30))).tolist(), rng.integers(10, 250, int(k)).tolist())
        for k in rng.integers(1, 12, 23)
    ]
    requests += [(requests[0][0], [77]), (requests[3][0], [78, 79])]
    together = SteeredTexts(llama, plan).log_likelihoods(requests)
    singly = SteeredTexts(llama, plan, batch_rows=1).log_likelihoods(requests)
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in singly], abs=2e-4)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in singly]


def greedy(model: Any, plan: sims.SteeringPlan, context: list[int], count: int) -> list[int]:
    """The most probable tokens, one after the other, without a cache."""
    tokens = torch.tensor([context])
    with torch.no_grad(), sims.steering(model, plan) as steered, steered.prompt(len(context)):
        for _ in range(count):
            logits = adapt(model).logits(tokens, torch.ones_like(tokens).bool(), keep=1)
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(context) :].tolist()


def test_greedy_is_what_greedy_decoding_says(llama: Any) -> None:
    plan = plan_of(1, scope="generation", coefficient=3.0)
    texts = SteeredTexts(llama, plan)
    context = texts.encode("Hello")
    said = greedy(llama, plan, context, 3)
    found = texts.log_likelihoods([(context, said), (context, [*said[:2], said[2] ^ 1])])
    assert [most_probable for _, most_probable in found] == [True, False]


def test_long_contexts_lose_their_beginning(llama: Any) -> None:
    plan = plan_of(1, coefficient=2.0)
    found = SteeredTexts(llama, plan).log_likelihoods([(LONG, [50, 51])])[0][0]
    assert found == pytest.approx(by_hand(llama, plan, LONG[-127:], [50, 51]), abs=2e-4)
    with pytest.raises(CapabilityError, match="a continuation of 129 tokens doesn't fit the 128 tokens"):
        SteeredTexts(llama, plan).log_likelihoods([([1], LONG[:129])])
    with pytest.raises(CapabilityError, match="an empty continuation"):
        SteeredTexts(llama, plan).log_likelihoods([([1], [])])


def test_completions_are_greedy_steered_and_cut_at_stops(llama: Any) -> None:
    prompts, plan = ["Hello", "", "What now, then?"], plan_of(1, scope="generation", coefficient=3.0)
    texts = SteeredTexts(llama, plan)
    whole = texts.complete(prompts, max_new_tokens=12)
    assert whole == SteeredTexts(llama, plan, batch_rows=1).complete(prompts, max_new_tokens=12)
    assert whole != SteeredTexts(llama, NOTHING).complete(prompts, max_new_tokens=12)
    for prompt, text in zip(prompts, whole, strict=True):
        said = greedy(llama, plan, texts.encode(prompt) or [texts.start], 12)
        ends = [k for k, token in enumerate(said) if token in adapt(llama).stop_ids]
        assert text == adapt(llama).decode(said[: ends[0]] if ends else said)
    stop = whole[0][4:6]
    cut = texts.complete(prompts, max_new_tokens=12, stop=[stop])
    assert cut == [text.split(stop)[0] for text in whole]
    sampled = [texts.complete(prompts, max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(CapabilityError, match="max_new_tokens = 128 leaves no room"):
        texts.complete(prompts, max_new_tokens=128)


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    before = fingerprint(llama)
    texts = SteeredTexts(llama, plan_of(1))
    texts.log_likelihoods([([40], [50])])
    texts.complete(["a"], max_new_tokens=2)
    assert fingerprint(llama) == before
    with sims.steering(llama, plan_of(1)), pytest.raises(ModelError, match="a plan is attached"):
        SteeredTexts(llama, plan_of(1))


def test_a_bos_is_added_as_the_checkpoint_does_it(zoo: Any) -> None:
    gpt2 = zoo("gpt2", "bridge")  # TransformerLens adds a BOS, the checkpoint's tokenizer doesn't
    bos = gpt2.tokenizer.bos_token_id
    assert SteeredTexts(gpt2, NOTHING).encode("Hi")[0] != bos
    assert SteeredTexts(gpt2, NOTHING, add_bos=True).encode("Hi")[0] == bos
    marked = gpt2.tokenizer.bos_token + "Hi"
    assert SteeredTexts(gpt2, NOTHING, add_bos=True).encode(marked).count(bos) == 1


# The comparison, without lm-eval


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def ratio(values: list[tuple[float, float]]) -> float:
    return sum(a for a, _ in values) / sum(b for _, b in values)


def test_a_mean_is_compared_document_by_document() -> None:
    base, steered = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 4, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0] * 4
    found = score("t", "acc", "none", base, steered, mean, True, seed=0)
    assert found.base.estimate == pytest.approx(4 / 6) and found.steered.estimate == pytest.approx(3 / 6)
    assert (found.better, found.worse, found.documents) == (4, 8, 24)
    expected = sims.bootstrap_mean(np.array(steered) - np.array(base))
    assert found.difference == expected and not found.moved
    flipped = score("t", "loss", "none", base, steered, mean, False, seed=0)
    assert (flipped.better, flipped.worse) == (8, 4)


def test_any_other_figure_is_made_anew_for_each_bootstrap_sample() -> None:
    rng = np.random.default_rng(1)
    weights = rng.uniform(1, 9, 60)
    values = rng.normal(2.0, 0.5, 60)
    base = [(float(v * w), float(w)) for v, w in zip(values, weights, strict=True)]
    steered = [
        (float((v + 0.3 + 0.05 * e) * w), float(w))
        for v, w, e in zip(values, weights, rng.normal(size=60), strict=True)
    ]
    found = score("t", "ppl", "none", base, steered, ratio, False, seed=0)
    assert found.better is None and found.base.estimate == pytest.approx(ratio(base))
    assert found.difference.estimate == pytest.approx(ratio(steered) - ratio(base))
    assert found.difference.low < 0.3 < found.difference.high and found.difference.low > 0.25  # paired, so narrow
    assert found.base.high - found.base.low > 4 * (found.difference.high - found.difference.low)
    assert found.harmed


def test_the_interval_of_such_a_figure_covers() -> None:
    """Of 60 data sets, the 95% interval of a weighted mean's difference holds the truth in nearly all."""
    rng, held = np.random.default_rng(2), 0
    for k in range(60):
        w = rng.uniform(1, 5, 30)
        d = rng.normal(0.2, 1.0, 30)
        base = [(0.0, float(x)) for x in w]
        steered = [(float(a * b), float(b)) for a, b in zip(d, w, strict=True)]
        interval = score("t", "m", "none", base, steered, ratio, True, seed=k).difference
        held += interval.low <= 0.2 <= interval.high
    assert 52 <= held <= 60


def made(task: str, metric: str, low: float, high: float, **options: Any) -> CapabilityScore:
    middle = (low + high) / 2
    base = Interval(0.5, 0.4, 0.6)
    return CapabilityScore(
        task, metric, "none", options.get("up", True), 40, base, base, Interval(middle, low, high), 3, 2
    )


@pytest.fixture
def result() -> Capability:
    scores = (made("<a>", "acc", -0.3, -0.1), made("b", "acc", -0.1, 0.1), made("b", "ppl", 0.1, 0.2, up=False))
    return Capability(scores, NOTHING)


def test_table_text_and_what_was_harmed(result: Capability) -> None:
    assert [s.task for s in result.harmed] == ["<a>", "b"]
    table = result.table()
    assert table.loc[("<a>", "acc", "none"), "difference_high"] == -0.1 and list(table["better"]) == [3, 3, 3]
    text = repr(result)
    assert "-0.2 [-0.3, -0.1]" in text and "2 of 3 intervals leave out 0" in text and "worse: <a> acc, b ppl" in text
    assert "<a>" not in result._repr_html_() and "&lt;a&gt;" in result._repr_html_()
    still = CapabilityScore("t", "acc", "none", True, 24, *[Interval(0.5, 0.5, 0.5)] * 2, Interval(0.0, 0.0, 0.0), 0, 0)
    assert "no document changed, which rules out a change of more than 0.12" in repr(Capability((still,), NOTHING))


def test_the_figure(result: Capability) -> None:
    figure = sims.plots.capability(result)
    assert figure.layout.template.layout.font == TEMPLATE.layout.font
    shown = {(trace.xaxis, trace.y[0]): (trace.x[0], trace.marker.color) for trace in figure.data}
    assert shown["x", "&lt;a&gt;"] == (pytest.approx(-0.2), sims.plots.theme.VERMILLION)
    assert shown["x", "b"] == (pytest.approx(0.0), sims.plots.theme.BLUE)
    assert [a.text for a in figure.layout.annotations] == ["acc (higher is better)", "ppl (lower is better)"]
    assert sims.plots.figures(result)[0] == figure


def test_the_packaged_data_are_sound() -> None:
    facts = [json.loads(line) for line in (TASKS / "plain_facts.jsonl").read_text().splitlines()]
    words = [json.loads(line) for line in (TASKS / "plain_words.jsonl").read_text().splitlines()]
    assert len(facts) == len(words) == 24
    assert all(len(set(f["choices"])) == 4 and 0 <= f["answer"] < 4 for f in facts)
    assert [sum(f["answer"] == k for f in facts) for k in range(4)] == [6, 6, 6, 6]  # no place is the right one
    assert len({f["question"] for f in facts}) == len({w["text"] for w in words}) == 24
    assert all(w["answers"] and w["text"] == w["text"].strip() for w in words)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_evaluated(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"limit": 0}, "limit, the documents of each task .* must be an integer of at least 1, got 0"),
        ({"shots": -1}, "shots, .* must be an integer from 0 up, got -1"),
        ({"tasks": []}, r"there are no tasks; give names, for instance \['sims_plain_facts'"),
    ):
        with pytest.raises(CapabilityError, match=message):
            sims.capability(llama, plan_of(1), **options)
    with pytest.raises(CapabilityError, match="batch_rows = 0"):
        SteeredTexts(llama, NOTHING, batch_rows=0)
    monkeypatch.setattr("sims_lens.harness.model.find_spec", lambda _name: None)
    for call in (lambda: sims.capability(llama, plan_of(1)), lambda: sims.lm_eval_model(llama)):
        with pytest.raises(CapabilityError, match=r"pip install 'sims-lens\[lm-eval\]'"):
            call()


# With lm-eval


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=a, request_type=kind) for a in arguments]


@pytest.fixture(scope="module")
def tiny_lm(zoo: Any) -> Any:
    pytest.importorskip("lm_eval", reason=REASON)
    return sims.lm_eval_model(zoo("llama", "bridge"), plan_of(1, scope="generation", coefficient=3.0))


def test_requests_become_what_lm_eval_says_they_are(tiny_lm: Any, zoo: Any) -> None:
    texts = SteeredTexts(zoo("llama", "bridge"), plan_of(1, scope="generation", coefficient=3.0))
    found = tiny_lm.loglikelihood(instances("loglikelihood", ("Hi ", "you"), ("", "you")), disable_tqdm=True)
    spaced = texts.encode("Hi you")
    head = len(texts.encode("Hi"))  # the space goes to the continuation
    expected = texts.log_likelihoods(
        [(spaced[:head], spaced[head:]), ([texts.start], texts.encode("you", special=False))]
    )
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-5)
    # A document of several windows: each token once.
    long = "word " * 60
    ids = texts.encode(long)
    whole = tiny_lm.loglikelihood_rolling(instances("loglikelihood_rolling", (long,)), disable_tqdm=True)[0]
    first = texts.log_likelihoods([([texts.start], ids[:128])])[0][0]
    assert len(ids) > 128 and whole < first < 0
    said = tiny_lm.generate_until(
        instances("generate_until", ("Hi", {"until": ["a"], "max_gen_toks": 5}), ("Oh", {"max_gen_toks": 3}))
    )
    assert said[1] == texts.complete(["Oh"], max_new_tokens=3)[0] and "a" not in said[0]
    with pytest.raises(CapabilityError, match="generation_kwargs num_beams, which a steered model doesn't act on"):
        tiny_lm.generate_until(instances("generate_until", ("Hi", {"num_beams": 4})))


def test_the_chat_template_is_the_models(tiny_lm: Any, zoo: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    text = tiny_lm.apply_chat_template(turns)
    assert text.endswith("[assistant] ") and "[user] Hi" in text and tiny_lm.chat_template(True)
    plain = sims.lm_eval_model(zoo("gpt2", "bridge"))
    with pytest.raises(CapabilityError, match="has no chat template"):
        plain.apply_chat_template(turns)


def test_without_a_plan_it_is_lm_evals_own_model(embedded: Any) -> None:
    """The same log-likelihoods within 1e-3 nats, and the same texts, as ``lm_eval.models.huggingface.HFLM``."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=REASON)
    from sims_lens.models import checkpoint_of

    theirs = huggingface.HFLM(pretrained=str(checkpoint_of(embedded)), device="cpu", dtype="float32", batch_size=2)
    ours = sims.lm_eval_model(embedded)
    chat = ours.apply_chat_template([{"role": "user", "content": "Say hello."}])
    pairs = [
        ("The capital of France is", " Paris"),
        ("The capital of France is", " London, I think"),
        ("", "Once upon a time"),
        ("Question: 2 + 2 = ?\nAnswer: ", "4"),
        (chat, "Hello there!"),
    ]
    requests = instances("loglikelihood", *pairs)
    for mine, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
    documents = instances("loglikelihood_rolling", ("The sea is wide and blue. Ships cross it.",), ("Rain.",))
    rolled = theirs.loglikelihood_rolling(documents)
    assert ours.loglikelihood_rolling(documents) == pytest.approx(rolled, abs=1e-3)
    asked = {"until": ["\n", "."], "max_gen_toks": 10, "do_sample": False}
    contexts = instances(
        "generate_until", *((text, asked) for text in ("1, 2, 3, 4,", "Q: Who wrote Hamlet?\nA:", chat))
    )
    assert ours.generate_until(contexts) == theirs.generate_until(contexts)


def test_capability_on_the_packaged_tasks(embedded: Any) -> None:
    pytest.importorskip("lm_eval", reason=REASON)
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    wreck = sims.SteeringPlan.addition({15: vector}, coefficient=2.0, units="residual_norm", scope="all")
    state = torch.random.get_rng_state()
    found = sims.capability(embedded, wreck, PACKAGED, limit=6)
    assert torch.equal(state, torch.random.get_rng_state())  # nothing of the process was seeded
    assert {(s.task, s.metric) for s in found.scores} == {
        ("sims_plain_facts", "acc"),
        ("sims_plain_facts", "acc_norm"),
        ("sims_plain_words", "contains"),
    }
    words = next(s for s in found.scores if s.metric == "contains")
    assert words.documents == 6 and words.base.estimate >= 0.6 and words.harmed and words.steered.estimate <= 0.25
    nothing = sims.capability(embedded, wreck.scaled(0.0), "sims_plain_words", limit=2)
    assert nothing.scores[0].difference == Interval(0.0, 0.0, 0.0)
    assert nothing.scores[0].better == nothing.scores[0].worse == 0


def test_a_task_of_ones_own_and_one_that_is_not_there(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason=REASON)
    # lm-eval's own 13,000 task files take it ten seconds to look through.
    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: manager(None, include_path, False))
    model, plan = zoo("llama", "bridge"), plan_of(1, scope="generation", coefficient=6.0)
    (tmp_path / "own.yaml").write_text(
        "task: own_rolling\n"
        "custom_dataset: !function own.read\n"
        "test_split: test\n"
        "output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\n"
        "doc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    (tmp_path / "own.py").write_text(
        "from datasets import Dataset, DatasetDict\n"
        "def read(**_):\n"
        "    return DatasetDict({'test': Dataset.from_list([{'text': t} for t in "
        "('Some words here.', 'And more of them.', 'A third one, too.')])})\n"
    )
    found = sims.capability(model, plan, "own_rolling", include_path=tmp_path)
    figures = {s.metric: s for s in found.scores}
    assert set(figures) == {"word_perplexity", "bits_per_byte"} and figures["bits_per_byte"].higher_is_better is False
    bits = figures["bits_per_byte"]
    documents = ("Some words here.", "And more of them.", "A third one, too.")
    for shown, used in ((bits.base, NOTHING), (bits.steered, plan)):
        texts = SteeredTexts(model, used)
        nats = [texts.log_likelihoods([([texts.start], texts.encode(text))])[0][0] for text in documents]
        assert shown.estimate == pytest.approx(-sum(nats) / len("".join(documents)) / math.log(2), rel=1e-5)
    assert bits.documents == 3 and bits.better is None and bits.difference.estimate != 0
    with pytest.raises(CapabilityError, match="lm-eval has no task 'own_rollin'; there are own_rolling"):
        sims.capability(model, plan, "own_rollin", include_path=tmp_path)
