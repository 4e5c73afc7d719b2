"""Rows of the examples' tables: chosen by name, joined with those of an earlier run."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def rows():
    """Import examples/rows.py."""
    path = Path(__file__).parents[1] / "examples" / "rows.py"
    spec = importlib.util.spec_from_file_location("rows", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_are_chosen_by_pattern(rows, capsys):
    parser = argparse.ArgumentParser()
    rows.add_only(parser)
    names = ["alds", "svd", "svd, fitted"]
    assert rows.chosen(parser, names, parser.parse_args([]).only) == names
    assert rows.chosen(parser, names, parser.parse_args(["--only", "svd*"]).only) == names[1:]
    assert rows.chosen(parser, names, parser.parse_args(["--only", "svd"]).only) == ["svd"]
    with pytest.raises(SystemExit):
        rows.chosen(parser, names, "pca")
    assert "--only must match one of ['alds', 'svd', 'svd, fitted'], got 'pca'" in capsys.readouterr().err


def test_rows_take_the_place_of_earlier_ones(rows, tmp_path):
    path = tmp_path / "results.json"
    names = ["a", "b", "c"]
    first = [{"way": name, "budget": budget, "top1": 1} for name in ("a", "gone", "c") for budget in (1, 2)]
    assert rows.joined(path, "way", names, first) == first[:2] + first[4:]
    path.write_text(json.dumps({"rows": first}))
    new = [{"way": "b", "budget": 3, "top1": 2}, {"way": "a", "budget": 3, "top1": 3}]
    assert rows.joined(path, "way", names, new) == [new[1], new[0], *first[4:]]
