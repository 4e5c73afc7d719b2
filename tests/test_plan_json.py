"""A plan as JSON: equal when read back, and refused when anything in it cannot be."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import RECIPES, Net, X
from torch import nn

import lrcompress as lrc


def json_of_a_plan() -> dict:
    torch.manual_seed(0)
    return json.loads(lrc.plan(Net(), lrc.Budget(params=0.6), example_inputs=X).to_json())


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.sampled_from(RECIPES),
    st.sampled_from(["params", "macs"]),
    st.one_of(st.floats(0.3, 1.0), st.integers(20, 300)),
    st.booleans(),
)
@settings(max_examples=40)
def test_json_gives_an_equal_plan(widths, recipe, cost, size, edited):
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)), nn.Embedding(3, 2))
    model.forward = model[:-1].forward
    try:
        plan = lrc.plan(
            model, lrc.Budget(**{cost: size}), recipe, example_inputs=torch.zeros(2, 3, widths[0])
        )
    except lrc.BudgetError:
        return
    if edited:
        plan = plan.edit("0", rank=1)
    again = lrc.Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    if edited:
        assert math.isnan(again["0"].choice.error)
    else:
        assert again == plan
        assert hash(again) == hash(plan)


def test_json_keeps_whether_a_budget_is_a_fraction():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    for size, limit in ((1.0, 64), (64, 64), (10**20, 10**20)):
        plan = lrc.Plan.from_json(lrc.plan(model, lrc.Budget(params=size)).to_json())
        assert type(plan.budget.params) is type(size)
        assert plan.budget.limit(64) == limit


def walk(value, path=()):
    """Yield every path into nested dicts, and into the first item of every list."""
    yield path
    for key in (
        value if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    ):
        yield from walk(value[key], (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


PATHS = list(walk(json_of_a_plan()))
FIELDS = [path for path in PATHS if path and isinstance(path[-1], str)]
ADDED = [("bytes",), ("saved_bytes",)]  # which plans written before they were there lack
OBJECTS = [path for path in PATHS if isinstance(at(json_of_a_plan(), path), dict)]
# None stands for nan, so an error may be None.
MAY_BE_NONE = {"params", "macs", "latency", "latency_ms", "config", "error", "objective", "bound"}


def has_the_type_of(wrong, old, path) -> bool:
    """Say whether a value is of the right type for its field; what it says is another test's matter."""
    if wrong is None and path[-1] in MAY_BE_NONE:
        return True
    if path[0] == "budget" and type(wrong) in (int, float):
        return True
    return type(wrong) is type(old) or (type(old) is float and type(wrong) is int)


WRONG = [
    (path, wrong)
    for path in FIELDS
    for wrong in (True, "text", [], {}, None, [None], 1.5, 7)
    if not has_the_type_of(wrong, at(json_of_a_plan(), path), path)
]


def refuses(fields: dict) -> str:
    with pytest.raises(lrc.PlanError) as refused:
        lrc.Plan.from_json(json.dumps(fields))
    return str(refused.value)


@pytest.mark.parametrize(
    "path", [path for path in FIELDS if path not in ADDED], ids=lambda p: ".".join(map(str, p))
)
def test_every_field_must_be_there(path):
    fields = json_of_a_plan()
    del at(fields, path[:-1])[path[-1]]
    assert path[-1] in refuses(fields)


def test_a_plan_without_its_size_in_bytes_is_read():
    fields = json_of_a_plan()
    for (name,) in ADDED:
        del fields[name]
    assert lrc.Plan.from_json(json.dumps(fields)).bytes == 0


@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: ".".join(map(str, p)))
def test_no_other_field_may_be_there(path):
    fields = json_of_a_plan()
    at(fields, path)["unheard_of"] = 1
    assert "unheard_of" in refuses(fields)


@pytest.mark.parametrize(("path", "wrong"), WRONG, ids=str)
def test_every_field_must_be_of_its_type(path, wrong):
    fields = json_of_a_plan()
    at(fields, path[:-1])[path[-1]] = wrong
    assert path[-1] in refuses(fields)


@pytest.mark.parametrize("key", ["params", "macs"])
def test_tampered_prices_are_refused(key):
    for change in (-1, 1):
        fields = json_of_a_plan()
        fields["layers"][0]["choice"][key] += change
        assert "'features.0'" in refuses(fields)


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 0), ("rank", 10**9), ("groups", 3), ("groups", 0), ("scheme", 7)]
)
def test_choices_that_a_layer_cannot_take_are_refused(key, value):
    fields = json_of_a_plan()
    fields["layers"][-1]["choice"]["config"][key] = value
    assert "'head'" in refuses(fields)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_shape", []),
        ("weight_shape", [8]),
        ("weight_shape", [8, 4, 0, 3]),
        ("weight_shape", [0, 0, 0, 0]),
        ("conv_groups", 0),
        ("conv_groups", -1),
    ],
)
def test_layers_that_cannot_be_are_refused(key, value):
    fields = json_of_a_plan()
    fields["layers"][0]["layer"][key] = value
    refuses(fields)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repeats", None),
        ("repeats", math.inf),
        ("repeats", 1e308),
        ("input_size", [3]),
        ("output_size", [1, 2, 3]),
    ],
)
def test_calls_that_cannot_be_are_refused(key, value):
    fields = json_of_a_plan()
    fields["layers"][0]["layer"]["calls"][0][key] = value
    refuses(fields)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"plan"', "{}", '{"plan_format": 2}', '{"plan_format": [1]}', "[" * 20_000],
    ids=lambda text: text[:20],
)
def test_other_texts_are_no_plans(text):
    with pytest.raises(lrc.PlanError):
        lrc.Plan.from_json(text)
