from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from layerwright.core.errors import CheckpointError, InputError
from layerwright.recipes.place import Load, place_job
from layerwright.report.place import render_place, write_place_report
from layerwright.report.place_charts import place_charts

ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&'


@pytest.fixture(scope="module")
def data():
    found = place_job("mixtral", "duplex", Load(batch=8, prompt=64, new=32, steps=20), compare=("gpu", "hetero"))
    return json.loads(json.dumps(found.to_data()))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.scripts: list[str] = []
        self.links: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.ids |= {found["id"]} if "id" in found else set()
        self.links += [value for name, value in attrs if name in ("src", "href") and value != "data:,"]
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


def test_the_page_holds_everything_and_fetches_nothing(data) -> None:
    text = render_place(data)
    page = Page(text)
    assert page.links == []
    for chart in place_charts(data):
        assert f"chart-{chart.key}" in page.ids and chart.title in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and "default-src 'none'" in policy[1]
    for script in page.scripts[1:]:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]
    assert "prefers-color-scheme: dark" in text
    assert render_place(data) == text
    headline = re.search(r'class="headline">([^<]*)<', text)
    assert headline and headline[1].startswith("mixtral on duplex: ") and "x gpu" in headline[1]


def test_names_are_escaped(data) -> None:
    bad = copy.deepcopy(data)
    bad["model"]["name"] += ATTACK
    bad["device"]["name"] += ATTACK
    bad["device"]["high"]["name"] += ATTACK
    bad["load"]["text"] += ATTACK
    bad["systems"] = {name + ATTACK: report for name, report in bad["systems"].items()}
    bad["gains"] = {name + ATTACK: gain for name, gain in bad["gains"].items()}
    bad["skipped"] = {"x" + ATTACK: ATTACK}
    page = Page(render_place(bad))
    assert "img" not in page.tags and page.tags.count("script") == 3
    assert "\\u003cscript" in page.scripts[0] or "<script" not in page.scripts[0]


def test_charts_show_the_data(data) -> None:
    charts = {chart.key: chart for chart in place_charts(data)}
    assert set(charts) == {"roofline", "processors", "throughput", "tbt", "shares"}
    (bars,) = charts["throughput"].traces
    assert bars["y"] == [report["throughput"] for report in data["systems"].values()]
    roofs = [trace for trace in charts["roofline"].traces if trace["mode"] == "lines"]
    assert [max(roof["y"]) for roof in roofs] == pytest.approx([989.4e12, 107.264e12], rel=0.9)
    marks = [trace for trace in charts["roofline"].traces if trace["mode"] == "markers"]
    high = data["device"]["high"]
    for kind, mark in zip(data["kinds"], marks, strict=True):
        assert mark["x"] == [kind["op_per_byte"]]
        if kind["processor"] == "high":
            # no layer is above its roof
            roof = min(high["flops"], kind["op_per_byte"] * high["bandwidth"])
            assert mark["y"][0] == pytest.approx(roof, rel=1e-6) or mark["y"][0] < roof
    shares = {trace["name"]: trace["x"] for trace in charts["shares"].traces}
    names = list(data["systems"])[::-1]
    for place, name in enumerate(names):
        report = data["systems"][name]
        total = sum(values[place] for values in shares.values())
        assert total == pytest.approx(report["seconds"] / report["tokens"] * 1e6)
    assert all(len(row) == len(chart.columns) for chart in charts.values() for row in chart.rows)


def test_a_device_with_one_processor(data) -> None:
    found = place_job("llama3-70b", "h100", Load(batch=4, prompt=16, new=8, steps=5), compare=())
    text = render_place(json.loads(json.dumps(found.to_data())))
    assert "llama3-70b on h100" in text


def test_runs_without_a_first_token_or_a_second(data) -> None:
    found = place_job("llama3-70b", "h100", Load(batch=4, prompt=16, new=1, rate=9.0, number=3), compare=())
    assert found.reports["h100"].tbt.count == 0
    assert "h100" in render_place(json.loads(json.dumps(found.to_data())))


def test_writing(data, tmp_path) -> None:
    page = write_place_report(data, tmp_path / "out")
    assert page.read_text(encoding="utf-8") == render_place(data)
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_place_report(data, tmp_path / "file")


@pytest.mark.parametrize("key", ["model", "device", "kinds", "systems"])
def test_what_is_no_result(data, key) -> None:
    with pytest.raises(InputError, match=f"`{key}` is missing or empty"):
        render_place({name: value for name, value in data.items() if name != key})
