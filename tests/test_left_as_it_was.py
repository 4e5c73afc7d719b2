"""Planning, collecting, verifying and tuning run the model, and leave it and its inputs as they were."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lrcompress as lrc


class State:
    def __init__(self) -> None:
        self.seen, self.sums = 0, [torch.zeros(4)]


class Busy(nn.Module):
    """Writes to everything that a forward can write to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("average", torch.zeros(16))
        self.count, self.list, self.dict = 0, [1], {"calls": [0]}
        self.queue, self.state = deque([0], maxlen=3), State()
        self.plain = torch.zeros(4)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.5).add_(self.a(x).mean(0).detach())
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.arange(8.0), persistent=False)
        self.count += 1
        self.list.append(self.count)
        self.dict["calls"][0] += 1
        self.queue.append(self.count)
        self.state.seen += 1
        self.state.sums[0].add_(1)
        self.plain += 1
        self.cache = x
        self.a.weight.requires_grad_(False)
        self.b.register_forward_hook(lambda *_: None)
        noise = torch.randn(4) + random.random() + np.random.rand()
        noise = noise + torch.randn(4, generator=self.generator)
        x.add_(1)
        return self.b(torch.relu(self.a(x + self.made)) + self.average) + noise


def image(model: Busy) -> dict[str, object]:
    """Copy all that the forward may touch."""
    return {
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "plain": model.plain.clone(),
        "attributes": {m: sorted(vars(module)) for m, module in model.named_modules()},
        "rest": copy.deepcopy(
            (model.count, model.list, model.dict, model.queue, model.state.seen, model.state.sums)
        ),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "generator": model.generator.get_state(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


STEPS = {
    "plan": lambda model, small, x: lrc.plan(model, lrc.Budget(params=0.7), example_inputs=x),
    "collect": lambda model, small, x: lrc.collect(model, [x]),
    "collect with gradients": lambda model, small, x: lrc.collect(model, [x], gradients=True),
    "apply": lambda model, small, x: lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.7)), batches=[x]),
    "verify": lambda model, small, x: lrc.verify(model, small, x),
    "verify the other way": lambda model, small, x: lrc.verify(small, model, x),
    "fold": lambda model, small, x: lrc.fold(model.eval(), x) and model.train(),
    "latency": lambda model, small, x: lrc.plan(model, lrc.Budget(latency_ms=100), example_inputs=x),
}


@pytest.mark.parametrize("step", STEPS)
def test_nothing_that_a_forward_writes_stays(step):
    model, x = Busy(), torch.randn(9, 8)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.7)))
    model.b.register_forward_hook(lambda *_: None)
    before, inputs, held = image(model), x.clone(), [id(model.list), id(model.average), id(model.state)]
    STEPS[step](model, small, x)
    after = image(model)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert held == [id(model.list), id(model.average), id(model.state)]
    assert torch.equal(x, inputs)


def test_tuning_leaves_the_factored_model_as_it_was():
    model, x = Busy(), torch.randn(9, 8)
    small = lrc.apply(model, lrc.plan(model, lrc.Budget(params=0.7), lrc.svd()))
    before, inputs = image(small), x.clone()
    lrc.tune(small, x, seconds=0.1)
    after = image(small)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert torch.equal(x, inputs)


def test_both_models_meet_the_same_random_numbers():
    model, x = Busy(), torch.randn(9, 8)
    assert lrc.verify(model, copy.deepcopy(model), x).output_error == 0
