"""A convolution written as attention over patches: its blocks between patches, and the layer made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.rel_pos_patch_attention import Border, Encoding, RelPosPatchAttention

__all__ = ["conv_anchor", "conv_to_attention", "patch_conv_blocks", "patch_radius"]

Pair = tuple[int, int]
Block = tuple[Pair, Tensor, Tensor]
"""Offset, matrix to the values of a head, matrix from them to the output."""


def patch_radius(kernel: int, patch: int, dilation: int = 1, anchor: int | None = None) -> int:
    """Patches that a kernel reaches beyond its own along one axis.

    Args:
        kernel: pixels.
        patch: side of a patch in pixels.
        dilation: pixels from one entry of the kernel to the next.
        anchor: pixels that the kernel reaches back; half of its reach if left out, for odd kernels.

    Raises:
        InputError: sizes below 1, or an even reach without an anchor.
    """
    if min(kernel, patch, dilation) < 1:
        raise InputError(f"kernel, patch, dilation: got {kernel}, {patch}, {dilation}, expected at least 1")
    reach = dilation * (kernel - 1)
    back = _anchor(kernel, dilation, anchor)
    return math.ceil(max(back, reach - back) / patch)


def patch_conv_blocks(
    weight: Tensor, patch: int, dilation: int | Pair = 1, groups: int = 1, anchor: Pair | None = None
) -> dict[Pair, Tensor]:
    """Matrices ``M`` with which a convolution of stride 1 acts between patches: ``Y_t = sum_d X_(t + d) M_d``.

    Row ``(c, u)`` and column ``(o, v)`` of ``M_d`` hold ``weight[o, c, i]`` where ``dilation i = u + patch d - v + anchor``
    for a whole `i` within the kernel, else 0; `u` is a pixel of the patch at ``t + d``, `v` one of patch ``t``. Features
    are ordered as by `layerwright.nn.patches.to_patches`. Gradients pass to `weight`.

    Args:
        weight: ``(out channels, in channels / groups, height, width)``.
        patch: side of a patch in pixels.
        dilation, groups: of the convolution.
        anchor: pixels that the kernel reaches up and to the left; half of its reach if left out.

    Returns:
        ``(rows, columns) -> (in channels patch^2, out channels patch^2)`` for all offsets up to the radius, zero blocks too.

    Raises:
        InputError: another shape, groups that do not divide the output channels, or an even kernel without an anchor.
    """
    if weight.dim() != 4:
        raise InputError(f"weight: got shape {tuple(weight.shape)}, expected (out, in / groups, height, width)")
    if groups < 1 or weight.shape[0] % groups:
        raise InputError(f"groups: got {groups}, expected a divisor of the {weight.shape[0]} output channels")
    spacing = (dilation, dilation) if isinstance(dilation, int) else dilation
    dense = _ungrouped(weight, groups)
    picks = [
        _axis_picks(dense.shape[2 + axis], patch, spacing[axis], None if anchor is None else anchor[axis]).to(dense)
        for axis in (0, 1)
    ]
    blocks = torch.einsum("ocij,aiuv,bjst->abcusovt", dense, *picks)
    blocks = blocks.flatten(5, 7).flatten(2, 4)
    below, right = (pick.shape[0] // 2 for pick in picks)
    return {
        (row - below, column - right): blocks[row, column]
        for row in range(blocks.shape[0])
        for column in range(blocks.shape[1])
    }


def conv_anchor(conv: nn.Conv2d, anchor: Pair | None = None) -> Pair:
    """Pixels that a convolution's kernel reaches up and to the left, where input and output have one size.

    Args:
        anchor: instead of what the padding says, for an even kernel whose border is added elsewhere.

    Raises:
        TypeError: not a plain ``nn.Conv2d``.
        InputError: a stride, or a padding that changes the size.
    """
    kind = type(conv)
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv: got {kind.__name__}, expected nn.Conv2d")
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        raise TypeError(f"conv: {kind.__name__} computes something else than nn.Conv2d")
    if set(conv.stride) != {1}:
        raise InputError(
            f"conv: got stride {tuple(conv.stride)}, expected 1; with a stride of one patch it is a linear patch embedding"
        )
    spread = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if anchor is not None:
        if not all(0 <= a <= s for a, s in zip(anchor, spread, strict=True)):
            raise InputError(f"anchor: got {anchor}, expected 0 to {tuple(spread)} pixels")
        return anchor
    if conv.padding == "same":
        return spread[0] // 2, spread[1] // 2
    if any(s % 2 for s in spread):
        raise InputError(f"anchor: needed for an even kernel of {tuple(conv.kernel_size)}; give (up, left) in pixels")
    half = (spread[0] // 2, spread[1] // 2)
    if conv.padding == "valid" or tuple(conv.padding) != half:
        raise InputError(f"conv: got padding {conv.padding!r}, expected {half}, so that the map keeps its size")
    return half


def conv_to_attention(
    conv: nn.Conv2d,
    patch: int,
    border: Border | None = None,
    sharpness: float = 40.0,
    head_dim: int | None = None,
    prune_zero: bool = True,
    *,
    num_heads: int | None = None,
    subtract_identity: bool = False,
    encoding: Encoding = "relative_bias",
    content: bool = False,
    key_dim: int | None = None,
    anchor: Pair | None = None,
    seed: int = 0,
) -> RelPosPatchAttention:
    """Attention over patches that computes what `conv` computes: one head for each patch that the kernel reaches.

    Head `h` looks at the patch at offset ``d_h`` (see `RelPosPatchAttention.look_at_`), and its matrices are a
    factorisation ``V_h O_h = M_d`` (see `patch_conv_blocks`): 9 heads for any kernel up to ``2 patch + 1``. At sharpness
    40 the result is exact to rounding; 4 to 8 leaves it near and can be trained on, since gradients to the biases fade
    like ``exp(-sharpness)``.

    Source: Li et al., "Can Vision Transformers Perform Convolution?" (2021, arXiv 2111.01353).

    Args:
        conv: stride 1, and a padding that keeps the size of the map.
        patch: side of a patch in pixels; tokens are ordered as by `layerwright.nn.patches.to_patches`.
        border: as of `RelPosPatchAttention`; ``zero_token`` or ``circular``, as the convolution pads, if left out.
        sharpness: of the bias at a head's offset above the others.
        head_dim: one width for all heads; the rank of each head's matrix if left out. What is more than the rank has random
            matrices to the values and zeros from there.
        prune_zero: no head for offsets whose matrix is zero.
        num_heads: heads in all; the additional ones look at the patch itself and give zero.
        subtract_identity: the layer computes ``conv(x) - x``, for a place with a skip connection.
        encoding: of the offsets.
        content: queries at zero and random keys, which change nothing before they are trained.
        key_dim: features of queries and keys; as many as the widest head has if left out.
        anchor: see `conv_anchor`.
        seed: of what is random.

    Raises:
        TypeError, InputError: see `conv_anchor`; a sharpness that is not above 0, another border mode of the padding, a
            width or a number of heads below what is needed (named in the message), or an identity between unequal widths.
    """
    reach = conv_anchor(conv, anchor)
    if not sharpness > 0:
        raise InputError(f"sharpness: got {sharpness}, expected a positive number")
    spacing = (conv.dilation[0], conv.dilation[1])
    with torch.no_grad():
        blocks = patch_conv_blocks(conv.weight.double(), patch, spacing, conv.groups, reach)
        if subtract_identity:
            if conv.in_channels != conv.out_channels:
                raise InputError(
                    f"subtract_identity: {conv.in_channels} to {conv.out_channels} channels, expected as many behind as before"
                )
            blocks[0, 0] = blocks[0, 0] - torch.eye(len(blocks[0, 0])).to(blocks[0, 0])
        parts = [(offset, *_factors(block)) for offset, block in blocks.items() if not prune_zero or bool(block.any())]
    plan = _plan(parts, head_dim, num_heads)
    layer = RelPosPatchAttention(
        conv.in_channels * patch**2, conv.out_channels * patch**2, len(plan.offsets), plan.widths,
        radius=max(abs(step) for offset in blocks for step in offset), content=content, encoding=encoding, key_dim=key_dim,
        border=_border(conv, border), bias=conv.bias is not None, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    layer.to(device=conv.weight.device, dtype=conv.weight.dtype)
    _fill_(layer, conv, parts, plan, patch)
    layer.look_at_(plan.offsets, sharpness)
    return layer.train(conv.training)


@dataclass(frozen=True)
class _Plan:
    offsets: list[Pair]
    widths: list[int]


def _plan(parts: Sequence[Block], head_dim: int | None, num_heads: int | None) -> _Plan:
    """Offsets and widths of all heads; those of `parts` come first."""
    offsets = [offset for offset, *_ in parts]
    ranks = [to_values.shape[1] for _, to_values, _ in parts]
    needed = max(ranks, default=0)
    if head_dim is not None and head_dim < max(needed, 1):
        raise InputError(f"head_dim: got {head_dim}, but the matrices of this convolution need {max(needed, 1)}")
    if num_heads is not None and num_heads < len(parts):
        raise InputError(
            f"num_heads: got {num_heads}, but this convolution needs {len(parts)} heads at this patch size"
        )
    more = max(num_heads or 1, len(parts)) - len(parts)
    widths = [head_dim or max(rank, 1) for rank in ranks] + [head_dim or max(needed, 1)] * more
    return _Plan(offsets + [(0, 0)] * more, widths)


@torch.no_grad()
def _fill_(layer: RelPosPatchAttention, conv: nn.Conv2d, parts: Sequence[Block], plan: _Plan, patch: int) -> None:
    """Write the factors of each head, in place; what is behind a head's rank gives zero."""
    layer.out.weight.zero_()
    start = 0
    for width, (_, to_values, to_output) in zip(plan.widths, parts, strict=False):
        rank = to_values.shape[1]
        layer.value.weight[start : start + rank] = to_values.mT.to(layer.value.weight)
        layer.out.weight[:, start : start + rank] = to_output.mT.to(layer.out.weight)
        start += width
    if conv.bias is not None:
        layer.out.bias.copy_(conv.bias.repeat_interleave(patch**2))
    if layer.query is not None:
        layer.query.weight.zero_()


def _factors(block: Tensor) -> tuple[Tensor, Tensor]:
    """``V (in, rank)`` and ``O (rank, out)`` of equal weight with ``V O = block``, from its rows and columns that are not zero."""
    rows, columns = block.any(1).nonzero()[:, 0], block.any(0).nonzero()[:, 0]
    left, sizes, right = torch.linalg.svd(block[rows][:, columns], full_matrices=False)
    least = sizes[:1].sum() * max(len(rows), len(columns)) * torch.finfo(block.dtype).eps
    rank = int((sizes > least).sum())
    halves = sizes[:rank].sqrt()
    to_values, to_output = block.new_zeros(len(block), rank), block.new_zeros(rank, block.shape[1])
    to_values[rows] = left[:, :rank] * halves
    to_output[:, columns] = halves[:, None] * right[:rank]
    return to_values, to_output


def _border(conv: nn.Conv2d, border: Border | None) -> Border:
    if border is not None:
        return border
    if conv.padding_mode not in ("zeros", "circular"):
        raise InputError(
            f"border: the convolution pads by {conv.padding_mode!r}, expected zeros or circular; 'interior' leaves the rim open"
        )
    return "zero_token" if conv.padding_mode == "zeros" else "circular"


def _anchor(kernel: int, dilation: int, anchor: int | None) -> int:
    reach = dilation * (kernel - 1)
    if anchor is None:
        if reach % 2:
            raise InputError(f"anchor: needed for an even kernel of {kernel}; give (up, left) in pixels")
        return reach // 2
    if not 0 <= anchor <= reach:
        raise InputError(f"anchor: got {anchor}, expected 0 to {reach} pixels")
    return anchor


def _axis_picks(kernel: int, patch: int, dilation: int, anchor: int | None) -> Tensor:
    """``(offsets, kernel, patch, patch)``: 1 where that entry of the kernel leads from input pixel `u` to output pixel `v`."""
    radius, back = patch_radius(kernel, patch, dilation, anchor), _anchor(kernel, dilation, anchor)
    offset = torch.arange(-radius, radius + 1)[:, None, None, None]
    entry = torch.arange(kernel)[:, None, None]
    u, v = torch.arange(patch)[:, None], torch.arange(patch)
    return dilation * entry == u + patch * offset - v + back


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weight of the same convolution without groups: zeros between channels of different groups."""
    if groups == 1:
        return weight
    own = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    spread = torch.einsum("gocij,gh->gohcij", weight.unflatten(0, (groups, -1)), own)
    return spread.flatten(2, 3).flatten(0, 1)
