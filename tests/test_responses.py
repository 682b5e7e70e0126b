"""Responses for AlpacaEval and Arena-Hard-Auto: what is written is what their readers read.

AlpacaEval's own package is used where it is installed (it needs setuptools below 81); else, and for Arena-Hard-Auto,
which is no package, what their readers do with a file is done here with the same calls of pandas and json.
"""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from common import plan_of

import sims_lens as sims
from sims_lens.errors import ExportError, PromptError
from sims_lens.export.responses import markdown_counts, uid_of

PROMPTS = ("Say hi.", 'A "quoted" one,\nof two lines: ünïcödé 🙂', "42", "2024-01-01")
TEXTS = ("Hello!\n\n# Title\n- **a**\n1. b", "7", "", "2024-01-01")
NAME = "smol-steered_0.2"


@pytest.fixture
def responses() -> sims.export.Responses:
    return sims.export.Responses(PROMPTS, TEXTS, (9, 1, 0, 5))


def test_alpaca_eval_as_its_reader_reads_it(responses: sims.export.Responses, tmp_path: Path) -> None:
    path = sims.export.to_alpaca_eval(responses, tmp_path / f"{NAME}.json", dataset="own")
    ours = pd.read_json(path)  # utils.load_or_convert_to_dataframe
    assert list(ours.columns) == ["instruction", "output", "generator", "dataset"]
    assert ours["generator"].unique().tolist() == [NAME]  # utils.get_generator_name
    reference = pd.DataFrame({"instruction": PROMPTS[::-1], "output": ["ref"] * 4, "generator": ["gpt"] * 4})
    merged = reference.merge(ours, on=["instruction"], suffixes=("_1", "_2")).drop_duplicates()  # annotate_head2head
    assert len(merged) == len(PROMPTS)
    assert dict(zip(merged["instruction"], merged["output_2"], strict=True)) == dict(zip(PROMPTS, TEXTS, strict=True))
    assert int(ours["output"].str.len().mean()) > 0  # the leaderboard's avg_length


def test_alpaca_eval_as_its_package_judges_it(responses: sims.export.Responses, tmp_path: Path) -> None:
    alpaca_eval = pytest.importorskip("alpaca_eval", reason="alpaca_eval isn't installed; see docs/capability.md")
    annotators = pytest.importorskip("alpaca_eval.annotators")

    class Longest(annotators.PairwiseAnnotator):  # type: ignore[misc, name-defined]
        """Its own reader and join; a judge that asks nobody."""

        def __init__(self, **_: Any) -> None:
            self.input_keys = ["instruction"]

        def __call__(self, pairs: pd.DataFrame, **_: Any) -> list[dict[str, Any]]:
            longer = pairs["output_2"].str.len() > pairs["output_1"].str.len()
            return pairs.assign(preference=1 + longer.astype(float)).to_dict("records")

    path = sims.export.to_alpaca_eval(responses, tmp_path / "steered.json", dataset="own")
    other = sims.export.Responses(PROMPTS[::-1], ("Hi",) * len(PROMPTS))
    reference = sims.export.to_alpaca_eval(other, tmp_path / "reference.json")
    board, annotations = alpaca_eval.evaluate(
        model_outputs=path,
        reference_outputs=reference,
        annotators_config="longest",
        Annotator=Longest,
        precomputed_leaderboard=None,
        output_path=None,
        is_return_instead_of_print=True,
        fn_metric="get_winrate",
        sort_by="win_rate",
    )
    assert list(board.index) == ["steered"] and board.loc["steered", "win_rate"] == 50.0
    assert board.loc["steered", "n_total"] == len(PROMPTS)
    won = {row["instruction"]: row["preference"] == 2 for row in annotations}
    assert won == {p: len(t) > 2 for p, t in zip(PROMPTS, TEXTS, strict=True)}


def test_arena_hard_as_its_readers_read_it(responses: sims.export.Responses, tmp_path: Path) -> None:
    answers = tmp_path / "model_answer"
    answers.mkdir()
    questions = sims.export.arena_hard_questions(PROMPTS, tmp_path / "question.jsonl", category="creative_writing")
    for name in (NAME, "baseline"):
        sims.export.to_arena_hard(responses, answers / f"{name}.jsonl")
    asked = [
        json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines() if line
    ]  # utils/completion.load_questions
    loaded: dict[str, dict[str, Any]] = {}
    for filename in sorted(str(path) for path in answers.glob("*.jsonl")):  # load_model_answers
        with Path(filename).open(encoding="utf-8") as lines:
            loaded[Path(filename).name[:-6]] = {(row := json.loads(line))["uid"]: row for line in lines}
    assert [q["category"] for q in asked] == ["creative_writing"] * 4
    for question, prompt, text in zip(asked, PROMPTS, TEXTS, strict=True):
        answer = loaded[NAME][question["uid"]]
        # gen_judgment.pairwise_judgment, gen_judgment.judgment
        assert question["prompt"] == prompt and answer["messages"][-1]["content"]["answer"] == text
        assert answer["model"] == NAME
    frame = pd.read_json(answers / f"{NAME}.jsonl", lines=True)  # show_result.get_model_style_metadata
    assert frame.iloc[0]["model"] == NAME
    metadata = frame.set_index("uid")["metadata"].to_dict()
    features = [  # show_result.print_leaderboard_with_style_features
        [v if isinstance(v, int) else sum(v.values()) for v in metadata[q["uid"]].values()] for q in asked
    ]
    assert features == [[9, 1, 2, 1], [1, 0, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0]]
    ids = [row["ans_id"] for rows in loaded.values() for row in rows.values()]
    assert len(set(ids)) == 8


def test_arena_hard_takes_the_benchmarks_own_ids(responses: sims.export.Responses, tmp_path: Path) -> None:
    questions = tmp_path / "question.jsonl"
    rows = [{"uid": f"id{i}", "category": "hard_prompt", "prompt": p} for i, p in enumerate(PROMPTS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = sims.export.to_arena_hard(responses, tmp_path / "m.jsonl", questions=questions)
    assert [json.loads(line)["uid"] for line in path.read_text().splitlines()] == ["id0", "id1", "id2", "id3"]
    foreign = sims.export.Responses(("What else?",), ("This.",))
    with pytest.raises(ExportError, match=r"prompt 0 isn't in .*question.jsonl: 'What else\?'"):
        sims.export.to_arena_hard(foreign, tmp_path / "m.jsonl", questions=questions)


def arena_hards_counts(text: str) -> dict[str, dict[str, int]]:
    """As ``utils/add_markdown_info.py`` defines the three figures."""
    for block in re.findall("```([^`]*)```", text):
        text = text.replace(block, "")
    found = {f"h{n}": len(re.findall(rf"^#{{{n}}}\s", text, re.MULTILINE)) for n in range(1, 7)}
    patterns = {
        "list_count": {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"},
        "bold_count": {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"},
    }
    rest = {k: {n: len(re.findall(p, text, re.MULTILINE)) for n, p in v.items()} for k, v in patterns.items()}
    return {"header_count": found, **rest}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# A\n## B\n ### no\n#### D\n#hash\n###### F\n####### no",
        "1. a\n  2. b\n12. c\n- d\n* e\n+ f\n-no\n\n\n- g",
        "**a** and **b c** and __d__, not ** e\nf** nor ****",
        "text\n```python\n# not a heading\n- not an item\n**x**\n```\n# heading\n```\n1. no\n```",
        "``` unclosed\n# heading",
    ],
)
def test_markdown_is_counted_as_arena_hard_counts_it(text: str) -> None:
    assert markdown_counts(text) == arena_hards_counts(text)


def test_both_are_read_back(responses: sims.export.Responses, tmp_path: Path) -> None:
    alpaca = sims.export.from_alpaca_eval(sims.export.to_alpaca_eval(responses, tmp_path / "a.json"))
    arena = sims.export.from_arena_hard(sims.export.to_arena_hard(responses, tmp_path / "a.jsonl"))
    assert (alpaca.prompts, alpaca.texts) == (arena.prompts, arena.texts) == (PROMPTS, TEXTS)


def test_responses_of_a_steered_model(llama: Any) -> None:
    sampling = sims.SamplingConfig(max_new_tokens=6)
    prompts, plan = ["Hi", "A much longer prompt"], plan_of(1, coefficient=8.0)
    base = sims.responses_of(llama, prompts=prompts, sampling=sampling, seed=1)
    steered = sims.responses_of(llama, plan, prompts, sampling=sampling, seed=1)
    drawn = sims.LocalSampler(llama, sampling).sample(prompts, n=1, plan=plan, seed=1)
    assert set(zip(steered.prompts, steered.texts, strict=True)) == {(prompts[s.prompt], s.text) for s in drawn}
    assert base.texts != steered.texts and max(steered.tokens) <= 6


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_exported(responses: sims.export.Responses, tmp_path: Path) -> None:
    alpaca, arena = sims.export.to_alpaca_eval, sims.export.to_arena_hard
    with pytest.raises(ExportError, match=r"'a.jsonl': AlpacaEval reads .json"):
        alpaca(responses, tmp_path / "a.jsonl")
    with pytest.raises(ExportError, match=r"'a.json': Arena-Hard-Auto reads .jsonl"):
        arena(responses, tmp_path / "a.json")
    with pytest.raises(ExportError, match="'org/model' can't be a model's name"):
        alpaca(responses, tmp_path / "a.json", generator="org/model")
    with pytest.raises(ExportError, match=r"folder .*nowhere does not exist"):
        arena(responses, tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(ExportError, match="every response is empty"):
        alpaca(sims.export.Responses(("a",), (" ",)), tmp_path / "a.json")
    with pytest.raises(ExportError, match="1 responses to 2 prompts"):
        sims.export.Responses(("a", "b"), ("c",))
    with pytest.raises(PromptError, match="prompts 0 and 1 are the same"):
        sims.export.Responses(("a", "a"), ("c", "d"))
    with pytest.raises(ExportError, match="category 'jokes' is not one of hard_prompt"):
        sims.export.arena_hard_questions(["a"], tmp_path / "q.jsonl", category="jokes")
    with pytest.raises(ExportError, match="half of a surrogate pair"):
        alpaca(sims.export.Responses(("a",), ("\ud800",)), tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "isn't a list of objects"),
        ("[", "isn't JSON"),
        ('[{"instruction": "a"}]', r"without a text under 'output'; its keys are \['instruction'\]"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c"}]', "prompts 0 and 1 are the same"),
    ],
)
def test_broken_alpaca_eval_files_give_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ExportError, match=message):
        sims.export.from_alpaca_eval(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n{", "line 3: not JSON"),
        ("[]", "line 1: a list, not an object"),
        ('{"uid": "a"}', "line 1: no messages"),
        ('{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}', "line 1: the last message must be"),
    ],
)
def test_broken_arena_hard_files_give_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ExportError, match=message):
        sims.export.from_arena_hard(path)
    with pytest.raises(ExportError, match="cannot be read"):
        sims.export.from_arena_hard(tmp_path / "missing.jsonl")


def test_ids_depend_on_the_text_alone() -> None:
    assert uid_of("a") == uid_of("a") != uid_of("b")
