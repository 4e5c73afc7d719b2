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


def test_rows_and_cells_are_chosen_by_pattern(rows, capsys):
    parser = argparse.ArgumentParser()
    rows.add_only(parser)
    jobs = [(name, budget) for name in ("alds", "svd", "svd, fitted") for budget in (0.5, 0.25)]

    def left(*arguments):
        return rows.chosen(parser, jobs, parser.parse_args(arguments).only)

    assert left() == jobs
    assert left("--only", "svd*") == jobs[2:]
    assert left("--only", "svd") == jobs[2:4]
    assert left("--only", "svd, 0.25") == [jobs[3]]
    assert left("--only", "*, 0.5") == jobs[::2]
    with pytest.raises(SystemExit):
        left("--only", "pca")
    assert "--only must match one of ['alds, 0.5', 'alds, 0.25', 'svd, 0.5'" in capsys.readouterr().err


def test_cells_take_the_place_of_earlier_ones(rows, tmp_path):
    path = tmp_path / "results.json"
    jobs = [(name, budget) for name in "abc" for budget in (1, 2)]
    first = [{"way": name, "budget": budget, "top1": 1} for name in ("c", "gone", "a") for budget in (1, 2)]
    assert rows.joined(path, "way", jobs, first) == first[4:] + first[:2]
    path.write_text(json.dumps({"rows": first}))
    new = [{"way": "b", "budget": 2, "top1": 2}, {"way": "a", "budget": 2, "top1": 3}]
    assert rows.joined(path, "way", jobs, new) == [first[4], new[1], new[0], *first[:2]]
