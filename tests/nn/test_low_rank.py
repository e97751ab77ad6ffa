from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwright.core.errors import InputError
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import LowRank, Quantize
from layerwright.nn import LowRankConv, LowRankLinear, QuantLinear, module_from_spec
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.stored import Stored
from stored_samples import DTYPES, low_rank, normal, relative, state_bytes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""The inner activations are rounded too."""


def reloaded(module: nn.Module) -> nn.Module:
    empty = module_from_spec(json.loads(json.dumps(module.spec())))  # type: ignore[operator]
    empty.load_state_dict(module.state_dict())
    return empty


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(4, 20),
    in_=st.integers(4, 20),
    rank=st.integers(1, 3),
    bits=st.sampled_from([None, 2, 5, 8]),
    dtype=st.sampled_from(DTYPES),
)
def test_bytes_are_those_that_were_planned(out: int, in_: int, rank: int, bits: int | None, dtype: torch.dtype) -> None:
    module = LowRankLinear.from_stored(low_rank((1, out, in_), rank, dtype, bits), normal(out), dtype)
    plan = (LowRank(rank), *(() if bits is None else (Quantize(bits, -1, method="rtn"),)))
    assert state_bytes(module) == stored_bytes(plan, out, in_, 1, dtype.itemsize) + out * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 4])
def test_products_and_round_trips(dtype: torch.dtype, bits: int | None) -> None:
    stored = low_rank((1, 24, 64), 8, dtype, bits)
    module = LowRankLinear.from_stored(stored, normal(24), dtype)
    assert module.bias is not None
    assert (module.in_features, module.out_features, module.weight.shape) == (64, 24, (24, 64))
    for shape in ((64,), (0, 64), (2, 3, 64)):
        x = normal(*shape, seed=1, dtype=dtype)
        wanted = x.double() @ stored.to_dense(torch.float64)[0].T + module.bias.double()
        assert relative(module(x), wanted) < TOLERANCE[dtype]
    assert relative(module.weight, stored.to_dense(torch.float64)[0]) < TOLERANCE[dtype]
    assert torch.equal(reloaded(module)(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_dense_factors_train_and_share_nothing() -> None:
    stored, bias = low_rank((1, 6, 10), 2), normal(6)
    module = LowRankLinear.from_stored(stored, bias, torch.float32)
    assert stored.factors is not None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert bool(bias.abs().sum() > 0)
    assert all(bool(f.dense is not None and f.dense.abs().sum() > 0) for f in stored.factors)
    module(normal(2, 10)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_quantized_factors_are_quantized_layers() -> None:
    module = LowRankLinear.from_stored(low_rank((1, 6, 10), 2, bits=4), None, torch.float32)
    assert isinstance(module.left, QuantLinear)
    assert isinstance(module.right, QuantLinear)


CONVS = [
    nn.Conv1d(6, 8, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, padding=1, bias=False),
    nn.Conv2d(6, 9, (3, 2), groups=3, dilation=(1, 2), stride=(2, 1)),
    nn.Conv2d(4, 8, 3, groups=2, padding=2, padding_mode="reflect"),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("bits", [None, 8])
def test_convolutions(conv: nn.Conv2d, bits: int | None) -> None:
    out, in_ = conv.out_channels, conv.weight[0].numel()
    stored = low_rank((1, out, in_), 2, bits=bits)
    conv = copy.deepcopy(conv)
    conv.weight = nn.Parameter(stored.to_dense()[0].view_as(conv.weight))
    module = LowRankConv.from_stored(stored, conv.bias, torch.float32, ConvSettings.of(conv))
    size = (7, 6)[: len(conv.kernel_size)]
    for shape in ((2, conv.in_channels, *size), (conv.in_channels, *size)):
        x = normal(*shape)
        assert torch.allclose(module(x), conv(x), atol=1e-5)
    assert torch.allclose(module.weight, conv.weight, atol=1e-6)
    assert torch.equal(reloaded(module)(x), module(x))
    plan = (LowRank(2), *(() if bits is None else (Quantize(bits, -1, method="rtn"),)))
    assert state_bytes(module) == stored_bytes(plan, out, in_, 1, 4) + (0 if conv.bias is None else 4 * out)


def test_what_has_no_factors_is_refused() -> None:
    with pytest.raises(InputError, match="factors"):
        LowRankLinear.from_stored(Stored((1, 4, 8), dense=normal(1, 4, 8)), None, torch.float32)
    with pytest.raises(InputError, match="factors"):
        LowRankLinear.from_stored(low_rank((2, 4, 8), 2), None, torch.float32)
