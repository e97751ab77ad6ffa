"""Random treated weights for the tests of this room."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.storage import kept_weights
from layerwright.core.treatment import Quantize
from layerwright.nn.quantizer import find_scale, quantize
from layerwright.nn.stored import Stored

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(shape: tuple[int, int, int], sparsity: float, seed: int = 0) -> Tensor:
    """Exactly the number of kept weights that storage accounts for, at random places of each matrix."""
    count, out, in_ = shape
    order = torch.rand(count, out * in_, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order.argsort(1) < kept_weights(out, in_, sparsity)).view(shape)


def quantized(
    shape: tuple[int, int, int],
    bits: int = 4,
    group_size: int = -1,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
    *,
    act_bits: int | None = None,
    input_scale: float | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Stored:
    weight = normal(*shape, seed=seed) + 0.1
    scale_dtype = torch.float32 if dtype == torch.float64 else dtype
    scale, zero = find_scale(weight, bits, group_size, symmetric, scale_dtype=scale_dtype)
    mode = "dynamic" if input_scale is None else "static"
    return Stored(
        shape,
        codes=quantize(weight, scale.float(), zero, bits),
        scale=scale.to(dtype),
        zero=zero,
        mask=mask,
        quantize=Quantize(bits, group_size, symmetric, "rtn", act_bits, mode),
        input_scale=None if input_scale is None else torch.tensor(input_scale),
    )


def sparse(shape: tuple[int, int, int], sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Stored:
    mask = random_mask(shape, sparsity, seed)
    return Stored(shape, dense=(normal(*shape, seed=seed) * mask).to(dtype), mask=mask)


def low_rank(
    shape: tuple[int, int, int], rank: int, dtype: torch.dtype = torch.float32, bits: int | None = None
) -> Stored:
    count, out, in_ = shape
    sides = ((count, out, rank), (count, rank, in_))
    if bits is None:
        left, right = (Stored(side, dense=normal(*side, seed=i).to(dtype)) for i, side in enumerate(sides))
    else:
        left, right = (quantized(side, bits, dtype=dtype, seed=i) for i, side in enumerate(sides))
    return Stored(shape, factors=(left, right))


def state_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference by the norm of what was wanted; 0 for two empty tensors."""
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm()) if wanted.numel() else 0.0
