"""The sentence on top says what was measured and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from layerwright.report.headline import comparison, headline

DATA = json.loads((Path(__file__).parent / "report.json").read_text())


def _changed(**figures):
    data = copy.deepcopy(DATA)
    data["measured"]["after"] |= figures
    return data


def test_the_whole_sentence():
    assert headline(DATA) == (
        "demo:lm went from 4.01 MB to 0.836 MB (0.21x); held-out loss rose by 0.0109 nats/token "
        "(95 % interval 0.0080 to 0.0141); uniform 3-bit GPTQ at equal bytes: +0.0171 "
        "(95 % interval 0.0141 to 0.0203)."
    )


def test_a_loss_that_fell():
    text = headline(_changed(difference=-0.02, difference_interval=[-0.03, -0.01]))
    assert "held-out loss fell by 0.0200 nats/token (95 % interval -0.0300 to -0.0100)" in text
    assert "no change" not in text


def test_doubt_is_said():
    text = headline(_changed(difference=0.002, difference_interval=[-0.001, 0.005]))
    assert "rose by 0.00200" in text
    assert "not to be told from no change" in text


def test_other_bytes_are_not_called_equal():
    assert "GPTQ at 0.836 MB" not in headline(DATA)
    assert "GPTQ at 836 kB:" in headline(_changed(bytes=700_000))


def test_parts_that_are_missing_are_left_out():
    data = copy.deepcopy(DATA)
    del data["measured"]["uniform"]
    assert "uniform" not in headline(data)
    data["measured"]["after"]["difference"] = None
    assert headline(data) == "demo:lm went from 4.01 MB to 0.836 MB (0.21x)."
    assert headline({"measured": {}}) == "the model: sizes before and after were not measured."


def test_comparison_has_the_lines_that_were_measured():
    lines = {line.name: line.values for line in comparison(DATA["measured"], ["before", "after", "uniform"])}
    assert lines["Size against before"] == ("1.00x", "0.21x", "0.21x")
    assert lines["Loss (nats/token)"] == ("1.094", "1.105", "1.111")
    assert lines["Rise of the loss"] == ("–", "+0.0109", "+0.0171")
    assert lines["Tokens per second, batch 1"] == ("57.0", "76.4", "79.1")
    assert lines["Tokens per second, batch 16"] == ("819", "1,010", "1,027")
    assert "Accuracy" not in lines


def test_classifiers_show_accuracy():
    figures = {"before": {"accuracy": 0.984, "bytes": 10, "ms": 0.0, "speed_unit": ""}}
    lines = {line.name: line.values for line in comparison(figures, ["before"])}
    assert lines["Accuracy"] == ("98.4 %",)
    assert "Time" not in lines
