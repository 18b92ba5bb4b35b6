"""What is written as JSON is JSON: numbers that are not finite become null, in whatever a writer is given."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from ttt_e2e.bench import table
from ttt_e2e.runs.files import parse_json
from ttt_e2e.strict_json import to_json

ROOT = Path(__file__).parents[1]


def parse(text: str):
    """As a strict reader does: NaN and Infinity, which `json` would take, fail."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_are_not_finite_become_null(number):
    value = {"a": number, "b": [1, (number, {"c": [number]})], "d": "NaN"}
    assert parse(to_json(value)) == {"a": None, "b": [1, [None, {"c": [None]}]], "d": "NaN"}
    with pytest.raises(AssertionError):  # what `json` makes of it
        parse(json.dumps(value))


def test_everything_else_is_as_json_writes_it():
    value = {"b": [1, 2.5, True, None, "é"], "a": {"1": ()}}
    for options in ({}, {"indent": 2}, {"sort_keys": True}):
        assert to_json(value, **options) == json.dumps(value, **options)
    assert to_json(Path("x"), default=str) == '"x"'
    with pytest.raises(TypeError):
        to_json(np.float32(1))


def test_there_is_one_place_that_writes_json():
    paths = [path for room in ("ttt_e2e", "launch") for path in sorted((ROOT / room).rglob("*.py"))]
    writers = [path.name for path in paths if re.search(r"json\.dumps?\(|JSONEncoder", path.read_text())]
    assert writers == ["strict_json.py"]


def test_figures_of_benchmarks_are_json(tmp_path):
    table.write(tmp_path, [{"variant": "a", "loss": math.nan, "seconds": 0.5}], "Title")
    assert parse((tmp_path / "results.json").read_text()) == [{"variant": "a", "loss": None, "seconds": 0.5}]


def test_files_of_before_are_read():
    assert parse_json('{"loss": NaN, "worst": [-Infinity, 1.0]}', "metrics.json") == {
        "loss": None,
        "worst": [None, 1.0],
    }
