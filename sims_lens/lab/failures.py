"""A ledger of what went wrong in responses, by kind: steered against base. Pure functions of samples.

The kinds are heuristics on text, made to be seen through: each is a rule of a line or two, none asks a model, none
downloads anything. They miss what they do not name.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sims_lens.data import Sample, by_prompt
from sims_lens.errors import ConfigError
from sims_lens.lab.shown import Shown, columns, rate, rate_difference, share, signed
from sims_lens.run import Run
from sims_lens.stats import CONFIDENCE, Interval, holm, sign_flip_p

if TYPE_CHECKING:
    import pandas as pd

GRAM, TIMES = 4, 3
"""A loop: the same four words three times over in one response."""

LONGEST_PERIOD, LEAST_TOKENS = 8, 12
"""Or one that ends in a stretch of at least 12 tokens, of three periods or more, that repeats up to 8 tokens."""

BLOW_UP, MORE_TOKENS = 1.5, 10
"""A blow-up: half as long again as the base model's mean response to the prompt, and 10 tokens longer."""

_SCRIPTS: Final = (
    "LATIN",
    "CYRILLIC",
    "GREEK",
    "ARABIC",
    "HEBREW",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HANGUL",
    "THAI",
) + (
    "DEVANAGARI",
    "BENGALI",
    "TAMIL",
)

_STOP_WORDS: Final = {
    language: frozenset(words.split())
    for language, words in {
        "English": "the and of to in is that it for you with on are this be have not as at your was they from or by",
        "German": "der die das und ist nicht ein eine zu mit auf für von sich den dem auch es wie werden sie ich oder",
        "French": "le la les des et est une un pas que pour dans sur avec vous ce qui il elle au du je nous sont",
        "Spanish": "el la los las de que y en un una es por con para no se su al lo como más pero te mi está",
        "Italian": "il lo la gli di che e è un una per con non si del della sono come più ma nel ti anche",
        "Portuguese": "o a os as de que e em um uma é por com para não se do da no na como mais mas você",
        "Dutch": "de het een en van is niet dat op te in voor met zijn ook aan als je er maar om hij wordt",
    }.items()
}

_REFUSAL: Final = re.compile(
    r"\b(?:i(?:'| a)?m sorry,? (?:but )?(?:i )?(?:can(?:'|no)t|am (?:not|un)able|won't)"
    r"|i (?:can(?:'|no)t|can not|won't|will not|am unable to|am not able to|'m unable to|'m not able to)"
    r" (?:help|assist|provide|answer|do that|fulfil|comply|engage|generate|create|discuss|support|continue)"
    r"|as an ai(?: language)?(?: model| assistant)?,? i (?:do(?:n't| not)|can(?:'t|not|not)|am not)"
    r"|i must (?:decline|refuse)|(?:that|it) (?:is|would be) (?:not appropriate|inappropriate) for me)",
    re.IGNORECASE,
)
_WORD: Final = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Failure:
    """One kind of failure.

    Args:
        kind: its name.
        meaning: the rule, in a few words.
        count: steered responses that have it.
        steered: share of steered responses that have it; over prompts.
        base: the same of the base model's.
        difference: steered less base, paired by prompt.
        p: of no difference, by sign flips over prompts; not adjusted for the number of kinds.
        examples: ``(prompt, draw)`` of the steered responses that have it.
    """

    kind: str
    meaning: str
    count: int
    steered: Interval
    base: Interval
    difference: Interval
    p: float
    examples: tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False)
class FailureLedger(Shown):
    """Failures by kind; made by :func:`failures`.

    Args:
        kinds: each kind, and "any" of them but missing EOS, which is the rule where responses are cut short.
        responses: steered ones.
        prompts: how many.
    """

    kinds: tuple[Failure, ...]
    responses: int
    prompts: int

    @property
    def more(self) -> list[str]:
        """Kinds that are shown to be more frequent than in the base model's responses: p below 0.05, adjusted for the
        number of kinds (Holm). An interval alone says so too easily of events as rare as these."""
        return self._shown(1.0)

    @property
    def less(self) -> list[str]:
        """Kinds that are shown to be less frequent."""
        return self._shown(-1.0)

    def _shown(self, sign: float) -> list[str]:
        single = [f for f in self.kinds if f.kind != "any"]
        adjusted = holm([f.p for f in single])
        return [
            f.kind
            for f, p in zip(single, adjusted, strict=True)
            if p < 1 - CONFIDENCE and sign * f.difference.estimate > 0
        ]

    def __getitem__(self, kind: str) -> Failure:
        for failure in self.kinds:
            if failure.kind == kind:
                return failure
        raise ConfigError(f"there is no kind of failure {kind!r}; there are {', '.join(f.kind for f in self.kinds)}")

    def table(self) -> "pd.DataFrame":
        """One row per kind: count, and shares with their intervals."""
        import pandas as pd

        rows = []
        for f in self.kinds:
            row: dict[str, Any] = {"kind": f.kind, "count": f.count}
            rows.append(row | columns(steered=f.steered, base=f.base, difference=f.difference) | {"p": f.p})
        return pd.DataFrame(rows).set_index("kind")

    def head(self) -> str:
        """One line."""
        return f"Failures in {self.responses} steered responses to {self.prompts} prompts"

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text."""
        rows: list[tuple[str, ...]] = [
            ("kind", "count", "steered [95%]", "base [95%]", "difference, points [95%]", "p", "what it is")
        ]
        for f in self.kinds:
            points = signed(f.difference.map(lambda share: 100 * share))
            rows.append((f.kind, f"{f.count}", share(f.steered), share(f.base), points, f"{f.p:.2g}", f.meaning))
        return rows

    def verdict(self) -> str:
        """Which kinds are shown to have become more frequent, or less."""
        more, less = self.more, self.less
        if not more and not less:
            return "No kind of failure is shown to be more or less frequent than in the base model's responses."
        parts = [f"more frequent than in the base model's responses: {', '.join(more)}"] if more else []
        parts += [f"less frequent: {', '.join(less)}"] if less else []
        return f"Shown to be {'; '.join(parts)}."


def failures(
    samples: Run | Sequence[Sample],
    base: Sequence[Sample] | None = None,
    prompts: Sequence[str] | None = None,
    *,
    iteration: int | None = None,
    seed: int = 0,
) -> FailureLedger:
    """Count failures of steered responses by kind, against the base model's responses to the same prompts.

    Args:
        samples: steered responses; or a run, then its held-out responses are taken, and ``base`` and ``prompts`` too.
        base: of the base model.
        prompts: those that ``Sample.prompt`` counts.
        iteration: of a run; by default the one that its plan is taken from, or the last.
        seed: of the intervals.

    Raises:
        ConfigError: base or prompts are missing, or the samples are of different prompts.
    """
    if isinstance(samples, Run):
        best = samples.best
        chosen = iteration or (best.index if best else len(samples.iterations))
        prompts, base, samples = samples.prompts, samples.samples(0), samples.samples(chosen)
    if base is None or prompts is None:
        raise ConfigError(
            "samples need base=[...], those of the base model, and prompts=[...] beside them; or give a run"
        )
    groups, base_groups = by_prompt(samples), by_prompt(base)
    if [g[0].prompt for g in groups] != [g[0].prompt for g in base_groups] or not groups:
        raise ConfigError("steered and base samples must be of the same prompts, one or more")
    usual = {g[0].prompt: float(np.mean([len(s.tokens) for s in g])) for g in base_groups}
    asked = {i: language(prompts[i]) for i in usual}
    rules: dict[str, tuple[str, Callable[[Sample], bool]]] = {
        "loop": (f"the same {GRAM} words {TIMES} times, or it ends going round", lambda s: loops(s.text, s.tokens)),
        "length blow-up": (
            f"{BLOW_UP:g} times the base model's mean, and {MORE_TOKENS} tokens more",
            lambda s: len(s.tokens) >= max(BLOW_UP * usual[s.prompt], usual[s.prompt] + MORE_TOKENS),
        ),
        "language switch": (
            "another language or script than the prompt's",
            lambda s: _switched(asked[s.prompt], language(s.text)),
        ),
        "refusal": ("says that it can't or won't", lambda s: refuses(s.text)),
        "empty": ("no word in it", lambda s: not _WORD.search(s.text)),
        "no EOS": ("cut off by the token limit", lambda s: not s.ended),
    }
    found = [_counted(kind, meaning, rule, groups, base_groups, seed) for kind, (meaning, rule) in rules.items()]
    broken = [rule for kind, (_, rule) in rules.items() if kind != "no EOS"]
    either = _counted(
        "any", "any of these but no EOS", lambda s: any(rule(s) for rule in broken), groups, base_groups, seed
    )
    return FailureLedger((*found, either), len(samples), len(groups))


def loops(text: str, tokens: Sequence[int] = ()) -> bool:
    """Whether a response goes round in circles: :data:`GRAM` words :data:`TIMES` times over, or its end repeats a few
    tokens.

    >>> loops("so it is and so it is and so it is and"), loops("so it goes", [7, 8] * 6), loops("so it goes", range(12))
    (True, True, False)
    """
    words = [word.casefold() for word in text.split()]
    grams = Counter(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))
    if grams and max(grams.values()) >= TIMES:
        return True
    ids = list(tokens)
    for period in range(1, LONGEST_PERIOD + 1):
        same = 0
        while same + period < len(ids) and ids[-1 - same] == ids[-1 - same - period]:
            same += 1
        if same and same + period >= max(TIMES * period, LEAST_TOKENS):
            return True
    return False


def language(text: str) -> str:
    """The language or script of a text, "" where it is too short to tell.

    The script that most letters are in; for Latin letters the language of seven whose most frequent words make up most
    of the text, if they are at least three, and twice as many as the next language's.

    >>> language("What is the worst thing about it?"), language("Почему небо голубое?"), language("Hi!")
    ('English', 'Cyrillic', '')
    """
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return ""
    names = Counter(unicodedata.name(char, "?").split(" ", 1)[0] for char in letters)
    script = max(_SCRIPTS, key=lambda name: names[name])
    if names[script] < 0.5 * len(letters) or len(letters) < 4:
        return ""
    if script != "LATIN":
        return "Chinese or Japanese" if script in ("CJK", "HIRAGANA", "KATAKANA") else script.capitalize()
    words = [word.casefold() for word in _WORD.findall(text)]
    hits = sorted(((sum(w in known for w in words), name) for name, known in _STOP_WORDS.items()), reverse=True)
    (most, name), (next_most, _) = hits[:2]
    return name if most >= 3 and most >= 2 * next_most else ""


def refuses(text: str) -> bool:
    """Whether a response refuses, in English, in one of the usual phrases.

    >>> refuses("I'm sorry, but I can't help with that."), refuses("You can't help loving it.")
    (True, False)
    """
    return _REFUSAL.search(text.replace("’", "'")) is not None


def _switched(asked: str, answered: str) -> bool:
    return bool(asked and answered) and asked != answered


def _counted(
    kind: str,
    meaning: str,
    rule: Callable[[Sample], bool],
    groups: Sequence[Sequence[Sample]],
    base_groups: Sequence[Sequence[Sample]],
    seed: int,
) -> Failure:
    ours, theirs = ([[rule(s) for s in g] for g in some] for some in (groups, base_groups))
    steered, base = (np.array([np.mean(marks) for marks in some], dtype=np.float64) for some in (ours, theirs))
    return Failure(
        kind=kind,
        meaning=meaning,
        count=sum(map(sum, ours)),
        steered=rate(steered, seed=seed),
        base=rate(base, seed=seed),
        difference=rate_difference(steered - base, seed=seed),
        p=sign_flip_p(steered - base, seed=seed),
        examples=tuple(
            (s.prompt, s.draw)
            for g, marks in zip(groups, ours, strict=True)
            for s, bad in zip(g, marks, strict=True)
            if bad
        ),
    )


__all__ = ["Failure", "FailureLedger", "failures", "language", "loops", "refuses"]
