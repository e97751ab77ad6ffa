"""Charts hold the numbers of the job, in figures that Plotly accepts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from layerwright.report.charts import sensitivity_chart, stack_chart
from layerwright.report.frontier import frontier_chart
from layerwright.report.palette import palette
from layerwright.report.rows import layers_of, visible

DATA = json.loads((Path(__file__).parent / "report.json").read_text())


def _layers_and_marks(rows=None):
    layers = layers_of(DATA["layers"] if rows is None else rows)
    return layers, palette(layer.label for layer in layers)


def _charts():
    layers, marks = _layers_and_marks()
    return [stack_chart(layers, marks), sensitivity_chart(layers, marks), frontier_chart(DATA)]


@pytest.mark.parametrize("index", range(3))
def test_plotly_accepts_every_figure(index):
    """Plotly's own validators are the oracle: they refuse unknown properties and values."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    chart = _charts()[index]
    figure = graph_objects.Figure(data=list(chart.traces), layout=dict(chart.layout))
    assert len(figure.data) == len(chart.traces)


def test_stack_has_a_bar_before_and_after_for_every_layer():
    layers, marks = _layers_and_marks()
    chart = stack_chart(layers, marks)
    shown, _ = visible(layers)
    before, *after = chart.traces
    assert before["x"] == [layer.before for layer in shown]
    assert sorted(before["y"]) == before["y"]
    found = {place: x for trace in after for place, x in zip(trace["y"], trace["x"], strict=True)}
    assert [found[place] for place in before["y"]] == [layer.after for layer in shown]
    ticks = chart.layout["yaxis"]["ticktext"]
    assert [tick for tick in ticks if tick.startswith("<b>")] == ["<b>model.layers 0</b>", "<b>model.layers 7</b>"]
    assert len(chart.rows) == len(shown)


def test_dropped_blocks_are_named_in_the_stack():
    rows = copy.deepcopy(DATA["layers"])
    for row in rows:
        if row["block"] == 7 and row["kind"] == "linear":
            row["treatments"], row["label"] = {"drop": {}}, "drop"
    layers, marks = _layers_and_marks(rows)
    chart = stack_chart(layers, marks)
    assert "<b>model.layers 7, dropped</b>" in chart.layout["yaxis"]["ticktext"]
    (dropped,) = [trace for trace in chart.traces if trace["name"] == "drop"]
    assert set(dropped["x"]) == {0.0}
    assert "pale" in chart.about


def test_one_colour_per_treatment_in_all_charts():
    stack, sensitivity, _ = _charts()
    colours = {trace["name"]: trace["marker"]["color"] for trace in stack.traces[1:]}
    for trace in sensitivity.traces:
        assert colours[trace["name"]] == trace["marker"]["color"]
    assert len(set(colours.values())) == len(colours)


def test_sensitivity_without_a_rise_is_told_not_drawn():
    rows = copy.deepcopy(DATA["layers"])
    planned = [row for row in rows if row["sensitivity"] is not None]
    planned[0]["sensitivity"], planned[1]["sensitivity"] = 0.0, -1e-5
    chart = sensitivity_chart(*_layers_and_marks(rows))
    assert sum(len(trace["x"]) for trace in chart.traces) == len(planned) - 2
    assert len(chart.rows) == len(planned)
    assert "2 layers without a rise" in chart.about


def test_no_sensitivities_no_chart():
    rows = [{**row, "sensitivity": None} for row in DATA["layers"]]
    assert sensitivity_chart(*_layers_and_marks(rows)) is None
    assert stack_chart((), {}) is None


def test_frontier_shows_predicted_and_measured_points():
    chart = frontier_chart(DATA)
    traces = {trace["name"]: trace for trace in chart.traces}
    assert list(traces) == [
        "chosen per layer, predicted",
        "uniform, predicted",
        "this plan, measured",
        "uniform 3-bit GPTQ, measured",
    ]
    after = DATA["measured"]["after"]
    mine = traces["this plan, measured"]
    assert (mine["x"], mine["y"]) == ([after["bytes"]], [after["difference"]])
    low, high = after["difference_interval"]
    assert mine["error_y"]["array"] == [pytest.approx(high - after["difference"])]
    assert mine["error_y"]["arrayminus"] == [pytest.approx(after["difference"] - low)]
    assert all(y > 0 for trace in chart.traces for y in trace["y"]), "a logarithmic axis has no place for zero"
    assert len(chart.rows) == len(DATA["pareto"]) + len(DATA["uniform_curve"]) + 2
    (line,) = chart.layout["shapes"]
    assert line["x0"] == DATA["limits"]["bytes"]


def test_frontier_is_linear_where_the_loss_fell():
    data = copy.deepcopy(DATA)
    data["measured"]["after"] |= {"difference": -0.002, "difference_interval": [-0.004, 0.001]}
    chart = frontier_chart(data)
    assert chart.layout["yaxis"].get("type") != "log"
    assert "decades" not in chart.about
    assert sum(len(trace["x"]) for trace in chart.traces) == len(chart.rows)


def test_frontier_without_curves_or_anything():
    measured = {"measured": DATA["measured"]}
    assert [trace["mode"] for trace in frontier_chart(measured).traces] == ["markers", "markers"]
    assert frontier_chart({"pareto": [], "uniform_curve": [], "measured": {}}) is None
    assert frontier_chart({"pareto": DATA["pareto"]}) is not None
    assert frontier_chart({"pareto": [{"bytes": 10.0, "damage": 0.0}]}) is not None
