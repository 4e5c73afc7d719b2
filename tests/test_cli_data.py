"""The command line with samples and stored weights: every method at its best, as in Python."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import HALF, INPUT, folder, refused, run
from torch import nn

import lrcompress as lrc
from lrcompress import pipeline, presets, sources
from lrcompress.arguments import Preset
from lrcompress.types import Recipe, Reconstruction

__all__ = ["folder"]  # the fixture, for pytest
SAMPLES = ("--inputs", "samples.safetensors")


@pytest.fixture
def model(folder):
    """Write samples; return the model that the command line makes."""
    save_file({"x": torch.randn(600, 4, 8, 8)}, "samples.safetensors")
    return sources.load_model("toy:net", None, "cpu")


def batches():
    return list(sources.samples.load_file("samples.safetensors")["x"].split(100))


def same_values(model, expected, artefact="out"):
    found = pipeline.load(artefact, model).state_dict()
    wanted = expected.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_every_preset_is_on_the_command_line():
    made = {name for name in vars(presets) if name in lrc.__all__ and name.islower()}
    assert made == {preset.value for preset in Preset}
    assert all(isinstance(getattr(presets, name)(), Recipe | Reconstruction) for name in made)


@pytest.mark.parametrize("preset", [preset.value for preset in Preset if preset is not Preset.lnr])
def test_compress_gives_what_python_gives(model, preset):
    torch.manual_seed(3)
    run("compress", "toy:net", *HALF, *SAMPLES, "--preset", preset, "-o", "out")
    torch.manual_seed(3)
    recipe = getattr(presets, preset)()
    small, plan = lrc.compress(model, lrc.Budget(params=0.5), recipe, batches=batches())
    assert pipeline.load_plan("out").recipe == plan.recipe == str(recipe)
    if preset != "kfac_svd":  # its gradients are those of labels drawn at random
        assert same_values(model, small)


def test_without_a_preset_samples_mean_activation_aware(model):
    run("compress", "toy:net", *HALF, *SAMPLES, "-o", "out")
    small, plan = lrc.compress(model, lrc.Budget(params=0.5), batches=batches())
    assert pipeline.load_plan("out") == plan
    assert plan.recipe == str(lrc.activation_aware())
    assert same_values(model, small)
    run("compress", "toy:net", *HALF, *INPUT, "-o", "without")
    assert pipeline.load_plan("without").recipe == str(lrc.alds())


def test_weights_are_fitted_to_what_was_asked_for(model):
    statistics = lrc.collect(model, batches())
    plan = lrc.plan(model, lrc.Budget(params=0.5), statistics=statistics, example_inputs=batches()[0])
    for fit, data in (("batches", {"batches": batches()}), ("statistics", {"statistics": statistics})):
        run("compress", "toy:net", *HALF, *SAMPLES, "--fit", fit, "-o", fit)
        assert same_values(model, lrc.apply(model, plan, **data), fit)
    run("compress", "toy:net", *HALF, *SAMPLES, "--fit", "nothing", "-o", "nothing")
    assert same_values(model, lrc.apply(model, plan), "nothing")


def test_a_plan_is_fitted_to_the_samples_too(model):
    run("plan", "toy:net", *HALF, *SAMPLES, "-o", "plan.json")
    run("compress", "toy:net", "--plan", "plan.json", *SAMPLES, "-o", "out")
    run("compress", "toy:net", "--plan", "plan.json", *SAMPLES, "--fit", "statistics", "-o", "statistics")
    plan = pipeline.load_plan("out")
    assert same_values(model, lrc.apply(model, plan, batches=batches()))
    statistics = lrc.collect(model, batches())
    assert same_values(model, lrc.apply(model, plan, statistics=statistics), "statistics")


def test_tuning_is_stored_and_times_are_told(model):
    arguments = ("compress", "toy:net", *HALF, *INPUT, "--tune", "-o", "out")
    assert "times as fast" in run(*arguments).stdout
    times = json.loads(run(*arguments, "--json").stdout)["milliseconds"]
    assert set(times) == {"dense", "compressed"}
    assert min(times.values()) > 0
    stored = json.loads(Path("out/config.json").read_text())["tunings"]
    assert [layer["name"] for layer in stored[0]["layers"]]


def test_folds_are_stored_and_made_by_load(folder):
    (folder / "normed.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), "
        "nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))\n"
    )
    found = run("compress", "normed:net", *HALF, *INPUT, "--fold", "--tune", "-o", "out", "--json").stdout
    assert set(json.loads(found)["milliseconds"]) == {"dense", "compressed"}
    model, x = sources.load_model("normed:net", None, "cpu"), torch.randn(3, 4, 8, 8)
    folded, plain = pipeline.load("out", model), pipeline.load("out", model, folded=False, tuned=False)
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(plain[1], nn.BatchNorm2d)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), plain.eval()(x))


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--tune",), "--tune"),
        (("--fold",), "--fold"),
        (("--fit", "batches"), "--fit"),
        (("--mean", "0.5,x"), "--mean"),
        (("--mean", "0.5"), "--mean"),
    ],
)
def test_wrong_usage_names_the_option(folder, options, hint):
    assert hint in run("compress", "toy:net", *HALF, *options, "-o", "out", code=2).stderr


def state():
    torch.manual_seed(7)
    return nn.ModuleDict(
        {"0": nn.Conv2d(4, 16, 3), "3": nn.Linear(16 * 36, 32), "4": nn.Linear(32, 10)}
    ).state_dict()


def write_shards(folder):
    folder.mkdir()
    parts = {"a-1.safetensors": list(state())[:2], "a-2.safetensors": list(state())[2:]}
    for file, names in parts.items():
        save_file({name: state()[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_weights(folder):
    """Write the same weights in every way that is taken; return the paths."""
    save_file(state(), folder / "w.safetensors")
    torch.save(state(), folder / "w.pt")
    torch.save({"state_dict": state(), "epoch": 3}, folder / "w.pth")
    write_shards(folder / "shards")
    (folder / "single").mkdir()
    save_file(state(), folder / "single/model.safetensors")
    index = "shards/model.safetensors.index.json"
    return ("w.safetensors", "w.pt", "w.pth", "shards", index, "single")


def test_weights_come_in_every_usual_form(folder):
    for name in write_weights(folder):
        loaded = sources.load_model("toy:net", folder / name, "cpu").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state().items()), name


def test_tied_weights_may_be_stored_once(folder):
    (folder / "tied.py").write_text(
        "from torch import nn\ndef net():\n    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n"
        "    m[1].weight = m[0].weight\n    return m\n"
    )
    stored = {"0.weight": torch.eye(4), "0.bias": torch.ones(4), "1.bias": torch.ones(4)}
    save_file(stored, "tied.safetensors")
    loaded = sources.load_model("tied:net", folder / "tied.safetensors", "cpu")
    assert torch.equal(loaded[1].weight, torch.eye(4))
    save_file({"0.bias": torch.ones(4), "1.bias": torch.ones(4)}, "few.safetensors")
    assert "lacks 0.weight, 1.weight" in refused("plan", "tied:net", *HALF, "--weights", "few.safetensors")


def test_other_weights_are_refused_with_what_is_taken(folder):
    (folder / "w.onnx").write_bytes(b"")
    assert "must be one of .safetensors" in refused("plan", "toy:net", *HALF, "--weights", "w.onnx")
    torch.save(nn.Linear(2, 2), "module.pt")  # a pickled object: never unpickled
    assert "module.pt" in refused("plan", "toy:net", *HALF, "--weights", "module.pt")
    torch.save({"epoch": 3}, "few.pt")
    assert "must hold tensors by name" in refused("plan", "toy:net", *HALF, "--weights", "few.pt")
    write_shards(folder / "shards")
    (folder / "shards/model.safetensors.index.json").write_text('{"weight_map": {"x": "a-1.safetensors"}}')
    assert "names 'x'" in refused("plan", "toy:net", *HALF, "--weights", "shards")
    (folder / "empty").mkdir()
    assert "must hold one .safetensors file" in refused("plan", "toy:net", *HALF, "--weights", "empty")
