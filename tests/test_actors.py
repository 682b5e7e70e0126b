"""What actors do, with one in this process in place of Ray's; shards; streaming."""

import copy
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from common import plan_of, random_rows

import sims_lens as sims
from sims_lens.cost import TokenCount
from sims_lens.data import Sample
from sims_lens.errors import ConfigError, DamagedError, ModelError, PlanError, PromptError, RunError, SamplerError
from sims_lens.moments import Moments, PairMoments
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.prompts import Chat, iter_prompts
from sims_lens.sampling import ReadingSampler
from sims_lens.scale import Actors, KeptActors
from sims_lens.scale.actors import Batch, InProcess, ModelSpec, batches, check_rows, merged, read_shard, shard

PROMPTS = ["Say sea.", "Say a longer word.", "Sky?", "Name a tree, please."]
CONFIG = sims.SamplingConfig(responses=2, max_new_tokens=6)
PLAN = plan_of(1, coefficient=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def local(folder: Path) -> sims.LocalSampler:
    return sims.LocalSampler(sims.load(folder), CONFIG)


def in_process(folder: Path, **options: Any) -> sims.RaySampler:
    return sims.RaySampler(folder, CONFIG, pool=InProcess, **{"batch_rows": 3, **options})


def ordered(samples: Any) -> list[Sample]:
    return sorted(samples, key=lambda sample: (sample.prompt, sample.draw))


class TestSamples:
    def test_are_those_of_the_local_sampler(self, folder: Path, local: sims.LocalSampler) -> None:
        sampler = in_process(folder)
        assert isinstance(sampler, ReadingSampler)
        for plan in (NOTHING, PLAN):
            asked: dict[str, Any] = {"n": 2, "plan": plan, "seed": 7}
            assert ordered(sampler.sample(PROMPTS, **asked)) == ordered(local.sample(PROMPTS, **asked))
            measured = ordered(sampler.sample_and_measure(PROMPTS, **asked, measured=1))
            assert measured == ordered(local.sample_and_measure(PROMPTS, **asked, measured=1))
            assert [s.nll is not None for s in measured] == [s.draw == 0 for s in measured]
        assert sampler.count.decode > 0 and sampler.provenance.model == "llama"

    def test_readings_too(self, folder: Path, local: sims.LocalSampler) -> None:
        sampler = in_process(folder)
        assert sampler.reads(PLAN) and local.reads(PLAN)
        asked: dict[str, Any] = {"n": 2, "plan": PLAN, "seed": 7}
        ours = {(s.prompt, s.draw): r for s, r in sampler.sample_and_read(PROMPTS, **asked)}
        theirs = {(s.prompt, s.draw): r for s, r in local.sample_and_read(PROMPTS, **asked)}
        assert ours.keys() == theirs.keys()
        for key, reading in ours.items():
            other = theirs[key]
            assert (reading is None) == (other is None)
            if reading is not None and other is not None:
                assert torch.equal(reading.mean, other.mean) and torch.equal(reading.norms, other.norms)

    def test_some_left_out_do_not_change_the_others(self, folder: Path) -> None:
        sampler, asked = in_process(folder), {"n": 2, "plan": PLAN, "seed": 3}
        whole = ordered(sampler.sample(PROMPTS, **asked))  # type: ignore[arg-type]
        skip = {(0, 1), (2, 0), (2, 1)}
        rest = ordered(sampler.sample(PROMPTS, **asked, skip=skip))  # type: ignore[arg-type]
        assert rest == [s for s in whole if (s.prompt, s.draw) not in skip]
        assert list(sampler.sample(PROMPTS, n=0, plan=NOTHING, seed=0)) == []

    def test_a_loop_is_the_same(self, folder: Path, tmp_path: Path) -> None:
        config = sims.SIMSConfig(
            iterations=2,
            sampling=CONFIG,
            ranking=sims.RankingConfig(audit="off"),
            steering=sims.SteeringConfig(layers=(1,), strength=0.3),
            evaluation=sims.EvaluationConfig(samples=2, controls=1),
            guard=sims.GuardConfig(mode="report"),
        )
        prompts = [f"Say {word}." for word in ("sea", "sky", "sun", "rain", "snow", "wind", "tree", "leaf")]

        def letters(prompt: str, responses: Sequence[str]) -> list[float]:
            return [float(sum(map(ord, response)) % 101) for response in responses]

        model = sims.load(folder)
        runs = [
            sims.improve(
                model, prompts, ranker=letters, config=config, out=tmp_path / name, sampler=sampler, progress=False
            )
            for name, sampler in (("local", None), ("actors", in_process(folder)))
        ]
        for name in ("iterations/02/samples.jsonl", "iterations/02/heldout.jsonl", "iterations/02/plan.safetensors"):
            one, other = ((run.path / name).read_bytes() for run in runs)
            assert one == other, name

    def test_a_run_with_another_config_is_refused_first(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="config.sampling"):
            in_process(folder).check(sims.SIMSConfig(sampling=replace(CONFIG, temperature=0.5)))
        in_process(folder).check(sims.SIMSConfig(sampling=replace(CONFIG, batch_rows=3)))

    def test_what_an_actor_says_is_wrong_is_said(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(ModelError):
            list(in_process(tmp_path / "none").sample(PROMPTS, n=1, plan=NOTHING, seed=0))
        with pytest.raises(PlanError):
            list(in_process(folder).sample(PROMPTS, n=1, plan=plan_of(40), seed=0))

    def test_another_answer_is_refused(self, folder: Path) -> None:
        class Forgetful(InProcess):
            def ask(self, questions: Any) -> Iterator[tuple[int, Any]]:
                for number, answer in super().ask(questions):
                    head, *rows = answer.value.splitlines(keepends=True)
                    yield number, replace(answer, value=head + b"".join(rows[1:]))

        with pytest.raises(DamagedError, match="no whole shard"):
            list(sims.RaySampler(folder, CONFIG, pool=Forgetful).sample(PROMPTS, n=1, plan=NOTHING, seed=0))


class TestBatches:
    def test_cover_everything_once(self) -> None:
        found = list(batches(PROMPTS, 5, Batch((), (), b"", 0), rows=4, skip={(1, 2)}))
        rows = [(batch.places[index], draw) for batch in found for index, draw in batch.rows]
        assert sorted(rows) == [(i, k) for i in range(4) for k in range(5) if (i, k) != (1, 2)]
        assert all(len(batch.rows) <= 4 and len(batch.prompts) == len(batch.places) for batch in found)
        assert [PROMPTS[p] for b in found for p in b.places][0] == "Sky?"

    def test_a_key_is_made_of_the_content(self) -> None:
        spec = ModelSpec("embedded", CONFIG)
        batch = Batch(("a",), ((0, 0),), PLAN.to_bytes(), 0, places=(3,))
        key = batch.key(spec)
        assert replace(batch, places=(5,)).key(spec) == key
        assert batch.key(replace(spec, sampling=replace(CONFIG, batch_rows=1, responses=9), threads=7)) == key
        others = [replace(batch, seed=1), replace(batch, rows=((0, 1),)), replace(batch, plan=NOTHING.to_bytes())]
        others += [replace(batch, site="resid_post"), replace(batch, measured=1), replace(batch, prompts=("b",))]
        chats = [replace(batch, prompts=(Chat(["a", "b"], [said]),)) for said in ("x", "y")]
        keys = {key, *(other.key(spec) for other in [*others, *chats])}
        assert len(keys) == 1 + len(others) + 2
        assert batch.key(replace(spec, model="other")) not in keys
        assert batch.key(replace(spec, sampling=replace(CONFIG, top_k=3))) not in keys

    def test_rows_are_counted(self) -> None:
        samples = [Sample(0, 0, (), "", True), Sample(0, 0, (), "", True)]
        for found in (samples, samples[:1], [*samples[:1], Sample(4, 0, (), "", True)]):
            with pytest.raises(SamplerError, match="asked for"):
                check_rows([(0, 0), (0, 1)], found)
        check_rows([(0, 0)], samples[:1])

    def test_a_damaged_shard_is_none(self) -> None:
        whole = shard("k", [(Sample(0, 0, (1, 2), "é\u2028\n", True, kl=0.1), None)])
        assert read_shard(whole, "here", key="k")[0][0].text == "é\u2028\n"
        for data in (b"", whole[:-1], whole[: whole.index(b"\n") + 1], whole.replace(b"[1, 2]", b"[1, 3]"), b"x\n"):
            with pytest.raises(DamagedError, match="here"):
                read_shard(data, "here", key="k")
        with pytest.raises(DamagedError):
            read_shard(whole, "here", key="another")


class TestCapture:
    def test_moments_are_those_of_one_process(self, folder: Path, local: sims.LocalSampler) -> None:
        positive, negative = random_rows([(3, 4), (5, 2), (2, 6), (4, 4), (3, 3)]), random_rows([(3, 5)] * 5)
        weights = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
        with sims.steering(local.model, PLAN):
            whole = sims.capture_moments(local.model, positive, negative, weights=weights)["resid_post"].moments
        parts = in_process(folder).capture_moments(positive, negative, plan=PLAN, weights=weights, batch_pairs=2)
        found = parts["resid_post"]
        for one, other in ((found.positive, whole.positive), (found.difference, whole.difference)):
            assert one.count == other.count == 5
            torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(one.squares, other.squares, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.sums, whole.sums, rtol=1e-6, atol=1e-6)

    def test_the_order_of_arrival_does_not_matter(self) -> None:
        rows = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(6)]

        def part(i: int) -> PairMoments:
            return PairMoments(Moments.of(rows[i]), Moments.of(rows[i]), Moments.of(rows[i]), torch.ones(0, 3).double())

        orders = ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 3, 4])
        found = [merged((i, {"resid_post": part(i)}) for i in order)["resid_post"].positive for order in orders]
        assert all(torch.equal(f.mean, found[0].mean) and torch.equal(f.squares, found[0].squares) for f in found)
        torch.testing.assert_close(found[0].mean, torch.cat(rows).double().mean(0))

    def test_bad_arguments(self, folder: Path) -> None:
        sampler = in_process(folder)
        with pytest.raises(ConfigError, match="one of each"):
            sampler.capture_moments([([1], [2])], [])
        with pytest.raises(ConfigError, match="weights"):
            sampler.capture_moments([([1], [2])], [([1], [2])], weights=torch.ones(1, 3))


class TestJudging:
    def test_scores_are_those_of_the_ranker(self) -> None:
        items = [(f"p{i}", ["a" * k for k in range(1 + i % 3)]) for i in range(11)]

        def brevity(prompt: str, responses: Sequence[str]) -> list[float]:
            return [-len(response) - float(prompt[1:]) for response in responses]

        ranker = sims.RayRanker(brevity, pool=InProcess)
        assert ranker.rank_all(items) == [tuple(brevity(p, r)) for p, r in items]
        assert ranker.rank(*items[2]) == tuple(brevity(*items[2]))
        assert ranker.name == "brevity" and not ranker.judges and ranker.rank_all([]) == []

    def test_a_judge_is_bound_where_it_is(self, folder: Path) -> None:
        judge = sims.SelfJudge()
        ranker = sims.RayRanker(judge, judge=str(folder), pool=InProcess)
        items = [("Say sea.", ["sea", "no"]), ("Sky?", ["blue", "x"])]
        own = judge.bind(sims.load(folder))
        assert ranker.rank_all(items) == [tuple(own.rank(p, r)) for p, r in items]
        assert ranker.judges and ranker.count.prefill > 0 and ranker.settings["judge"] == str(folder)

    def test_what_cannot_be_spread_is_refused(self) -> None:
        with pytest.raises(sims.SimsError, match="judge='embedded'"):
            sims.RayRanker(sims.SelfJudge(), pool=InProcess)

    def test_a_ranker_that_fails_is_named(self) -> None:
        def broken(prompt: str, responses: Sequence[str]) -> list[float]:
            raise OSError("no room")

        with pytest.raises(sims.SimsError, match="broken.*no room"):
            sims.RayRanker(broken, pool=InProcess).rank("a", ["b"])


class Echo:
    """Draws a prompt's own letters, and remembers how many it was asked for."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.count, self.asked, self.fail_at = TokenCount(), 0, fail_at

    def sample(self, prompts: Sequence[str], *, n: int, plan: SteeringPlan, seed: int) -> Iterator[Sample]:
        for index, prompt in enumerate(prompts):
            for draw in range(n):
                if self.asked == self.fail_at:
                    raise RuntimeError("stopped")
                self.asked += 1
                yield Sample(index, draw, (seed, draw), f"{prompt} {draw}", True)


class TestStreaming:
    many = staticmethod(lambda count: (f"prompt {i}" for i in range(count)))

    def test_goes_on_where_it_was(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"n": 2, "shard_prompts": 3, "progress": False}
        with pytest.raises(RuntimeError, match="stopped"):
            sims.stream(Echo(fail_at=13), self.many(10), tmp_path / "out", **options)
        again = Echo()
        done = sims.stream(again, self.many(10), tmp_path / "out", **options)
        assert again.asked == done.drawn == 8 and (done.samples, done.shards, done.prompts) == (20, 4, 10)
        whole = sims.stream(Echo(), self.many(10), tmp_path / "whole", **options)
        assert list(sims.read_stream(done.path)) == list(sims.read_stream(whole.path))
        assert [s.prompt for _, s in sims.read_stream(done.path)] == [i for i in range(10) for _ in range(2)]
        last = Echo()
        assert sims.stream(last, self.many(10), tmp_path / "out", **options).drawn == last.asked == 0

    def test_changed_prompts_are_drawn_anew_and_no_others(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"shard_prompts": 2, "progress": False}
        sims.stream(Echo(), ["a", "b", "c", "d", "e"], tmp_path, **options)
        again = Echo()
        sims.stream(again, ["a", "b", "c", "x"], tmp_path, **options)
        assert again.asked == 2
        assert [prompt for prompt, _ in sims.read_stream(tmp_path)] == ["a", "b", "c", "x"]

    def test_damage_is_seen_and_mended(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"shard_prompts": 2, "progress": False}
        sims.stream(Echo(), self.many(4), tmp_path, **options)
        file = sorted((tmp_path / "shards").iterdir())[0]
        file.write_bytes(file.read_bytes().replace(b"prompt 1 0", b"prompt 1 9"))
        with pytest.raises(DamagedError):
            list(sims.read_stream(tmp_path))
        again = Echo()
        sims.stream(again, self.many(4), tmp_path, **options)
        assert again.asked == 2 and len(list(sims.read_stream(tmp_path))) == 4

    def test_another_sampler_that_draws_the_same_goes_on(
        self, tmp_path: Path, folder: Path, local: sims.LocalSampler
    ) -> None:
        options: dict[str, Any] = {"n": 2, "plan": PLAN, "seed": 1, "shard_prompts": 2, "progress": False}
        sims.stream(local, PROMPTS[:2], tmp_path / "one", **options)
        done = sims.stream(in_process(folder), PROMPTS, tmp_path / "one", **options)
        assert done.drawn == 4
        sims.stream(local, PROMPTS, tmp_path / "two", **options)
        assert list(sims.read_stream(tmp_path / "one")) == list(sims.read_stream(tmp_path / "two"))

    def test_scores_of_a_ranker_with_other_settings_are_no_scores_of_this_one(self, tmp_path: Path) -> None:
        class Longest:
            name = "longest"

            def __init__(self, sign: float) -> None:
                self.settings = {"sign": sign}

            def rank(self, prompt: str, responses: Sequence[str]) -> list[float]:
                return [self.settings["sign"] * len(response) for response in responses]

        sims.stream(Echo(), ["a", "b"], tmp_path, ranker=Longest(1.0), progress=False)
        assert not sims.stream(Echo(), ["a", "b"], tmp_path, ranker=Longest(1.0), progress=False).drawn
        with pytest.raises(RunError, match="was begun with ranker = "):
            sims.stream(Echo(), ["a", "b"], tmp_path, ranker=Longest(-1.0), progress=False)

    def test_scores_and_chats(self, tmp_path: Path) -> None:
        chat = Chat(["Hello.", "And?"], ["Hi."])

        def length(prompt: str, responses: Sequence[str]) -> list[float]:
            return [float(len(response)) for response in responses]

        done = sims.stream(Echo(), [chat, "b"], tmp_path, ranker=length, progress=False)
        (said, sample), _ = sims.read_stream(done.path)
        assert isinstance(said, Chat) and said.turns == chat.turns and sample.score == len(sample.text)

    def test_the_folder_is_guarded(self, tmp_path: Path) -> None:
        sims.stream(Echo(), ["a"], tmp_path / "out", progress=False)
        with pytest.raises(RunError, match="seed = 0, and 1"):
            sims.stream(Echo(), ["a"], tmp_path / "out", seed=1, progress=False)
        (tmp_path / "run.json").write_text("{}")
        with pytest.raises(RunError, match="something else"):
            sims.stream(Echo(), ["a"], tmp_path, progress=False)
        with pytest.raises(RunError, match=r"stream\.json"):
            list(sims.read_stream(tmp_path))

        class Nested(Echo):
            def sample(self, *args: Any, **options: Any) -> Iterator[Sample]:
                with pytest.raises(RunError, match="another process"):
                    sims.stream(Echo(), ["a"], tmp_path / "new", progress=False)
                return super().sample(*args, **options)

        sims.stream(Nested(), ["a"], tmp_path / "new", progress=False)

    def test_a_sampler_that_miscounts_is_refused(self, tmp_path: Path) -> None:
        class Twice(Echo):
            def sample(self, *args: Any, **options: Any) -> Iterator[Sample]:
                yield from super().sample(*args, **options)
                yield from super().sample(*args, **options)

        with pytest.raises(SamplerError, match="twice"):
            sims.stream(Twice(), ["a"], tmp_path, progress=False)
        assert not list((tmp_path / "shards").iterdir())

    def test_prompts_are_taken_as_they_are_needed(self, tmp_path: Path) -> None:
        taken = 0

        def endless() -> Iterator[str]:
            nonlocal taken
            while True:
                taken += 1
                yield f"prompt {taken}"

        with pytest.raises(RuntimeError, match="stopped"):
            sims.stream(Echo(fail_at=25), endless(), tmp_path, shard_prompts=10, progress=False)
        assert taken <= 40


class TestPrompts:
    def test_files_piece_by_piece(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('\ufeff"one"\n\n{"id": 1, "text": "two"}\n', encoding="utf-8")
        (tmp_path / "a.txt").write_text("one\n\n two \n")
        (tmp_path / "a.json").write_text('["one", "two"]')
        for name in ("a.jsonl", "a.txt", "a.json"):
            assert list(iter_prompts(tmp_path / name)) == ["one", "two"], name
        assert list(iter_prompts(str(tmp_path / "a.txt"))) == ["one", "two"]

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        prompts = [f"prompt {i}" for i in range(2500)]
        parquet.write_table(pyarrow.table({"id": list(range(2500)), "prompt": prompts}), tmp_path / "a.parquet")
        assert list(iter_prompts(tmp_path / "a.parquet")) == prompts
        parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "b.parquet")
        (tmp_path / "c.parquet").write_text("no")
        for name, said in (("b", "no column of prompts"), ("c", "no readable Parquet")):
            with pytest.raises(PromptError, match=said):
                list(iter_prompts(tmp_path / f"{name}.parquet"))

    def test_a_streamed_data_set(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")

        def rows() -> Iterator[dict[str, Any]]:
            yield from ({"prompt": f"prompt {i}", "id": i} for i in range(5))

        streamed = datasets.IterableDataset.from_generator(rows)
        assert list(iter_prompts(streamed)) == [f"prompt {i}" for i in range(5)]

    @pytest.mark.parametrize(
        "source", [b"abc", {"prompt": "a"}, "missing.jsonl", ["a", 3], ["a", " "], [{"id": 1}], ["\ud800"]]
    )
    def test_what_is_no_prompt(self, source: Any) -> None:
        with pytest.raises(PromptError):
            list(iter_prompts(source))

    @pytest.mark.parametrize(("text", "said"), [('"a"\n{\n', "line 2"), ("3\n", "line 1"), ('{"id": 1}\n', "line 1")])
    def test_broken_lines_are_named(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(PromptError, match=said):
            list(iter_prompts(tmp_path / "a.jsonl"))


class TestThings:
    def test_chats_and_plans_travel(self) -> None:
        chat = Chat(["Hello.", "And?"], ["Hi."])
        for made in (pickle.loads(pickle.dumps(chat)), copy.deepcopy(chat)):
            assert isinstance(made, Chat) and (made, made.turns) == (chat, chat.turns)
        again = SteeringPlan.from_bytes(PLAN.to_bytes())
        assert again.to_bytes() == PLAN.to_bytes()
        for data in (b"", b"nonsense", PLAN.to_bytes()[:-1]):
            with pytest.raises(PlanError, match="the plan is damaged"):
                SteeringPlan.from_bytes(data)

    @pytest.mark.parametrize(
        "options",
        [{"actors": 0}, {"threads": 0}, {"batch_rows": 0}, {"dtype": "int8"}],
    )
    def test_bad_arguments(self, options: dict[str, Any]) -> None:
        with pytest.raises((ConfigError, ModelError)):
            sims.RaySampler(**{"model": "embedded", "pool": InProcess, **options})

    def test_bad_streams(self, tmp_path: Path) -> None:
        bad: list[dict[str, Any]] = [{"n": 0}, {"seed": -1}, {"shard_prompts": 0}]
        for options in bad:
            with pytest.raises(sims.SimsError):
                sims.stream(**{"sampler": Echo(), "prompts": ["a"], "out": tmp_path, "progress": False, **options})
        assert not list(tmp_path.iterdir())

    def test_without_ray_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setitem(__import__("sys").modules, "ray", None)
        with pytest.raises(SamplerError, match=r"pip install 'sims-lens\[ray\]'"):
            list(sims.RaySampler(folder, CONFIG).sample(PROMPTS, n=1, plan=NOTHING, seed=0))
        pool = KeptActors(lambda: None, Actors())  # type: ignore[arg-type, return-value]
        assert list(pool.ask([])) == [] and pool.pids == []
        pool.close()
        assert json.loads(json.dumps(ModelSpec("a", CONFIG).to_json()))["model"] == "a"
