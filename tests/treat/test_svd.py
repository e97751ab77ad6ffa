from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.treatment import LowRank, Quantize
from layerwright.score.statistics import gram_energy
from layerwright.treat.factorize import low_rank, output_spectrum, svd_factors
from layerwright.treat.quantize import prepare

SHAPES = [(6, 10), (10, 6), (8, 8)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    return normal(tokens, features, seed=seed) @ normal(features, features, seed=seed + 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inner", [1, 3, 5])
def test_without_inputs_it_is_the_truncated_decomposition(shape: tuple[int, int], inner: int) -> None:
    weight = normal(2, *shape)
    left, right = svd_factors(weight, inner)
    assert left.shape == (2, shape[0], inner)
    assert right.shape == (2, inner, shape[1])
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    best = u[..., :inner] * s[:, None, :inner] @ v[:, :inner]
    assert torch.allclose((left @ right).double(), best, atol=1e-5)
    assert torch.allclose(left.norm(dim=1), right.norm(dim=2), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inner", [1, 3, 5])
def test_with_inputs_it_is_the_best_rank_of_the_outputs(shape: tuple[int, int], inner: int) -> None:
    x, weight = inputs(40, shape[1]), normal(1, *shape, seed=5)
    left, right = svd_factors(weight, inner, (x.T @ x)[None])
    outputs = weight[0].double() @ x.double().T
    # No matrix of this rank can be nearer to the outputs than their own truncated decomposition (Eckart, Young).
    bound = torch.linalg.svdvals(outputs)[inner:].square().sum()
    ours = (outputs - (left @ right)[0].double() @ x.double().T).square().sum()
    assert float(ours) == pytest.approx(float(bound), rel=1e-4)
    plain = svd_factors(weight, inner)
    theirs = (outputs - (plain[0] @ plain[1])[0].double() @ x.double().T).square().sum()
    assert float(ours) < float(theirs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_no_small_step_improves_it(seed: int, inner: int) -> None:
    x, weight = inputs(30, 6, seed), normal(1, 5, 6, seed=seed + 3)
    gram = (x.T @ x)[None]
    left, right = svd_factors(weight, inner, gram)
    best = float(gram_energy(weight - left @ right, gram))
    for step in range(5):
        a = left + 0.01 * normal(*left.shape, seed=seed + step)
        b = right + 0.01 * normal(*right.shape, seed=seed + step + 50)
        assert float(gram_energy(weight - a @ b, gram)) > best


def test_spectrum_tells_the_error_of_every_rank() -> None:
    for shape in SHAPES:
        x, weight = inputs(40, shape[1]), normal(1, *shape, seed=5)
        gram = (x.T @ x)[None]
        energy, directions = output_spectrum(weight, gram)
        assert directions.shape == (1, shape[0], min(shape))
        assert bool((energy.diff() <= 0).all())
        for inner in range(1, min(shape)):
            left, right = svd_factors(weight, inner, gram)
            error = float(gram_energy(weight - left @ right, gram))
            assert error == pytest.approx(float(energy[0, inner:].sum()), rel=1e-3, abs=1e-6 * float(energy.sum()))


def test_fewer_tokens_than_inputs_and_none_at_all() -> None:
    x, weight = inputs(3, 10), normal(2, 6, 10, seed=5)
    grams = torch.stack([x.T @ x, torch.zeros(10, 10)])
    left, right = svd_factors(weight, 4, grams)
    # Three tokens span three directions: rank four reproduces every output.
    assert float(gram_energy(weight[:1] - left[:1] @ right[:1], grams[:1])) < 1e-6 * float(
        gram_energy(weight[:1], grams[:1])
    )
    plain = svd_factors(weight[1:], 4)
    assert torch.allclose(left[1:] @ right[1:], plain[0] @ plain[1], atol=1e-5)


def test_panels_of_the_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = inputs(40, 10), normal(1, 6, 10)
    whole = output_spectrum(weight, (x.T @ x)[None])[0]
    monkeypatch.setattr("layerwright.treat.factorize._svd._PANEL", 3)
    assert torch.allclose(output_spectrum(weight, (x.T @ x)[None])[0], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = normal(2, 6, 10).to(dtype)
    stored, used = low_rank(weight, LowRank(5, "svd"))
    assert used == []
    assert stored.shape == (2, 6, 10)
    assert stored.factors is not None
    left, right = stored.factors
    assert (left.shape, right.shape) == ((2, 6, 5), (2, 5, 10))
    assert left.dense is not None
    assert left.dense.dtype == dtype
    expected = torch.linalg.svdvals(weight.double())[:, 5:].square().sum()
    error = (stored.to_dense().double() - weight.double()).square().sum()
    assert float(error) == pytest.approx(float(expected), rel=1e-3 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_factors(method: str, symmetric: bool) -> None:
    x, weight = inputs(200, 32), normal(1, 24, 32, seed=5)
    gram = (x.T @ x)[None]
    quantize = Quantize(8, 8, symmetric, method)  # type: ignore[arg-type]
    factor = prepare(gram, 200)
    stored, _ = low_rank(weight, LowRank(12), gram, quantize, torch.bfloat16, factor=factor)
    assert stored.factors is not None
    left, right = stored.factors
    assert left.quantize == Quantize(8, -1, symmetric, method)  # type: ignore[arg-type]
    assert right.quantize == quantize
    assert left.codes is not None
    assert right.codes is not None
    assert left.scale is not None
    assert right.scale is not None
    assert left.scale.shape == (1, 24, 1)
    assert right.scale.shape == (1, 12, 4)
    assert (left.zero is None) == symmetric
    exact, _ = low_rank(weight, LowRank(12), gram)
    least = float(gram_energy(weight - exact.to_dense(), gram))
    assert least < float(gram_energy(weight - stored.to_dense(), gram)) < 1.05 * least


def test_left_factor_makes_up_for_the_rounded_right_one() -> None:
    x, weight = inputs(200, 32), normal(1, 24, 32, seed=5)
    gram = (x.T @ x)[None]
    stored, used = low_rank(weight, LowRank(12), gram, Quantize(3, 8), factor=prepare(gram, 200))
    assert len(used) == 2
    left, right = svd_factors(weight, 12, gram)
    apart = [low_rank_part(part) for part in (left, right)]
    products = (left @ right, stored.to_dense(), apart[0] @ apart[1])
    least, ours, theirs = (float(gram_energy(weight - product, gram)) for product in products)
    assert ours - least < 0.6 * (theirs - least)


def low_rank_part(part: Tensor) -> Tensor:
    scale = part.abs().amax(-1, keepdim=True) / 3.5
    return (part / scale).round().clamp(-4, 3) * scale
