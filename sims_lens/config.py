"""Choices, never results. A config that was saved reproduces its run.

One small frozen dataclass per step, nested in :class:`SIMSConfig`. Each only checks itself. The defaults are those
of the demo on SmolLM2-135M-Instruct (``docs/results.md``); ``docs/method.md`` says which of them rest on trials only.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from sims_lens.errors import ConfigError
from sims_lens.scope import TokenScope
from sims_lens.sites import check_site

Compose = Literal["accumulate", "replace"]
Allocation = Literal["equal", "spread"]
AuditPolicy = Literal["stop", "report", "off"]
GuardMode = Literal["act", "report", "off"]
Dtype = Literal["float32", "bfloat16", "float16"]
LengthControl = Literal["report", "match", "regress"]
Policy = Literal["all", "top_margin", "stratified", "recency", "random"]


def _positive_int(name: str, value: Any, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")


def _number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if bad or value < low or value > high or (open_low and value == low):
        raise ConfigError(f"{name} must be a number {'above' if open_low else 'from'} {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Args:
        responses: K, responses to each training prompt in each iteration.
        allocation: "equal", K to each prompt; or "spread", from the second iteration on the same number in all, more
            where a prompt's scores have spread further so far.
        max_new_tokens: longest response.
        temperature: divides the logits.
        top_k: only the k most probable tokens; None for all.
        top_p: the smallest set of tokens with this much probability; 1.0 for all.
        min_p: only tokens at least this probable, as a share of the most probable one's; 0 for all.
        stop: strings that end a response; they are not part of it.
        batch_rows: sequences decoded side by side, at most. None: as many as help and find room in memory.
        dtype: to decode in, "float32", "bfloat16" or "float16", with a copy of the weights where it is not the
            model's own. "bfloat16" is nearly twice as fast on a CPU that multiplies in it, and slower on others; what
            it does to results is in ``docs/speed.md``. What is measured while sampling is measured in it too.
    """

    responses: int = 4
    allocation: str = "equal"
    max_new_tokens: int = 40
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    batch_rows: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        _positive_int("responses (K)", self.responses, low=2)
        if self.allocation not in get_args(Allocation):
            raise ConfigError(f"allocation must be one of {', '.join(get_args(Allocation))}, got {self.allocation!r}")
        _positive_int("max_new_tokens", self.max_new_tokens)
        if self.batch_rows is not None:
            _positive_int("batch_rows", self.batch_rows)
        _number("min_p", self.min_p, 0.0, 1.0)
        stop = self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(f'stop must be a tuple of strings, such as ("\\n\\n",), got {stop!r}')
        object.__setattr__(self, "stop", tuple(stop))
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise ConfigError(f"dtype must be one of {', '.join(get_args(Dtype))}, or None; got {self.dtype!r}")
        _number("temperature", self.temperature, 0.0, open_low=True)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.top_k is not None:
            _positive_int("top_k", self.top_k)


@dataclass(frozen=True)
class RankingConfig:
    """How the ranker is watched.

    Args:
        audit: what happens when an audit of the ranker, before anything is learnt, finds it no better than chance:
            "stop" with the reason, or "report" it and go on; "off" asks nothing.
        audit_prompts: training prompts whose first responses the audit uses.
    """

    audit: str = "stop"
    audit_prompts: int = 16

    def __post_init__(self) -> None:
        if self.audit not in get_args(AuditPolicy):
            raise ConfigError(f"audit must be one of {', '.join(get_args(AuditPolicy))}, got {self.audit!r}")
        _positive_int("audit_prompts", self.audit_prompts, low=2)


@dataclass(frozen=True)
class ContrastConfig:
    """How pairs are made of ranked responses.

    Args:
        memory: how many iterations the pairs may come from: 1, only the one at hand; None, all so far (contrast
            sampling), so that the best response of one iteration may meet the worst of another.
        policy: which pairs: "all"; or "top_margin", "stratified", "recency", "random" of a given ``size``.
        size: pairs in all; None for every one.
        per_prompt: pairs of one prompt, at most.
        min_margin: a prompt whose best and worst score differ by no more than this gives no pair (0 drops ties).
        length: what is done about best and worst differing in length: "report", "match" or "regress".
    """

    memory: int | None = 1
    policy: str = "all"
    size: int | None = None
    per_prompt: int = 1
    min_margin: float = 0.0
    length: str = "report"

    def __post_init__(self) -> None:
        if self.memory is not None:
            _positive_int("memory", self.memory)
        if self.policy not in get_args(Policy):
            raise ConfigError(f"policy must be one of {', '.join(get_args(Policy))}, got {self.policy!r}")
        if self.size is not None:
            _positive_int("size", self.size)
            if self.policy == "all":
                raise ConfigError(f"policy 'all' takes every pair; with size = {self.size} choose another policy")
        _positive_int("per_prompt", self.per_prompt)
        _number("min_margin", self.min_margin, 0.0)
        if self.length not in get_args(LengthControl):
            raise ConfigError(f"length must be one of {', '.join(get_args(LengthControl))}, got {self.length!r}")


@dataclass(frozen=True)
class SteeringConfig:
    """How the fitted directions are applied.

    Args:
        layers: the layers to steer, or "auto": of the candidates, the one with the highest win rate on the
            validation prompts among those whose text stays fluent.
        candidates: the layers that "auto" tries, as fractions of the model's depth.
        max_nll_increase: what "auto" calls fluent: mean negative log-likelihood of the steered text under the
            unsteered model, in nats per token above that of the unsteered text.
        site: where in the block.
        strength: total strength at the last iteration, in units of the median residual norm of the responses at
            the site. With several layers each gets this much. "auto": as much as ``kl`` allows, found in each
            iteration on the model's own responses.
        kl: what "auto" spends: mean KL(steered || base) of the next-token distributions, nats per token, on responses
            of the base model. That of the steered model's own responses, in the run's table, is 0.8 to 0.95 of it.
        compose: "accumulate" adds a new unit direction in each iteration, of ``strength / iterations``, or so that the
            sum spends ``kl * t / iterations``; "replace" keeps only the newest direction, at full strength.
        scope: which tokens are steered.
    """

    layers: tuple[int, ...] | Literal["auto"] = "auto"
    candidates: tuple[float, ...] = (0.6, 0.75, 0.9)
    max_nll_increase: float = 0.8
    site: str = "resid_post"
    strength: float | Literal["auto"] = "auto"
    kl: float = 0.3
    compose: str = "accumulate"
    scope: str = "generation"

    def __post_init__(self) -> None:
        check_site(self.site)
        TokenScope.of(self.scope)
        if self.strength != "auto":
            if isinstance(self.strength, str):
                raise ConfigError(f'strength must be "auto" or a number such as 0.2, got {self.strength!r}')
            _number("strength", self.strength, 0.0, open_low=True)
        _number("kl", self.kl, 0.0, open_low=True)
        _number("max_nll_increase", self.max_nll_increase, 0.0, open_low=True)
        if self.compose not in get_args(Compose):
            raise ConfigError(f"compose must be one of {', '.join(get_args(Compose))}, got {self.compose!r}")
        if self.layers != "auto":
            if not isinstance(self.layers, (tuple, list)) or not self.layers:
                raise ConfigError(f'layers must be "auto" or a tuple such as (22,), got {self.layers!r}')
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                _positive_int("a layer", layer, low=0)
            if len(set(self.layers)) < len(self.layers):
                raise ConfigError(f"layers are named twice in {self.layers!r}")
        if not isinstance(self.candidates, (tuple, list)) or not self.candidates:
            raise ConfigError(f"candidates must be fractions of the depth, such as (0.75,), got {self.candidates!r}")
        object.__setattr__(self, "candidates", tuple(self.candidates))
        for fraction in self.candidates:
            _number("a candidate", fraction, 0.0, 1.0)


@dataclass(frozen=True)
class EvaluationConfig:
    """How progress is measured, on prompts that the fit never sees.

    Args:
        heldout: share of the prompts that are held out.
        validation: share of the prompts on which "auto" picks the layer.
        samples: responses to each held-out prompt, of each plan.
        measured: of those, how many of each prompt have their perplexity and KL measured. It comes along with
            drawing them where the model has a twin, and costs as much again where not.
        controls: norm-matched shuffled-label plans, evaluated beside the last iteration; a null band takes two.
        split_seed: of the split of the prompts; None for the run's seed. Runs with different seeds and the same
            ``split_seed`` are measured on the same held-out prompts.
    """

    heldout: float = 0.4
    validation: float = 0.15
    samples: int = 3
    measured: int = 2
    controls: int = 5
    split_seed: int | None = None

    def __post_init__(self) -> None:
        _number("heldout", self.heldout, 0.0, 1.0, open_low=True)
        _number("validation", self.validation, 0.0, 1.0)
        if self.heldout + self.validation >= 1.0:
            raise ConfigError(
                f"heldout + validation must leave prompts to train on, got {self.heldout} + {self.validation}"
            )
        _positive_int("samples", self.samples)
        _positive_int("measured", self.measured)
        _positive_int("controls", self.controls, low=0)
        if self.split_seed is not None:
            _positive_int("split_seed", self.split_seed, low=0)


@dataclass(frozen=True)
class GuardConfig:
    """What an iteration must keep to, on the held-out prompts, and what happens if it doesn't.

    An iteration that is over budget is tried again with a smaller step, then rolled back; one that is shown to be
    worse than the best before it is rolled back; one whose effect is shown to be above 0 is accepted. The reasons for
    the limits are in ``docs/method.md``.

    Args:
        mode: "act"; "report", which says what it would have done and keeps every iteration; or "off".
        kl_95: the 95th percentile over a response's tokens of KL(steered || base), nats, averaged: at most.
        perplexity_ratio: perplexity of the steered text under the base model over that of the base model's: at most.
        diversity: distinct word bigrams of the steered responses over those of the base model's: at least.
        turn: cosine of an iteration's direction with the newest one that was kept: at least. A ranker that changes its
            mind turns it round.
        shrinks: how often a step over budget is made smaller before it is rolled back; each is measured.
        patience: iterations in a row that gain nothing, after which the run stops.
    """

    mode: str = "act"
    kl_95: float = 1.5
    perplexity_ratio: float = 2.2
    diversity: float = 0.75
    turn: float = -0.2
    shrinks: int = 2
    patience: int = 2

    def __post_init__(self) -> None:
        if self.mode not in get_args(GuardMode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(GuardMode))}, got {self.mode!r}")
        _number("kl_95", self.kl_95, 0.0, open_low=True)
        _number("perplexity_ratio", self.perplexity_ratio, 1.0, open_low=True)
        _number("diversity", self.diversity, 0.0, 1.0)
        _number("turn", self.turn, -1.0, 1.0)
        _positive_int("shrinks", self.shrinks, low=0)
        _positive_int("patience", self.patience)


@dataclass(frozen=True)
class SIMSConfig:
    """Everything that :func:`sims_lens.improve` can be told.

    Args:
        iterations: turns of the loop.
        seed: of everything that is random. The same config gives the same vectors, bit for bit, on one machine.

    >>> SIMSConfig(iterations=2).sampling.responses
    4
    """

    iterations: int = 3
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        _positive_int("iterations", self.iterations)
        _positive_int("seed", self.seed, low=0)
        for part in fields(self)[2:]:
            kind = part.default_factory
            if not isinstance(getattr(self, part.name), kind):  # type: ignore[arg-type]
                raise ConfigError(f"{part.name} must be a {kind.__name__}, got {getattr(self, part.name)!r}")  # type: ignore[union-attr]

    def to_json(self) -> dict[str, Any]:
        """A plain dict; the inverse of :meth:`from_json`."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SIMSConfig":
        """The config that :meth:`to_json` described.

        Raises:
            ConfigError: a name is unknown or a value is out of range.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a SIMSConfig is an object with settings by name, got a {type(data).__name__}")
        parts = {f.name: f.default_factory for f in fields(cls)[2:]}
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name not in {f.name for f in fields(cls)}:
                raise ConfigError(
                    f"unknown setting {name!r}; a SIMSConfig has {', '.join(f.name for f in fields(cls))}"
                )
            if name in parts:
                kind: Any = parts[name]
                known = {f.name for f in fields(kind)}
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{name!r} is an object with settings by name, got a {type(value).__name__}")
                if unknown := set(value) - known:
                    raise ConfigError(
                        f"unknown settings {sorted(unknown)} in {name!r}; it has {', '.join(sorted(known))}"
                    )
                try:
                    value = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
                except TypeError as error:  # lists within lists
                    raise ConfigError(f"{name!r} has a value of a type that no setting is of ({error})") from error
            values[name] = value
        return cls(**values)

    @property
    def digest(self) -> str:
        """Twelve hex digits that change when any choice does."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]
