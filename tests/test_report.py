"""Tables and HTML: every number is there, nothing is interpreted, nothing comes from outside."""

import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

import lrcompress as lrc
from lrcompress.report import (
    Column,
    Sheet,
    plan_table,
    plot_plan,
    scaled,
    sheet_table,
    verification_table,
    write_html,
)
from lrcompress.report.svg import Axis, line_chart
from lrcompress.types import (
    Budget,
    Call,
    Layer,
    LayerCheck,
    LayerPlan,
    LeftAlone,
    LowRank,
    Plan,
    Tradeoff,
    Verification,
)

HOSTILE = '<script>alert("x")</script>[red]&amp;'
VOID = {"meta", "br", "hr", "img"}


ONE_CALL = (Call(1, (8, 8), (8, 8)),)


def planned(name, channels, rank, calls=ONE_CALL):
    layer = Layer(name, "Conv2d", (channels, channels, 3, 3), calls=calls)
    curve = [layer.option(LowRank(0, 1, r), 1 - r / channels) for r in range(1, channels // 2, 2)]
    return LayerPlan(layer, layer.option(LowRank(0, 1, rank), 1 - rank / channels), (*curve, layer.dense))


def some_plan(layers=None, **changes):
    layers = layers or (planned("stem", 16, 3), planned(HOSTILE, 64, 20))
    left_alone = (LeftAlone("norm<b>", "BatchNorm2d", 32, "not & never a weight matrix"),)
    tradeoff = tuple(Tradeoff(i / 10, 1 - i / 10) for i in range(1, 11))
    plan = Plan("alds", Budget(params=0.4), 40_000, 3_000_000, tuple(layers), left_alone, tradeoff)
    return dataclasses.replace(plan, **changes)


def some_verification():
    checks = (LayerCheck("stem", "Conv2d", 2304, 480, 0.125),)
    return Verification(64, 0.25, 1.5, 0.875, 40_000, 16_000, 3_000_000, 1_000_000, checks)


def drawn(renderable, width=200):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


class Page(HTMLParser):
    """Tags must close in order; collects the text and the tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(tmp_path, *args, **kwargs):
    write_html(tmp_path / "report.html", *args, **kwargs)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_table_has_every_layer_the_totals_and_what_is_left_alone():
    plan = some_plan()
    text = drawn(plan_table(plan))
    for entry in plan:
        row = next(line for line in text.splitlines() if entry.layer.name in line)
        assert scaled(entry.layer.params) in row
        assert scaled(entry.choice.params) in row
        assert scaled(entry.choice.macs) in row
        assert f"{entry.choice.error:.4f}" in row
    assert f"{plan.params:,} -> {plan.params_after:,}" in text
    assert "norm<b>" in text
    assert "not & never a weight matrix" in text


def test_table_without_macs_has_no_column_for_them():
    layers = (planned("stem", 16, 3, calls=()),)
    text = drawn(plan_table(some_plan(layers, macs=0)))
    assert "MACs" not in text
    assert "stem" in text


def test_an_edited_choice_has_no_error_yet(tmp_path):
    plan = some_plan().edit("stem", rank=5)
    row = next(line for line in drawn(plan_table(plan)).splitlines() if "stem" in line)
    assert "n/a" in row
    assert "nan" not in page(tmp_path, plan).text


def test_names_fold_on_a_narrow_terminal_and_lose_nothing():
    name = "backbone.stage3.block11.attention.projection"
    sheet = Sheet("t", (Column("layer", "words"), Column("params")), ((name, "1234"),))
    lines = drawn(sheet_table(sheet), width=30).splitlines()
    assert max(map(len, lines)) <= 30
    assert "".join(line.split()[0] for line in lines[5:] if line.split()) == name


def test_verification_table_has_its_numbers():
    text = drawn(verification_table(some_verification()))
    for expected in ("0.2500", "87.5%", "1.5", "0.1250", "40,000 -> 16,000"):
        assert expected in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (4_111_514_624, "4.11G"),
    ],
)
def test_scaled(count, text):
    assert scaled(count) == text


def test_html_holds_all_names_and_interprets_none(tmp_path):
    plan, verification = some_plan(), some_verification()
    found = page(tmp_path, plan, verification, title="<i>title</i>")
    for name in (
        *(entry.layer.name for entry in plan),
        *(item.name for item in plan.left_alone),
        "<i>title</i>",
    ):
        assert name in found.text
    assert not {"script", "b", "i", "link", "img", "iframe"} & set(found.tags)


def test_html_needs_nothing_from_outside(tmp_path):
    found = page(tmp_path, some_plan(), some_verification())
    assert not [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert "url(" not in found.text
    assert "@import" not in found.text
    assert "prefers-color-scheme: dark" in found.text


def test_html_plots_every_layer_and_its_chosen_point(tmp_path):
    layers = tuple(planned(f"layer{i}", 16, 3) for i in range(60))
    found = page(tmp_path, some_plan(layers))
    assert found.tags.count("svg") == 1 + 60 + 1  # bars, a curve a layer, the trade-off
    assert found.tags.count("circle") == 60
    assert found.tags.count("rect") == 2 * 60


def test_html_of_a_plan_without_layers(tmp_path):
    found = page(tmp_path, dataclasses.replace(some_plan(), layers=(), tradeoff=()))
    assert "svg" not in found.tags
    assert "norm<b>" in found.text


def test_further_sheets_come_first(tmp_path):
    sheet = Sheet("Comparison <1>", (Column("method", "text"), Column("kB")), (("svd<2>", "12.5"),))
    text = page(tmp_path, some_plan(), sheets=[sheet]).text
    assert text.index("Comparison <1>") < text.index("svd<2>") < text.index("recipe")


@pytest.mark.parametrize("end", [1.0, 0.98, 1e-6, 7.3, 60_000.0])
@pytest.mark.parametrize("most", [4, 5])
def test_ticks_are_round_evenly_spaced_and_inside(end, most):
    ticks = Axis("x", end).ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] <= end * (1 + 1e-9)
    assert 2 <= len(ticks) <= most + 1
    assert re.fullmatch(r"[125](\.0+)?e[+-]\d+", f"{ticks[1]:.6e}")


def test_chosen_point_lies_where_the_axes_say():
    svg = line_chart("t", [(0.0, 1.0), (1.0, 0.0)], (0.25, 0.5), Axis("x", 1.0), Axis("y", 2.0), 226, 170)
    circle = re.search(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    left, right, top, bottom = 46, 226 - 12, 26, 170 - 34
    assert math.isclose(float(circle[1]), left + 0.25 * (right - left), abs_tol=0.06)
    assert math.isclose(float(circle[2]), bottom - 0.25 * (bottom - top), abs_tol=0.06)


def test_matplotlib_figure_shows_every_layer(tmp_path):
    pytest.importorskip("matplotlib", reason="install the plots extra")
    plan = lrc.plan(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), lrc.Budget(params=0.8))
    figure = plot_plan(plan)
    sizes, curves, budgets = figure.axes
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["0", "1"]
    assert len(curves.lines) == 2 * len(plan.layers)
    assert len(budgets.lines[0].get_xdata()) == len(plan.tradeoff)
    figure.savefig(tmp_path / "plan.png")


@pytest.mark.parametrize("budget", ["params", "macs", "bytes", "latency", "latency_ms"])
@pytest.mark.filterwarnings("ignore:the plan's network takes")
def test_every_kind_of_budget_has_a_report(tmp_path, budget):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    size = {"latency_ms": 1e4, "latency": 1.0}.get(budget, 0.9)
    x = torch.zeros(2, 64)
    plan = lrc.plan(model, lrc.Budget(**{budget: size}), lrc.svd_energy(), example_inputs=x)
    assert lrc.Plan.from_json(plan.to_json()) == plan
    found = page(tmp_path, plan)
    assert found.tags.count("svg") == 1 + 2 + 1  # bars, a curve a layer, the trade-off
    drawn(plan_table(plan))


def test_a_budget_in_bytes_is_told_in_bytes(tmp_path):
    half, whole = torch.nn.Linear(32, 32, bias=False).half(), torch.nn.Linear(32, 32, bias=False)
    model = torch.nn.ModuleList([half, whole])
    plan = lrc.plan(model, lrc.Budget(bytes=0.6), lrc.svd_energy())
    expected = sum(p.numel() * p.element_size() for p in lrc.apply(model, plan).parameters())
    assert (plan.bytes, plan.bytes_after) == (6 * 32 * 32, expected)
    line = f"{plan.bytes:,} -> {expected:,}"
    assert line in page(tmp_path, plan).text
    assert line in drawn(plan_table(plan))
    assert f"bytes {plan.bytes} -> {expected}" in str(plan)


def test_a_plan_without_its_size_in_bytes_has_no_plot_of_the_budget(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    plan = dataclasses.replace(lrc.plan(model, lrc.Budget(bytes=0.9)), bytes=0)
    assert page(tmp_path, plan).tags.count("svg") == 1 + 1
