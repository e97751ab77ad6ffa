"""The page: its structure, its escaping, and what happens when parts are missing."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from layerwright.core.errors import InputError
from layerwright.report import render, write_report

FIXTURE = Path(__file__).parent / "report.json"
DATA = json.loads(FIXTURE.read_text())
VOID = {"meta", "link", "input", "br", "img"}
ATTACK = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&'


class Page(HTMLParser):
    """Tags, text by element id, and whether every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, str] = {}
        self.rows: dict[str, int] = Counter()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in VOID:
            return
        self.open.append((tag, dict(attrs).get("id") or ""))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "tr":
            for _, key in self.open:
                self.rows[key] += 1

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
            return
        for key in {key for _, key in self.open} | {tag for tag, _ in self.open}:
            self.text[key] = self.text.get(key, "") + data


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(DATA))


def test_everything_is_there_in_order(page):
    body = page.text["body"]
    parts = [
        "demo:lm went from 4.01 MB",
        "Before and after",
        "What every layer got",
        "The stack of layers",
        "Sensitivity against cost",
        "Loss against size",
        "Decisions and what became of them",
        "The plan",
        "How to do it again",
        "layerwright optimize demo:lm --budget bits=3",
    ]
    places = [body.index(part) for part in parts]
    assert places == sorted(places)
    assert page.tags["h1"] == page.tags["main"] == page.tags["title"] == 1


def test_all_layers_and_reasons_are_in_the_table(page):
    text = page.text["decisions"]
    assert page.rows["decisions"] == len(DATA["layers"]) + 1
    for row in DATA["layers"]:
        assert row["path"] in text
        assert row["reason"] in text
    assert "16384" in text


def test_plan_and_command_are_verbatim(page):
    assert page.text["plan"] == DATA["plan"]
    assert page.text["command"] == DATA["command"]
    assert "torch 2.13.0+cpu" in page.text["main"]


def test_every_chart_has_its_table(page):
    charts = [value for _, name, value in page.attributes if name == "id" and value.startswith("chart-")]
    assert charts == ["chart-stack", "chart-sensitivity", "chart-frontier"]
    assert page.text["details"].count("The numbers of this chart") == 3
    (figures,) = [text for attributes, text in page.scripts if attributes.get("type") == "application/json"]
    assert [f"chart-{figure['key']}" for figure in json.loads(figures)] == charts


def test_map_has_a_row_per_block(page):
    assert page.rows["map"] == 3
    assert page.text["map"].count("int") == 14


def test_nothing_comes_from_outside(page):
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "action", "data", "poster")]
    assert addresses == ["data:,"]
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "@import" not in page.text["style"]
    assert "url(" not in page.text["style"]


def test_the_policy_admits_these_scripts_only(page):
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run} == allowed
    assert len(run) == 3
    assert re.search(r"script-src[^;]*", policy).group().count("unsafe") == 0


def test_phones_and_dark_rooms_are_provided_for(page):
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in page.text["style"]


def test_same_data_same_page():
    assert render(DATA) == render(json.loads(FIXTURE.read_text()))


def _everywhere(value):
    """`value` with the attack in every text that a model, a file or a person could choose."""
    if isinstance(value, dict):
        return {key: _everywhere(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_everywhere(inner) for inner in value]
    return value + ATTACK if isinstance(value, str) else value


def test_everything_is_escaped(page):
    attacked = Page(render(_everywhere(DATA)))
    assert attacked.tags["script"] == page.tags["script"]
    assert attacked.tags["img"] == 0
    assert not [name for _, name, _ in attacked.attributes if name.startswith("on")]
    assert ATTACK in attacked.text["h1"]
    assert ATTACK in attacked.text["decisions"]
    assert ATTACK in attacked.text["plan"]
    (figures,) = [text for attributes, text in attacked.scripts if attributes.get("type") == "application/json"]
    assert "<" not in figures
    hover = json.loads(figures)[0]["data"][0]["hovertext"][0]
    assert "<script" not in hover, "Plotly reads tags in its texts"
    assert "&lt;script&gt;" in hover


def test_keys_of_mappings_are_escaped_too():
    data = copy.deepcopy(DATA)
    data["versions"] = {ATTACK: ATTACK}
    data["measured"][ATTACK] = dict(data["measured"]["after"])
    found = Page(render(data))
    assert found.tags["img"] == 0
    assert ATTACK in found.text["comparison"]


def test_no_uniform_baseline():
    data = copy.deepcopy(DATA)
    del data["measured"]["uniform"]
    data["uniform"] = ""
    found = Page(render(data))
    assert "uniform" not in found.text["comparison"]
    assert "rose by 0.0109" in found.text["main"]


def test_no_frontier():
    data = {**DATA, "pareto": [], "uniform_curve": [], "measured": {}}
    found = Page(render(data))
    assert "Loss against size" not in found.text["main"]
    assert "Nothing was measured" in found.text["main"]


@pytest.mark.parametrize("missing", [key for key in DATA if key not in ("layers", "measured")])
def test_any_other_part_may_be_missing(missing):
    Page(render({key: value for key, value in DATA.items() if key != missing}))


def test_almost_nothing():
    found = Page(render({"layers": [], "measured": {}}))
    assert "sizes before and after were not measured" in found.text["main"]
    assert found.rows["decisions"] == 1


def test_numbers_that_are_none_or_not_finite():
    data = copy.deepcopy(DATA)
    for row in data["layers"]:
        row |= {"damage": float("nan"), "sensitivity": float("inf"), "error": None, "ms": None}
    data["measured"]["after"] |= {"loss": float("nan"), "difference": float("nan"), "perplexity": float("inf")}
    found = Page(render(data))
    assert "nan" not in found.text["comparison"]
    assert "nan" not in found.text["decisions"]


def test_more_labels_than_colours():
    data = copy.deepcopy(DATA)
    planned = [row for row in data["layers"] if row["planned"]]
    for index, row in enumerate(planned):
        row["label"] = f"rank {index}"
    found = Page(render(data))
    looks = Counter(value for tag, name, value in found.attributes if tag == "span" and name == "style")
    assert len(looks) == len(planned) == 14, "every label has its own chip"


def test_failed_layers_are_announced_on_top():
    data = copy.deepcopy(DATA)
    row = next(row for row in data["layers"] if row["planned"])
    row |= {"status": "failed", "note": "Hessian was singular"}
    text = Page(render(data)).text["main"]
    assert text.index("1 layer failed") < text.index("Before and after")
    assert "Hessian was singular" in text


def test_three_hundred_layers_take_less_than_two_seconds():
    rows = []
    template = next(row for row in DATA["layers"] if row["planned"])
    for block in range(43):
        rows += [{**template, "path": f"model.layers.{block}.part.{i}", "block": block} for i in range(7)]
    render(DATA)  # reads Plotly's script once per process
    begun = time.process_time()
    text = render({**DATA, "layers": rows})
    assert time.process_time() - begun < 2
    assert Page(text).rows["decisions"] == 302


def test_write_report(tmp_path):
    (tmp_path / "report.json").write_text(FIXTURE.read_text())
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text(encoding="utf-8") == render(DATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert write_report(str(tmp_path)) == page


def test_a_missing_report_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="layerwright optimize"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"layers": 3, "measured": {}}', '{"layers": [], "measured": [1]}',
                                  '{"layers": [], "measured": {}, "versions": 3}'])  # fmt: skip
def test_a_broken_report_says_what_to_run(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match="layerwright optimize") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
