"""What Linear Neural Reconstruction reaches on the two networks of its authors' figures."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.realdata, pytest.mark.slow]


@pytest.fixture(scope="module")
def example():
    """Import examples/lenet_mnist.py."""
    path = Path(__file__).parents[1] / "examples" / "lenet_mnist.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "alone", "retrained"), [("LeNet-300-100", 0.46, 0.29), ("LeNet-5", 0.16, 0.1)]
)
def test_neurons_go_at_most_three_tenths_of_a_point_above_dense(example, data_folder, name, alone, retrained):
    x, labels = example.images(data_folder / "mnist_t10k.npz")
    torch.manual_seed(0)
    model = example.train(
        example.network(name), x[: example.TRAIN], labels[: example.TRAIN], example.EPOCHS[name], 3e-3
    )
    dense = example.error(model, x[example.TRAIN :], labels[example.TRAIN :])
    for budget, column in ((alone, "error"), (retrained, "error_retrained")):
        way = "bottom-up+top-down"
        plan = example.plans(model, name, budget, x, (way,))[way]
        row = example.measured(model, name, way, plan, x, labels)[1]
        assert row["params"] <= budget
        assert row[column] <= dense + 0.3
