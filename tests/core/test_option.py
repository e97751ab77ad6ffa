from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.option import Allocation, Option, OptionTable, Scores
from layerwright.core.treatment import Drop, LowRank, Quantize, Sparsify

SCORES = Scores(
    "swap",
    {
        ("model.layers.0.q", (Quantize(4, 32, False),)): 0.1 + 0.2,
        ("model.layers.0.q", (Sparsify(0.3), Quantize(8))): 1e-17,
        ("model.layers.0.q", (LowRank(3, "svd"),)): -0.5,
        ("model.layers.0", (Drop(),)): 3.0,
    },
    {"model.layers.0": 1.5},
    model="abc",
    data="def",
    base_loss=2.25,
    seconds=1.5,
    meta={"samples": 8, "note": "ü"},
)


def test_an_option_covers_its_layer_unless_told():
    assert Option("a", (), Cost(), 0.0).covers == ("a",)
    assert Option("b", (Drop(),), Cost(), 0.0, ("b.q", "b.k")).covers == ("b.q", "b.k")


def test_an_option_reads_as_a_sentence():
    assert str(Option("a", (Quantize(3),), Cost(bytes=12345.0), 0.00123)) == (
        "a: int3 gptq (damage 0.00123, 12,345 bytes)"
    )


def test_layers_of_a_table_are_covered_layers_in_order():
    rows = (
        Option("q", (), Cost(), 0.0),
        Option("b", (Drop(),), Cost(), 0.0, ("q", "k")),
        Option("q", (Quantize(),), Cost(), 0.0),
    )
    table = OptionTable(rows)
    assert table.layers == ("q", "k")
    assert len(table) == 3


def test_options_and_allocations_are_values():
    one, two = (Option("q", (Quantize(4),), Cost(bytes=3.0), 0.5) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.damage = 1.0
    assert Allocation((one,), one.cost, 0.5).bound is None


def test_scores_save_and_load(tmp_path):
    path = SCORES.save(tmp_path / "deep" / "scores")
    assert path.name == "swap.json"
    assert Scores.load(path) == SCORES
    named = SCORES.save(tmp_path / "mine.json")
    assert named == tmp_path / "mine.json"
    assert Scores.load(named) == SCORES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "mine.json"]


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20))
def test_numbers_and_names_survive_exactly(tmp_path_factory, damage, name):
    path = tmp_path_factory.mktemp("scores") / "s.json"
    scores = Scores("s", {(name, (Quantize(5),)): damage}, {name: damage}, base_loss=damage)
    scores.save(path)
    assert Scores.load(path) == scores


def test_no_treatment_does_no_damage_and_a_missing_one_says_so():
    assert SCORES.damage("anything", ()) == 0.0
    assert SCORES.damage("model.layers.0", (Drop(),)) == 3.0
    with pytest.raises(InputError, match=r"'swap' have no entry for model\.layers\.0\.q with int2 gptq"):
        SCORES.damage("model.layers.0.q", (Quantize(2),))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("layerwright_scores"),
        lambda d: d.update(layerwright_scores=2),
        lambda d: d.pop("damages"),
        lambda d: d.update(damages=[{"layer": "a"}]),
        lambda d: d.update(damages=[3]),
        lambda d: d["damages"][0].update(damage=None),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, change):
    path = SCORES.save(tmp_path / "s.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="is not a scores file of this version"):
        Scores.load(path)


def test_text_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(InputError, match="is not a scores file"):
        Scores.load(tmp_path / "s.json")


def test_an_unknown_treatment_in_a_file_is_named(tmp_path):
    path = SCORES.save(tmp_path / "s.json")
    path.write_text(path.read_text().replace('"low_rank"', '"low_rang"'))
    with pytest.raises(InputError, match=r"unknown treatment 'low_rang' in .*s\.json; did you mean low_rank"):
        Scores.load(path)
