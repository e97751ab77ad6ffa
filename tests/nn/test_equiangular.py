from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn import equiangular, equiangular_cache
from layerwright.nn.equiangular import generate_ebv, measure_cosines, pair_hinge, welch_bound
from layerwright.nn.equiangular_cache import cached_ebv
from oracles.ebv import cosines, pair_loss


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(n, d, generator=draw, dtype=torch.float64), dim=1)


def test_welch_bound_is_met_by_equiangular_frames() -> None:
    # The simplex: d + 1 unit vectors whose products are all -1 / d.
    for d in (2, 3, 7):
        simplex = functional.normalize(torch.eye(d + 1) - 1 / (d + 1), dim=1)
        assert max(cosines(simplex)) == pytest.approx(welch_bound(d + 1, d), abs=1e-6)
        assert welch_bound(d + 1, d) == pytest.approx(1 / d)
    # Six diagonals of the icosahedron.
    golden = (1 + math.sqrt(5)) / 2
    lines = functional.normalize(
        torch.tensor(
            [[0, 1, golden], [0, 1, -golden], [1, golden, 0], [1, -golden, 0], [golden, 0, 1], [-golden, 0, 1]]
        ),
        dim=1,
    )
    assert max(cosines(lines)) == pytest.approx(welch_bound(6, 3), abs=1e-6)
    assert welch_bound(6, 3) == pytest.approx(1 / math.sqrt(5))
    assert welch_bound(5, 5) == welch_bound(1, 3) == 0
    assert welch_bound(1000, 100) == pytest.approx(0.0949, abs=1e-4)


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_no_vectors_are_below_the_welch_bound(n: int, d: int, seed: int) -> None:
    assert max(cosines(unit(n, d, seed))) >= welch_bound(n, d) - 1e-9


def test_loss_and_gradient_are_those_of_the_pairs() -> None:
    vectors = unit(8, 3).requires_grad_()
    loss = pair_loss(vectors, 0.3)
    (gradient,) = torch.autograd.grad(loss, vectors)
    found = pair_hinge(vectors.detach(), 0.3)
    assert found.loss == pytest.approx(float(loss.detach()), abs=1e-9)
    torch.testing.assert_close(found.gradient, gradient)
    each = cosines(vectors.detach())
    assert found.largest == pytest.approx(max(each))
    assert found.mean == pytest.approx(sum(each) / len(each))
    assert measure_cosines(vectors.detach()) == pytest.approx((found.largest, found.mean))


@pytest.mark.parametrize("slice_size", [1, 7, 999])
def test_slices_change_nothing(slice_size: int) -> None:
    vectors = unit(50, 9).float()
    whole, parts = pair_hinge(vectors, 0.2, 50), pair_hinge(vectors, 0.2, slice_size)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    torch.testing.assert_close(parts.gradient, whole.gradient, atol=1e-6, rtol=1e-6)
    assert (parts.largest, parts.mean) == pytest.approx((whole.largest, whole.mean))


def test_loss_falls_along_the_gradient() -> None:
    vectors = unit(20, 6)
    found = pair_hinge(vectors, 0.3)
    moved = vectors - 1e-4 * found.gradient
    assert float(pair_loss(moved, 0.3)) < found.loss - 0.5e-4 * float(found.gradient.square().sum())


def test_few_vectors_are_orthonormal() -> None:
    for n, d in ((16, 16), (5, 40), (1, 1)):
        made = generate_ebv(n, d)
        assert made.vectors.shape == (n, d) and made.steps == 0 and made.feasible
        assert made.max_cos < 1e-6
        torch.testing.assert_close(made.vectors @ made.vectors.T, torch.eye(n), atol=1e-6, rtol=0)
    assert generate_ebv(5, 8, 0.0).feasible


def test_six_lines_in_space_are_found() -> None:
    assert min(generate_ebv(6, 3, steps=300, seed=seed).max_cos for seed in range(10)) <= 0.4472 + 2e-2


def test_descent_beats_random_vectors_and_repeats() -> None:
    made = generate_ebv(64, 16, steps=1000)
    random = measure_cosines(unit(64, 16))[0]
    assert made.max_cos < 1.4 * welch_bound(64, 16) < 0.6 * random
    assert made.max_cos == pytest.approx(max(cosines(made.vectors)), abs=1e-6)
    torch.testing.assert_close(made.vectors.norm(dim=1), torch.ones(64))
    again, other = generate_ebv(64, 16, steps=50, seed=3), generate_ebv(64, 16, steps=50, seed=3)
    assert torch.equal(again.vectors, other.vectors)
    assert not torch.equal(again.vectors, generate_ebv(64, 16, steps=50, seed=4).vectors)


@pytest.mark.parametrize("anneal", [True, False])
def test_a_limit_is_kept_and_ends_the_descent(anneal: bool) -> None:
    made = generate_ebv(30, 15, 0.35, steps=2000, anneal=anneal, dtype=torch.float64)
    assert made.feasible and made.max_cos <= 0.35 + equiangular.TOLERANCE and made.steps < 2000
    assert made.vectors.dtype == torch.float64


def test_collapse_turns_back() -> None:
    # A rate this large drives vectors onto one another at once.
    made = generate_ebv(40, 4, steps=200, lr=50.0)
    assert made.max_cos <= measure_cosines(unit(40, 4))[0] + 1e-6


def test_what_is_not_reached_is_said() -> None:
    with pytest.warns(UserWarning, match=r"max_cos: 0.25 was not reached for 64 vectors of 16 dimensions in 3 steps"):
        made = generate_ebv(64, 16, 0.25, steps=3)
    assert not made.feasible and made.max_cos > 0.25
    with pytest.raises(InputError, match="was not reached"):
        generate_ebv(64, 16, 0.25, steps=3, strict=True)


def test_bad_input() -> None:
    for arguments, message in (
        ({"max_cos": 0.1}, r"max_cos: got 0.1, expected at least the Welch bound 0.21"),
        ({"max_cos": 1.0}, "below 1"),
        ({"steps": 0}, "steps"),
        ({"slice_size": 0}, "slice_size"),
        ({"lr": 0.0}, "lr"),
        ({"anneal": False}, "max_cos: needed without anneal"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ):
        with pytest.raises(InputError, match=message):
            generate_ebv(64, 16, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1"):
        welch_bound(0, 3)


def test_stored_vectors_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(equiangular_cache, "STEPS", 20)
    made = cached_ebv(12, 4, 5)
    file = tmp_path / "layerwright" / "ebv" / "12x4-seed5.safetensors"
    assert file.is_file() and len(list(file.parent.iterdir())) == 1
    calls = []

    def counted(*args: object, **settings: object) -> object:
        calls.append(args)
        return generate_ebv(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(equiangular_cache, "generate_ebv", counted)
    again = cached_ebv(12, 4, 5)
    assert not calls and torch.equal(again.vectors, made.vectors)
    assert (again.max_cos, again.mean_cos, again.steps) == (made.max_cos, made.mean_cos, made.steps)
    file.write_bytes(b"damaged")
    assert torch.equal(cached_ebv(12, 4, 5).vectors, made.vectors) and len(calls) == 1
    assert torch.equal(cached_ebv(12, 4, 5).vectors, made.vectors) and len(calls) == 1
    assert cached_ebv(3, 4).max_cos < 1e-6 and len(list(file.parent.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equiangular_cache, "STEPS", 5)
    (tmp_path / "file").write_text("")
    assert cached_ebv(6, 3, folder=tmp_path / "file").vectors.shape == (6, 3)
