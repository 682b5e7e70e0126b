"""Judges built from a known oracle with a fault of known size, texts for them, and what an audit should find.

A response is a run of words "t7n100 t7n101 ..." on its prompt's topic, some of them spoilt, and an end. The oracle
counts the words that are followed by the right one, as a share of the response, and takes a point off one that does not
come to its end. Shuffled, off-topic and truncated responses are worse by construction, and the real ones have a quality
of their own that has next to nothing to do with their length.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

K = 4


def texts(prompts: int, *, seed: int) -> tuple[list[str], list[list[str]]]:
    """Prompts, and to each K responses of 12 to 40 words, all of different length and quality."""
    rng = np.random.default_rng(seed)
    topics = [f"t{seed:03}x{i:05}" for i in range(prompts)]
    return [f"About {topic}" for topic in topics], [_group(topic, rng) for topic in topics]


def _group(topic: str, rng: np.random.Generator) -> list[str]:
    while True:
        lengths, shares = rng.permutation(np.arange(12, 41, 4))[:K], rng.permutation(np.linspace(0.6, 1, 9))[:K]
        group = []
        for length, share in zip(lengths, shares, strict=True):
            words = [f"{topic}n{100 + i}" for i in range(length)]
            spoilt = round((1 - share) * length)
            group.append(
                " ".join([*words[: length - spoilt], *("zz" + w[2:] for w in words[length - spoilt :]), "end"])
            )
        if len(set(oracle(f"About {topic}", group))) == K:
            return group


@lru_cache(maxsize=100_000)
def quality(prompt: str, response: str) -> float:
    topic, words = prompt.removeprefix("About "), response.split()
    at = {f"{topic}n{100 + i}": i for i in range(41)}
    good = sum(at.get(a, -9) + 1 == at.get(b, -5) for a, b in pairwise(words))
    return good / max(1, len(words)) - (not words or words[-1] != "end")


def oracle(prompt: str, responses: Sequence[str]) -> list[float]:
    return [quality(prompt, response) for response in responses]


class Judge:
    """Says what the oracle says, save for a share of its answers; every answer is drawn anew.

    Args:
        fault: "position": it prefers the first shown; "length": it prefers the longest; "noise": it says the opposite.
        rate: the share of answers that the fault decides.
        seed: of the draws.
    """

    judges = True

    def __init__(self, fault: str = "noise", rate: float = 0.0, *, seed: int = 0) -> None:
        self.fault, self.rate, self.rng = fault, rate, np.random.default_rng(seed)
        self.name = f"{fault} {rate:g}"

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        scores = oracle(prompt, responses)
        if self.rng.random() >= self.rate:
            return scores
        if self.fault == "position":
            return [float(-place) for place in range(len(responses))]
        if self.fault == "length":
            return [float(len(response)) for response in responses]
        return [-score for score in scores]

    def truth(self) -> dict[str, float]:
        """What an audit with the oracle as its reference would find on infinitely many prompts."""
        e, length, agreement = self.rate, *_length()
        twice = (1 - e) ** 2 + e**2  # the fault strikes both times, or neither
        found = {"reference_tau": 1 - 2 * e, "reference_accuracy": 1 - e, "first_wins": 0.5, "all_tied": 0.0}
        known = known_truncated = 1 - e
        same = turned = twice
        length_tau = (1 - 2 * e) * length
        if self.fault == "position":
            found = {**found, "reference_tau": 1 - e, "reference_accuracy": 1 - e / 2, "first_wins": (1 + e) / 2}
            known = known_truncated = 1 - e / 2
            same, turned = twice + e * (1 - e), 1 - e
            length_tau = (1 - e) * length
        if self.fault == "length":
            found = {**found, "reference_tau": 1 - e + e * length, "reference_accuracy": 1 - e + e * agreement}
            known, known_truncated = 1 - e / 2, 1.0
            same = turned = twice + e * (1 - e) * (1 + length)
            length_tau = e + (1 - e) * length
        return {
            **found,
            "known_equal_length": known,
            "known_shuffled": known,
            "known_other": known,
            "known_truncated": known_truncated,
            "known_pooled": (2 * known + known_truncated) / 3,
            "repetition_stability": same,
            "position_consistency": turned,
            "length_tau": length_tau,
        }


@lru_cache(maxsize=1)
def _length() -> tuple[float, float]:
    """Kendall's tau of quality with length, and how often the oracle agrees with longest over shortest."""
    taus, agreed = [], []
    for prompt, group in zip(*texts(3000, seed=999), strict=True):
        scores, lengths = np.array(oracle(prompt, group)), np.array([len(response) for response in group])
        i, j = np.triu_indices(K, k=1)
        taus.append(np.mean(np.sign(scores[i] - scores[j]) * np.sign(lengths[i] - lengths[j])))
        agreed.append(scores[lengths.argmax()] > scores[lengths.argmin()])
    return float(np.mean(taus)), float(np.mean(agreed))


class PairJudge:
    """A judge of pairs: each single verdict goes to the first shown, or to the worse one, at given rates.

    Args:
        first: share of verdicts that go to the first shown whatever it is.
        flips: share of the rest that are the wrong way round.
        seed: of the draws.
    """

    name = "pairs"
    judges = True

    def __init__(self, *, first: float = 0.0, flips: float = 0.0, seed: int = 0) -> None:
        self.first, self.flips, self.rng = first, flips, np.random.default_rng(seed)

    def matrix(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
        scores = np.array(oracle(prompt, responses))
        right = scores[:, None] > scores[None, :]
        says = np.where(self.rng.random(right.shape) < self.flips, ~right, right)
        says = np.where(self.rng.random(right.shape) < self.first, True, says)
        return np.where(says, 0.9, 0.1)

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """Mean win rate over both orders."""
        verdicts = self.matrix(prompt, responses)
        wins = (verdicts + 1 - verdicts.T) / 2
        np.fill_diagonal(wins, 0.0)
        return [float(x) for x in wins.sum(axis=1)]

    def truth(self) -> dict[str, float]:
        """What an audit would find on infinitely many prompts."""
        better_first = self.first + (1 - self.first) * (1 - self.flips)
        worse_first = self.first + (1 - self.first) * self.flips
        right, wrong = better_first * (1 - worse_first), (1 - better_first) * worse_first  # in both orders
        known = (better_first + 1 - worse_first) / 2
        return {
            "single_order_consistency": right + wrong,
            "first_wins": (better_first + worse_first) / 2,
            "cyclic_triples": right * wrong * (right + wrong),
            "known_equal_length": known,
            "known_shuffled": known,
            "known_other": known,
            "known_truncated": known,
            "known_pooled": known,
        }


class Circular:
    """Rock, paper, scissors among the responses, by their length; its scores are the oracle's all the same."""

    name = "circular"
    judges = True

    def matrix(self, prompt: str, responses: Sequence[str]) -> np.ndarray:
        kind = np.argsort(np.argsort([len(response) for response in responses])) % 3
        ahead = (kind[:, None] - kind[None, :]) % 3
        return np.select([ahead == 1, ahead == 0], [0.9, 0.5], 0.1)

    def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
        return oracle(prompt, responses)
