"""Prompts: a set of our own, files of the user's, and the check that every list of prompts goes through."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from sims_lens.checks import check_path, shown
from sims_lens.errors import PromptError

__all__ = [
    "GROUPS",
    "PROMPT_KEYS",
    "Chat",
    "check_prompts",
    "conversations",
    "everyday",
    "group",
    "iter_prompts",
    "quote",
    "read_prompts",
    "tone_pairs",
]

PROMPT_KEYS: Final = ("prompt", "text", "instruction", "question")
"""The keys of an object, or the columns of a table, that can hold a prompt; the first that is there is taken."""

GROUPS: Final = ("code_and_maths", "very_short", "other_languages")
"""Names for :func:`group`."""

_KEYS: Final = "one of " + ", ".join(f'"{key}"' for key in PROMPT_KEYS)
_BATCH_ROWS: Final = 1024  # of a Parquet file, read at once
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def quote(text: str, width: int = 60) -> str:
    """Quote text for a message: escaped, and shortened to ``width`` characters.

    Args:
        text: the text.
        width: the number of characters of the text, at most.

    Returns:
        The text as a Python literal, its end replaced by an ellipsis if it is longer.
    """
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def check_prompts(prompts: object) -> tuple[str, ...]:
    """Check that something is a list of distinct prompts.

    Args:
        prompts: a sequence (a list, say) of one or more strings.

    Returns:
        The same prompts, as they are, in a tuple.

    Raises:
        PromptError: ``prompts`` is a bare string, no sequence, or empty; or one of its items isn't a string, has
            nothing but white space, can't be encoded as UTF-8, or is there twice.

    Examples:
        >>> check_prompts(["Tell me about the sea.", "Why is it salty?"])
        ('Tell me about the sea.', 'Why is it salty?')
    """
    if isinstance(prompts, str):
        raise PromptError(f"the prompts are the bare string {quote(prompts)}; wrap it in a list: [{quote(prompts)}]")
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise PromptError(f"the prompts are of type {type(prompts).__name__}, not a list of strings; use list(...)")
    if not prompts:
        raise PromptError("there are no prompts; give at least one")
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise PromptError(f"prompt {index} is of type {type(prompt).__name__}, not a string: {quote(repr(prompt))}")
        problem = _problem(prompt)
        if problem:
            raise PromptError(f"prompt {index} {problem}")
        if prompt in first:
            raise PromptError(f"prompts {first[prompt]} and {index} are the same; remove one: {quote(prompt)}")
        first[prompt] = index
    return tuple(first)


def read_prompts(path: str | Path) -> list[str]:
    """Read a file of prompts.

    By the ending of its name: ``.jsonl`` has a JSON string, or an object with a prompt under one of
    :data:`PROMPT_KEYS`, in each line; ``.json`` a list of the same; ``.txt`` a prompt in each line, without the white
    space around it; ``.csv`` a column under one of those names. Blank lines are skipped. The text is UTF-8, with or
    without a byte order mark.

    Args:
        path: the file.

    Returns:
        The prompts in their order, distinct and fit for :func:`check_prompts`.

    Raises:
        PromptError: the file can't be read, is of another kind, or has a broken, empty or repeated prompt, or one with
            control characters other than line feed and tab; the message says in which line.
    """
    path = check_path(path, PromptError)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{path} ends in {path.suffix!r}; prompts are read from {', '.join(_READERS)}")
    first: dict[str, str] = {}
    for place, prompt in reader(path, _read_text(path)):
        problem = _problem(prompt)
        control = _CONTROL.search(prompt)
        if control:
            problem = f"has the control character {control[0]!r}; remove it: {quote(prompt)}"
        if problem:
            raise PromptError(f"{path}, {place}: the prompt {problem}")
        if prompt in first:
            raise PromptError(f"{path}, {place}: the same prompt as in {first[prompt]}; remove one: {quote(prompt)}")
        first[prompt] = place
    if not first:
        raise PromptError(f"{path} has no prompts in it; give at least one")
    return list(first)


def iter_prompts(source: Iterable[object] | str | Path) -> Iterator[str]:
    """Give prompts one by one, so that memory does not grow with their number.

    Args:
        source: a file: ``.jsonl`` and ``.txt`` as in :func:`read_prompts`, and ``.parquet`` with a column under one of
            :data:`PROMPT_KEYS`, are read piece by piece; those of other kinds by :func:`read_prompts`. Or whatever
            gives, one by one, texts, or rows with a text under one of those keys: a data set of Hugging Face that is
            streamed, for instance.

    Returns:
        The prompts in their order. Whether one is there twice is not looked at.

    Raises:
        PromptError: the file can't be read or is of another kind, at once; something is no prompt, once it is come to.

    Examples:
        A data set of any size, of which nothing is kept::

            rows = datasets.load_dataset("allenai/c4", "en", split="train", streaming=True)
            sims.stream(sampler, iter_prompts(rows), "out")

        >>> list(iter_prompts([{"prompt": "Sea?", "id": 1}, "Sky?"]))
        ['Sea?', 'Sky?']
    """
    if isinstance(source, (str, Path)):
        return _iter_file(check_path(source, PromptError))
    if not isinstance(source, Iterable) or isinstance(source, (bytes, bytearray, Mapping)):
        raise PromptError(f"prompts come from a file, or one by one from a list or the like; got {quote(repr(source))}")
    return _checked(((f"prompt {index}", item) for index, item in enumerate(source)), "")


def _iter_file(path: Path) -> Iterator[str]:
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".txt", ".parquet"):
        return iter(read_prompts(path))
    try:
        path.open("rb").close()
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}); check the path") from error
    return _checked(_parquet(path) if kind == ".parquet" else _lines(path, kind), f"{path}, ")


def _checked(items: Iterator[tuple[str, object]], where: str) -> Iterator[str]:
    for place, item in items:
        prompt = _prompt_of(dict(item) if isinstance(item, Mapping) else item, f"{where}{place}")
        if problem := _problem(prompt):
            raise PromptError(f"{where}{place}: the prompt {problem}")
        yield prompt


def _lines(path: Path, kind: str) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise PromptError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error
            if text:
                yield f"line {number}", _parse(text, path, number) if kind == ".jsonl" else text


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise PromptError(f"{path} is read with pyarrow; pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            names = [key for key in PROMPT_KEYS if key in file.schema_arrow.names]
            if not names:
                raise PromptError(f"{path}: no column of prompts in {file.schema_arrow.names}; call it {_KEYS}")
            rows = (row for batch in file.iter_batches(_BATCH_ROWS, columns=names[:1]) for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows))
    except (ArrowException, OSError) as error:
        raise PromptError(f"{path} is no readable Parquet file ({type(error).__name__}); write it again") from error


def everyday(n: int | None = None) -> list[str]:
    """Give the prompts that come with the package: short, harmless, everyday requests.

    They are shuffled so that each twenty (the first, the second, ...) has one prompt on each of twenty topics: a cut
    anywhere leaves two sets of one kind.

    Args:
        n: how many, from the first; all of them if None.

    Returns:
        The prompts, in a new list.

    Raises:
        PromptError: ``n`` is less than 1 or more than there are.
    """
    prompts = files(__name__).joinpath("everyday.txt").read_text(encoding="utf-8").splitlines()
    if n is not None and not (type(n) is int and 1 <= n <= len(prompts)):
        raise PromptError(f"n = {shown(n)} is not in 1..{len(prompts)}, the number of everyday prompts")
    return prompts[:n]


def tone_pairs(n: int | None = None) -> list[tuple[str, str, str]]:
    """Give the contrast pairs that come with the package: a prompt, a cheerful answer and a gloomy one, all short.

    For first steps, examples and benchmarks: ``sims.fit(model, sims.tone_pairs())``.

    Args:
        n: how many, from the first; all 64 if None.

    Returns:
        ``(prompt, cheerful, gloomy)`` each, in a new list.

    Raises:
        PromptError: ``n`` is less than 1 or more than there are.
    """
    lines = files(__name__).joinpath("tone.jsonl").read_text(encoding="utf-8").splitlines()
    if n is not None and not (type(n) is int and 1 <= n <= len(lines)):
        raise PromptError(f"n = {shown(n)} is not in 1..{len(lines)}, the number of tone pairs")
    pairs = [json.loads(line) for line in lines[:n]]
    return [(pair["prompt"], pair["positive"], pair["negative"]) for pair in pairs]


def group(name: str) -> list[str]:
    """Give a group of prompts that comes with the package, unlike the everyday ones; 14 each.

    Args:
        name: "code_and_maths", "very_short", or "other_languages" (German, French, Spanish, Italian).

    Returns:
        The prompts, in a new list.

    Raises:
        PromptError: there is no such group.
    """
    if name not in GROUPS:
        raise PromptError(f"there is no group of prompts {name!r}; there are {', '.join(GROUPS)}")
    return files(__name__).joinpath("groups", f"{name}.txt").read_text(encoding="utf-8").splitlines()


def conversations(n: int | None = None) -> list[tuple[str, ...]]:
    """Give the conversations that come with the package: what a user says in three turns that fit whatever is answered.

    Args:
        n: how many, from the first; all 14 if None.

    Raises:
        PromptError: ``n`` is less than 1 or more than there are.
    """
    lines = files(__name__).joinpath("conversations.jsonl").read_text(encoding="utf-8").splitlines()
    if n is not None and not (type(n) is int and 1 <= n <= len(lines)):
        raise PromptError(f"n = {shown(n)} is not in 1..{len(lines)}, the number of conversations")
    return [tuple(json.loads(line)) for line in lines[:n]]


class Chat(str):
    """A prompt that is a conversation so far: what the user said, what was answered, and what the user says now.

    It can be given wherever a prompt is encoded, and then is the whole chat in the model's template. As a string it is
    what the *user* said, turn by turn: rankers are shown that, and two chats that differ in their answers only are
    sampled with the same random numbers.

    Args:
        user: what the user says, turn by turn.
        answers: to all but the last.

    Raises:
        PromptError: a turn is blank, or there is not one answer for each turn but the last.

    >>> chat = Chat(["Hello.", "How are you?"], ["Hi!"])
    >>> [turn["role"] for turn in chat.turns], chat.count("Hi!")
    (['user', 'assistant', 'user'], 0)
    """

    user: tuple[str, ...]
    answers: tuple[str, ...]

    def __new__(cls, user: Sequence[str], answers: Sequence[str] = ()) -> "Chat":
        """See the class."""
        if isinstance(user, str) or not user:
            raise PromptError(f"a chat is a list of what the user says, turn by turn; got {quote(repr(user))}")
        for turn in user:
            if problem := _problem(turn):
                raise PromptError(f"a turn of the chat {problem}")
        if len(answers) != len(user) - 1:
            raise PromptError(
                f"a chat has an answer to each turn but the last; got {len(answers)} to {len(user)} turns"
            )
        made = super().__new__(cls, "\n\n".join(user))
        made.user, made.answers = tuple(user), tuple(answers)
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What a copy in another process is made from."""
        return self.user, self.answers

    @property
    def turns(self) -> list[dict[str, str]]:
        """As chat templates have them."""
        turns = []
        for said, answered in zip(self.user, (*self.answers, None), strict=True):
            turns.append({"role": "user", "content": said})
            if answered is not None:
                turns.append({"role": "assistant", "content": answered})
        return turns


def _problem(prompt: str) -> str | None:
    """Say what is wrong with the text of a prompt, in words that go on from "the prompt ..."."""
    if not prompt.strip():
        return "is empty or white space; remove it"
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return f"has half of a surrogate pair, {prompt[error.start]!r}; remove it: {quote(prompt)}"
    return None


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}); check the path") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    return text.replace("\r\n", "\n")


def _read_txt(_path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", line.strip()


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"line {number}"
            yield place, _prompt_of(_parse(line, path, number), f"{path}, {place}")


def _read_json(path: Path, text: str) -> Iterator[tuple[str, str]]:
    items = _parse(text, path, 1)
    if not isinstance(items, list):
        raise PromptError(f"{path}: a {_json_type(items)} where a list of prompts should be; put it in [ ]")
    for index, item in enumerate(items):
        yield f"item {index}", _prompt_of(item, f"{path}, item {index}")


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, str]]:
    rows = csv.reader((line + "\n" for line in text.split("\n")), strict=True)
    header: list[str] | None = None
    column = 0
    line = 1
    try:
        for row in rows:
            place, line = f"line {line}", rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                names = [key for key in PROMPT_KEYS if key in header]
                if not names:
                    raise PromptError(f"{path}, {place}: no column of prompts in {header}; call it {_KEYS}")
                column = header.index(names[0])
            elif len(row) != len(header):
                raise PromptError(
                    f"{path}, {place}: fields here: {len(row)}, in the header: {len(header)}; "
                    'put a prompt with commas in quotes ("...")'
                )
            else:
                yield place, row[column]
    except csv.Error as error:
        raise PromptError(f"{path}, line {line}: not a valid row ({error}); check its quotes") from error


_READERS: Final = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt, ".csv": _read_csv}


def _parse(text: str, path: Path, line: int) -> object:
    """Parse JSON that starts in the given line."""
    try:
        parsed: object = json.loads(text)
    except json.JSONDecodeError as error:
        broken = quote(text.split("\n")[error.lineno - 1])
        raise PromptError(
            f"{path}, line {line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno}); "
            f"check the quotes and commas of {broken}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path}, line {line}: JSON that is no prompt ({error}); remove it") from error
    return parsed


def _prompt_of(item: object, where: str) -> str:
    """Take the prompt out of a JSON value."""
    if isinstance(item, dict):
        keys = [key for key in PROMPT_KEYS if key in item]
        if not keys:
            raise PromptError(f"{where}: an object with the keys {sorted(item)}; the prompt goes under {_KEYS}")
        if not isinstance(item[keys[0]], str):
            raise PromptError(f'{where}: "{keys[0]}" is a {_json_type(item[keys[0]])}; make it a string')
        return str(item[keys[0]])
    if not isinstance(item, str):
        raise PromptError(f"{where}: a {_json_type(item)}; make it a string, or an object with {_KEYS}")
    return item


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return {"NoneType": "null", "dict": "object", "str": "string"}.get(type(value).__name__, "list")
