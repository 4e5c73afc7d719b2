"""Each value of an artefact or plan replaced by hostile ones, checksums right: the right model or our error.

Mutations go by the structure of the JSON, so each of them gets past the parser and, where it can, past the
checksum, to the code that has to be careful.
"""

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import Narrowed, Tied, input_of
from test_artefact import CONFIG, all_tensors
from torch import nn

import lrcompress as lrc
from lrcompress.codec.artefact import _checksum

GOLDEN = Path(__file__).parent / "golden"
MUTATIONS, SECONDS = 5000, 60

# Values that JSON of Python can write; those that it cannot are texts in `TEXTS`.
VALUES = [
    *(None, True, False, "", "x", "0", "../x", "\0", "ü", "x" * 100_000),
    *(
        0,
        1,
        2,
        3,
        7,
        -1,
        -(2**31),
        2**31,
        2**40,
        2**53,
        2**63,
        2**64,
        2**100,
        2**100 + 1,
        10**31,
        10**400,
        -(10**400),
    ),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 1e300, 1e308, float("nan"), float("inf"), float("-inf")),
    *([], [0], [1, 2], [-1], [None], [[]], [{}], [2**40], [10**400], list(range(1000)), [[0] * 50] * 50),
    *({}, {"": 0}, {"a": 1}, {"name": "0"}, {"a": {"a": {"a": []}}}),
]
TEXTS = [
    *("1e999", "-1e999", "1" * 5000, "[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900),
    *('{"a": 1, "a": 2}', '"\\ud800"', '"\\udfff\\ud800"', "[" * 60 + "]" * 60, "0" * 9, "1.", '"', "}"),
]
MARK = "replace this"

Place = tuple[str | int, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """Yield the path of every value inside, containers too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from places(each, (*path, key))


def at(value: Any, path: Place) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated(text: str, count: int, finish: Callable[[Any], None]) -> Iterator[tuple[str, str]]:
    """Yield texts in which one value was replaced, removed, doubled or moved, and what was done."""
    draw = random.Random(0)
    every = list(places(json.loads(text)))
    values = [*range(len(VALUES)), *range(-len(TEXTS), 0)]
    for i in range(count):
        fields = json.loads(text)
        path = every[i % len(every)]
        parent, key = at(fields, path[:-1]), path[-1]
        what = draw.random()
        if what < 0.75:
            choice = draw.choice(values)
            new = VALUES[choice] if choice >= 0 else TEXTS[choice]
            parent[key] = MARK if choice < 0 else new
        elif what < 0.9:
            choice, new = 0, at(fields, draw.choice(every))  # of another place
            parent[key] = json.loads(json.dumps(new))
        elif isinstance(parent, list):
            choice, new = 0, "twice"
            parent.insert(int(key), parent[int(key)])
        else:
            choice, new = 0, "removed"
            del parent[key]
        finish(fields)
        written = json.dumps(fields)
        if choice < 0:
            written = written.replace(f'"{MARK}"', str(new), 1)
        yield written, f"{path} -> {str(new)[:60]}"


def outcome(run: Callable[[], Any], where: str) -> Any:
    """Return what a call returns, None after an error of ours; anything else, or slowness, fails."""
    start = time.process_time()
    result = message = None
    try:
        result = run()
    except lrc.CompressionError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    assert time.process_time() - start < 2, where
    assert message is None or len(message.encode("utf-8", "backslashreplace")) < 2000, where
    return result


def peak() -> int:
    """Return the most memory that this process had, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def seal(config: Any) -> None:
    config.pop("checksum", None)
    config["checksum"] = _checksum(config)


@pytest.mark.parametrize(("name", "network"), [("low_rank", Tied), ("removal", Narrowed)])
def test_a_mutated_artefact_gives_the_right_model_or_our_error(tmp_path, name, network):
    model = network().eval()
    right = lrc.load(GOLDEN / name, model)
    outputs, tensors = right(input_of(right)), all_tensors(right)
    (weights,) = (GOLDEN / name).glob("model-*")
    (tmp_path / weights.name).symlink_to(weights)
    text, loaded, before, start = (GOLDEN / name / CONFIG).read_text(), 0, peak(), time.process_time()
    for changed, where in mutated(text, MUTATIONS // 2, seal):
        (tmp_path / CONFIG).write_text(changed)
        found = outcome(lambda: lrc.load(tmp_path, model), where)
        if found is None:
            continue
        loaded += 1
        assert str(lrc.load_plan(tmp_path)), where
        assert all_tensors(found).keys() == tensors.keys(), where
        assert all(torch.equal(value, tensors[key]) for key, value in all_tensors(found).items()), where
        assert torch.equal(found(input_of(found)), outputs), where
    assert 0.02 * MUTATIONS < loaded < 0.4 * MUTATIONS
    assert time.process_time() - start < SECONDS / 2
    assert peak() - before < 200 << 20


def nothing(_: Any) -> None:
    pass


@pytest.mark.parametrize("name", ["plan", "removal"])
def test_a_mutated_plan_makes_a_model_or_our_error(name):
    """What it says is the user's wish, so any model that the plan's own numbers describe is right."""
    model: nn.Module = (Tied if name == "plan" else Narrowed)().eval()
    if name == "plan":
        text, data = (GOLDEN / "plan.json").read_text(), {}
    else:
        text = lrc.load_plan(GOLDEN / "removal").to_json()
        data = {"statistics": lrc.collect(model, [torch.randn(64, 12)])}
    made, before, start = 0, peak(), time.process_time()
    for changed, where in mutated(text, MUTATIONS // 5, nothing):
        plan = outcome(lambda: lrc.Plan.from_json(changed), where)  # noqa: B023
        if plan is None:
            continue
        assert lrc.Plan.from_json(plan.to_json()).to_json() == plan.to_json(), where
        assert str(plan), where
        small = outcome(lambda: lrc.apply(model, plan, **data), where)  # noqa: B023
        if small is not None:
            made += 1
            assert small(input_of(model)).shape == model(input_of(model)).shape, where
    assert made > 0.02 * MUTATIONS / 5
    assert time.process_time() - start < SECONDS
    assert peak() - before < 200 << 20
