"""What differs between ``HookedTransformer`` and ``TransformerBridge``, in one place.

Everything above this module sees one :class:`Adapter`: token ids in, left-padded batches with an explicit mask,
logits of the last columns out, a KV cache that can be expanded, and hook points by canonical name. TransformerLens
3.9 has both kinds, 4.x only the bridge.
"""

import copy
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sims_lens.checks import check_kind, one_line, shown
from sims_lens.cost import Arithmetic
from sims_lens.errors import ConfigError, ModelError, PlanError, PromptError
from sims_lens.plan import Provenance
from sims_lens.prompts import Chat
from sims_lens.sites import hook_name

_SENTINEL = "sims-lens-user-content"


class Adapter(ABC):
    """One face for both model kinds. Holds no state of its own; make one with :func:`adapt` whenever needed."""

    kind: str

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.cfg.n_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.cfg.d_model)

    @property
    def n_ctx(self) -> int:
        """Longest sequence, in tokens."""
        return int(self.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        """Where token ids must live."""
        return torch.device(self.cfg.device)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ModelError: the model has none.
        """
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            raise ModelError(f"{self.name} has no tokenizer; build it with one, or set model.set_tokenizer(...)")
        return tokenizer

    @property
    def name(self) -> str:
        """The model's name: as ``sims_lens.load`` set it, else from its config."""
        source = getattr(self.model, "sims_source", None) or {}
        return str(source.get("model") or self.cfg.model_name)

    @property
    def provenance(self) -> Provenance:
        """What a plan or a run made on this model must record."""
        source = getattr(self.model, "sims_source", None) or {}
        return Provenance(
            model=self.name,
            revision=str(source.get("revision") or ""),
            weight_processing=self._weight_processing(),
            n_layers=self.n_layers,
            d_model=self.d_model,
        )

    @property
    def arithmetic(self) -> Arithmetic:
        """Floating-point operations of a forward pass, by the model's config: of a mixture of experts those that a
        token goes to."""
        cfg = self.cfg
        d_model, n_heads, d_head = self.d_model, int(cfg.n_heads), int(cfg.d_head)
        n_kv = int(getattr(cfg, "n_key_value_heads", None) or n_heads)
        mlp = 0 if getattr(cfg, "attn_only", False) else d_model * int(cfg.d_mlp) * (3 if cfg.gated_mlp else 2)
        if experts := getattr(cfg, "num_experts", None):
            mlp = mlp * int(cfg.experts_per_token or 1) + d_model * int(experts)
        attention = d_model * d_head * (2 * n_heads + 2 * n_kv)
        return Arithmetic(
            blocks=2.0 * self.n_layers * (attention + mlp),
            attention=4.0 * self.n_layers * n_heads * d_head,
            unembed=2.0 * d_model * int(cfg.d_vocab),
        )

    # Text and tokens

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt: in the chat template, once, for an instruct model; else with a BOS where
        TransformerLens would prepend one. Special tokens written out in a prompt stay plain text: they never
        become turns. A :class:`~sims_lens.prompts.Chat` becomes a turn for each thing that was said in it.

        Raises:
            PromptError: nothing is left after tokenization, it is no text or none that can be encoded, or a chat is
                given to a model without a chat template.
        """
        _check_text(prompt, "a prompt")
        if isinstance(prompt, Chat):
            return self._encode_chat(prompt)
        tokenizer = self.tokenizer
        hostile = any(token in prompt for token in self._special.values())
        if getattr(tokenizer, "chat_template", None):
            if hostile:
                before, _, after = self._chat(_SENTINEL).partition(_SENTINEL)
                ids = [*self._ids(before), *self._ids(prompt, plain=True), *self._ids(after)]
            else:
                ids = self._ids(self._chat(prompt))
        else:
            ids = self._ids(prompt, plain=hostile)
            bos = tokenizer.bos_token_id
            if getattr(self.cfg, "default_prepend_bos", True) and bos is not None and ids[:1] != [bos]:
                ids = [bos, *ids]
        if not ids:
            raise PromptError(f"prompt {prompt[:60]!r} has no tokens for {self.name}")
        return ids

    def _encode_chat(self, chat: Chat) -> list[int]:
        """Token ids of a conversation. What was said goes in as plain text, so that it can't write turns of its own."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError(f"{self.name} has no chat template, so that it can't be given a chat; use a chat model")
        turns = chat.turns

        if not any(token in turn["content"] for turn in turns for token in self._special.values()):
            return self._ids(self._rendered(turns))
        names = [f"{_SENTINEL}-{index}-end" for index in range(len(turns))]
        text = self._rendered([{**turn, "content": name} for turn, name in zip(turns, names, strict=True)])
        ids: list[int] = []
        for name, turn in zip(names, turns, strict=True):
            before, _, text = text.partition(name)
            ids += [*self._ids(before), *self._ids(turn["content"], plain=True)]
        return [*ids, *self._ids(text)]

    def encode_response(self, response: str) -> list[int]:
        """Token ids of a response that is given as text: tokenised on its own, as it comes after the prompt's tokens.

        Nothing is added, and special tokens written out stay plain text. Without a chat template the text should begin
        as it would in a document, with a space where there is one.

        Raises:
            PromptError: nothing is left after tokenization, or it is no text or none that can be encoded.
        """
        _check_text(response, "a response")
        ids = self._ids(response, plain=True)
        if not ids:
            raise PromptError(f"response {response[:60]!r} has no tokens for {self.name}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: EOS, and what the chat template writes after an assistant's turn."""
        tokenizer = self.tokenizer
        stops = {tokenizer.eos_token_id} - {None}
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}]
            text = self._rendered(turns, add_generation_prompt=False)
            tail = self._ids(text.rpartition(_SENTINEL)[2])
            stops |= {next((i for i in tail if i in self._special), tokenizer.eos_token_id)} - {None}
        return tuple(sorted(int(i) for i in stops))

    @property
    def _special(self) -> dict[int, str]:
        """Every special token: those with a role, such as EOS, and those that only a chat template writes."""
        named = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        return dict(named) | {i: str(t) for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}

    def _chat(self, content: str) -> str:
        return self._rendered([{"role": "user", "content": content}])

    def _rendered(self, turns: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:
            raise PromptError(
                f"the chat template of {self.name} refuses the turns {shown([turn['role'] for turn in turns])} "
                f"({one_line(error, 120)}); use another model, or set model.tokenizer.chat_template"
            ) from error

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)
        return [int(i) for i in encoded["input_ids"]]

    # Hook points

    def point(self, layer: int, site: str) -> Any:
        """The HookPoint at a site.

        Raises:
            PlanError: the model has no such hook point.
        """
        name = hook_name(layer, site)
        point = self._points.get(name)
        if point is None:
            raise PlanError(f"{self.name} has no hook point {name}, site {shown(site)}; see model.hook_dict")
        return point

    @cached_property
    def _points(self) -> dict[str, Any]:
        """TransformerLens' own HookPoints. A bridge takes 10 ms to list them, each time."""
        return dict(self.model.hook_dict)

    def block(self, layer: int) -> nn.Module:
        """The block itself."""
        return self.model.blocks[layer]  # type: ignore[no-any-return]

    @abstractmethod
    def register(self, layer: int, name: str, module: nn.Module) -> None:
        """Add a submodule with HookPoints to a block, so that ``hook_dict`` lists them."""

    @abstractmethod
    def unregister(self, layer: int, name: str) -> None:
        """Undo :meth:`register`, also where it stopped halfway."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: the dtype of its first weights that are not quantised."""
        found: torch.dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return found

    def floats(self, name: str, weight: Tensor) -> Tensor:
        """A weight that is read as numbers, not run.

        Raises:
            ModelError: it is quantised: integers, which mean nothing without their scales.
        """
        if not weight.is_floating_point():
            raise ModelError(
                f"{name} of {self.name} is quantised ({str(weight.dtype).removeprefix('torch.')}) and can't be read; "
                "load the model without quantisation for this"
            )
        return weight.detach()

    # Forward passes

    def check_runs(self) -> None:
        """Raise :class:`ModelError` unless running the model gives a result, and the same one each time.

        A quantised model is not refused: it is run by itself, and what needs its weights says so.
        """
        parameters = list(self.model.parameters())
        places = {p.device.type for p in parameters}
        if "meta" in places:
            raise ModelError(f"{self.name} is on the meta device and has no weights; load them first")
        if len(places) > 1 and not hasattr(getattr(self.model, "original_model", None), "hf_device_map"):
            raise ModelError(
                f"the weights of {self.name} are on {' and '.join(sorted(places))}; move them to one, as with "
                "model.to('cpu')"
            )
        acting = next((name for name, part in self.model.named_modules() if _drops_out(part)), None)
        if acting is not None:
            raise ModelError(
                f"{self.name} is in training mode, and the dropout in {acting} makes it another model in each pass; "
                "call model.eval() first"
            )
        types = {p.dtype for p in parameters if p.is_floating_point()}
        if len(types) > 1:
            self._check_mixed(types)

    def _check_mixed(self, types: set[torch.dtype]) -> None:
        """Some models mean to have their norms or routers in another dtype: only a pass tells."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        try:
            with torch.inference_mode():
                self.logits(token, torch.ones_like(token, dtype=torch.bool), keep=1)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            named = " and ".join(sorted(str(t).removeprefix("torch.") for t in types))
            raise ModelError(
                f"the weights of {self.name} are in {named}, and it can't be run ({one_line(error, 120)}); "
                "convert them to one, as with model.to(torch.float32)"
            ) from error

    @abstractmethod
    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch all_pos"],
        *,
        keep: int,
        cache: Any = None,
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """Logits of the last ``keep`` columns of a left-padded batch.

        Args:
            tokens: new tokens.
            mask: True on real tokens, over what the cache holds *and* the new tokens.
            keep: columns, counted from the right; at least 1.
            cache: of :meth:`new_cache`; filled in place.
        """

    @abstractmethod
    def new_cache(self, batch: int) -> Any:
        """An empty KV cache for ``batch`` rows."""

    @abstractmethod
    def select_rows(self, cache: Any, rows: Int[Tensor, " new_batch"]) -> Any:
        """A cache whose row i is row ``rows[i]`` of ``cache``: expands a prompt K ways, drops finished rows."""

    @abstractmethod
    def fork(self, cache: Any) -> Any:
        """A cache that goes on from ``cache`` and leaves it as it is; what is in it is shared, not copied."""

    @contextmanager
    def replaying(self, layers: int, stream: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
        """Inside, the first ``layers`` blocks don't run: the last of them gives ``stream``, recorded before.

        A forward pass then costs only the blocks above. Hook points in the blocks that don't run don't fire, and their
        part of a KV cache stays as it is.

        Args:
            layers: how many blocks not to run.
            stream: what the last of them gave for the very tokens that the pass inside is about.
        """
        blocks = [self.block(layer) for layer in range(layers)]
        theirs = [block.__dict__.get("forward") for block in blocks]
        try:
            for block in blocks:
                block.__dict__["forward"] = lambda *_args, **_kwargs: stream
            yield
        finally:
            for block, forward in zip(blocks, theirs, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.__dict__["forward"] = forward

    def response_logits(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[tuple[int, Sequence[int]]]
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Teacher-forced logits that predict each token of each response; every prompt is run once.

        Args:
            prompts: token ids.
            responses: index of the prompt, and response token ids.

        Returns:
            Column k predicts token k of the row's response; columns beyond a response mean nothing.
        """
        tokens, mask = left_pad(prompts, self.device)
        cache = self.new_cache(len(prompts))
        rows = torch.tensor([index for index, _ in responses], device=self.device)
        first = self.logits(tokens, mask, keep=1, cache=cache)[rows]
        inputs = [list(response[:-1]) for _, response in responses]
        width = max(len(row) for row in inputs)
        if width == 0:
            return first
        padded = torch.tensor([row + [0] * (width - len(row)) for row in inputs], device=self.device)
        real = torch.arange(width)[None] < torch.tensor([len(row) for row in inputs])[:, None]
        whole = torch.cat([mask[rows], real.to(self.device)], dim=1)
        rest = self.logits(padded, whole, keep=width, cache=self.select_rows(cache, rows))
        return torch.cat([first, rest], dim=1)

    @abstractmethod
    def _weight_processing(self) -> str: ...


def adapt(model: Any) -> Adapter:
    """The adapter for a model.

    Raises:
        ModelError: the model is neither a ``HookedTransformer`` nor a ``TransformerBridge``.
    """
    from transformer_lens import HookedRootModule
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return BridgeAdapter(model)
    if isinstance(model, HookedRootModule) and hasattr(model, "blocks") and hasattr(model, "generate"):
        return HookedAdapter(model)
    raise ModelError(
        f"sims_lens steers HookedTransformer and TransformerBridge models, not {type(model).__name__}; "
        "use sims_lens.load(name), or TransformerBridge.boot_transformers(name)"
    )


class HookedAdapter(Adapter):
    """``HookedTransformer`` (TransformerLens up to 3.x)."""

    kind = "HookedTransformer"

    def register(self, layer: int, name: str, module: nn.Module) -> None:
        """See :meth:`Adapter.register`. The names are written one by one, as ``model.setup()`` would: to go through the
        whole model takes longer than a forward pass of a few tokens."""
        from transformer_lens.hook_points import HookPoint

        self.block(layer).add_module(name, module)
        for full_name, part in module.named_modules(prefix=f"blocks.{layer}.{name}"):
            part.__dict__["name"] = full_name
            self.model.mod_dict[full_name] = part
            if isinstance(part, HookPoint):
                self.model.hook_dict[full_name] = part

    def unregister(self, layer: int, name: str) -> None:
        """See :meth:`Adapter.unregister`."""
        parts = self.block(layer)._modules
        module = parts.get(name)  # taken out last, so that a second call does what an interrupted one did not
        for full_name, _ in module.named_modules(prefix=f"blocks.{layer}.{name}") if module else ():
            self.model.mod_dict.pop(full_name, None)
            self.model.hook_dict.pop(full_name, None)
        parts.pop(name, None)

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch all_pos"],
        *,
        keep: int,
        cache: Any = None,
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """See :meth:`Adapter.logits`. Only the kept columns are unembedded."""
        from transformer_lens.utilities.activation_functions import apply_softcap

        residual = self.model.forward(
            tokens,
            attention_mask=mask[:, -tokens.shape[1] :].int(),  # the cache holds the mask of what came before
            past_kv_cache=cache,
            stop_at_layer=self.n_layers,
        )[:, -keep:]
        if self.cfg.normalization_type is not None:
            residual = self.model.ln_final(residual)
        logits: Tensor = apply_softcap(self.model.unembed(residual), self.cfg.output_logits_soft_cap)
        return logits

    def new_cache(self, batch: int) -> Any:
        """See :meth:`Adapter.new_cache`."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.cfg, self.cfg.device, batch)

    def select_rows(self, cache: Any, rows: Int[Tensor, " new_batch"]) -> Any:
        """See :meth:`Adapter.select_rows`."""
        new = self.new_cache(len(rows))
        for old_entry, entry in zip(cache.entries, new.entries, strict=True):
            entry.past_keys = old_entry.past_keys.index_select(0, rows)
            entry.past_values = old_entry.past_values.index_select(0, rows)
        new.previous_attention_mask = cache.previous_attention_mask.index_select(0, rows)
        return new

    def fork(self, cache: Any) -> Any:
        """See :meth:`Adapter.fork`."""
        new = copy.copy(cache)
        new.entries = [copy.copy(entry) for entry in cache.entries]  # an entry that grows gets new tensors
        return new

    def _weight_processing(self) -> str:
        source = getattr(self.model, "sims_source", None) or {}
        folded = str(self.cfg.normalization_type).endswith("Pre")
        return str(source.get("weight_processing") or ("folded" if folded else "none"))


class BridgeAdapter(Adapter):
    """``TransformerBridge`` (TransformerLens 3.x and 4.x)."""

    kind = "TransformerBridge"

    def register(self, layer: int, name: str, module: nn.Module) -> None:
        """See :meth:`Adapter.register`. Names are written to the bridge's registry one by one, because scanning
        the whole model again renames points on 3.9."""
        self.block(layer).add_module(name, module)
        for child, point in module.named_children():
            full_name = f"blocks.{layer}.{name}.{child}"
            point.__dict__["name"] = full_name
            self.model._hook_registry[full_name] = point

    def unregister(self, layer: int, name: str) -> None:
        """See :meth:`Adapter.unregister`."""
        parts = self.block(layer)._modules
        module = parts.get(name)
        for child, _ in module.named_children() if module else ():
            self.model._hook_registry.pop(f"blocks.{layer}.{name}.{child}", None)
        parts.pop(name, None)

    def logits(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch all_pos"],
        *,
        keep: int,
        cache: Any = None,
    ) -> Float[Tensor, "batch keep d_vocab"]:
        """See :meth:`Adapter.logits`."""
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        kept: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits() else {}
        logits: Tensor = self.model.forward(
            tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **kept,
        )
        return logits[:, -keep:]

    def _keeps_logits(self) -> bool:
        import inspect

        return "logits_to_keep" in inspect.signature(self.model.original_model.forward).parameters

    def new_cache(self, batch: int) -> Any:  # noqa: ARG002 - HF caches take their batch from the first tokens
        """See :meth:`Adapter.new_cache`."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.original_model.config)

    def select_rows(self, cache: Any, rows: Int[Tensor, " new_batch"]) -> Any:
        """See :meth:`Adapter.select_rows`."""
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in new.layers:
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
        return new

    def fork(self, cache: Any) -> Any:
        """See :meth:`Adapter.fork`."""
        new = copy.copy(cache)
        new.layers = [copy.copy(layer) for layer in cache.layers]  # a layer that grows gets new tensors
        return new

    def _weight_processing(self) -> str:
        source = getattr(self.model, "sims_source", None) or {}
        compatible = bool(getattr(self.model, "compatibility_mode", False))
        return str(source.get("weight_processing") or ("compatibility mode" if compatible else "none"))


def cached_length(call: Callable[[str], Any], arguments: Sequence[Any]) -> int:
    """How many tokens the KV cache of a block's call already holds; 0 without a cache.

    Args:
        call: looks up a keyword argument of the block's call, None where it is absent.
        arguments: every argument of the call.
    """
    entry = call("past_kv_cache_entry")
    if entry is not None:
        return int(entry.past_keys.shape[1])
    for argument in arguments:
        if hasattr(argument, "get_seq_length"):
            return int(argument.get_seq_length())
    return 0


def check_lengths(
    adapter: Adapter,
    prompts: Sequence[str],
    max_new_tokens: int,
    encoded: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raise :class:`PromptError` unless every prompt leaves room for a response in the context.

    Args:
        adapter: of the model.
        prompts: texts.
        max_new_tokens: of a response.
        encoded: the prompts' token ids, where they are known.
    """
    if max_new_tokens >= adapter.n_ctx:
        raise ConfigError(f"max_new_tokens = {max_new_tokens} does not fit the context of {adapter.n_ctx} tokens")
    for index, prompt in enumerate(prompts):
        length = len(adapter.encode(prompt) if encoded is None else encoded[index])
        if length + max_new_tokens > adapter.n_ctx:
            raise PromptError(
                f"prompt {index} ({prompt[:40]!r}...) has {length} tokens; with {max_new_tokens} new ones that is more "
                f"than the context of {adapter.n_ctx}: shorten it or lower max_new_tokens"
            )


def check_rows(adapter: Adapter, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raise :class:`PromptError` unless rows are token ids of the model's, of prompts and responses in its context."""
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
        raise PromptError(f"rows must be a list of (prompt, response) of token ids, got {shown(rows)}")
    vocabulary = int(adapter.cfg.d_vocab)
    for index, row in enumerate(rows):
        try:
            prompt, response = row
            parts = [array("q", prompt), array("q", response)]
        except (TypeError, ValueError, OverflowError):
            raise PromptError(
                f"row {index} is {shown(row)}; a row is (prompt, response), two lists of token ids"
            ) from None
        for ids in parts:
            if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
                wrong = next(i for i in ids if not 0 <= i < vocabulary)
                raise PromptError(
                    f"row {index} has the token id {wrong}; those of {adapter.name} are 0..{vocabulary - 1}"
                )
        length = len(parts[0]) + len(parts[1])
        if length > adapter.n_ctx:
            raise PromptError(f"row {index} has {length} tokens, the context {adapter.n_ctx}: shorten {shown(row)}")


def _check_text(text: object, what: str) -> None:
    check_kind(what, text, str, "give a text", PromptError)
    assert isinstance(text, str)
    if not text.isascii() and (half := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
        raise PromptError(f"{what} has half of a surrogate pair, {half!r}; remove it: {shown(text)}")


def _drops_out(part: nn.Module) -> bool:
    """Whether a module is in training mode and has a dropout, as a part or as the number that transformers' have."""
    if not part.training:
        return False
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    numbers = (vars(part).get(name) for name in ("attention_dropout", "dropout", "activation_dropout", "layerdrop"))
    return any(isinstance(number, float) and number > 0 for number in numbers)


def left_pad(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids and mask of a left-padded batch. Pads are token 0 and masked: their value never matters.

    >>> left_pad([[5, 6], [7]], torch.device("cpu"))[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = torch.tensor(list(row), dtype=torch.long)
        mask[i, width - len(row) :] = True
    return tokens.to(device), mask.to(device)


def restride(model: Any) -> Any:
    """Lay a ``HookedTransformer``'s weights out in memory as its forward pass reads them; in place, returns it.

    TransformerLens copies every weight matrix into another layout at each forward pass (``W.T.contiguous()``,
    ``rearrange``): four fifths of the time of a decoding step at batch 1. This changes only the strides: the same
    parameters, values, shapes, bytes, and bit-identical logits and activations, but those copies become views. It
    survives ``.to`` and ``load_state_dict``; to save the weights with safetensors call ``.contiguous()`` on them
    first. :func:`sims_lens.load` has done it already. A ``TransformerBridge`` is returned untouched.
    """
    if adapt(model).kind != "HookedTransformer":
        return model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kind = name.rpartition(".")[2].removeprefix("_")
            if weight.ndim == 2 and kind in ("W_U", "W_in", "W_out", "W_gate"):
                weight.data = weight.data.T.contiguous().T
            elif weight.ndim == 3 and kind in ("W_Q", "W_K", "W_V"):
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
            elif weight.ndim == 3 and kind == "W_O":
                weight.data = weight.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return model
