"""The arithmetic of the benchmarks: what they print can't be seen to be wrong."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


report = module("speed_report")


def record(*turns: tuple[float, float] | None, name: str = "a", error: str | None = None) -> dict[str, Any]:
    made = [turn and {"units": turn[0], "seconds": turn[1]} for turn in turns]
    return {"name": name, "rounds": made, "error": error}


class TestRatio:
    def test_each_round_is_compared_with_its_own_reference(self) -> None:
        slowing = record((10, 1.0), (10, 10.0), (10, 100.0))  # the machine got slower: the ratio did not
        reference = record((10, 2.0), (10, 20.0), (10, 200.0))
        assert report.ratio(slowing, reference) == (2.0, 2.0, 2.0, 3)

    def test_median_and_spread(self) -> None:
        found = report.ratio(record((10, 1), (20, 1), (90, 1)), record((10, 1), (10, 1), (10, 1)))
        assert found == (2.0, 1.0, 9.0, 3)
        assert str(found) == "2.00 (1.00–9.00)"

    def test_units_count_as_well_as_seconds(self) -> None:
        assert report.ratio(record((5, 1)), record((10, 1))).median == 0.5

    def test_rounds_without_one_of_both_are_left_out(self) -> None:
        found = report.ratio(record(None, (30, 1), (50, 1)), record((10, 1), (10, 1), None))
        assert found == (3.0, 3.0, 3.0, 1)
        assert str(found) == "3.00"
        assert report.ratio(record(None, (30, 1)), record((10, 1), None)) is None

    def test_records_of_unlike_length_are_refused(self) -> None:
        with pytest.raises(ValueError):
            report.ratio(record((1, 1)), record((1, 1), (1, 1)))


class TestPage:
    def test_a_contestant_that_gave_up_is_shown_with_its_error(self) -> None:
        cell = {
            "about": "a cell",
            "job": {"stops": []},
            "records": [record((10, 1), name="HF generate"), record(None, name="peer", error="ImportError: no peer")],
        }
        part = {"machine": _machine(), "settings": "quick", "cells": {"64 tokens": cell}}
        text = report.page({"parts": {"sampling": part}})
        assert "| HF generate | 10.0 | 1.00 |  |" in text
        assert "| peer |  |  | ImportError: no peer |" in text

    def test_the_share_of_the_limit(self) -> None:
        """Ten tokens of prompt at 100 a second and ten steps of 2 rows at 40 a second: 22 tokens in 0.6 seconds."""
        job = {"prompts": 1, "n": 2, "tokens": 11, "stops": [], "prompt_tokens": 10}
        cell = {"about": "a cell", "job": job, "records": [record((22, 1.2), name="HF generate")]}
        speeds = [("float32", 2, 40.0), ("float32", 8, 100.0)]
        products = [{"dtype": d, "rows": r, "tokens_per_second": s} for d, r, s in speeds]
        parts = {"sampling": {"cells": {"c": cell}}, "limits": {"limits": {"products": products}}}
        assert list(report._shares(parts)) == [["c", "HF generate", "37", "18", "50%"]]


def test_matrix_products_of_a_model() -> None:
    shapes = module("speed_machine").shapes(
        {
            "hidden_size": 8,
            "intermediate_size": 20,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "vocab_size": 100,
        }
    )
    assert shapes == {(8, 8): 6, (8, 4): 6, (8, 20): 6, (20, 8): 3, (8, 100): 1}


def _machine() -> dict[str, Any]:
    names = ("device", "cpu", "cores", "capability", "load", "python", "commit", "when")
    return {**dict.fromkeys(names, "?"), "versions": {"torch": sys.version}}
