"""The command line as a user meets it: exit codes, streams, files."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import lrcompress as lrc
from lrcompress import doctor, pipeline, sources
from lrcompress.cli import app
from lrcompress.types import Plan

MODULE = """
import torch
from torch import nn

print("a module may print")


def net():
    first = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(16 * 36, 32), nn.Linear(32, 10))


def broken():
    raise KeyError("no such backbone")


ready = net()
text = "not a module"
"""
INPUT = ("--input", "2,4,8,8")
HALF = ("--params", "0.5")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder with a module ``toy`` in it."""
    (tmp_path / "toy.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("toy", None)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def refused(*arguments, code=1):
    """Return the one line of an error that a user can mend."""
    result = run(*arguments, code=code)
    lines = [line for line in result.stderr.splitlines() if line.startswith("lrcompress: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return lines[0]


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom lrcompress.cli import main\nsys.argv = ['lrcompress', '--help']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'lrcompress.pipeline' in sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "False False"
    assert "Exit codes: 0 done; 1" in done.stdout


@pytest.mark.parametrize("command", ["demo", "plan", "compress", "verify", "report", "doctor"])
def test_every_command_has_help_and_json(command):
    assert "--json" in run(command, "--help").stdout


def test_version_is_that_of_the_package():
    import lrcompress

    assert run("--version").stdout == f"lrcompress {lrcompress.__version__}\n"


def test_plan_prints_what_it_writes_and_the_table_agrees(folder):
    arguments = ("plan", "toy:net", *HALF, *INPUT)
    printed = run(*arguments, "--json", "-o", "plan.json").stdout
    plan = Plan.from_json(printed)
    assert Plan.from_json((folder / "plan.json").read_text()) == plan
    table = run(*arguments).stdout
    assert f"{plan.params:,} -> {plan.params_after:,}" in table
    for entry in plan:
        row = next(line for line in table.splitlines() if line.strip().startswith(entry.layer.name))
        assert f"{entry.choice.error:.4f}" in row
    assert plan.params_after <= plan.params / 2


def test_budget_in_macs_and_a_count(folder):
    plan = Plan.from_json(run("plan", "toy:net", "--macs", "0.6", *INPUT, "--json").stdout)
    assert plan.macs_after <= 0.6 * plan.macs
    plan = Plan.from_json(run("plan", "toy:ready", "--params", "9000", "--json").stdout)
    assert plan.params_after <= 9000


def test_budget_in_measured_time(folder):
    for option, size in (("--latency", "1.0"), ("--latency-ms", "1e4")):
        plan = Plan.from_json(run("plan", "toy:net", option, size, *INPUT, "--json").stdout)
        assert 0 < plan.latency_after <= plan.latency
    assert "time of a forward" in run("plan", "toy:net", "--latency", "1.0", *INPUT).stdout
    assert "needs example_inputs" in refused("plan", "toy:net", "--latency", "0.9")


def test_preset_error_and_ignore_reach_the_plan(folder):
    plan = Plan.from_json(
        run("plan", "toy:net", *HALF, "--error", "frobenius", "--ignore", "4", "--json").stdout
    )
    assert "frobenius" in plan.recipe
    assert "4" in [item.name for item in plan.left_alone]
    plan = Plan.from_json(run("plan", "toy:net", *HALF, "--preset", "svd_energy", "--json").stdout)
    assert plan.recipe.startswith("svd_energy")


def test_compress_verify_and_report(folder):
    torch.manual_seed(7)
    layers = {"0": nn.Conv2d(4, 16, 3), "3": nn.Linear(16 * 36, 32), "4": nn.Linear(32, 10)}
    save_file(nn.ModuleDict(layers).state_dict(), "weights.safetensors")
    model = ("toy:net", "--weights", "weights.safetensors")
    found = json.loads(run("compress", *model, *HALF, *INPUT, "-o", "out", "--json").stdout)
    assert found["bytes"] == sum(file.stat().st_size for file in (folder / "out").iterdir())
    assert not found["dry_run"]
    stored = pipeline.load_plan("out")
    assert (stored.params, stored.params_after) == (found["params"], found["params_after"])
    assert Plan.from_json(json.dumps(found["plan"])) == stored

    verify = ("verify", *model, "--artefact", "out", *INPUT)
    checked = json.loads(run(*verify, "--json").stdout)
    assert 0 < checked["output_error"] < 1
    assert checked["params_after"] == found["params_after"]
    assert f"{checked['output_error']:.4f}" in run(*verify).stdout
    run(*verify, "--max-error", checked["output_error"] * 1.01)
    assert "exceeds" in run(*verify, "--max-error", checked["output_error"] * 0.99, code=3).stderr

    run("report", "out", "-o", "report.html")
    assert stored.layers[0].layer.name in (folder / "report.html").read_text(encoding="utf-8")


def test_compress_follows_an_edited_plan(folder):
    run("plan", "toy:net", *HALF, "-o", "plan.json")
    plan = Plan.from_json((folder / "plan.json").read_text()).keep_dense("4").edit("3", rank=2)
    (folder / "plan.json").write_text(plan.to_json())
    run("compress", "toy:net", "--plan", "plan.json", "-o", "out")
    assert pipeline.load_plan("out") == plan
    assert json.loads(run("report", "plan.json", "-o", "r.html", "--json").stdout) == {"report": "r.html"}


def test_dry_run_writes_nothing(folder):
    before = sorted(folder.rglob("*.*"))
    arguments = ("compress", "toy:net", *HALF, "-o", "out", "--dry-run")
    assert "would write out" in run(*arguments).stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["dry_run"]
    assert found["bytes"] is None
    assert [path for path in sorted(folder.rglob("*.*")) if "__pycache__" not in path.parts] == before
    assert not (folder / "out").exists()


def test_an_impossible_budget_says_the_least_possible(folder):
    message = refused("plan", "toy:net", "--params", "0.0001")
    run("plan", "toy:net", "--params", message.split("the least possible is ")[1].split()[0])


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("nowhere:net", "nowhere"),
        ("toy:absent", "absent"),
        ("toy:broken", "KeyError: 'no such backbone'"),
        ("toy:text", "TypeError"),
        ("builtins:dict", "torch.nn.Module, got dict"),
    ],
)
def test_a_bad_model_is_one_line(folder, reference, expected):
    assert expected in refused("plan", reference, *HALF)


def test_bad_weights_are_named(folder):
    save_file({"0.weight": torch.zeros(16, 4, 3, 3), "head": torch.zeros(1)}, "few.safetensors")
    message = refused("plan", "toy:net", *HALF, "--weights", "few.safetensors")
    assert "lacks 0.bias, 3.bias" in message
    assert "adds head" in message
    save_file({"0.weight": torch.zeros(16, 4, 5, 5)}, "shape.safetensors")
    assert "0.weight" in refused("plan", "toy:net", *HALF, "--weights", "shape.safetensors")
    (folder / "junk.safetensors").write_bytes(b"not safetensors")
    assert "junk.safetensors" in refused("plan", "toy:net", *HALF, "--weights", "junk.safetensors")


def test_inputs_that_the_model_cannot_take_and_files_that_are_no_plan(folder):
    assert "RuntimeError" in refused("plan", "toy:net", *HALF, "--input", "1,3,8,8")
    (folder / "plan.json").write_text("{}")
    assert "plan_format" in refused("report", "plan.json", "-o", "r.html")
    run("plan", "toy:net", *HALF, "-o", "plan.json")
    assert "absent" in refused("report", "plan.json", "-o", "absent/r.html")


def test_inputs_come_from_a_file(folder):
    save_file({"x": torch.ones(3, 4, 8, 8)}, "x.safetensors")
    run("compress", "toy:net", *HALF, "-o", "out")
    arguments = ("verify", "toy:net", "--artefact", "out", "--inputs")
    assert json.loads(run(*arguments, "x.safetensors", "--json").stdout)["samples"] == 3
    save_file({"input": torch.ones(5, 4, 8, 8), "other": torch.ones(5)}, "two.safetensors")
    assert "other" in refused(*arguments, "two.safetensors")  # which the model's forward does not have


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "toy:net"),
        ("plan", "toy:net", *HALF, "--macs", "0.5"),
        ("plan", "toy:net", "--params", "half"),
        ("plan", "toy:net", "--params", "1.5"),
        ("plan", "toy", *HALF),
        ("plan", "toy:net", *HALF, "--input", "1,x"),
        ("plan", "toy:net", *HALF, "--preset", "svd", "--error", "bound"),
        ("plan", "toy:net", *HALF, "--weights", "absent.safetensors"),
        ("compress", "toy:net", *HALF),
        ("compress", "toy:net", *HALF, "--plan", "toy.py", "-o", "out"),
        ("verify", "toy:net", "--artefact", "."),
        ("unknown",),
    ],
)
def test_wrong_usage_exits_with_2(folder, arguments):
    assert run(*arguments, code=2).stdout == ""


def test_piped_output_and_no_color_have_no_escapes(folder):
    arguments = ("-m", "lrcompress", "plan", "toy:net", *HALF)
    for done in (python(*arguments), python(*arguments, NO_COLOR="1"), python("-m", "lrcompress", "--help")):
        assert done.returncode == 0
        assert "\x1b" not in done.stdout + done.stderr


def test_json_is_alone_on_stdout_whatever_the_module_prints(folder):
    done = python("-m", "lrcompress", "plan", "toy:net", *HALF, "--json")
    Plan.from_json(done.stdout)
    assert "a module may print" in done.stderr


def test_traceback_on_demand(folder):
    done = python("-m", "lrcompress", "--traceback", "plan", "toy:broken", *HALF)
    assert done.returncode == 1
    assert "in broken" in done.stderr


def test_doctor_finds_this_installation():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["packages"]["torch"] == torch.__version__
    assert found["torch_cuda"] == torch.version.cuda
    assert found["problems"] == []
    processor = Path("/proc/cpuinfo")
    assert not found["extension"]["amx"] or "amx_bf16" in processor.read_text()
    assert bool(found["gpu"]) == (not (torch.cuda.is_available() and found["extension"]["cuda"]))
    text = " ".join(run("doctor").stdout.split())
    for line in (*found["gpu"], found["platform"]):
        assert line in text


def test_doctor_without_the_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lrcompress._C", None)
    text = " ".join(run("doctor", code=1).stdout.split())  # a long line may be wrapped
    assert "pip install ." in text
    assert json.loads(run("doctor", "--json", code=1).stdout)["extension"] is None


@pytest.mark.parametrize(
    ("sm", "archs", "runs"),
    [
        ("90", "80 90", True),
        ("89", "80 90", True),
        ("75", "80 90", False),
        ("120", "80 90", True),
        ("86", "90", False),
    ],
)
def test_which_devices_a_build_serves(sm, archs, runs):
    build = {"cuda": True, "cuda_archs": archs.split(), "nvcc": "12.8", "compiler": "12", "openmp": True}
    missing = doctor._missing_for_gpu(build, "12.8", [{"name": "A device", "sm": sm}])
    assert missing == [] if runs else "install again" in missing[0]


def test_neurons_go_with_samples_in_a_file(folder):
    torch.manual_seed(7)
    save_file({"samples": torch.randn(600, 4, 8, 8)}, "samples.safetensors")
    samples, lnr = ("--inputs", "samples.safetensors"), ("--preset", "lnr")
    found = json.loads(
        run(
            "compress", "toy:ready", *HALF, *lnr, *samples, "--chaining", "parallel", "-o", "out", "--json"
        ).stdout
    )
    plan = pipeline.load_plan("out")
    assert plan.recipe == "lnr: parallel, debiased"
    assert plan.removals
    assert found["params_after"] == plan.params_after <= 0.5 * plan.params
    assert run("verify", "toy:ready", "--artefact", "out", *INPUT).exit_code == 0
    narrow = run("plan", "toy:ready", *HALF, *lnr, *samples, "-o", "narrow.json")
    assert "Channels removed" in narrow.stdout
    shown = run("plan", "toy:ready", *HALF, *lnr, "--low-rank", *samples, "-o", "plan.json").stdout
    assert "Splits tried" in shown
    assert "taken" in shown
    assert Plan.from_json((folder / "plan.json").read_text()).splits
    run("report", "plan.json", "-o", "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Splits tried" in page
    run("compress", "toy:ready", "--plan", "plan.json", *samples, "-o", "both")
    assert pipeline.load_plan("both").splits
    without = refused("compress", "toy:ready", "--plan", "narrow.json", "-o", "no")
    assert "needs batches or statistics" in without


def test_low_rank_that_won_against_removal_is_fitted_as_it_was_measured(folder):
    samples = torch.randn(600, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    save_file({"samples": samples}, "samples.safetensors")
    model = sources.load_model("toy:ready", None, "cpu")
    known, budget = lrc.collect(model, [samples]), lrc.Budget(params=0.5)
    alone = lrc.plan(model, budget, lrc.activation_aware(), statistics=known)
    won = dataclasses.replace(alone, splits=(lrc.types.Split(1.0, 0.1),))
    (folder / "plan.json").write_text(won.to_json())
    run("compress", "toy:ready", "--plan", "plan.json", "--inputs", "samples.safetensors", "-o", "out")
    fitted = pipeline.apply(model, won, batches=samples.split(100))
    assert torch.equal(pipeline.load("out", model)(samples), fitted(samples))


def test_options_of_lnr_are_for_lnr_and_take_samples(folder):
    for options, said in (
        (("--preset", "lnr"), "lnr calibrates on samples"),
        (("--preset", "lnr", *INPUT), "lnr calibrates on samples"),
        (("--preset", "activation_aware", *INPUT), "activation_aware calibrates on samples"),
        (("--low-rank",), "alds removes no neurons"),
        (("--chaining", "parallel", "--preset", "svd"), "svd removes no neurons"),
        (("--preset", "lnr", "--error", "bound"), "lnr has an error of its own"),
    ):
        assert said in run("plan", "toy:net", *HALF, *options, code=2).stderr
