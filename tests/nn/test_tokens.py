"""Only the chosen tokens are computed, and the result is the masked dense one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.tokens import run_on_tokens


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_equals_the_masked_dense_result(wanted: list[bool], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).to(dtype)
    x = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
    mask = torch.tensor(wanted).reshape(2, 3)
    seen: list[int] = []

    def fn(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return layer(rows)

    result = run_on_tokens(fn, x, mask)
    expected = layer(x) * mask[..., None]
    assert result.dtype == dtype
    assert torch.allclose(result.float(), expected.float(), atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert seen == ([sum(wanted)] if any(wanted) else [])
    (got,) = torch.autograd.grad(result.float().square().sum(), x)
    (want,) = torch.autograd.grad(expected.float().square().sum(), x)
    assert torch.allclose(got.float(), want.float(), atol=1e-5 if dtype == torch.float32 else 0.1)


def test_another_width() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(5, 4)
    mask = torch.tensor([True, False, True, True, False])
    assert torch.allclose(run_on_tokens(layer, x, mask), layer(x) * mask[:, None])


def test_shape_of_the_mask() -> None:
    with pytest.raises(InputError, match=r"mask: got shape \(2,\), expected \(3,\)"):
        run_on_tokens(nn.Identity(), torch.zeros(3, 4), torch.ones(2, dtype=torch.bool))
