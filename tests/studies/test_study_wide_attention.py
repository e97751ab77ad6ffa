from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.studies import _listops
from layerwright.studies.wide_attention import run


def value_of(tokens: list[int]) -> int:
    """Value of an expression by a stack, written apart from the generator."""
    names = {12: "MAX", 13: "MIN", 14: "MED", 15: "SM"}
    stack: list[list[object]] = [[]]
    for token in tokens:
        if token in names:
            stack.append([names[token]])
        elif token == 1:
            name, *values = stack.pop()
            numbers = [v for v in values if isinstance(v, int)]
            assert len(numbers) == len(values) > 0
            if name == "MAX":
                found = max(numbers)
            elif name == "MIN":
                found = min(numbers)
            elif name == "SM":
                found = sum(numbers) % 10
            else:
                found = next(n for n in sorted(numbers) if sum(m <= n for m in numbers) >= len(numbers) / 2)
            stack[-1].append(found)
        else:
            stack[-1].append(token - 2)
    assert len(stack) == 1 and len(stack[0]) == 1
    result = stack[0][0]
    assert isinstance(result, int)
    return result


def depth_of(tokens: list[int]) -> int:
    deepest = depth = 0
    for token in tokens:
        depth += (token >= 12) - (token == 1)
        deepest = max(deepest, depth)
    assert depth == 0
    return deepest


@pytest.mark.parametrize(("depth", "length", "arguments"), [(4, 128, 5), (2, 20, 3), (1, 8, 4), (4, 16, 5)])
def test_expressions_are_what_they_say(depth: int, length: int, arguments: int) -> None:
    ids, values = _listops.listops(300, max_depth=depth, max_length=length, max_arguments=arguments, seed=1)
    assert ids.shape == (300, length)
    rows = [[t for t in row if t] for row in ids.tolist()]
    assert [value_of(row) for row in rows] == values.tolist()
    assert max(map(depth_of, rows)) == (depth if length > 16 or depth == 1 else max(map(depth_of, rows)))
    assert max(map(depth_of, rows)) <= depth
    assert int(ids.max()) < _listops.VOCABULARY


def test_expressions_are_varied_and_drawn_again() -> None:
    ids, values = _listops.listops(1000, max_length=64)
    assert torch.equal(ids, _listops.listops(1000, max_length=64)[0])
    assert not torch.equal(ids, _listops.listops(1000, max_length=64, seed=1)[0])
    assert int(values.bincount(minlength=10).min()) > 40
    assert float(((ids >= 12).sum(1) > 1).float().mean()) >= 0.5
    with pytest.raises(InputError, match="max_length: got 6, expected at least 7"):
        _listops.listops(1, max_length=6)


def test_median_is_the_lower_one() -> None:
    assert [_listops.OPERATORS["MED"](v) for v in ([3, 1], [5, 1, 9], [4, 8, 2, 6])] == [1, 5, 4]


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "wide-attention"
    trained = [row for row in evidence.table if "task" in row]
    assert [(row["task"], row["layers x heads"]) for row in trained] == [
        ("library bytes", "6x2"),
        ("library bytes", "1x12"),
        ("ListOps", "6x2"),
        ("ListOps", "1x12"),
    ]
    assert all(row["accuracy"] > 0.3 for row in trained[:2])  # of four groups
    costs = [row for row in evidence.table if "kernels" in row]
    assert [row["layers x heads"] for row in costs] == ["6x2", "1x12"] * 2
    assert costs[0]["MFLOP"] - costs[1]["MFLOP"] == pytest.approx(5 * 256 * 4 * 64 * 128 / 1e6)
    parameters = evidence.checks[1]
    assert parameters.measured == pytest.approx(66372 / 150532) and parameters.holds
    assert [check.bound for check in evidence.checks[2:]] == [0.6, 0.6]
    assert all(0.1 < check.measured < 0.9 for check in evidence.checks[2:])
    assert evidence.checks[0].measured == trained[1]["accuracy"]
    assert evidence.checks[0].bound == pytest.approx(trained[0]["accuracy"] - 0.02)
