from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.storage import kept_weights
from layerwright.core.treatment import Quantize, Sparsify
from layerwright.score.statistics import gram_energy
from layerwright.treat.prune import magnitude_mask, smallest, sparsegpt, spread_evenly, two_of_four, wanda_mask
from layerwright.treat.quantize import gptq_with, prepare, round_to_nearest
from oracles import masks as oracle
from oracles.column_rounding import damped, prune_columns


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    shared = normal(tokens, 4, seed=seed) @ normal(4, features, seed=seed + 1)
    return (shared + 0.5 * normal(tokens, features, seed=seed + 2)) * (0.5 + normal(features, seed=seed + 3).abs())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_smallest_takes_exactly_that_many(seed: int, rows: int, columns: int, ties: bool) -> None:
    scores = normal(rows, columns, seed=seed)
    scores = scores.round() if ties else scores
    number = torch.arange(rows) * columns // max(rows - 1, 1)
    chosen = smallest(scores, number)
    for row in range(rows):
        expected = sorted(range(columns), key=lambda i: (float(scores[row, i]), i))[: int(number[row])]
        assert chosen[row].nonzero().flatten().tolist() == sorted(expected)
    assert torch.equal(smallest(scores, columns // 2).sum(-1), torch.full((rows,), columns // 2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 21), st.floats(0.01, 0.99), st.integers(0, 100), st.booleans())
def test_masks_keep_exactly_what_is_promised(out: int, in_: int, sparsity: float, seed: int, equal: bool) -> None:
    weight = torch.ones(2, out, in_) if equal else normal(2, out, in_, seed=seed)
    x = correlated(30, in_, seed)
    factor = prepare((x.T @ x).expand(2, in_, in_), 30, order="natural")
    masks = {
        "magnitude": magnitude_mask(weight, sparsity),
        "wanda": wanda_mask(weight, factor.importance, sparsity),
        "sparsegpt": sparsegpt(weight, factor, Sparsify(sparsity)).mask,
    }
    for name, mask in masks.items():
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.flatten(1).sum(1).tolist() == [kept_weights(out, in_, sparsity)] * 2, name


def test_magnitude_keeps_the_largest() -> None:
    weight = normal(2, 6, 8)
    mask = magnitude_mask(weight, 0.6)
    for i in range(2):
        assert float(weight[i].abs()[~mask[i]].max()) <= float(weight[i].abs()[mask[i]].min())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_against_loops(sparsity: float, dtype: torch.dtype) -> None:
    x, weight = correlated(40, 14), normal(1, 5, 14).to(dtype)
    mask = wanda_mask(weight, x.square().sum(0)[None], sparsity)
    removed = spread_evenly(int(sparsity * 70), 5).tolist()
    assert max(removed) - min(removed) <= 1
    assert torch.equal(mask[0], oracle.wanda(weight[0].float(), x, removed))


def test_wanda_without_inputs_goes_by_magnitude() -> None:
    weight = normal(1, 4, 8)
    mask = wanda_mask(weight, torch.zeros(1, 8), 0.5)
    assert torch.equal(mask, wanda_mask(weight, torch.ones(1, 8), 0.5))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_two_of_four_against_loops(seed: int, ties: bool) -> None:
    scores = normal(3, 16, seed=seed).abs()
    scores = scores.round() if ties else scores
    mask = two_of_four(scores)
    assert torch.equal(mask, oracle.two_of_four(scores))
    assert bool((mask.view(3, 4, 4).sum(-1) == 2).all())


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("features", [40, 144])
def test_sparsegpt_is_that_of_the_paper(sparsity: float, features: int) -> None:
    x, weight = correlated(400, features, 3), normal(1, 6, features, seed=8)
    stored = sparsegpt(weight, prepare(x.T @ x, 400, order="natural"), Sparsify(sparsity))
    values, kept = prune_columns(weight[0], damped(x.T @ x, 400), sparsity, 128)
    assert stored.mask is not None
    assert stored.dense is not None
    assert torch.equal(stored.mask[0], kept)
    assert torch.allclose(stored.dense[0].double(), values, atol=2e-3)


def test_sparsegpt_two_of_four_is_that_of_the_paper() -> None:
    x, weight = correlated(400, 36, 3), normal(1, 6, 36, seed=8)
    stored = sparsegpt(weight, prepare(x.T @ x, 400, order="natural"), Sparsify(0.5, "2:4"))
    values, kept = prune_columns(weight[0], damped(x.T @ x, 400), 0.5, 128, "2:4")
    assert stored.mask is not None
    assert stored.dense is not None
    assert torch.equal(stored.mask[0], kept)
    assert torch.allclose(stored.dense[0].double(), values, atol=2e-3)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_methods_in_their_order_of_quality(pattern: str) -> None:
    x, weight = correlated(400, 64, 1), normal(1, 48, 64, seed=2)
    gram = (x.T @ x)[None]
    wanda = wanda_mask(weight, gram.diagonal(dim1=1, dim2=2), 0.5, pattern)  # type: ignore[arg-type]
    magnitude = magnitude_mask(weight, 0.5, pattern)  # type: ignore[arg-type]
    best = sparsegpt(weight, prepare(gram, 400, order="natural"), Sparsify(0.5, pattern))  # type: ignore[arg-type]
    errors = [float(gram_energy(weight - w, gram)) for w in (best.to_dense(), weight * wanda, weight * magnitude)]
    assert errors[0] < 0.6 * errors[1]
    assert errors[1] < errors[2]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pruning_and_rounding_in_one_pass(pattern: str, symmetric: bool) -> None:
    x, weight = correlated(400, 64, 1), normal(2, 24, 64, seed=2)
    gram = (x.T @ x).expand(2, 64, 64)
    factor = prepare(gram, 400, order="natural")
    sparsify = Sparsify(0.5, pattern)  # type: ignore[arg-type]
    quantize = Quantize(4, 16, symmetric)
    joint = sparsegpt(weight, factor, sparsify, quantize, torch.bfloat16)
    assert joint.mask is not None
    assert joint.codes is not None
    assert joint.scale is not None
    assert joint.scale.dtype == torch.bfloat16
    assert joint.mask.flatten(1).sum(1).tolist() == [24 * 32] * 2
    dense = joint.to_dense()
    assert bool((dense[~joint.mask] == 0).all())
    zero = torch.zeros(2, 24, 4, dtype=torch.int8) if joint.zero is None else joint.zero
    assert bool((joint.codes == zero.repeat_interleave(16, -1))[~joint.mask].all())
    # Later weights make up for rounding as well: better than pruning first and rounding the rest to nearest.
    pruned = sparsegpt(weight, factor, sparsify)
    assert pruned.dense is not None
    nearest = round_to_nearest(pruned.dense, quantize, torch.bfloat16, clip=True)
    errors = [float(gram_energy(weight - w, gram).sum()) for w in (pruned.dense, dense, nearest.to_dense())]
    assert errors[0] < errors[1]
    assert errors[1] - errors[0] < 0.7 * (errors[2] - errors[0])


def test_scales_make_room_for_grown_weights() -> None:
    x, weight = correlated(400, 64, 1), normal(1, 24, 64, seed=2)
    factor = prepare(x.T @ x, 400, order="natural")
    pruned = sparsegpt(weight, factor, Sparsify(0.7))
    joint = sparsegpt(weight, factor, Sparsify(0.7), Quantize(4, -1))
    assert pruned.dense is not None
    assert float(pruned.dense.abs().max()) > 1.2 * float(weight.abs().max())
    gram = (x.T @ x)[None]
    error, least = (float(gram_energy(weight - stored.to_dense(), gram)) for stored in (joint, pruned))
    assert error < 1.35 * least


def test_fixed_mask_is_kept_while_rounding() -> None:
    x, weight = correlated(400, 32, 1), normal(1, 8, 32, seed=2)
    mask = magnitude_mask(weight, 0.4)
    stored = gptq_with(weight, prepare(x.T @ x, 400), Quantize(3, 8, False), mask=mask)
    assert bool((stored.to_dense()[~mask] == 0).all())
    assert stored.mask is not None
    assert torch.equal(stored.mask, mask)


def test_two_of_four_needs_fours() -> None:
    with pytest.raises(InputError, match="6 inputs are not a multiple of 4"):
        two_of_four(normal(2, 6))
