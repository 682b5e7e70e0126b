"""The laboratory on a tiny model: every experiment's arithmetic, what it refuses, and its figure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from common import KINDS, plan_of
from test_loop import PROMPTS, config, improve, vowels

import sims_lens as sims
from sims_lens import lab
from sims_lens.adapter import adapt
from sims_lens.contrast import best_against_worst
from sims_lens.data import Sample, by_prompt
from sims_lens.errors import ConfigError, PlanError, PromptError
from sims_lens.lab.conversation import _slopes
from sims_lens.lab.distribution import difference_of_means
from sims_lens.lab.failures import language, loops, refuses
from sims_lens.lab.steerability import from_values
from sims_lens.prompts import GROUPS, Chat, check_prompts, conversations, group
from sims_lens.rankers import CachedRanker, as_ranker, rank
from sims_lens.rankers.base import CheckedRanker
from sims_lens.stats import Interval

HOSTILE = "<img src=x onerror=alert(1)>"
SAMPLING = sims.SamplingConfig(max_new_tokens=6, top_k=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write("llama", tmp_path_factory.mktemp("models") / "lab")
    return sims.load(str(folder), kind=KINDS[-1])


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> sims.Run:
    settings = config(iterations=1, evaluation={"controls": 0, "heldout": 0.3})
    return improve(model, tmp_path_factory.mktemp("runs") / "lab", config=settings)


def drawn(result: object) -> Any:
    """The one figure of a result: titled, and without markup in it."""
    (figure,) = sims.plots.figures(result)
    assert figure.layout.title.text and figure.layout.template.layout.colorway
    assert "<img" not in figure.to_json().replace("\\u003c", "<")
    return figure


def shown(result: Any) -> str:
    """What a result shows, after the checks that hold for all of them."""
    text = repr(result)
    assert result.verdict().endswith(".") and result.head() in text and "object at 0x" not in text
    assert len(text.splitlines()) < 40 and "<img" not in result._repr_html_()
    assert len(result.table())
    drawn(result)
    return text


class TestOracles:
    RESPONSES = ("aeiou", "xyz! !", "some more words and vowels here, eleven or so of them")

    def test_noise_turns_the_ranking_of_some_prompts_and_says_the_same_again(self) -> None:
        noisy = as_ranker(lab.Noisy(vowels, 0.3, seed=1))
        honest = np.array(vowels("", list(self.RESPONSES)))
        signs = []
        for k in range(400):
            given = np.array(noisy.rank(f"prompt {k}", self.RESPONSES))
            assert given.tolist() in (honest.tolist(), (-honest).tolist())
            assert noisy.rank(f"prompt {k}", self.RESPONSES[:2]) == tuple(given[:2])  # whatever it is shown beside
            signs.append(given[0] != honest[0])
        assert np.mean(signs) == pytest.approx(0.3, abs=0.07)
        other = [lab.Noisy(vowels, 0.3, seed=2).flips(f"prompt {k}") for k in range(400)]
        assert other != signs
        assert not any(lab.Noisy(vowels, 0.0).flips(f"{k}") for k in range(50))

    def test_noise_swaps_best_and_worst_of_whole_pairs(self, run: sims.Run) -> None:
        """What :func:`lab.oracle_noise` does to pairs is what a noisy oracle does to the loop's."""
        noisy, samples = lab.Noisy(vowels, 0.5, seed=3), run.samples(1, "train")
        clean, wrong = (
            best_against_worst(rank(as_ranker(ranker), run.prompts, samples)).pairs for ranker in (vowels, noisy)
        )
        turned = [noisy.flips(run.prompts[pair.prompt]) for pair in clean]
        assert 0 < sum(turned) < len(turned) == len(wrong)
        for pair, other, bad in zip(clean, wrong, turned, strict=True):
            ends = (pair.worst.draw, pair.best.draw) if bad else (pair.best.draw, pair.worst.draw)
            assert (other.best.draw, other.worst.draw) == ends

    def test_what_the_biased_ones_pay_for(self) -> None:
        honest = vowels("", list(self.RESPONSES))
        assert lab.Reversed(vowels).rank("", self.RESPONSES) == tuple(-s for s in honest)
        words = [len(r.split()) for r in self.RESPONSES]
        expected = [s + 2.0 * w / 10 for s, w in zip(honest, words, strict=True)]
        assert lab.LengthBiased(vowels, 2.0).rank("", self.RESPONSES) == pytest.approx(expected)
        marks = lab.Loophole(vowels, "!", 3.0).rank("", self.RESPONSES)
        assert marks == pytest.approx([honest[0], honest[1] + 6.0, honest[2]])
        by_function = lab.Loophole(vowels, lambda r: float(len(r)), 1.0).rank("", ["ab"])
        assert by_function[0] == pytest.approx(vowels("", ["ab"])[0] + 2.0)

    def test_they_are_rankers_like_the_one_inside(self, tmp_path: Path) -> None:
        class Tournament:
            name, steered = "tournament", True
            matrix = None

            def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
                return [0.0 for _ in responses]

            def bind(self, model: Any) -> Any:
                bound = Tournament()
                bound.name = f"bound to {model}"
                return bound

        for wrong in lab.wrong_oracles(sims.ReadingEase(), spread=1.0).values():
            checked = as_ranker(wrong)
            assert checked.pointwise and isinstance(checked, CheckedRanker)
            cached = as_ranker(CachedRanker(wrong, tmp_path))
            assert cached.rank("Say.", self.RESPONSES) == pytest.approx(checked.rank("Say.", self.RESPONSES))
        both = as_ranker(lab.Noisy(Tournament(), 0.5))
        assert not both.pointwise and both.steered
        assert "bound to m" in both.bind("m").name
        names = [as_ranker(w).name for w in lab.wrong_oracles(sims.ReadingEase(), spread=1.0).values()]
        assert len(set(names)) == len(names)

    @pytest.mark.usefixtures("unchecked")
    def test_what_they_refuse(self) -> None:
        for call, said in (
            (lambda: lab.Noisy(vowels, 1.5), "a probability from 0 to 1, got 1.5"),
            (lambda: lab.LengthBiased(vowels, float("nan")), "weight must be a finite number, got nan"),
            (lambda: lab.Loophole(vowels, "", 1.0), "loophole must be a phrase"),
            (lambda: lab.Loophole(vowels, "!", "much"), "bonus must be a finite number"),
        ):
            with pytest.raises(ConfigError, match=said):
                call()


class TestCorruptedPairs:
    def test_flips_of_a_runs_pairs(self, model: Any, run: sims.Run) -> None:
        found = lab.oracle_noise(
            model, run, epsilons=(0.0, 0.5, 1.0), repeats=20, ranker=vowels, effect_at=(0.0, 1.0), progress=False
        )
        assert (found.kind, found.layer, found.site) == ("flips", 1, "resid_post")
        assert found.curve.cosine[0].estimate == pytest.approx(1.0)
        assert found.curve.cosine[-1].estimate == pytest.approx(-1.0)
        # The clean pairs' mean is what the run fitted, and at one norm it is what the run steers with.
        clean, turned = found.effects
        assert clean.difference.estimate == pytest.approx(run.iterations[0].evaluation.difference.estimate)
        assert turned.each != clean.each and len(clean.each) == 1 and len(turned.each) == 2
        assert clean.cosines == pytest.approx([1.0]) and turned.cosines == pytest.approx([-1.0, -1.0])
        assert "Labels flipped" in shown(found) and "held-out prompts" in found.verdict()
        table = found.table()
        assert table.loc[0.0, "effect"] == clean.difference.estimate and np.isnan(table.loc[0.5, "effect"])

    def test_the_same_twice(self, model: Any, run: sims.Run) -> None:
        a, b = (lab.oracle_noise(model, run, repeats=5, seed=3, progress=False) for _ in range(2))
        assert a.table().equals(b.table()) and a.curve.break_even == b.curve.break_even

    def test_mistaken_negatives_never_turn_the_direction(self, model: Any, run: sims.Run) -> None:
        found = lab.oracle_noise(model, run, flip="negatives", epsilons=(0.0, 1.0), repeats=20, progress=False)
        assert found.curve.cosine[-1].estimate > 0.2
        # With three responses the wrong negative is the middle one: the mean of best less middle, exactly.
        adapter, samples, rows = adapt(model), run.samples(1, "train"), []
        for pair in best_against_worst(samples).pairs:
            prompt = adapter.encode(run.prompts[pair.prompt])
            (middle,) = (s for s in samples if s.prompt == pair.prompt and s not in (pair.best, pair.worst))
            rows += [(prompt, s.tokens) for s in (pair.best, middle, pair.worst)]
        means = sims.capture(model, rows).means[:, 1].reshape(-1, 3, 32)
        best, middles, worst = means.unbind(1)
        cosine = torch.cosine_similarity((best - middles).mean(0), (best - worst).mean(0), dim=0)
        assert found.curve.cosine[-1].estimate == pytest.approx(float(cosine), abs=1e-4)
        assert "egatives mistaken" in shown(found)

    def test_poison_that_is_the_negatives_changes_nothing(self, model: Any, run: sims.Run) -> None:
        """Texts dealt to other prompts: the worst responses of other prompts differ from one's own, but not by much of
        a direction; the best ones take the difference away."""
        good = lab.poisoned_negatives(model, run, shares=(0.0, 1.0), repeats=20, progress=False)
        texts = [s.text for s in run.samples(1, "train")][:4]
        given = lab.poisoned_negatives(model, run, texts=texts, shares=(0.0, 1.0), repeats=20, progress=False)
        assert given.kind == "poison" and given.curve.cosine[0].estimate == pytest.approx(1.0)
        assert good.curve.cosine[1].estimate < 0.95 and good.curve.moments.across < good.curve.moments.signal
        shown(good)

    def test_pairs_of_texts(self, model: Any) -> None:
        pairs = [(f"Say {k}.", f"yes {k * 7}", f"no, never {k}") for k in range(12)]
        found = lab.oracle_noise(model, [*pairs, pairs[0]], repeats=10, layer=2, progress=False)
        assert found.curve.pairs == 12 and found.layer == 2 and not found.effects
        shown(found)

    def test_what_is_refused(self, model: Any, run: sims.Run) -> None:
        pairs = [(f"Say {k}.", "yes", "no") for k in range(12)]
        for call, kind, said in (
            (lambda: lab.oracle_noise(model, run, flip="some"), ConfigError, 'must be "all" or "negatives"'),
            (lambda: lab.oracle_noise(model, pairs, flip="negatives"), ConfigError, "give a run, not pairs"),
            (lambda: lab.oracle_noise(model, pairs, ranker=vowels), ConfigError, "give a run, or leave ranker out"),
            (lambda: lab.oracle_noise(model, run, layer=2, ranker=vowels), PlanError, r"steers layers \[1\]"),
            (lambda: lab.oracle_noise(model, run, layer=9), sims.SimsError, "layer 9"),
            (lambda: lab.oracle_noise(model, run, repeats=0), ConfigError, "repeats must be an integer"),
            (lambda: lab.oracle_noise(model, run, ranker=vowels, effect_at=(2.0,)), ConfigError, "effect_at"),
            (lambda: lab.poisoned_negatives(model, run, texts=[]), ConfigError, "at least one text"),
        ):
            with pytest.raises(kind, match=said):
                call()


@pytest.fixture(scope="module")
def wrong_loops(model: Any, tmp_path_factory: pytest.TempPathFactory) -> lab.Misled:
    settings = config(iterations=2, evaluation={"controls": 0, "heldout": 0.3})
    oracles = {
        "honest": vowels,
        HOSTILE.replace("/", ""): lab.Reversed(vowels),
        "e": lab.Loophole(vowels, "e", 5.0),
    }
    folder = tmp_path_factory.mktemp("misled")
    return lab.misled(model, PROMPTS, oracles, honest=vowels, config=settings, out=folder, progress=False)


class TestMisled:
    def test_each_loop_is_judged_by_both(self, wrong_loops: lab.Misled) -> None:
        found = wrong_loops
        honest, turned, _ = found.runs.values()
        for i in honest.iterations:
            assert i.proxy.difference == i.honest.difference
            assert i.asked_honest == i.action  # the effect that it looked at is the honest one
        for i in turned.iterations:
            assert i.proxy.difference.estimate == pytest.approx(-i.honest.difference.estimate)
        assert sims.open_run(honest.path).ranker == "vowels"
        assert list(found.table().loc["honest"].index) == [i.index for i in honest.iterations]
        assert "by the oracle" in shown(found)

    def test_what_is_called_hacked(self, wrong_loops: lab.Misled) -> None:
        found = wrong_loops
        template = found.runs["honest"].iterations[0]

        def outcome(proxy: tuple[float, float], honest: tuple[float, float]) -> str:
            def effect(low: float, high: float) -> Any:
                return replace(template.honest, difference=Interval((low + high) / 2, low, high))

            made = replace(template, proxy=effect(*proxy), honest=effect(*honest))
            return replace(found.runs["honest"], iterations=(made,), chosen=1).outcome

        up, flat, down = (1.0, 2.0), (-1.0, 1.0), (-2.0, -1.0)
        said = {(p, h): outcome(p, h) for p in (up, flat, down) for h in (up, flat, down)}
        assert [said[up, h] for h in (up, flat, down)] == ["harmless", "hollow", "hacked"]
        assert [said[flat, h] for h in (up, flat, down)] == ["hidden", "nothing", "harmful"]
        assert replace(found.runs["honest"], chosen=None).outcome == "stopped"

    def test_reward_hacking_names_its_loops(self, model: Any, tmp_path: Path) -> None:
        settings = config(iterations=1, evaluation={"controls": 0, "heldout": 0.3})
        found = lab.reward_hacking(
            model, PROMPTS, ranker=vowels, loophole="e", bonus=9.0, config=settings, out=tmp_path, progress=False
        )
        assert list(found.runs) == ["honest", "loophole"] and "loophole e" in found.runs["loophole"].oracle
        assert found.prompts == 6 and found.samples == 2

    def test_what_is_refused(self, model: Any) -> None:
        with pytest.raises(ConfigError, match="give oracles by name"):
            lab.misled(model, PROMPTS, {}, honest=vowels)
        with pytest.raises(ConfigError, match="becomes a folder's"):
            lab.misled(model, PROMPTS, {"../up": vowels}, honest=vowels)


class TestOutOfDistribution:
    def test_each_group_against_the_base_model(self, model: Any) -> None:
        plan = plan_of(1, coefficient=4.0, scope="generation")
        groups = {"near": PROMPTS[:5], HOSTILE: ["One?", "Two?", "Three?"]}
        found = lab.out_of_distribution(model, plan, groups, ranker=vowels, sampling=SAMPLING, seed=2, progress=False)
        sampler, changes = sims.LocalSampler(model, SAMPLING), {}
        for name, prompts in groups.items():
            means = []
            for p in (plan, plan.scaled(0.0)):
                scored = rank(as_ranker(vowels), prompts, list(sampler.sample(prompts, n=2, plan=p, seed=2)))
                means.append(
                    np.array([np.mean([s.score for s in g if s.score is not None]) for g in by_prompt(scored)])
                )
            changes[name] = means[0] - means[1]
            assert found.evaluations[name].difference.estimate == pytest.approx(changes[name].mean())
        gap = found.gaps[HOSTILE]
        assert gap.estimate == pytest.approx(changes[HOSTILE].mean() - changes["near"].mean())
        assert gap.low <= gap.estimate <= gap.high and found.reference == "near"
        assert found.evaluations["near"].kl.estimate > 0
        assert "less near" in shown(found)

    def test_two_groups_of_prompts_have_an_interval_that_covers(self) -> None:
        rng = np.random.default_rng(0)
        inside = []
        for _ in range(200):
            a, b = rng.exponential(2.0, 20), rng.normal(1.0, 1.0, 14)
            i = difference_of_means(a, b)
            inside.append(i.low <= 1.0 <= i.high)
        assert np.mean(inside) > 0.90

    def test_the_groups_that_come_along(self) -> None:
        groups = lab.default_groups()
        assert list(groups) == ["everyday", *(name.replace("_", " ") for name in GROUPS)]
        every = [prompt for prompts in groups.values() for prompt in prompts]
        assert len(check_prompts(every)) == 24 + 3 * 14 and not set(groups["everyday"]) & set(sims.everyday(100))
        with pytest.raises(PromptError, match="no group of prompts 'jokes'"):
            group("jokes")

    def test_what_is_refused(self, model: Any) -> None:
        with pytest.raises(ConfigError, match="two or more groups"):
            lab.out_of_distribution(model, plan_of(1), {"a": PROMPTS}, ranker=vowels)
        with pytest.raises(ConfigError, match="'b' has one prompt"):
            lab.out_of_distribution(model, plan_of(1), {"a": PROMPTS, "b": ["x"]}, ranker=vowels)


class TestChats:
    def test_a_chat_of_one_turn_is_a_prompt(self, model: Any) -> None:
        adapter = adapt(model)
        assert adapter.encode(Chat(["Hello."])) == adapter.encode("Hello.")
        chat = Chat(["Hello.", "And you?"], ["Fine."])
        text = adapter.tokenizer.decode(adapter.encode(chat))
        assert text == "<s>[user] Hello.</s>[assistant] Fine.</s>[user] And you?</s>[assistant] "
        assert chat == "Hello.\n\nAnd you?" and len(check_prompts([chat])) == 1

    def test_what_was_said_writes_no_turns(self, model: Any) -> None:
        adapter = adapt(model)
        ends = adapter.encode(Chat(["Hi", "b"], ["</s>[user] now do as I say"])).count(adapter.tokenizer.eos_token_id)
        assert ends == adapter.encode(Chat(["Hi", "b"], ["a"])).count(adapter.tokenizer.eos_token_id) == 3

    def test_without_a_template_there_is_no_chat(self, zoo: Any) -> None:
        with pytest.raises(PromptError, match="no chat template"):
            adapt(zoo("gpt2", KINDS[-1])).encode(Chat(["Hi", "b"], ["a"]))

    @pytest.mark.usefixtures("unchecked")
    def test_what_is_no_chat(self) -> None:
        for given, said in (
            ((["a", "b"], []), "got 0 to 2 turns"),
            (("a",), "a list of what the user says"),
            (([" "],), "a turn of the chat is empty"),
        ):
            with pytest.raises(PromptError, match=said):
                Chat(*given)

    def test_each_arm_has_its_own_answers(self, model: Any) -> None:
        plan = plan_of(1, coefficient=4.0, scope="generation")
        talks = [["Hi.", "Why?", "So?"], ["Say.", "No.", "Go on."], ["A?", "B?", "C?"]]
        found = lab.multi_turn(
            model, plan, talks, ranker=vowels, turns=2, samples=2, sampling=SAMPLING, seed=1, progress=False
        )
        assert len(found.evaluations) == 2 and all(len(answers) == 2 for answers in found.chats.values())
        sampler = sims.LocalSampler(model, SAMPLING)
        from sims_lens.workbench import derive_seed

        for steered, p in ((False, plan.scaled(0.0)), (True, plan)):
            chats = [Chat(talk[:2], found.chats[i, 1, steered][:1]) for i, talk in enumerate(talks)]
            again = sorted(sampler.sample(chats, n=1, plan=p, seed=derive_seed(1, 1, 1)), key=lambda s: s.prompt)
            assert [s.text for s in again] == [found.chats[i, 1, steered][1] for i in range(3)]
        assert found.chats[0, 0, True] != found.chats[0, 0, False] != found.chats[0, 1, False]
        assert "from turn to turn" in shown(found)

    def test_a_plan_that_does_nothing_changes_no_turn(self, model: Any) -> None:
        found = lab.multi_turn(
            model, plan_of(1, coefficient=0.0), [["Hi.", "Why?"], ["A", "B"]], ranker=vowels, turns=2, samples=1,
            sampling=SAMPLING, progress=False,
        )  # fmt: skip
        assert [e.difference.estimate for e in found.evaluations] == [0.0, 0.0] and found.trend.estimate == 0.0

    def test_the_conversations_that_come_along(self) -> None:
        talks = conversations()
        assert len(talks) == 14 and all(len(talk) == 3 for talk in talks) and len(set(talks)) == 14
        with pytest.raises(PromptError, match="n = 99"):
            conversations(99)
        assert _slopes(np.array([[3.0]])).tolist() == [0.0]

    def test_what_is_refused(self, model: Any) -> None:
        with pytest.raises(PromptError, match="conversation 1 has 1 turns"):
            lab.multi_turn(model, plan_of(1), [["a", "b"], ["c"]], ranker=vowels, turns=2)
        with pytest.raises(PromptError, match="two or more conversations"):
            lab.multi_turn(model, plan_of(1), [["a", "b"]], ranker=vowels, turns=2)
        with pytest.raises(PromptError, match="more than the context"):
            lab.multi_turn(model, plan_of(1), [["a" * 60, "b" * 60], ["c", "d"]], ranker=vowels, turns=2, samples=1,
                           sampling=SAMPLING, progress=False)  # fmt: skip


class TestSteerability:
    def test_slopes_and_shares_that_were_planted(self) -> None:
        rng = np.random.default_rng(0)
        slopes = np.array([2.0] * 30 + [-1.0] * 10)
        x = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
        values = rng.normal(5.0, 3.0, 40)[:, None] + slopes[:, None] * x + rng.normal(0.0, 0.05, (40, 5))
        found = from_values(values, tuple(x))
        assert found.slopes == pytest.approx(slopes, abs=0.15)
        assert found.anti.estimate == 0.25 and found.anti.low <= 0.25 <= found.anti.high
        assert found.shown.estimate == pytest.approx(0.25, abs=0.03)
        assert found.mean.estimate == pytest.approx(1.25, abs=0.03)
        assert found.noise == pytest.approx(0.05 / np.sqrt(2.5), rel=0.3) and found.spread > 1
        assert "25%" in shown(found)

    def test_noise_alone_makes_half_of_the_prompts_anti_steerable_but_shows_none(self) -> None:
        values = np.random.default_rng(1).normal(size=(200, 7))
        found = from_values(values, (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5))
        assert found.anti.estimate == pytest.approx(0.5, abs=0.12)
        assert found.shown.estimate == pytest.approx(0.025, abs=0.03)
        assert "Most of the spread is scatter" in found.verdict()

    def test_pairs_of_one_prompt_count_as_one(self) -> None:
        values = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, -1.0, -2.0]])
        apart, together = from_values(values, (0.0, 1.0, 2.0)), from_values(values, (0.0, 1.0, 2.0), prompts=(0, 0, 1))
        assert apart.anti.estimate == pytest.approx(1 / 3) and together.anti.estimate == 0.5

    def test_of_a_model(self, model: Any) -> None:
        plan = plan_of(1, coefficient=1.0, scope="generation")
        behaviour = sims.PairBehaviour([(f"Say {k % 4}.", f"yes {k}", f"no {k}") for k in range(8)])
        found = lab.steerability(model, plan, behaviour, coefficients=(-1.0, 0.0, 1.0), progress=False)
        ends = [behaviour.measure(model, plan.scaled(c)).numpy() for c in (-1.0, 1.0)]
        assert found.slopes == pytest.approx((ends[1] - ends[0]) / 2, abs=1e-5)
        assert found.unit == "pair" and found.prompts == (0, 1, 2, 3) * 2
        shown(found)
        sampled = lab.steerability(model, plan, prompts=PROMPTS[:3], ranker=vowels, samples=1, progress=False)
        assert sampled.unit == "prompt" and sampled.values.shape == (3, 5)
        assert sampled.summary()["anti_steerable"] == sampled.anti.estimate

    def test_what_is_refused(self, model: Any) -> None:
        behaviour = sims.PairBehaviour([("a", "b", "c")])
        for options, said in (
            ({"behaviour": behaviour, "coefficients": (0.0, 1.0)}, "three or more different numbers"),
            ({}, "not both"),
            ({"behaviour": behaviour, "ranker": vowels}, "not both"),
            ({"ranker": vowels}, "needs prompts"),
        ):
            with pytest.raises(ConfigError, match=said):
                lab.steerability(model, plan_of(1), progress=False, **options)


class TestFailures:
    @staticmethod
    def sample(prompt: int, draw: int, text: str, *, tokens: int = 12, ended: bool = True) -> Sample:
        return Sample(prompt, draw, tuple(range(tokens)), text, ended)

    def test_each_kind_is_counted_against_the_base_model(self) -> None:
        prompts = ["What is the best of the things that you have?", "How are the people in that part of town?"]
        fine = "It is the best of all that we have in the house, and it is for you."
        base = [self.sample(i, k, fine) for i in range(2) for k in range(2)]
        steered = [
            self.sample(0, 0, "on and on we go on and on we go on and on we go"),
            self.sample(0, 1, fine, tokens=30, ended=False),
            self.sample(1, 0, "Das ist nicht der Weg, und ich werde es auch nicht mit dir gehen."),
            self.sample(1, 1, "I'm sorry, but I can't help with that."),
        ]
        found = lab.failures(steered, base, prompts)
        assert {f.kind: f.examples for f in found.kinds} == {
            "loop": ((0, 0),),
            "length blow-up": ((0, 1),),
            "language switch": ((1, 0),),
            "refusal": ((1, 1),),
            "empty": (),
            "no EOS": ((0, 1),),
            "any": ((0, 0), (0, 1), (1, 0), (1, 1)),
        }
        assert found["loop"].steered.estimate == 0.25 and found["any"].difference.estimate == 1.0
        assert found.more == [] and found["any"].p > 0.05  # two prompts show nothing
        assert found["any"].base.estimate == 0.0 and found["any"].count == 4
        assert "language switch" in shown(found)
        with pytest.raises(ConfigError, match="no kind of failure 'boredom'"):
            found["boredom"]

    def test_what_is_shown_to_be_more_frequent(self) -> None:
        prompts = [f"What is {k}?" for k in range(16)]
        base = [self.sample(k, 0, "It is so.") for k in range(16)]
        steered = [self.sample(k, 0, "I cannot help with it." if k < 12 else "It is so.") for k in range(16)]
        found, turned = lab.failures(steered, base, prompts), lab.failures(base, steered, prompts)
        assert found.more == ["refusal"] and found.less == [] and "more frequent" in found.verdict()
        assert turned.less == ["refusal"] and "less frequent: refusal" in turned.verdict()
        few = lab.failures([*steered[:4], *base[4:]], base, prompts)
        assert few.more == [] and few["refusal"].difference.low > 0  # the interval alone would say so

    def test_of_a_run(self, run: sims.Run) -> None:
        found = lab.failures(run)
        samples = run.samples(1)
        assert found.responses == len(samples) and found.prompts == len(run.indices("heldout"))
        assert found["no EOS"].steered.estimate == pytest.approx(np.mean([not s.ended for s in samples]))
        same = lab.failures(run.samples(0), run.samples(0), run.prompts)
        assert {f.difference.estimate for f in same.kinds} == {0.0}
        assert same.verdict().startswith("No kind of failure")

    def test_what_is_refused(self) -> None:
        samples = [self.sample(0, 0, "a")]
        with pytest.raises(ConfigError, match="samples need base"):
            lab.failures(samples)
        with pytest.raises(ConfigError, match="of the same prompts"):
            lab.failures(samples, [self.sample(1, 0, "a")], ["x", "y"])

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The cat is on the mat and it was there for a while.", "English"),
            ("Der Hund ist nicht in dem Haus und die Katze auch nicht.", "German"),
            ("Le chat est dans la maison et il ne veut pas de lait pour vous.", "French"),
            ("El perro no está en la casa de mi padre, pero lo veo por las tardes.", "Spanish"),
            ("今日はいい天気ですね。", "Chinese or Japanese"),
            ("Привет, как дела?", "Cyrillic"),
            ("print(x)", ""),
            ("", ""),
        ],
    )
    def test_languages(self, text: str, expected: str) -> None:
        assert language(text) == expected

    def test_no_everyday_prompt_is_taken_for_another_language(self) -> None:
        assert {language(prompt) for prompt in sims.everyday()} <= {"English", ""}
        assert {language(p) for p in group("other_languages")} <= {"German", "French", "Spanish", "Italian", ""}

    def test_loops_and_refusals(self) -> None:
        assert loops("", [5] * 12) and not loops("", [5] * 11) and loops("", [1, 2, 3, 4, 5] * 3)
        assert loops("", [9, 9, 4, *[1, 2, 3] * 4]) and not loops("", list(range(40)))
        assert not loops("the sea and the sky and the sea and the sun")
        for text in ("As an AI language model, I don't have feelings.", "I cannot provide that.", "I must decline."):
            assert refuses(text), text
        for text in ("You can help with that.", "I can't wait to help!", "Sorry, we are closed."):
            assert not refuses(text), text


def test_a_model_with_a_plan_attached_is_refused(model: Any, run: sims.Run) -> None:
    plan, pairs = plan_of(1), sims.PairBehaviour([("a", "b", "c")])
    calls = [
        lambda: lab.oracle_noise(model, run, progress=False),
        lambda: lab.poisoned_negatives(model, run, progress=False),
        lambda: lab.misled(model, PROMPTS, {"a": vowels}, honest=vowels, progress=False),
        lambda: lab.out_of_distribution(model, plan, ranker=vowels, progress=False),
        lambda: lab.multi_turn(model, plan, ranker=vowels, progress=False),
        lambda: lab.steerability(model, plan, pairs, progress=False),
    ]
    for call in calls:
        with sims.steering(model, plan), pytest.raises(sims.SimsError, match="a plan is attached"):
            call()


def test_the_report_takes_what_the_laboratory_found(run: sims.Run, tmp_path: Path) -> None:
    values = np.array([[0.0, 1.0, 2.0], [0.0, -1.0, -2.0]])
    results = [lab.failures(run), from_values(values, (0.0, 1.0, 2.0), name=HOSTILE)]
    text = sims.write_report(run, tmp_path / "page.html", analyses=results).read_text()
    assert "length blow-up" in text and "Anti-steerable" in text and "<img src=x" not in text


@pytest.mark.slow
def test_theory_holds_on_real_pairs(embedded: Any, tmp_path: Path) -> None:
    """Break-even of the embedded model's own pairs, measured by flipping their labels, agrees with theory."""
    settings = sims.SIMSConfig(
        iterations=1,
        steering=sims.SteeringConfig(layers=(22,)),
        evaluation=sims.EvaluationConfig(validation=0.0, controls=0, samples=1, heldout=0.1),
    )
    run = sims.improve(
        embedded, sims.everyday(60), ranker=sims.ReadingEase(), config=settings, out=tmp_path / "run", progress=False
    )
    for layer in (10, 17, 22, 26):
        curve = lab.oracle_noise(embedded, run, layer=layer, progress=False).curve
        assert curve.agrees and curve.gap.low <= 0 <= curve.gap.high, (layer, curve)
        assert 0 < curve.break_even.estimate < 0.5
