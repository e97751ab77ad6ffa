"""Wide and sparse layers: one small matrix for many blocks of features, between permutations."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["PKLayer", "ShallowMixer", "SparseWeightMLP"]

Permutation = Literal["identity", "commute", "random"] | Tensor


class PKLayer(nn.Module):
    """``x -> J2 (I_n kron A) J1 x``: a matrix `A` applied to each of `n` blocks of features, between two permutations.

    With no permutation, features of ``vec(X)`` (columns of ``X``, tokens by channels, one after the other) are mixed along
    the tokens; with ``commute`` on both sides along the channels; with ``random`` ones the blocks are no longer tokens or
    channels of an image. Seen as one matrix, the layer is as wide as all features and has a share ``1 / n`` of weights
    that are not zero (Hayase and Karakida, 2024, arXiv 2306.01470). Permutations are stored as indices: memory grows
    with the features, not with their square.

    Args:
        dim_block: features of a block.
        num_blocks: `n`.
        out_block: features of a block behind the layer; as many if left out.
        perm_in, perm_out: ``identity``, ``commute`` (blocks become the other axis), ``random``, or indices: feature `i`
            of what follows is feature ``perm[i]`` of what comes.
        bias: one for each feature of a block, shared by all blocks.
        generator: of permutations and first weights (He normal, by the features of a block).

    Raises:
        InputError: sizes below 1, or indices that are no permutation.
    """

    perm_in: Tensor | None
    perm_out: Tensor | None

    def __init__(
        self,
        dim_block: int,
        num_blocks: int,
        out_block: int | None = None,
        perm_in: Permutation = "identity",
        perm_out: Permutation = "identity",
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        out_block = dim_block if out_block is None else out_block
        if min(dim_block, num_blocks, out_block) < 1:
            raise InputError(
                f"dim_block, num_blocks: got {dim_block}, {num_blocks} to {out_block}, expected at least 1"
            )
        self.dim_block, self.num_blocks, self.out_block = dim_block, num_blocks, out_block
        self.weight = nn.Parameter(torch.empty(out_block, dim_block))
        nn.init.normal_(self.weight, std=math.sqrt(2 / dim_block), generator=generator)
        self.bias = nn.Parameter(torch.zeros(out_block)) if bias else None
        self._commute = (
            self._store("perm_in", perm_in, num_blocks * dim_block, generator),
            self._store("perm_out", perm_out, num_blocks * out_block, generator),
        )

    def _store(self, name: str, wanted: Permutation, size: int, generator: torch.Generator | None) -> bool:
        """Keep the indices as a buffer; returns whether a transposition does instead."""
        if isinstance(wanted, str):
            if wanted not in ("identity", "commute", "random"):
                raise InputError(f"{name}: got {wanted!r}, expected identity, commute, random or indices")
            indices = torch.randperm(size, generator=generator) if wanted == "random" else None
        else:
            indices = wanted.long()
            if indices.shape != (size,) or not torch.equal(indices.sort().values, torch.arange(size)):
                raise InputError(
                    f"{name}: expected each of 0 to {size - 1} once, got a tensor of shape {tuple(wanted.shape)}"
                )
        self.register_buffer(name, indices)
        return isinstance(wanted, str) and wanted == "commute"

    @property
    def width_in(self) -> int:
        """Features of the input."""
        return self.num_blocks * self.dim_block

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, num_blocks * dim_block)`` to ``(batch, num_blocks * out_block)``.

        Raises:
            TypeError: whole numbers.
            InputError: another number of features.
        """
        if not x.is_floating_point():
            raise TypeError(f"x: got {x.dtype}, expected floating-point numbers")
        if x.dim() != 2 or x.shape[1] != self.width_in:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, {self.width_in})")
        if self._commute[0]:
            blocks = x.unflatten(1, (self.dim_block, self.num_blocks)).mT
        else:
            moved = x if self.perm_in is None else x.index_select(1, self.perm_in)
            blocks = moved.unflatten(1, (self.num_blocks, self.dim_block))
        mixed = nn.functional.linear(blocks, self.weight, self.bias)
        if self._commute[1]:
            return mixed.mT.flatten(1)
        flat = mixed.flatten(1)
        return flat if self.perm_out is None else flat.index_select(1, self.perm_out)

    def dense_weight(self) -> Tensor:
        """The one matrix ``(features behind, features before)`` that does the same."""
        device, dtype = self.weight.device, self.weight.dtype
        bias, self.bias = self.bias, None
        try:
            return self.forward(torch.eye(self.width_in, device=device, dtype=dtype)).mT
        finally:
            self.bias = bias


class ShallowMixer(nn.Module):
    """``relu(relu(W X) V)``: one mixing of tokens, one of channels, on features ``vec(X)`` of width tokens times channels.

    Args:
        tokens, channels: of ``X``.
        permute: random permutations around both mixings, drawn once (the random permuted mixer).
        bias: of both.
        generator: of everything random.
    """

    def __init__(
        self, tokens: int, channels: int, permute: bool = False, bias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        along: Permutation = "random" if permute else "identity"
        across: Permutation = "random" if permute else "commute"
        self.token = PKLayer(tokens, channels, None, along, along, bias, generator)
        self.channel = PKLayer(channels, tokens, None, across, across, bias, generator)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens * channels)`` to the same."""
        mixed: Tensor = self.channel(self.token(x).relu()).relu()
        return mixed


class SparseWeightMLP(nn.Module):
    """A wide perceptron whose weights are zero but for a random share, fixed at the start (Golubeva et al., 2021).

    Args:
        width: of every layer.
        density: share of weights that are not zero, above 0 and at most 1.
        depth: layers, each with ReLU.
        generator: of masks and first weights (He normal, by the weights that a unit has on the average).

    Raises:
        InputError: a number outside its range.
    """

    mask: Tensor

    def __init__(self, width: int, density: float, depth: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise InputError(f"density: got {density}, expected above 0 and at most 1")
        if width < 1 or depth < 1:
            raise InputError(f"width, depth: got {width} and {depth}, expected at least 1")
        weights, masks = torch.empty(depth, width, width), torch.empty(depth, width, width)
        nn.init.normal_(weights, std=math.sqrt(2 / (width * density)), generator=generator)
        masks.bernoulli_(density, generator=generator)
        self.weight = nn.Parameter(weights * masks)
        self.register_buffer("mask", masks.bool())

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to the same."""
        for weight in self.weight * self.mask:
            x = nn.functional.linear(x, weight).relu()
        return x
