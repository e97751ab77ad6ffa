from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.score.proxies.operations import BINARY, BOUND, COMMUTATIVE, NOT_NEGATIVE, UNARY, apply_operation, arity

EXTREMES = {
    "zeros": torch.zeros(3, 4),
    "large": torch.full((3, 4), 1e38),
    "low": torch.full((3, 4), -1e38),
    "tiny": torch.full((3, 4), 1e-38),
    "mixed": torch.tensor([[1e30, -1e30, 0.0, 1e-30]] * 3),
    "broken": torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]] * 3),
    "scalar": torch.tensor(-2.0),
    "one row": torch.randn(1, 7),
    "tall": torch.randn(700, 2),
    "many axes": torch.randn(2, 3, 4),
}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("case", EXTREMES)
def test_unary_operations_are_finite_on_extremes(name: str, case: str) -> None:
    result = apply_operation(name, EXTREMES[case].clone())
    assert torch.isfinite(result).all() and float(result.abs().max()) <= BOUND
    if name in NOT_NEGATIVE:
        assert float(result.min()) >= 0


@pytest.mark.parametrize("name", BINARY)
def test_binary_operations_are_finite_on_extremes(name: str) -> None:
    for a in EXTREMES.values():
        for b in EXTREMES.values():
            result = apply_operation(name, a, b)
            assert torch.isfinite(result).all() and float(result.abs().max()) <= BOUND
            if name in NOT_NEGATIVE:
                assert float(result.min()) >= 0
            if name in COMMUTATIVE:
                assert torch.equal(result, apply_operation(name, b, a))


def test_shapes_that_differ_meet_as_scalars_or_means() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(4, 4)
    assert torch.equal(apply_operation("add", a, torch.tensor(1.0)), a + 1)
    assert torch.equal(apply_operation("add", torch.tensor([[1.0]]), a), a + 1)
    assert apply_operation("add", a, b) == a.mean() + 1
    assert apply_operation("product", a, b).dim() == 0


def test_operations_compute_what_their_names_say() -> None:
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    close = torch.testing.assert_close
    close(apply_operation("gram", x), x @ x.T)
    close(apply_operation("row_distances", x), (x[:, None] - x[None]).norm(dim=-1), atol=2e-3, rtol=1e-3)
    close(apply_operation("frobenius", x), x.norm())
    close(apply_operation("slogdet", x), torch.linalg.slogdet((x @ x.T / 6).double())[1].float(), rtol=1e-4, atol=1e-4)
    close(apply_operation("cosine", x, y), torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0))
    close(apply_operation("matmul", x, y), x @ y.T)
    close(apply_operation("hamming", x, y), ((x > 0) != (y > 0)).float().mean())
    expected = torch.nn.functional.kl_div(y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="batchmean")
    close(apply_operation("kl", x, y), expected)


def test_an_unknown_operation_is_answered_with_close_names() -> None:
    with pytest.raises(InputError, match=r"sqare.*square"):
        arity("sqare")
