"""The demonstration from end to end, with little training."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("sklearn", reason="install lrcompress[demo]")

from lrcompress import demo, pipeline
from lrcompress.cli import app
from lrcompress.report import Column
from lrcompress.types import CompressionError

ROW = demo.Row("svd", 0.5, 50, 500, 1000, 0.5)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run ``lrcompress demo`` once; return its JSON, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "lrcompress", "demo", "--epochs", "2", "--output", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), folder


def test_compares_each_method_at_each_budget_with_the_dense_network(ran):
    found, _ = ran
    assert [(row["method"], row["budget"]) for row in found["rows"]] == [
        ("dense", 1.0),
        *((method, budget) for budget in demo.BUDGETS for method in ("activation_aware", "lnr", "svd")),
    ]
    dense = found["rows"][0]
    for row in found["rows"][1:]:
        assert row["params"] <= row["budget"] * dense["params"]
        assert row["macs"] < dense["macs"]
        assert row["bytes"] < dense["bytes"]
        assert row["milliseconds"] > 0


def test_training_works_and_a_mild_budget_hardly_hurts(ran):
    found, _ = ran
    dense, mild = found["rows"][0], found["rows"][1]
    assert dense["accuracy"] > 0.9
    assert mild["accuracy"] > dense["accuracy"] - 0.02  # without labels
    assert mild["tuned_accuracy"] > dense["accuracy"] - 0.05


def test_each_budget_names_a_network_of_ours(ran):
    found, _ = ran
    assert [row["budget"] for row in found["best"]] == list(demo.BUDGETS)
    assert all(row in found["rows"] and row["method"] != "svd" for row in found["best"])


def test_the_best_is_the_fastest_of_the_accurate():
    def rows(budget):
        slow, fast, poor = (0.98, 1.0), (0.976, 1.5), (0.97, 3.0)
        return [demo.Row("lnr", budget, 1, 1, 1, a, speedup=s) for a, s in (slow, fast, poor)]

    every = (demo.Row("dense", 1.0, 1, 1, 1, 1.0), *(row for budget in demo.BUDGETS for row in rows(budget)))
    assert [row.speedup for row in demo.best_of_each_budget(every)] == [1.5] * len(demo.BUDGETS)


def test_the_kept_artefact_loads_and_is_as_accurate_as_reported(ran):
    found, folder = ran
    model = pipeline.load(folder / "compressed", demo.DigitsNet(), tuned=False)
    assert demo.load_digits().accuracy(model) == found["kept"]["accuracy"]
    assert sum(p.numel() for p in model.parameters()) == found["kept"]["params"]


def test_the_command_that_the_demo_proposes_works(ran, tmp_path):
    found, folder = ran
    rows = [demo.Row(**row) for row in found["rows"]]
    words = demo.Result(tuple(rows), (), demo.Row(**found["kept"]), folder).closing_words()
    command = words.split("next:   lrcompress ")[1].replace("smaller", str(tmp_path / "smaller")).split()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert pipeline.load_plan(tmp_path / "smaller").params_after <= rows[0].params / 4


def test_the_report_has_the_comparison_and_the_plan(ran):
    _, folder = ran
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count(">svd<") == len(demo.BUDGETS)
    for entry in pipeline.load_plan(folder / "compressed"):
        assert f">{entry.layer.name}</td>" in text


def test_choice_is_the_smallest_that_is_accurate_or_else_the_most_accurate():
    def candidate(method, params, accuracy):
        row, model = demo.Row(method, 0.5, params, 0, 0, accuracy), torch.nn.Identity()
        return demo.Candidate(row, model, None, model, None)

    large, small = candidate("lnr", 50, 0.98), candidate("activation_aware", 30, 0.975)
    poor, plain = candidate("lnr", 10, 0.9), candidate("svd", 5, 0.99)
    assert demo.choose([large, small, poor, plain], 0.98) is small
    assert demo.choose([large, small, poor, plain], 1.0) is large


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(CompressionError, match=r"lrcompress\[demo\]"):
        demo.load_digits()


def test_a_row_becomes_one_line_of_the_sheet():
    sheet = demo.comparison((ROW,))
    assert len(sheet.columns) == len(sheet.rows[0])
    assert sheet.columns[0] == Column("method", "text")
    assert sheet.rows[0][:5] == ("svd", "0.5", "50", "500", "1.0")


def test_one_thread_is_put_back():
    before = torch.get_num_threads()
    with demo.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
