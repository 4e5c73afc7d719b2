"""Files that the first version wrote still mean the same: values, and bytes when written again.

tests/golden holds two artefacts, a plan, and the outputs of both networks on the inputs of ``golden_models``.
"""

from pathlib import Path

import pytest
import torch
from golden_models import Narrowed, Tied, input_of
from safetensors.torch import load_file
from torch import nn

import lrcompress as lrc

GOLDEN = Path(__file__).parent / "golden"
NETWORKS = {"low_rank": Tied, "removal": Narrowed}


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("model-*.safetensors")
    return path


def loaded(name: str) -> tuple[nn.Module, lrc.Plan]:
    return lrc.load(GOLDEN / name, NETWORKS[name]().eval()), lrc.load_plan(GOLDEN / name)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_artefacts_load_to_the_stored_values(name):
    small, _ = loaded(name)
    stored = load_file(weights_of(GOLDEN / name))
    tensors = dict(small.state_dict()) | dict(small.named_buffers())
    assert stored.keys() <= tensors.keys()
    for key, value in stored.items():
        assert tensors[key].dtype == value.dtype, key
        assert torch.equal(tensors[key], value), key
    outputs = load_file(GOLDEN / "outputs.safetensors")[name]
    assert torch.allclose(small(input_of(small)), outputs, rtol=1e-5, atol=1e-5)


def test_the_first_artefacts_keep_ties_and_flags():
    small, _ = loaded("low_rank")
    assert small.head.weight is small.embedding.weight
    assert not small.hidden.U.requires_grad
    assert small.conv.U.requires_grad
    assert torch.equal(small.shift, torch.arange(12.0))


@pytest.mark.parametrize("name", NETWORKS)
def test_written_again_the_weights_have_the_same_bytes(name, tmp_path):
    small, plan = loaded(name)
    lrc.save(small, plan, tmp_path)
    assert weights_of(tmp_path).read_bytes() == weights_of(GOLDEN / name).read_bytes()
    assert lrc.load_plan(tmp_path) == plan


def test_the_first_plans_are_read_and_written_to_the_same_text():
    text = (GOLDEN / "plan.json").read_text()
    plan = lrc.Plan.from_json(text)
    assert plan.to_json() == text
    assert lrc.apply(Tied().eval(), plan) is not None
