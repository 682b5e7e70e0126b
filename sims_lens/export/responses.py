"""Responses for two public judges: AlpacaEval and Arena-Hard-Auto. What is written is what their readers read.

AlpacaEval reads a JSON list of ``{"instruction", "output", "generator"}`` and joins it with the reference model's on
the instruction. Arena-Hard-Auto reads a file of JSON lines whose name is the model's,
``{"uid", "ans_id", "model", "messages", "tstamp", "metadata"}``, and joins it with ``question.jsonl`` on the uid.

References: tatsu-lab/alpaca_eval 0.6.6, ``main.py``, ``annotators/pairwise_evaluator.py``; lmarena/arena-hard-auto at
    196f6b8 (v2.0, and v0.1 as that repository now reads it), ``gen_answer.py``, ``gen_judgment.py``,
    ``show_result.py``, ``utils/completion.py``. Before 2025 Arena-Hard v0.1 named the fields otherwise
    (``question_id``, ``choices``); such a reader isn't served.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sims_lens.config import SamplingConfig
from sims_lens.data import Sample
from sims_lens.errors import ExportError, PromptError
from sims_lens.plan import NOTHING, SteeringPlan
from sims_lens.prompts import check_prompts, quote
from sims_lens.run import Run
from sims_lens.sampling import LocalSampler

_NAME = re.compile(r"[\w][\w.+-]*")
"""A model's name in both: Arena-Hard makes a file name of it."""

ARENA_CATEGORIES = ("hard_prompt", "creative_writing", "coding", "math", "arena-hard-v0.1")
"""The categories that Arena-Hard-Auto has a judge's instructions for."""


@dataclass(frozen=True)
class Responses:
    """One response of a model to each of some prompts. Made by :func:`responses_of`, or by hand.

    Args:
        prompts: distinct texts.
        texts: the response to each.
        tokens: length of each in the model's tokens; empty where it isn't known.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...] = field(repr=False)
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        if len(self.texts) != len(self.prompts):
            raise ExportError(f"there are {len(self.texts)} responses to {len(self.prompts)} prompts; give one to each")
        if self.tokens and len(self.tokens) != len(self.prompts):
            raise ExportError(
                f"there are {len(self.tokens)} lengths of {len(self.prompts)} responses; give one of each"
            )


def responses_of(
    model: Any,
    plan: SteeringPlan = NOTHING,
    prompts: Sequence[str] = (),
    *,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> Responses:
    """Let a steered model answer prompts, once each.

    Args:
        model: ``HookedTransformer`` or ``TransformerBridge``.
        plan: what steers; by default nothing.
        prompts: for instance of :func:`sims_lens.load_prompts`.
        sampling: how responses are drawn. By default up to 512 new tokens at temperature 0.7: the usual 40 would cut
            every answer short.
        seed: of the draws.

    Raises:
        PromptError: a prompt can't be used.
        PlanError: the plan doesn't fit the model.
    """
    texts = check_prompts(prompts)
    config = sampling or SamplingConfig(max_new_tokens=512, temperature=0.7, top_k=None)
    drawn = sorted(LocalSampler(model, config).sample(texts, n=1, plan=plan, seed=seed), key=lambda s: s.prompt)
    return Responses(texts, tuple(s.text for s in drawn), tuple(len(s.tokens) for s in drawn))


def run_responses(run: Run, iteration: int | None = None) -> Responses:
    """The first draw to each held-out prompt of a run.

    Args:
        run: the run.
        iteration: counted from 1; 0 is the base model; None: the one that the run's plan is from, or the base model
            where the guard rolled all of them back.

    Raises:
        RunError: there is no such iteration.
    """
    if iteration is None:
        iteration = run.best.index if run.best else 0
    first: dict[int, Sample] = {s.prompt: s for s in run.samples(iteration) if s.draw == 0}
    order = sorted(first)
    return Responses(
        tuple(run.prompts[i] for i in order),
        tuple(first[i].text for i in order),
        tuple(len(first[i].tokens) for i in order),
    )


def to_alpaca_eval(
    responses: Responses | Run, path: str | Path, *, generator: str | None = None, dataset: str | None = None
) -> Path:
    """Write responses for ``alpaca_eval --model_outputs PATH``.

    Args:
        responses: of one model; of a run, see :func:`run_responses`.
        path: of the file, ending in .json.
        generator: the model's name on the leaderboard; by default the file's name.
        dataset: where the prompts are from; None to leave it out.

    Returns:
        The path.

    Raises:
        ExportError: the file's or the model's name can't be used, or a response is empty for all prompts.
    """
    path, found = Path(path), _given(responses)
    if path.suffix != ".json":
        raise ExportError(f"{path.name!r}: AlpacaEval reads .json; name the file so")
    name = _checked_name(generator if generator is not None else path.stem)
    extra = {} if dataset is None else {"dataset": dataset}
    rows = [
        {"instruction": prompt, "output": text, "generator": name, **extra}
        for prompt, text in zip(found.prompts, found.texts, strict=True)
    ]
    return _write(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def from_alpaca_eval(path: str | Path) -> Responses:
    """Read model outputs in AlpacaEval's format.

    Raises:
        ExportError: the file isn't one, or holds several answers to one instruction.
    """
    rows = _read_json(Path(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ExportError(f"{path} isn't a list of objects with 'instruction' and 'output', as AlpacaEval reads it")
    return _responses(path, [(_text(path, row, "instruction"), _text(path, row, "output")) for row in rows])


def to_arena_hard(responses: Responses | Run, path: str | Path, *, questions: str | Path | None = None) -> Path:
    """Write responses as a file of model answers for Arena-Hard-Auto.

    Put it into ``data/<benchmark>/model_answer/`` and name it in the config's ``model_list``. Lengths in ``metadata``
    are counted in the model's own tokens (words, where those aren't known), Arena-Hard's in gpt-4o's: before you use
    its style control, let its ``utils/add_markdown_info.py`` count anew.

    Args:
        responses: of one model; of a run, see :func:`run_responses`.
        path: of the file; its name without .jsonl is the model's name, as Arena-Hard takes it.
        questions: the benchmark's ``question.jsonl``, whose uids are taken. None: each uid is a hash of the prompt, as
            :func:`arena_hard_questions` writes them for prompts of your own.

    Returns:
        The path.

    Raises:
        ExportError: the file's name can't be used, or a prompt isn't among the questions.
    """
    path, found = Path(path), _given(responses)
    if path.suffix != ".jsonl":
        raise ExportError(f"{path.name!r}: Arena-Hard-Auto reads .jsonl; name the file so")
    name, uids = _checked_name(path.stem), {} if questions is None else _uids(Path(questions))
    lines = []
    for index, (prompt, text) in enumerate(zip(found.prompts, found.texts, strict=True)):
        if questions is not None and prompt not in uids:
            raise ExportError(
                f"prompt {index} isn't in {questions}: {quote(prompt)}; leave it out, or take its prompts"
            )
        uid = uids.get(prompt) or uid_of(prompt)
        length = found.tokens[index] if found.tokens else len(text.split())
        answer = {
            "uid": uid,
            "ans_id": hashlib.sha256(f"{name}\0{uid}\0{text}".encode()).hexdigest()[:22],
            "model": name,
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": {"answer": text}}],
            "tstamp": time.time(),
            # In this order: its style control takes the first for the length.
            "metadata": {"token_len": length, **markdown_counts(text)},
        }
        lines.append(json.dumps(answer, ensure_ascii=False))
    return _write(path, "".join(f"{line}\n" for line in lines))


def from_arena_hard(path: str | Path) -> Responses:
    """Read a file of model answers in Arena-Hard-Auto's format.

    Raises:
        ExportError: the file isn't one.
    """
    pairs = []
    for number, row in enumerate(_read_lines(Path(path)), start=1):
        messages = row.get("messages")
        if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, dict) for m in messages):
            raise ExportError(f"{path}, line {number}: no messages of a user and an assistant")
        asked = [m.get("content") for m in messages if m.get("role") == "user"]
        answer = messages[-1].get("content")
        text = answer.get("answer") if isinstance(answer, dict) else None
        if not asked or not isinstance(asked[-1], str) or not isinstance(text, str):
            raise ExportError(f"{path}, line {number}: the last message must be {{'content': {{'answer': text}}}}")
        pairs.append((asked[-1], text))
    return _responses(path, pairs)


def arena_hard_questions(
    prompts: Sequence[str], path: str | Path, *, category: str = "hard_prompt", subcategory: str = "own"
) -> Path:
    """Write prompts of your own as an Arena-Hard-Auto ``question.jsonl``, with the uids of :func:`to_arena_hard`.

    Args:
        prompts: distinct texts.
        path: of the file, ``data/<your benchmark>/question.jsonl``.
        category: which of its judge's instructions and baselines to use.
        subcategory: a label.

    Raises:
        ExportError: Arena-Hard-Auto has no instructions for the category.
        PromptError: a prompt can't be used.
    """
    if category not in ARENA_CATEGORIES:
        raise ExportError(f"category {category!r} is not one of {', '.join(ARENA_CATEGORIES)}")
    rows = [
        {"uid": uid_of(prompt), "category": category, "subcategory": subcategory, "prompt": prompt}
        for prompt in check_prompts(prompts)
    ]
    return _write(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def uid_of(prompt: str) -> str:
    """A question's id from its text: the same prompt always has the same one.

    >>> uid_of("Hi")
    '3639efcd08abb273'
    """
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    r"""Headings, list items and bold spans outside a text's code blocks, by kind, as Arena-Hard-Auto counts them.

    >>> markdown_counts("# A\n- **b**\n1. c")["list_count"]
    {'ordered': 1, 'unordered': 1}
    """
    prose = re.sub(r"```[^`]*```", "", text)
    levels = [len(mark) for mark in re.findall(r"^(#{1,6})\s", prose, re.MULTILINE)]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "header_count": {f"h{level}": levels.count(level) for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def _given(responses: Responses | Run) -> Responses:
    found = run_responses(responses) if isinstance(responses, Run) else responses
    if not any(text.strip() for text in found.texts):
        raise ExportError("every response is empty; there is nothing to judge")
    return found


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ExportError(f"{name!r} can't be a model's name; use letters, digits and . _ + - (no slash)")
    return name


def _uids(path: Path) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for row in _read_lines(path):
        found.setdefault(_text(path, row, "prompt"), _text(path, row, "uid"))
    return found


def _responses(path: str | Path, pairs: Sequence[tuple[str, str]]) -> Responses:
    try:
        return Responses(tuple(prompt for prompt, _ in pairs), tuple(text for _, text in pairs))
    except PromptError as error:
        raise ExportError(f"{path}: {error}") from error


def _text(path: str | Path, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ExportError(f"{path}: an object without a text under {key!r}; its keys are {sorted(row)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ExportError(f"{path}: {key!r} has half of a surrogate pair; remove it: {quote(value)}") from error
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} isn't JSON in UTF-8 ({error})") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise ExportError(f"{path} isn't UTF-8 ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ExportError(f"{path}, line {number}: a {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def _write(path: Path, text: str) -> Path:
    if not path.parent.is_dir():
        raise ExportError(f"folder {path.parent} does not exist; create it first")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ExportError(f"a text has half of a surrogate pair, {text[error.start]!r}; remove it") from error
    path.write_bytes(data)
    return path
