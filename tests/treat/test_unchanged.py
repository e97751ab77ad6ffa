"""A step that must not change what a model computes is held to it, as far as the model's dtype can tell."""

from __future__ import annotations

import pytest
import torch

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.treat.log_equalize import log_equalize_
from layerwright.treat.migrate import unchanged
from zoo import ZOO


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moving_factors_is_no_change_in_any_dtype(dtype: torch.dtype) -> None:
    model, batches = ZOO["llama"]()
    model = structure_copy(model).to(dtype)
    assert log_equalize_(model, as_calibration(batches), v0=0.0, v1=1e6)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.003), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_a_change_is_refused(dtype: torch.dtype, share: float) -> None:
    model, batches = ZOO["llama"]()
    model = structure_copy(model).to(dtype)
    with (
        pytest.raises(InputError, match=r"the step changed the model's output by \d\.\de-\d\d of its size"),
        unchanged(model, as_calibration(batches)),
        torch.no_grad(),
    ):
        model.get_output_embeddings().weight.mul_(1 + share)  # type: ignore[operator,union-attr]
