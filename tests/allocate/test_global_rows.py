from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwright.allocate.global_rows import global_rows, ranked_rows
from layerwright.core.errors import InputError

LOSSES = st.dictionaries(
    st.sampled_from("abcde"),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    min_size=1,
).filter(lambda table: any(any(rows) for rows in table.values()))


def tensors(table: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor(rows, dtype=torch.float32) for name, rows in table.items()}


@given(LOSSES, st.sampled_from([0.0, 0.1, 0.34, 0.5, 1.0]), st.randoms())
def test_the_highest_rows_whatever_the_order_of_the_layers(table, share, random) -> None:  # type: ignore[no-untyped-def]
    fractions = {8: share, 4: 1 - share}
    plan = global_rows(tensors(table), fractions)
    names = list(table)
    random.shuffle(names)
    again = global_rows({name: tensors(table)[name] for name in names}, fractions)
    places = sorted((-loss, name, row) for name, rows in table.items() for row, loss in enumerate(rows))
    chosen = {(name, row) for _, name, row in places[: int(share * len(places) + 1e-6)]}
    for name, rows in table.items():
        assert sorted(torch.cat(list(plan[name].values())).tolist()) == list(range(len(rows)))
        assert {(name, row) for row in plan[name][8].tolist()} == {place for place in chosen if place[0] == name}
        assert all(torch.equal(plan[name][width], again[name][width]) for width in (8, 4))


def test_none_and_all_are_uniform() -> None:
    losses = {"a": torch.tensor([1.0, 2]), "b": torch.tensor([3.0])}
    none, everything = global_rows(losses, {8: 0.0, 4: 1.0}), global_rows(losses, {8: 1.0, 4: 0.0})
    assert all(len(rows[8]) == 0 for rows in none.values()) and all(len(rows[4]) == 0 for rows in everything.values())
    assert global_rows(losses, {5: 1.0})["a"][5].tolist() == [0, 1]


def test_layer_by_layer() -> None:
    losses = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([0.0, 0, 1, 0])}
    plan = global_rows(losses, {8: 0.25, 4: 0.75}, scope="layer")
    assert plan["a"][8].tolist() == [0] and plan["b"][8].tolist() == [2]
    together = global_rows(losses, {8: 0.25, 4: 0.75})
    assert together["a"][8].tolist() == [0, 1] and together["b"][8].tolist() == []


def test_parameters_count_weights() -> None:
    losses = {"short": torch.tensor([4.0, 3, 2, 1]), "long": torch.tensor([9.0, 1])}
    columns = {"short": 10, "long": 40}
    plan = global_rows(losses, {8: 0.5, 4: 0.5}, unit="parameters", columns=columns)
    # By loss for each weight: .4, .3, then the long row with .225, which fills the 60 of 120.
    assert plan["short"][8].tolist() == [0, 1] and plan["long"][8].tolist() == [0]
    names, layer, row, loss = ranked_rows(losses, unit="parameters", columns=columns)
    assert names == ["long", "short"] and loss.tolist() == sorted(loss.tolist(), reverse=True)
    assert [names[i] for i in layer.tolist()][:4] == ["short", "short", "long", "short"] and row[0] == 0


def test_more_widths_repeat_with_the_losses_of_the_next() -> None:
    to5 = {"a": torch.tensor([5.0, 4, 3, 2, 1, 0])}
    to4 = {"a": torch.tensor([9.0, 0, 1, 2, 3, 4])}
    plan = global_rows({5: to5, 4: to4}, {8: 1 / 6, 5: 1 / 3, 4: 1 / 2})
    assert plan["a"][8].tolist() == [0]  # by the losses of 5 bits
    assert plan["a"][5].tolist() == [4, 5]  # by those of 4 bits, of what is left
    assert plan["a"][4].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({8: 0.2, 4: 0.7}, "add up to 1"),
        ({8: -0.1, 4: 1.1}, "add up to 1"),
        ({9: 0.1, 4: 0.9}, "from 2 to 8"),
        ({1: 1.0}, "from 2 to 8"),
        ({}, "from 2 to 8"),
    ],
)
def test_bad_fractions(fractions: dict[int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        global_rows({"a": torch.ones(3)}, fractions)


def test_bad_losses() -> None:
    shares = {8: 0.5, 4: 0.5}
    with pytest.raises(InputError, match="no layers"):
        global_rows({}, shares)
    with pytest.raises(InputError, match="all rows have loss 0"):
        global_rows({"a": torch.zeros(4)}, shares)
    with pytest.raises(InputError, match="a: its row losses are not finite"):
        global_rows({"a": torch.tensor([1.0, float("nan")])}, shares)
    with pytest.raises(InputError, match="columns"):
        global_rows({"a": torch.ones(4)}, shares, unit="parameters")
    with pytest.raises(InputError, match="unit: got 'bytes'"):
        global_rows({"a": torch.ones(4)}, shares, unit="bytes")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scope"):
        global_rows({"a": torch.ones(4)}, shares, scope="block")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none of rounding to 4 bits"):
        global_rows({5: {"a": torch.ones(4)}}, {8: 0.2, 5: 0.3, 4: 0.5})
