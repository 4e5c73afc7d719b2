"""What layers' outputs go through: batch norms behind them, residual sums that end their branches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lrcompress as lrc
from lrcompress import calibrate


class Block(nn.Module):
    """A residual block; ``how`` says in which words the sum is written."""

    def __init__(self, how="+"):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.how = how

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.nb(self.b(F.relu(self.na(self.a(x)), inplace=True)))
        if self.how == "+":
            y = x + y
        elif self.how == "+=":
            y += x
        elif self.how == "torch.add":
            y = torch.add(y, x)
        else:
            y = x.add_(y)
        return self.fc(y.relu().mean((2, 3)))


def follow(model, *inputs):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return calibrate.what_follows(model, layers, lambda: calibrate.run(model, inputs))


@pytest.fixture
def images():
    return torch.randn(16, 3, 6, 6)


@pytest.mark.parametrize("how", ["+", "+=", "torch.add", "add_"])
def test_both_layers_of_a_block_share_the_variance_of_its_branch(images, how):
    model = Block(how)
    model(images)
    model.eval()
    found = follow(model, images)
    with torch.no_grad():
        x = model.stem(images).relu()
        y = model.nb(model.b(model.na(model.a(x)).relu()))
        branch, total = (float(t.var((0, 2, 3), correction=0).sum()) for t in (y, x + y))
    for name in ("a", "b"):
        assert found[name].share == pytest.approx(branch / total, rel=1e-5)
        assert found[name].norm == "n" + name
    assert found["stem"] == found["fc"] == calibrate.Behind()


def test_a_mask_ends_no_branch_and_an_embedding_starts_one():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(20, 8)
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, tokens, mask):
            x = self.words(tokens)
            scores = self.q(x) @ self.k(x).mT
            scores = scores + mask.expand_as(scores)
            return x + self.out(scores.softmax(-1) @ self.v(x))

    mask = torch.zeros(1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)
    found = follow(Attention(), torch.randint(20, (7, 5)), mask)
    shares = {each.share for each in found.values()}
    assert len(found) == 4
    assert len(shares) == 1
    assert 0 < shares.pop() != 1


def test_an_output_added_to_what_depends_on_it_ends_no_branch(images):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return y + y.sigmoid()

    assert follow(Gate(), images)["conv"] == calibrate.Behind()


def test_layers_that_run_twice_have_a_share_and_no_norm(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.stem(x)
            for _ in range(2):
                x = x + self.norm(self.conv(x))
            return x

    found = follow(Twice().eval(), images)
    assert found["conv"].norm is None
    assert found["conv"].share < 1


def test_a_batch_norm_is_behind_a_layer_only_if_it_reads_its_channels_untouched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.written, self.rows = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)
            self.n_read, self.n_written, self.n_rows = (nn.BatchNorm1d(5) for _ in range(3))

        def forward(self, x):
            y = self.n_read(self.read(x)) + self.n_written(F.relu(self.written(x), inplace=True))
            return y, self.n_rows(self.rows(x.expand(5, -1, -1).transpose(0, 1)))

    found = follow(Net().eval(), torch.randn(7, 6))
    assert {name: each.norm for name, each in found.items()} == {
        "read": "n_read",
        "written": None,
        "rows": None,
    }


@pytest.mark.parametrize("ends", [(2, 3), (1, 2, 3)], ids=["features", "scalars"])
def test_branches_may_end_behind_fewer_axes_than_their_layers_have(images, ends):
    """Pooled and flattened: [batch, channels], [batch]; the share is that of the sum that is there."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 5)

        def forward(self, x):
            return self.a(x).relu().mean(ends) + self.b(x).relu().mean(ends)

    model = Two()
    found = follow(model, images)
    with torch.no_grad():
        a, b = (layer(images).relu().mean(ends) for layer in (model.a, model.b))
    for name, branch in (("a", a), ("b", b)):
        expected = branch.var(0, correction=0).sum() / (a + b).var(0, correction=0).sum()
        assert found[name].share == pytest.approx(float(expected), rel=1e-5)


def test_layers_that_do_not_run_are_not_found(images):
    model = Block().eval()
    model.idle = nn.Linear(3, 3)
    assert "idle" not in follow(model, images)


def test_following_leaves_the_model_and_its_outputs_as_they_were(images):
    model = Block("+=").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    follow(model, images)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_shares_are_collected_saved_and_merged(images, tmp_path):
    model = Block().eval()
    first, second = (lrc.collect(model, [x]) for x in images.split((12, 4)))
    shares = [each.layers["a"].share for each in (first, second)]
    assert shares[0] != shares[1]
    first.save(tmp_path / "s.safetensors")
    again = calibrate.Statistics.load(tmp_path / "s.safetensors")
    assert again.layers["a"].share == shares[0]
    merged = again.merge(second).layers["a"].share
    assert merged == pytest.approx(0.75 * shares[0] + 0.25 * shares[1])


def test_branch_errors_are_relative_errors_times_the_share(images):
    model = Block().eval()
    known = lrc.collect(model, [images])
    tables = [
        lrc.plan(model, lrc.Budget(params=0.9), lrc.activation_aware(error), statistics=known)["b"].curve
        for error in ("branch", "relative")
    ]
    relative = {option.config: option.error for option in tables[1]}
    both = [option for option in tables[0] if option.config in relative and option.config is not None]
    assert both
    for option in both:
        assert option.error == pytest.approx(relative[option.config] * known.layers["b"].share)
