r"""Oracles: rankers whose score is a formula, so that self-improvement can be measured without a judge.

:class:`ReadingEase` rewards plain language and needs nothing but Python. :class:`Vader` rewards a positive tone. Both
are offline and deterministic, and both look at the response alone, never at the prompt.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import ClassVar, Final

from sims_lens.errors import RankerError

EASIEST: Final = 121.22
"""The best score that the formula can give: words of one syllable in sentences of one word."""

HARDEST: Final = -50.0
"""All text that is harder than this scores the same, and so does text without a word."""

# --- syllables -------------------------------------------------------------------------------------------------------

# Words that the rules below get wrong and that people use. Their plurals and possessives follow. Of two accepted
# pronunciations the shorter one counts, as Flesch has it.
_EXCEPTIONS: Final[dict[str, int]] = {
    word: count
    for count, words in {
        1: "aisle isle",
        2: """acne argue boa business cafe cashier catholic chloe chocolate choir cliche colonel cooper crooked
           diamond druid duel duet duo embed evening eyebrow fluid frontier genius genre glacier goodbye
           guinea joel leo maybe naive naked noah noel ocean ok opera persuade premier righteous rugged ruin
           salesman soldier sovereign spokesman wednesday whereas wicked wyatt zoe""",
        3: """adobe anime anyone apache arguing cereal comfortable deity diego element fiance fiery finale genuine
           heroin heroine interesting iowa juliet karate linear messiah meteor nuclear nucleus oasis parliament
           recipe reunion reunite romeo seattle sesame sierra simile stereo suicide temperature tokyo vegetable
           video vienna whoever""",
        4: """allegedly apostrophe arguably california catastrophe coalition diabetes entirety epitome facsimile
           hyperbole karaoke laboratory nevertheless supposedly valencia veterinary""",
    }.items()
    for word in words.split()
}

_VOWELS: Final = re.compile(r"[aeiouy]+")

# A y that is a consonant: at the start, and between vowels ("yes", "beyond", "played").
_CONSONANT_Y: Final = re.compile(r"^y(?=[aeiou])|(?<=[aeiou])y(?=[aeiou])")

# Endings that a silent e can hide in front of: "love|ly", "move|ment", "some|where", "wide|spread".
_ENDING: Final = re.compile(
    r"""(?:ly|li|ful|less|ness|ment|some|ship|hood|(?<=[^aeiou]e)(?:
        back|ball|bird|board|book|by|cake|cast|craft|day|dom|fish|fore|ground|guard|head|hold|house|how|land|life|light
        |like|line|long|made|maker?|man|mark|men|most|one|place|play|point|proof|room|self|shop|side|spread|stock|stone
        |style|thing|times?|town|ty|walk|ward|ware|way|what|where|wide|wise|wood|work|yard
        |(?P<two>berry|body|holder|keeper|paper|woman|women)))$""",
    re.VERBOSE,
)

# A last vowel group that nobody says.
_SILENT: Final = re.compile(
    r"""(?<=[^aeiou])(?<![^aeiouylrw]l)(?<![bcdfgkptv]r)e$            # "time", not "table" nor "acre"
      | (?<=[^aeiouscgxzh])(?<![^aeiouylrw]l)(?<![bcdfgkptv]r)es$     # "times", not "houses" nor "changes"
      | (?<=[tp]h)es$                                                 # "clothes"
      | (?<=[gq])ues?$ | (?<=q)ued$ | (?<=ea|oa)gued$                 # "league", "technique"
      | (?<=[^aeioutd])(?<![bcdfgkpstz]l)(?<![bcdt]r)ed$              # "walked", not "wanted" nor "handled"
    """,
    re.VERBOSE,
)

# Vowels that stand side by side and belong to two syllables, and syllables without a written vowel.
_SPLIT: Final = re.compile(
    r"""^(?:[^aeiouy]+|qu)i(?=[ao]|et|en[ct])                         # "riot", "diet", "science", "quiet"
      | i(?=ous$)(?<![ctgx]i) | e(?=ous$)(?<![cg]e)                   # "various", "hideous"; not "precious", "gorgeous"
      | (?<![cstgl])i(?=a(?!ge)) | (?<=[ct])i(?=at(?!iv))             # "material", "appreciate"; not "special"
      | (?<=l)i(?=a(?![rn])|anc|en) | (?<=us)i(?=as)                  # "reliable", "alliance", "enthusiasm"
      | (?<![ctlsgr])i(?=en[ct]) | (?<=r)i(?=en(?!d)) | i(?=et(?:y|ies|al))   # "audience", "experience", "society"
      | [aeiouy][^aeiouy]+i(?=er$|est$) | (?<=[^aeiou])y(?=ing$)      # "easier", "happiest", "trying"
      | (?<![gqj])u(?=a) | u(?=ous) | (?<!q)u(?=iti?y|itio) | (?<![gq])u(?=en[ct])  # "actual", "fluent"
      | (?<=[aeiouy][^aeiouy])e(?=an?$) | e(?=um$|ing$) | deo(?=s)    # "area", "European", "seeing"
      | ^re(?=ac[^h]|ali|as[^o]|app|arr|en|in|org) | cre(?=at[eio]) | the(?=at)    # "reaction", "creative"
      | ^(?:geo|neo|theo)(?=[^aeiour]) | [aeo](?=olog) | i(?=olog|osi) # "geometry", "biology", "curiosity"
      | o(?=ing$|em|et|ic$) | u(?=ing$)(?<![gq]u) | a(?=o|ic$) | i(?=[iu]|o$)(?<!gi)   # "going", "chaotic", "studio"
      | (?<=[rdv])i(?=o[trdln]) | (?<=[aeiouy]b)i(?=o) | (?<=d)i(?=ov)             # "period", "antibiotic"
      | ^co(?=op|ord|in[ch]) | zo(?=ol) | ^mc(?=[^aeiou])             # "cooperate", "zoology"
      | s(?=m$) | th(?=m$)                                            # "tourism", "rhythm"
    """,
    re.VERBOSE,
)

_SIBILANT: Final = re.compile(r"(?:[sxz]|[cs]h|[cgsz]e)$")
_LETTERS_WITHOUT_PARTS: Final = str.maketrans({"æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "’": "'", "ʼ": "'"})
_PART: Final = re.compile(r"(?P<number>[^\W_]*\d[^\W_]*(?:[.,]\d+)*)|(?P<english>[a-z]+(?:'[a-z]+)*)|[^\W\d_a-z]+")


def _known(word: str) -> int | None:
    """Look a word, or the singular or present tense of it, up among the exceptions."""
    if word in _EXCEPTIONS:
        return _EXCEPTIONS[word]
    for stem in (word[:-1], word[:-2]):
        ending = word[len(stem) :]
        if stem not in _EXCEPTIONS or ending not in ("s", "es", "d", "ed"):
            continue
        if ending[-1] == "s":
            return _EXCEPTIONS[stem] + bool(_SIBILANT.search(stem))
        return _EXCEPTIONS[stem] + stem.endswith(("t", "te", "d", "de"))
    return None


def _base_syllables(word: str) -> int:
    """Count the syllables of one lower-case word of the letters a to z."""
    count = 0
    if word.startswith("every") and _VOWELS.search(word, 5):
        count, word = 2, word[5:]
    for _ in range(4):  # "careless|ness|ly"; the bound keeps a word of ten thousand letters cheap
        known = _known(word)
        if known is not None:
            return count + known
        if len(word) > 3 and word[-1] == "s" and word[-2] not in "cseiu":
            word = word[:-1]
        ending = _ENDING.search(word)
        if ending is None or not _VOWELS.search(word, 0, ending.start()):
            break
        count += 2 if ending["two"] else 1
        count -= word.endswith("ically")
        word = word[: ending.start()]
    word = _CONSONANT_Y.sub("j", word)
    here = len(_VOWELS.findall(word)) + len(_SPLIT.findall(word))
    if here > 1 and _SILENT.search(word):
        here -= 1
    return count + max(here, 1)


def _contraction_syllables(stem: str, ending: str) -> int:
    """Count what an ending after an apostrophe adds: none in "don't", one in "didn't"."""
    if ending == "s":
        return int(bool(_SIBILANT.search(stem)))
    if ending == "t":
        return int(stem.endswith(("dn", "sn", "tn")))
    if ending == "d":
        return int(stem.endswith(("t", "d")))
    if ending in ("ll", "ve"):
        return int(stem[-1] not in "aeiouwy")
    if ending in ("m", "re"):
        return 0
    return _base_syllables(ending)


@lru_cache(maxsize=20_000)
def syllables(word: str) -> int:
    """Count the syllables of an English word by its spelling.

    The number of vowel groups, corrected for silent letters (-e, -es, -ed, -que), for vowels that belong to two
    syllables ("riot", "area"), for endings and compounds that hide a silent e ("movement", "somewhere"), and by a table
    of exceptions. A figure is one syllable, as Flesch has it; letters outside the Latin alphabet are one syllable for
    every two, so that text without spaces isn't taken for easy English.

    Args:
        word: a word; apostrophes, hyphens, accents and capitals are understood.

    Returns:
        The number of syllables, at least 1 for a word with a letter or digit and 0 for anything else.

    Examples:
        >>> [syllables(word) for word in ("time", "table", "didn't", "well-known", "Everywhere", "naïve", "1,000")]
        [1, 2, 2, 2, 3, 2, 1]
    """
    decomposed = unicodedata.normalize("NFKD", word.casefold()).translate(_LETTERS_WITHOUT_PARTS)
    plain = "".join(char for char in decomposed if not unicodedata.combining(char))
    count = 0
    for part in _PART.finditer(plain):
        if part["number"]:
            count += 1
        elif part["english"]:
            stem, *endings = part["english"].split("'")
            count += _base_syllables(stem)
            for ending in endings:
                count += _contraction_syllables(stem, ending)
        else:
            count += (len(part[0]) + 1) // 2
    return count


# --- sentences -------------------------------------------------------------------------------------------------------

_WORD: Final = re.compile(r"[^\W_]+(?:(?:['’ʼ.\-‐‑]|(?<=\d),(?=\d))[^\W_]+)*")
_STOP: Final = re.compile(r"(?<![.!?。])(?P<marks>[.!?。]+)(?P<closing>[\"'”’»)\]}*_]*)(?= |$)")
_OPENING: Final = "\"'“‘«([{*_"
_LIST_ITEM: Final = re.compile(r"(?:[-*•+]|#{1,6}|\d{1,3}[.)])\s+")
_INITIALS: Final = re.compile(r"[A-HJ-Z]|[A-Z](?:\.[A-Z])+")

# Abbreviations after which a sentence always goes on, and those that may also end one.
_TITLE: Final = re.compile(
    r"mrs?|m[sx]|dr|prof|st|mt|rev|hon|gen|col|lt|sgt|capt|sen|rep|gov|vs|cf|e\.g|i\.e|approx", re.IGNORECASE
)
_MAY_END: Final = re.compile(r"etc|inc|ltd|co|corp|jr|sr|[ap]\.m|est|al|dept|ave", re.IGNORECASE)


def _blocks(text: str) -> list[str]:
    """Split text at blank lines, list items and headings, and make each block one line with single spaces."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        words = line.strip()
        marker = _LIST_ITEM.match(words)
        if marker or not words:
            blocks.append([])
        blocks[-1] += words[marker.end() if marker else 0 :].split()
        if words.startswith("#"):
            blocks.append([])
    return [" ".join(words) for words in blocks if words]


def _goes_on(block: str, stop: re.Match[str]) -> bool:
    """Say whether the sentence goes on after a full stop: after an abbreviation, an initial, a quotation."""
    following = block[stop.end() + 1 : stop.end() + 5].lstrip(_OPENING)[:1]
    if not following:
        return False
    if stop["marks"] != ".":
        return following.islower() and (bool(stop["closing"]) or stop["marks"].startswith(".."))
    before = block[block.rfind(" ", 0, stop.start()) + 1 : stop.start()].lstrip(_OPENING)
    if _MAY_END.fullmatch(before):
        return following.islower()
    return any(pattern.fullmatch(before) for pattern in (_TITLE, _INITIALS))


def sentences(text: str) -> list[tuple[str, ...]]:
    """Split text into sentences of words.

    A run of ``.``, ``!`` or ``?`` before a space ends a sentence, unless it belongs to an abbreviation ("Dr. Who",
    "e.g. this"), to an initial, or to a quotation that the sentence goes on from; decimals and addresses have no space.
    Blank lines, list items and headings end one too, and the last one counts even if it is unfinished. Markup and list
    numbers aren't words; figures and hyphenated words are one word each.

    Args:
        text: any text.

    Returns:
        The words of every sentence that has some.

    Examples:
        >>> sentences("Dr. Who paid $3.50. Why? Nobody")
        [('Dr', 'Who', 'paid', '3.50'), ('Why',), ('Nobody',)]
    """
    found: list[tuple[str, ...]] = []
    for block in _blocks(unicodedata.normalize("NFKC", text)):
        start = 0
        for stop in [*_STOP.finditer(block), None]:
            if stop is not None and _goes_on(block, stop):
                continue
            words = tuple(_WORD.findall(block, start, len(block) if stop is None else stop.start()))
            if words:
                found.append(words)
            start = len(block) if stop is None else stop.end()
    return found


# --- oracles ---------------------------------------------------------------------------------------------------------


def reading_ease(text: str) -> float:
    """Score how easy English text is to read, by Flesch's formula.

    206.835 - 1.015 * words / sentences - 84.6 * syllables / words, clipped to [-50, 121.22]: 90 is a story for
    children, 60 plain English, 30 a learned article. The clip keeps a single long word from becoming an outlier that
    decides which response is the best or worst of its group.

    Args:
        text: the text, in English; of other languages only those with spaces and Latin letters get a sensible score.

    Returns:
        The score, higher for easier; -50 for text without words.

    Reference:
        R. Flesch, "A new readability yardstick", Journal of Applied Psychology 32 (1948). Our deviations: syllables
        are counted by spelling (see :func:`syllables`), and blank lines, list items and headings end a
        sentence.

    Examples:
        >>> reading_ease("The cat sat on the mat. It was happy.") > reading_ease("Feline contentment is ubiquitous.")
        True
    """
    found = sentences(text)
    words = [word for sentence in found for word in sentence]
    if not words:
        return HARDEST
    per_sentence = len(words) / len(found)
    per_word = sum(map(syllables, words)) / len(words)
    return min(max(206.835 - 1.015 * per_sentence - 84.6 * per_word, HARDEST), EASIEST)


@dataclass(frozen=True)
class ReadingEase:
    """The plain-language oracle: :func:`reading_ease` of each response."""

    name: str = "reading-ease"
    pointwise: ClassVar[bool] = True
    settings: ClassVar[dict[str, int]] = {"version": 1}  # of the formula: scores that change need another

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:  # noqa: ARG002
        """Score the responses.

        Args:
            prompt: not looked at.
            responses: the texts to score.

        Returns:
            One score in [-50, 121.22] for each response, higher for easier.
        """
        return tuple(reading_ease(response) for response in responses)


@lru_cache(maxsize=1)
def _vader_scores() -> Callable[[str], dict[str, float]]:
    """Load VADER's lexicon, once."""
    try:
        module = import_module("vaderSentiment.vaderSentiment")
    except ImportError as error:
        raise RankerError(
            f'the "vader" ranker needs the package vaderSentiment ({error}): pip install "sims-lens[vader]"'
        ) from error
    scores: Callable[[str], dict[str, float]] = module.SentimentIntensityAnalyzer().polarity_scores
    return scores


@dataclass(frozen=True)
class Vader:
    """The positivity oracle: VADER's compound score of each response.

    The lexicon is in the package vaderSentiment, which is looked for when the ranker is made, so that a run can't fail
    for want of it after it has sampled.

    Raises:
        RankerError: vaderSentiment isn't installed.

    Reference:
        C. J. Hutto and E. Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media
        text", ICWSM 2014.
    """

    name: str = "vader"
    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Load the lexicon."""
        _vader_scores()

    @property
    def settings(self) -> dict[str, str]:
        """What the scores depend on, beside the texts."""
        return {"vaderSentiment": version("vaderSentiment")}

    def rank(self, prompt: str, responses: Sequence[str]) -> tuple[float, ...]:  # noqa: ARG002
        """Score the responses.

        Args:
            prompt: not looked at.
            responses: the texts to score.

        Returns:
            One score in [-1, 1] for each response, higher for a more positive tone, 0 for a neutral or empty text.

        Raises:
            RankerError: vaderSentiment isn't installed here.
        """
        scores = _vader_scores()
        return tuple(scores(response)["compound"] for response in responses)
