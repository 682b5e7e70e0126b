"""The data of the packaged tasks, and how an answer to them is scored. lm-eval imports this file by its path."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def facts(**_: Any) -> Any:
    """The multiple-choice questions, as a ``datasets.DatasetDict`` with one split."""
    return _read("plain_facts.jsonl")


def words(**_: Any) -> Any:
    """The sentences to be completed, as a ``datasets.DatasetDict`` with one split."""
    return _read("plain_words.jsonl")


def contains(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where one of the answers is a word of the continuation, letter case ignored.

    >>> contains({"answers": ["Paris"]}, [" paris, of course"])
    {'contains': 1.0}
    >>> contains({"answers": ["6"]}, [" 16, 26"])
    {'contains': 0.0}
    """
    text = results[0].casefold()
    found = any(re.search(rf"(?<!\w){re.escape(answer.casefold())}(?!\w)", text) for answer in doc["answers"])
    return {"contains": float(found)}


def _read(name: str) -> Any:
    import json

    from datasets import Dataset, DatasetDict

    rows = [json.loads(line) for line in (_HERE / name).read_text(encoding="utf-8").splitlines()]
    return DatasetDict({"test": Dataset.from_list(rows)})
