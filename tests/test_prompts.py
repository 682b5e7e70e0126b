"""Prompts: the packaged set, files of prompts, and the check."""

import difflib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sims_lens.errors import PromptError, SimsError
from sims_lens.prompts import check_prompts, everyday, quote, read_prompts, tone_pairs

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def refuse(path: str | Path, *parts: str) -> None:
    """Expect an error whose message has every part."""
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    for part in (str(path), *parts):
        assert part in str(caught.value), str(caught.value)


# --- the packaged set ------------------------------------------------------------------------------------------------


def test_everyday_is_two_hundred_distinct_short_prompts() -> None:
    prompts = everyday()
    assert len(prompts) == 200
    assert check_prompts(prompts) == tuple(prompts)
    assert [prompt for prompt in prompts if not 4 <= len(prompt.split()) <= 20] == []
    assert [prompt for prompt in prompts if prompt != prompt.strip() or not prompt.isascii()] == []


def test_everyday_has_no_near_duplicates() -> None:
    prompts = everyday()
    bags = [frozenset(re.findall(r"[a-z']+", prompt.lower())) for prompt in prompts]
    alike = [
        (one, other)
        for (one, a), (other, b) in itertools.combinations(zip(prompts, bags, strict=True), 2)
        if len(a & b) > 0.4 * len(a | b) and difflib.SequenceMatcher(None, one, other).ratio() > 0.7
    ]
    assert alike == []


def test_everyday_mixes_questions_and_requests_wherever_it_is_cut() -> None:
    prompts = everyday()
    for start in range(0, 200, 20):
        questions = sum("?" in prompt for prompt in prompts[start : start + 20])
        assert 4 <= questions <= 17, start


def test_everyday_gives_the_first_n_in_a_list_of_ones_own() -> None:
    assert everyday(3) == everyday()[:3]
    assert len(everyday(200)) == 200
    everyday().clear()
    assert len(everyday()) == 200


@pytest.mark.parametrize("n", [0, -1, 201])
def test_everyday_refuses_a_number_out_of_range(n: int) -> None:
    with pytest.raises(PromptError, match=rf"n = {n} is not in 1\.\.200"):
        everyday(n)


# --- the check -------------------------------------------------------------------------------------------------------


def test_check_keeps_the_text_as_it_is() -> None:
    assert check_prompts([" a ", "a", "é", "two\nlines"]) == (" a ", "a", "é", "two\nlines")
    assert check_prompts(("one",)) == ("one",)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("Hello", r"bare string 'Hello'; wrap it in a list: \['Hello'\]"),
        (b"Hello", "of type bytes, not a list"),
        (None, "of type NoneType, not a list"),
        ({"a": 1}, "of type dict, not a list"),
        ({"a"}, "of type set, not a list"),
        ((text for text in "ab"), r"of type generator, not a list of strings; use list\(...\)"),
        ([], "no prompts; give at least one"),
        (["a", ""], "prompt 1 is empty or white space"),
        (["a", "b", " \n\t\u3000"], "prompt 2 is empty or white space"),
        (["a", 7], "prompt 1 is of type int, not a string: '7'"),
        ([None], "prompt 0 is of type NoneType"),
        (["a", "b", "c", "b"], "prompts 1 and 3 are the same; remove one: 'b'"),
        (["ok", "bad \ud800"], "prompt 1 has half of a surrogate pair"),
    ],
)
def test_check_refuses(prompts: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_prompts(prompts)


def test_check_shortens_what_it_quotes() -> None:
    long = "word " * 50
    with pytest.raises(PromptError) as caught:
        check_prompts([long, long])
    assert quote(long) in str(caught.value)
    assert len(str(caught.value)) < 120


def test_quote_is_at_most_as_wide_as_told() -> None:
    assert quote("a" * 60) == repr("a" * 60)
    assert quote("a" * 61) == repr("a" * 59 + "…")
    assert quote("line\nbreak") == r"'line\nbreak'"


def test_prompt_errors_are_value_errors_and_ours() -> None:
    assert issubclass(PromptError, ValueError)
    assert issubclass(PromptError, SimsError)


@given(st.lists(st.text(max_size=8), max_size=8))
def test_check_accepts_exactly_the_good_lists(prompts: list[str]) -> None:
    good = bool(prompts) and len(set(prompts)) == len(prompts) and all(prompt.strip() for prompt in prompts)
    if good:
        before = list(prompts)
        assert check_prompts(prompts) == tuple(before)
        assert prompts == before
    else:
        with pytest.raises(PromptError):
            check_prompts(prompts)


@given(st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.lists(st.one_of(st.text(), st.integers()))))
def test_check_raises_nothing_but_its_own_error(prompts: object) -> None:
    try:
        checked = check_prompts(prompts)
    except PromptError as error:
        assert str(error)
    else:
        assert list(checked) == prompts


# --- files -----------------------------------------------------------------------------------------------------------


def test_jsonl_has_strings_and_objects(write: Write) -> None:
    path = write(
        "p.jsonl",
        '"One"\n{"prompt": "Two"}\n\n{"text": "Three", "id": 3}\r\n{"instruction": "Four"}\n{"question": "Fünf\\n?"}',
    )
    assert read_prompts(path) == ["One", "Two", "Three", "Four", "Fünf\n?"]
    assert read_prompts(str(path)) == read_prompts(path)


def test_the_first_key_wins(write: Write) -> None:
    assert read_prompts(write("p.json", '[{"question": "no", "prompt": "yes"}]')) == ["yes"]


def test_json_is_a_list_of_the_same(write: Write) -> None:
    assert read_prompts(write("p.JSON", '[\n"One",\n{"text": "Two"}]')) == ["One", "Two"]


def test_txt_has_one_prompt_per_line(write: Write) -> None:
    assert read_prompts(write("p.txt", "One \r\n\n   \n\tTwo\u2028still two\nThree")) == [
        "One",
        "Two\u2028still two",
        "Three",
    ]


def test_csv_takes_the_column(write: Write) -> None:
    text = 'id, prompt\n1,One\n\n2,"Two, with a ""comma"""\r\n3,"Three\nin two lines"\n'
    assert read_prompts(write("p.csv", text)) == ["One", 'Two, with a "comma"', "Three\nin two lines"]


@pytest.mark.parametrize(
    ("name", "content"), [("p.txt", "Hé"), ("p.jsonl", '"Hé"'), ("p.json", '["Hé"]'), ("p.csv", "text\nHé\n")]
)
def test_a_byte_order_mark_is_no_part_of_the_text(write: Write, name: str, content: str) -> None:
    assert read_prompts(write(name, content.encode("utf-8-sig"))) == ["Hé"]


@given(
    prompts=st.lists(
        st.text(st.characters(exclude_categories=("Cc", "Cs"), include_characters="\n\t")).filter(str.strip),
        min_size=1,
        max_size=5,
        unique=True,
    )
)
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, prompts: list[str]) -> None:
    path = tmp_path_factory.mktemp("round") / "p.jsonl"
    for ascii_only in (True, False):
        path.write_text("\n".join(json.dumps(prompt, ensure_ascii=ascii_only) for prompt in prompts), "utf-8")
        assert read_prompts(path) == prompts


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refuse(tmp_path / "none.txt", "No such file", "check the path")
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    refuse(folder, "cannot be read")


def test_an_unknown_ending(write: Write) -> None:
    refuse(write("p.yaml", "- a"), "'.yaml'", ".jsonl, .json, .txt, .csv")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.jsonl", '"a"\n{"prompt": "b"\n', ("line 2", "not valid JSON", "quotes and commas")),
        ("p.jsonl", '"a"\n\n3\n', ("line 3", "a number; make it a string")),
        ("p.jsonl", "[1]\n", ("line 1", "a list")),
        ("p.jsonl", "null\n", ("line 1", "a null")),
        ("p.jsonl", "true\n", ("line 1", "a boolean")),
        ("p.jsonl", '{"id": 1, "a": 2}', ("line 1", "['a', 'id']", '"prompt", "text"')),
        ("p.jsonl", '{"text": {}}', ("line 1", '"text" is a object')),
        ("p.jsonl", '"a"\n"b"\n"a"', ("line 3", "same prompt as in line 1", "'a'")),
        ("p.jsonl", '"a"\n"  "', ("line 2", "empty or white space")),
        ("p.jsonl", '"bell \\u0007"', ("line 1", "control character '\\x07'")),
        ("p.jsonl", '"half \\ud83d"', ("line 1", "surrogate")),
        ("p.jsonl", "[" * 100_000, ("line 1", "JSON")),
        ("p.jsonl", "9" * 5000, ("line 1", "JSON")),
        ("p.jsonl", "\n\n", ("no prompts in it",)),
        ("p.json", '["a",\n "b"\n "c"]', ("line 3", "not valid JSON")),
        ("p.json", '{"prompt": "a"}', ("a object where a list", "put it in [ ]")),
        ("p.json", '["a", 1.5]', ("item 1", "a number")),
        ("p.json", '["a", "a"]', ("item 1", "same prompt as in item 0")),
        ("p.json", "", ("line 1", "not valid JSON")),
        ("p.json", "[]", ("no prompts in it",)),
        ("p.txt", "a\nb\x00c\n", ("line 2", "control character '\\x00'")),
        ("p.txt", "a\nb\rc\n", ("line 2", "control character '\\r'")),
        ("p.txt", "a\nb\n\n a\n", ("line 4", "same prompt as in line 1")),
        ("p.txt", "", ("no prompts in it",)),
        ("p.txt", b"fine\nna\xefve\n", ("line 2", "not UTF-8", "save the file as UTF-8")),
        ("p.txt", "a\n".encode("utf-16"), ("line 1", "not UTF-8")),
        ("p.csv", "id,words\n1,a\n", ("line 1", "['id', 'words']", '"prompt", "text"')),
        ("p.csv", "prompt\na\nHello, you\n", ("line 3", "fields here: 2, in the header: 1", "quotes")),
        ("p.csv", 'prompt\n"two\nlines"\n"never closed\n', ("line 4", "not a valid row", "quotes")),
        ("p.csv", "id,prompt\n1,a\n2,\n", ("line 3", "empty or white space")),
        ("p.csv", 'prompt\n"two\nlines"\nb\nb\n', ("line 5", "same prompt as in line 4")),
        ("p.csv", "prompt\n", ("no prompts in it",)),
        ("p.csv", "", ("no prompts in it",)),
    ],
)
def test_a_broken_file_is_refused_with_its_place(
    write: Write, name: str, content: str | bytes, parts: tuple[str, ...]
) -> None:
    refuse(write(name, content), *parts)


@given(name=st.sampled_from(["p.jsonl", "p.json", "p.txt", "p.csv"]), content=st.binary(max_size=60))
def test_no_file_makes_it_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    try:
        prompts = read_prompts(path)
    except PromptError as error:
        assert str(path) in str(error)
    else:
        assert check_prompts(prompts) == tuple(prompts)


def test_tone_pairs_are_short_distinct_and_of_about_one_length() -> None:
    pairs = tone_pairs()
    assert len(pairs) == 64 and tone_pairs(3) == pairs[:3]
    assert len({prompt for prompt, _, _ in pairs}) == len({text for _, *texts in pairs for text in texts}) / 2 == 64
    lengths = [(len(cheerful.split()), len(gloomy.split())) for _, cheerful, gloomy in pairs]
    assert all(abs(a - b) <= 2 and max(a, b) <= 12 for a, b in lengths)
    for n in (0, 65):
        with pytest.raises(PromptError, match="1..64"):
            tone_pairs(n)
