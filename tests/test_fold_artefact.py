"""An artefact remembers what to fold; folds that do not fit the model are refused."""

import dataclasses
import json

import pytest
import torch
from test_fold import settled
from torch import nn

import lrcompress as lrc
from lrcompress import rewrite
from lrcompress.codec.artefact import _checksum
from lrcompress.types import Fold, Folding

X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)


def net():
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    second = (nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Flatten(), nn.Linear(256, 10))
    return settled(nn.Sequential(*first, *second))


def saved(path):
    model = net()
    plan = lrc.plan(model, lrc.Budget(params=0.5), example_inputs=X)
    small = lrc.apply(model, plan)
    folding = lrc.foldable(small, X)
    lrc.save(small, plan, path, folding=folding)
    return small, plan, folding


def test_load_folds_what_was_stored(tmp_path):
    small, plan, folding = saved(tmp_path)
    assert {fold.layer for fold in folding.folds} == {"0", "3"}
    folded = lrc.load(tmp_path, net())
    assert str(folded) == str(lrc.fold(small, X))
    assert str(lrc.load(tmp_path, net(), folded=False)) == str(small)
    with torch.no_grad():
        torch.testing.assert_close(folded(X), small(X))
    with pytest.raises(lrc.PlanError, match="folded in"):
        lrc.save(folded, plan, tmp_path / "again")


def test_a_tuning_of_the_folded_model_is_made_on_the_folded_model(tmp_path):
    small, plan, folding = saved(tmp_path)
    fast, tuning = lrc.tune(rewrite.folded(small, folding), X, seconds=0.0)
    lrc.save(small, plan, tmp_path, tunings=[tuning], folding=folding)
    loaded = lrc.load(tmp_path, net())
    assert str(loaded) == str(fast)
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), fast(X))


HOSTILE = [
    [Fold("0", "1", None), Fold("3", "1", None)],  # twice
    [Fold("0", "nowhere", None)],
    [Fold("nowhere", "1", None)],
    [Fold("", "1", None)],
    [Fold("0", "2", None)],  # not a batch norm
    [Fold("1", "4", None)],  # not a layer
    [Fold("7", "4", None)],  # another width
    [Fold("0", "1", "6")],  # not an activation
    [Fold("0", None, None)],
    [Fold("0", "0", None)],
]


@pytest.mark.parametrize("folds", HOSTILE, ids=str)
def test_folds_that_do_not_fit_are_refused(tmp_path, folds):
    small, plan, _ = saved(tmp_path)
    with pytest.raises(lrc.PlanError):
        lrc.save(small, plan, tmp_path / "other", folding=Folding(tuple(folds), ()))
    assert not (tmp_path / "other").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    config["folds"] = [dataclasses.asdict(fold) for fold in folds]
    del config["checksum"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "checksum": _checksum(config)}))
    with pytest.raises(lrc.FormatError):
        lrc.load(tmp_path, net())
    lrc.load(tmp_path, net(), folded=False)


@pytest.mark.parametrize("found", [None, 3, {}, [3], [{}], [{"layer": 1, "norm": None, "activation": None}]])
def test_folds_are_a_list_of_names(tmp_path, found):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["folds"] = found
    del config["checksum"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "checksum": _checksum(config)}))
    with pytest.raises(lrc.FormatError, match="fold"):
        lrc.load(tmp_path, net())
