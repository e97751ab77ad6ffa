"""Products of integers whose scales change along the sum: exact inside a group, scaled in float32 between groups.

``y[m, n] = sum_g sa[m, g] * sw[n, g] * I[m, n, g]`` with ``I[m, n, g] = sum_{k in g} qa[m, k] * (qw[n, k] - z[n, g])``
(two-step dequantization, Zheng et al., 2024, MixLLM): the zero point is taken off in 8 bits, the products of one group
add up in 32 bits, and only then do the scales come in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.quantizer import find_scale, quantize

__all__ = [
    "FEW_TOKENS",
    "MAGIC",
    "MAGIC_LIMIT",
    "grouped_matmul",
    "magic_float",
    "quantize_token_groups",
    "round_token_groups",
    "shifted_codes",
]

FEW_TOKENS = 32
"""Input rows up to which bfloat16 inputs on a CPU are rounded and multiplied with the packed codes: reading the weight
is what takes the time then.

Measured on AVX-512, one thread of a busy machine, 2048 x 2048 with a tenth of the rows at 8 bits, time of a dense
bfloat16 layer over this one, medians of 9 pairs, packed codes / integer products: 8 rows 1.3 / 0.2, 16 rows 0.9 / 0.3,
32 rows 0.7 / 0.5, 128 rows 0.7 / 0.8."""

MAGIC = 0x4B400000
"""The bits of the float 12582912 = 1.5 * 2**23, at which one step of the float is one."""

MAGIC_LIMIT = 1 << 22
"""Sums below this size are exact in `magic_float`."""

_PRODUCT_BYTES = 64 << 20


def magic_float(total: Tensor) -> Tensor:
    """int32 `total` with ``|total| < 2**22`` as float32, by reading ``total + MAGIC`` as a float and taking it off.

    An accelerator starts its sums at `MAGIC` and so needs no conversion (Zheng et al., 2024). Here a cast is as fast;
    this is the reference.

    Raises:
        InputError: not int32.
    """
    if total.dtype != torch.int32:
        raise InputError(f"total: got {total.dtype}, expected int32 sums")
    return (total + MAGIC).view(torch.float32) - 12582912.0


def quantize_token_groups(x: Tensor, group_size: int = -1) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of `x` ``(tokens, in)`` and scale ``(tokens, groups)`` float32: the largest size over 127."""
    scale, _ = find_scale(x, 8, group_size, full_range=True)
    return quantize(x, scale, None, 8), scale


def round_token_groups(x: Tensor, group_size: int = -1) -> Tensor:
    """The values of the codes of `quantize_token_groups`, in the dtype of `x`, in a few operations: for few tokens."""
    size = x.shape[-1] if group_size == -1 else group_size
    groups = x.float().unflatten(-1, (-1, size))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_(min=torch.finfo(torch.float32).eps)
    return torch.div(groups, scale).round_().mul_(scale).flatten(-2).to(x.dtype)


def shifted_codes(codes: Tensor, zero: Tensor | None) -> Tensor:
    """``codes - zero`` int8 ``(rows, in)`` for int8 `zero` ``(rows, groups)``; codes of at most 7 bits with a zero
    point stay inside 8 bits.
    """
    if zero is None:
        return codes
    rows, groups = zero.shape
    return (codes.view(rows, groups, -1) - zero.unsqueeze(-1)).view_as(codes)


def grouped_matmul(x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The product above, float32 ``(tokens, rows)``: one integer product for each group.

    Args:
        x: int8 ``(tokens, in)``.
        x_scale: ``(tokens, groups)``, ``(tokens, 1)`` or a scalar.
        codes: int8 ``(rows, in)``, zero points taken off.
        scale: ``(rows, groups)``.

    Memory: the result and one group's sums, for as many tokens at a time as keep these below 64 MiB.

    Raises:
        InputError: sizes that do not fit.
    """
    rows, groups = scale.shape
    if x.shape[1] != codes.shape[1] or codes.shape[1] % groups or codes.shape[0] != rows:
        raise InputError(
            f"codes: {tuple(codes.shape)} does not fit inputs {tuple(x.shape)} and scales {(rows, groups)}"
        )
    if x_scale.dim() == 2 and x_scale.shape[1] not in (1, groups):
        raise InputError(f"x_scale: got {x_scale.shape[1]} groups, expected 1 or the weight's {groups}")
    size = codes.shape[1] // groups
    columns = scale.float().t().contiguous()
    by_token = x_scale.float().expand(len(x), groups) if x_scale.dim() == 2 else x_scale.float().expand(len(x), 1)
    y = torch.zeros(len(x), rows, dtype=torch.float32, device=x.device)
    step = max(1, _PRODUCT_BYTES // max(1, 8 * rows))
    for start in range(0, len(x), step):
        tokens = slice(start, start + step)
        for group in range(groups):
            inside = slice(group * size, (group + 1) * size)
            total = torch._int_mm(x[tokens, inside].contiguous(), codes[:, inside].t()).float()
            total *= columns[group]
            if by_token.shape[1] > 1:
                total *= by_token[tokens, group, None]
            y[tokens] += total
    return y if by_token.shape[1] > 1 else y.mul_(by_token)
