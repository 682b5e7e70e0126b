"""Tiny random models of real architectures, for tests: built in milliseconds, saved like any checkpoint.

The weights are random but large, so that outputs depend visibly on every part, biases and norms included.
The tokenizers work on bytes: any text survives the round trip, and a token is a byte or a special token.
They differ as real ones do: GPT-2 and GPT-NeoX have one special token for everything (GPT-2 names no pad token),
the Qwens have no BOS, Gemma and Llama have all three, and Llama and the Qwens have a chat template.
"""

from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

# Hardly typed in transformers.
_AUTO, _CONFIGS, _FAST = cast(Any, AutoModelForCausalLM), cast(Any, CONFIG_MAPPING), cast(Any, PreTrainedTokenizerFast)

ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "gemma2")

N_LAYERS, D_MODEL, N_HEADS, N_KEY_VALUE_HEADS, D_MLP, N_CTX = 3, 32, 4, 2, 128, 128

_SPECIAL: dict[str, dict[str, str]] = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "gpt_neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}
_WITH_CHAT_TEMPLATE = ("llama", "qwen2", "qwen3")
_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer(architecture: str) -> Any:
    """Build a byte-level tokenizer without merges, with the special tokens that the architecture's models have."""
    special = _SPECIAL[architecture]
    tokens = [*dict.fromkeys(special.values()), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast: Any = _FAST(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = _CHAT_TEMPLATE if architecture in _WITH_CHAT_TEMPLATE else None
    return fast


def model(architecture: str, *, seed: int = 0, std: float = 0.3) -> Any:
    """Build a random model of one of :data:`ARCHITECTURES`, the same for the same seed, in float32 and eval mode."""
    text = tokenizer(architecture)
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = _CONFIGS[architecture](vocab_size=len(text), **ids, **_sizes(architecture))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        built = _AUTO.from_config(config, dtype=torch.float32)
        for parameter in built.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(std * noise if parameter.ndim > 1 else parameter + std * noise)
    return built.eval()


def write(architecture: str, folder: Path, *, seed: int = 0) -> Path:
    """Save model and tokenizer to ``folder`` as a Hugging Face checkpoint, and return the folder."""
    model(architecture, seed=seed).save_pretrained(folder)
    tokenizer(architecture).save_pretrained(folder)
    return folder


def _sizes(architecture: str) -> dict[str, Any]:
    if architecture == "gpt2":
        return {"n_layer": N_LAYERS, "n_embd": D_MODEL, "n_head": N_HEADS, "n_positions": N_CTX}
    sizes = {
        "num_hidden_layers": N_LAYERS,
        "hidden_size": D_MODEL,
        "num_attention_heads": N_HEADS,
        "intermediate_size": D_MLP,
        "max_position_embeddings": N_CTX,
    }
    if architecture == "gpt_neox":
        return sizes
    sizes["num_key_value_heads"] = N_KEY_VALUE_HEADS
    if architecture == "qwen3":
        sizes["head_dim"] = 16  # as in the real ones, heads x head_dim is not the model's width
    if architecture == "gemma2":
        # A window shorter than the tests' texts; a scale that is not the default one.
        sizes |= {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
    return sizes
