from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.nn.quantizer import find_scale
from layerwright.nn.stored import Stored
from layerwright.score.statistics import gram_energy
from layerwright.treat.quantize import Scales, gptq, gptq_with, prepare, round_to_nearest
from layerwright.treat.quantize import _gptq as module
from oracles.column_rounding import damped, round_columns
from oracles.lattice import best_codes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Inputs as layers see them: a few common directions and unequal sizes."""
    shared = normal(tokens, 4, seed=seed) @ normal(4, features, seed=seed + 1)
    return (shared + 0.5 * normal(tokens, features, seed=seed + 2)) * (0.5 + normal(features, seed=seed + 3).abs())


def error(weight: Tensor, stored: Stored, gram: Tensor) -> float:
    return float(gram_energy(weight.float() - stored.to_dense(), gram).sum())


@pytest.mark.parametrize("order", ["natural", "descending"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("features", [24, 160])
def test_codes_are_those_of_the_paper(order: str, symmetric: bool, features: int) -> None:
    # 160 columns pass the borders of blocks (128) and inner blocks (16).
    x, weight = correlated(300, features, 7), normal(1, 5, features, seed=9)
    gram = (x.T @ x)[None]
    treatment = Quantize(3, 8, symmetric)
    stored, notes = gptq(weight, gram, 300, treatment, order=order, scales="range")  # type: ignore[arg-type]
    assert notes == []
    scale, zero = find_scale(weight, 3, 8, symmetric)
    assert stored.scale is not None
    assert torch.equal(stored.scale, scale)
    moments = damped(gram[0], 300)
    columns = list(range(features))
    if order == "descending":
        columns = gram[0].diagonal().argsort(descending=True, stable=True).tolist()
    spread = [None if t is None else t[0].repeat_interleave(8, 1) for t in (scale, zero)]
    assert spread[0] is not None
    expected = round_columns(weight[0], moments, spread[0], spread[1], 3, columns)
    assert stored.codes is not None
    assert stored.codes.dtype == torch.int8
    # Rounding in float32 may tip a value that lies on the border of two codes, never more than very few.
    assert float((stored.codes[0] != expected).double().mean()) < 0.005


def test_a_diagonal_gram_rounds_to_nearest() -> None:
    weight = normal(1, 6, 32)
    gram = torch.diag(normal(32, seed=4).square() + 0.1)[None]
    for symmetric in (True, False):
        treatment = Quantize(4, 16, symmetric)
        stored, _ = gptq(weight, gram, 10, treatment, scales="range")
        nearest = round_to_nearest(weight, treatment, torch.float32)
        assert stored.codes is not None
        assert nearest.codes is not None
        assert torch.equal(stored.codes, nearest.codes)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3, 4]), st.sampled_from([8, 16, -1]), st.booleans())
def test_better_than_rounding_to_nearest(seed: int, bits: int, size: int, symmetric: bool) -> None:
    x, weight = correlated(200, 48, seed), normal(1, 24, 48, seed=seed + 20)
    gram = (x.T @ x)[None]
    treatment = Quantize(bits, size, symmetric)
    stored, _ = gptq(weight, gram, 200, treatment, scales="range")
    nearest = round_to_nearest(weight, treatment, torch.float32)
    assert error(weight, stored, gram) < error(weight, nearest, gram)


def test_between_the_best_rounding_and_the_nearest() -> None:
    ratios, optimal = [], []
    for seed in range(12):
        x, weight = correlated(40, 5, seed * 10), normal(1, 1, 5, seed=seed)
        gram = (x.T @ x)[None]
        treatment = Quantize(2, -1)
        stored, _ = gptq(weight, gram, 40, treatment, scales="range")
        assert stored.scale is not None
        _, least = best_codes(weight[0, 0], gram[0], float(stored.scale), 2)
        ours = error(weight, stored, gram)
        nearest = error(weight, round_to_nearest(weight, treatment, torch.float32), gram)
        assert ours >= least * (1 - 1e-4)
        ratios.append(ours / nearest)
        optimal.append(ours / least)
    assert sum(ratios) / len(ratios) < 0.85
    assert sorted(optimal)[len(optimal) // 2] < 2.5


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [16, -1])
def test_clipped_scales_beat_plain_gptq(bits: int, size: int) -> None:
    x, weight = correlated(400, 64, 3), normal(1, 48, 64, seed=4)
    gram = (x.T @ x)[None]
    names: list[Scales] = ["best", "clip", "range"]
    errors = {
        name: error(weight, gptq(weight, gram, 400, Quantize(bits, size), scales=name)[0], gram) for name in names
    }
    assert errors["best"] < 0.97 * errors["clip"]
    assert errors["clip"] < 0.97 * errors["range"]
    default = error(weight, gptq(weight, gram, 400, Quantize(bits, size))[0], gram)
    assert default == errors["clip" if bits > 3 else "best"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_loss_of_a_sweep_is_the_damped_error(symmetric: bool) -> None:
    x, weight = correlated(400, 144, 3), normal(2, 6, 144, seed=4)
    factor = prepare((x.T @ x).expand(2, 144, 144), 400)
    scale, zero = find_scale(weight, 3, 16, symmetric)
    mask = normal(2, 6, 144, seed=6) > -0.5
    moments = damped(x.T @ x, 400)
    for choose in (None, module._fixed(module.select_rows(mask.transpose(1, 2), factor.order))):
        swept = module.sweep(weight, factor, (scale, zero, 3), choose)
        stored = Stored((2, 6, 144), codes=swept.values, scale=scale, zero=zero, mask=swept.mask)
        off = (weight - stored.to_dense()).double()
        assert torch.allclose(swept.loss.double(), ((off @ moments) * off).sum(-1), rtol=1e-3)


def test_falling_order_helps() -> None:
    total = {"descending": 0.0, "natural": 0.0}
    for seed in range(5):
        x, weight = correlated(300, 64, seed), normal(1, 32, 64, seed=seed)
        gram = (x.T @ x)[None]
        for order in total:
            stored, _ = gptq(weight, gram, 300, Quantize(3, 16), order=order)  # type: ignore[arg-type]
            total[order] += error(weight, stored, gram) / float(gram_energy(weight, gram))
    assert total["descending"] < total["natural"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_and_scales_of_every_dtype(dtype: torch.dtype) -> None:
    x, weight = correlated(100, 32), normal(2, 6, 32).to(dtype)
    gram = (x.T @ x).expand(2, 32, 32)
    stored, _ = gptq(weight, gram, torch.tensor([100, 100]), Quantize(4, 8, False), dtype)
    assert stored.shape == (2, 6, 32)
    assert stored.scale is not None
    assert stored.scale.dtype == dtype
    assert stored.zero is not None
    assert stored.zero.dtype == torch.int8
    assert error(weight, stored, gram) < 0.02 * float(gram_energy(weight, gram).sum())


def test_stacked_weights_and_shared_factor_change_nothing() -> None:
    x = correlated(200, 40)
    factor = prepare(x.T @ x, 200)
    first, second = normal(1, 6, 40, seed=1), normal(1, 9, 40, seed=2)
    treatment = Quantize(4, 8)
    both = gptq_with(torch.cat([first, second], 1), factor, treatment)
    for weight, rows in ((first, slice(0, 6)), (second, slice(6, 15))):
        alone, _ = gptq(weight, x.T @ x, 200, treatment)
        assert alone.codes is not None
        assert both.codes is not None
        assert float((alone.codes != both.codes[:, rows]).float().mean()) < 0.01


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(100, 24), normal(1, 10, 24)
    whole, _ = gptq(weight, x.T @ x, 100, Quantize(4, 8, False))
    monkeypatch.setattr(module, "_ROWS", 3)
    pieces, _ = gptq(weight, x.T @ x, 100, Quantize(4, 8, False))
    assert whole.codes is not None
    assert pieces.codes is not None
    assert float((whole.codes != pieces.codes).float().mean()) < 0.01


def test_experts_are_treated_each_by_its_own_inputs() -> None:
    inputs = [correlated(100, 24, seed) for seed in (0, 50, 90)]
    grams = torch.stack([x.T @ x for x in inputs])
    weight = normal(3, 7, 24)
    together, _ = gptq(weight, grams, torch.tensor([100, 100, 100]), Quantize(3, 8))
    for i in range(3):
        alone, _ = gptq(weight[i : i + 1], grams[i], 100, Quantize(3, 8))
        assert together.codes is not None
        assert alone.codes is not None
        assert float((together.codes[i] != alone.codes[0]).float().mean()) < 0.02


def test_experts_without_tokens_are_rounded_and_named() -> None:
    x = correlated(100, 24)
    grams = torch.zeros(3, 24, 24)
    grams[1] = x.T @ x
    weight = normal(3, 7, 24)
    treatment = Quantize(3, 8, False)
    stored, notes = gptq(weight, grams, torch.tensor([0, 100, 0]), treatment, scales="range")
    nearest = round_to_nearest(weight, treatment, torch.float32)
    assert notes == ["some experts saw no tokens: 0, 2"]
    assert stored.codes is not None
    assert nearest.codes is not None
    assert torch.equal(stored.codes[[0, 2]], nearest.codes[[0, 2]])
    assert not torch.equal(stored.codes[1], nearest.codes[1])
    _, notes = gptq(weight, torch.zeros(3, 24, 24), 0, treatment)
    assert notes == ["never reached by the calibration data"]


def test_dead_inputs_get_weight_zero_and_do_not_disturb() -> None:
    x = correlated(100, 24) * 1e-3
    x[:, [3, 17]] = 0
    weight = normal(1, 5, 24)
    alive = [i for i in range(24) if i not in (3, 17)]
    for symmetric in (True, False):
        stored, notes = gptq(weight, x.T @ x, 100, Quantize(4, -1, symmetric))
        assert notes == []
        assert bool((stored.to_dense()[..., [3, 17]] == 0).all())
        # Tiny inputs are not drowned by what stands on the diagonal for a dead one.
        without, _ = gptq(weight[..., alive], x[:, alive].T @ x[:, alive], 100, Quantize(4, -1, symmetric))
        assert torch.allclose(stored.to_dense()[..., alive], without.to_dense(), atol=0.3)
        assert error(weight[..., alive], without, (x[:, alive].T @ x[:, alive])[None]) == pytest.approx(
            float(gram_energy(weight[..., alive] - stored.to_dense()[..., alive], x[:, alive].T @ x[:, alive])),
            rel=0.1,
        )


def test_factor_reproduces_the_moments() -> None:
    x = correlated(60, 12)
    factor = prepare(x.T @ x, 60)
    upper = (factor.spread[0].tril(-1) * factor.pivot[0][:, None]).T + torch.diag(factor.pivot[0])
    moments = damped(x.T @ x, 60)
    order = factor.order[0]
    assert torch.allclose((upper @ upper.T).double(), moments[order][:, order], rtol=1e-3, atol=1e-3)
    importance = factor.importance[0][order]
    assert bool((importance.diff() <= 0).all())


def test_singular_moments_are_damped() -> None:
    x = correlated(3, 24)
    stored, notes = gptq(normal(1, 4, 24), x.T @ x, 3, Quantize(4, -1))
    assert notes == []
    assert bool(stored.to_dense().isfinite().all())


def test_indefinite_moments_take_more_damping() -> None:
    x = correlated(100, 16)
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -0.05 * float(gram.diagonal().mean())
    broken = vectors @ torch.diag(values) @ vectors.T
    factor = prepare(broken, 100)
    assert factor.notes == ["factorization damped"]
    assert not bool(factor.failed.any())
    assert bool(factor.spread.isfinite().all())


def test_hopeless_moments_fall_back_to_rounding() -> None:
    weight = normal(2, 5, 8)
    good = correlated(50, 8)
    grams = torch.stack([torch.full((8, 8), -100.0).fill_diagonal_(1.0), good.T @ good])
    stored, notes = gptq(weight, grams, 50, Quantize(4, -1), scales="range")
    assert notes == ["factorization failed, rounded to nearest: experts 0"]
    nearest = round_to_nearest(weight, Quantize(4, -1), torch.float32)
    assert stored.codes is not None
    assert nearest.codes is not None
    assert torch.equal(stored.codes[0], nearest.codes[0])
    _, notes = gptq(weight[:1], grams[0], 50, Quantize(4, -1))
    assert notes == ["factorization failed, rounded to nearest"]


def test_float64_is_tried_before_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.cholesky_ex
    dtypes = []

    def refuses_float32(matrix: Tensor) -> tuple[Tensor, Tensor]:
        dtypes.append(matrix.dtype)
        lower, info = original(matrix)
        return lower, info + (1 if matrix.dtype == torch.float32 else 0)

    x = correlated(50, 8)
    plain = prepare(x.T @ x, 50)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", refuses_float32)
    factor = prepare(x.T @ x, 50)
    assert dtypes == [torch.float32, torch.float64]
    assert factor.notes == []
    assert torch.allclose(factor.spread, plain.spread, atol=1e-4)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="square"):
        prepare(normal(3, 4), 5)
    with pytest.raises(InputError, match="NaN"):
        prepare(torch.full((3, 3), float("nan")), 5)
    with pytest.raises(InputError, match="group_size"):
        gptq(normal(1, 2, 6), torch.eye(6), 4, Quantize(4, 4))


def test_nothing_is_written_to_what_is_given() -> None:
    x, weight = correlated(50, 16), normal(1, 4, 16)
    gram = (x.T @ x)[None]
    before = weight.clone(), gram.clone()
    gptq(weight, gram, 50, Quantize(4, 8))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
