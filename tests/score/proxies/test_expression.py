from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.score.proxies import ProxyTree
from layerwright.score.proxies.expression import STRUCTURES
from layerwright.score.proxies.operations import COMMUTATIVE
from layerwright.score.proxies.search import random_proxy
from oracles.proxies import made_up

STATISTICS = made_up()
SEEDS = st.integers(0, 10**6)


def tree(first: tuple[str, str, str], second: tuple[str, str, str], join: str) -> ProxyTree:
    genotype = {"input": [first[0], second[0]], "op": [list(first[1:]), list(second[1:]), join]}
    return ProxyTree.from_genotype(genotype)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(STRUCTURES))
def test_genotypes_and_strings_come_back(seed: int, structure: str) -> None:
    proxy = random_proxy(structure, STATISTICS.inputs, np.random.default_rng(seed))
    assert ProxyTree.from_genotype(proxy.genotype()) == proxy
    again = ProxyTree.from_string(proxy.to_string())
    assert again.to_string() == proxy.to_string()
    if structure != "dag":
        assert again == proxy
    np.testing.assert_array_equal(again.layer_values(STATISTICS), proxy.layer_values(STATISTICS))


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(STRUCTURES))
def test_the_canonical_form_has_the_same_value_and_is_its_own_canonical_form(seed: int, structure: str) -> None:
    proxy = random_proxy(structure, STATISTICS.inputs, np.random.default_rng(seed))
    if proxy.canonical() == "0":
        assert not proxy.layer_values(STATISTICS).any()
        return
    again = ProxyTree.from_string(proxy.canonical())
    assert again.canonical() == proxy.canonical()
    np.testing.assert_allclose(again.layer_values(STATISTICS), proxy.layer_values(STATISTICS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("join", sorted(COMMUTATIVE))
def test_swapped_operands_of_commutative_operations_are_one_form(join: str) -> None:
    a, b = ("G", "abs", "log"), ("W", "square", "tanh")
    assert tree(a, b, join).canonical() == tree(b, a, join).canonical()
    assert tree(a, b, "difference").canonical() != tree(b, a, "difference").canonical()


def test_idle_parts_do_not_count() -> None:
    one = tree(("G", "noop", "abs"), ("W", "negate", "negate"), "product")
    other = tree(("W", "noop", "noop"), ("G", "abs", "relu"), "product")
    assert one.canonical() == other.canonical() == "product(W, abs(G))"
    assert tree(("G", "disconnect", "abs"), ("W", "abs", "sign"), "product").canonical() == "sign(abs(W))"
    assert tree(("G", "disconnect", "abs"), ("W", "noop", "disconnect"), "product").canonical() == "0"


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.lists(st.integers(2, 8), min_size=6, max_size=6), st.lists(st.integers(2, 8), min_size=6, max_size=6))
def test_the_score_is_linear_in_bits(seed: int, a: list[int], b: list[int]) -> None:
    proxy = random_proxy("tree", STATISTICS.inputs, np.random.default_rng(seed))
    both = proxy(STATISTICS, [x + y for x, y in zip(a, b, strict=True)])
    assert both == pytest.approx(proxy(STATISTICS, a) + proxy(STATISTICS, b), rel=1e-9, abs=1e-6)
    gains = proxy.gains(STATISTICS, (2, 4))
    assert gains.shape == (6, 2) and np.allclose(2 * gains[:, 0], gains[:, 1])


def test_a_value_is_the_mean_of_the_formula() -> None:
    proxy = ProxyTree.from_string("product(abs(noop(G)), square(noop(W)))")
    assert proxy.structure == "tree"
    pairs = zip(STATISTICS.lists["G"], STATISTICS.lists["W"], strict=True)
    expected = [float((g.abs() * w**2).mean()) for g, w in pairs]
    np.testing.assert_allclose(proxy.layer_values(STATISTICS), expected, rtol=1e-6)
    assert proxy(STATISTICS, [2, 3, 4, 2, 3, 4]) == pytest.approx(float(np.dot(expected, [2, 3, 4, 2, 3, 4])))


def test_structures_are_recognised() -> None:
    assert ProxyTree.from_string("W").structure == "linear"
    assert ProxyTree.from_string("log(abs(GW))").structure == "linear"
    assert ProxyTree.from_string("add(G, product(G, W))").structure == "dag"
    shared = ProxyTree.from_string("add(abs(G), sqrt(abs(G)))")
    assert shared.inputs == ("G",) and len(shared.steps) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abs(X)", "unknown input 'X'"),
        ("abss(G)", "unknown operation 'abss'.*abs"),
        ("abs(G, W)", "got 2 operands, expected 1"),
        ("add(G)", "got 1 operands, expected 2"),
        ("abs(G", "closing parenthesis"),
        ("abs(G))", "behind its end"),
        ("abs", "needs operands"),
        ("", "expected an expression"),
        ("abs(G) + 1", "cannot read"),
        ("abs(" * 300 + "G" + ")" * 300, "expected an expression"),
    ],
)
def test_bad_expressions_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProxyTree.from_string(text)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"op": []},
        {"input": ["G"], "op": [["abs"], "add"]},
        {"structure": "forest", "input": ["G"], "op": []},
        {"structure": "dag", "input": ["G"], "op": [["abs", 3]]},
        {"structure": "tree", "input": ["G"], "op": [["abs", "abs"], ["abs", "abs"], "add"]},
        {"structure": "linear", "input": [], "op": []},
    ],
)
def test_bad_genotypes_are_refused(data: object) -> None:
    with pytest.raises(InputError):
        ProxyTree.from_genotype(data)


def test_bits_must_fit_the_layers_and_statistics_must_be_there() -> None:
    proxy = ProxyTree.from_string("abs(G)")
    with pytest.raises(InputError, match="got 2 numbers, expected one for each of 6"):
        proxy(STATISTICS, [2, 3])
    with pytest.raises(InputError, match="H was not measured"):
        ProxyTree.from_string("abs(H)").layer_values(made_up(names="GW"))
    assert not torch.is_grad_enabled() or proxy.layer_values(STATISTICS).dtype == np.float64
