"""Matrices of a decoder, fused and laid out for inference (Li et al., 2021, EET, section on operator fusion)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.kernels import build_kernel
from layerwright.nn.quantized import QuantLinear
from layerwright.nn.resized import ResizedLinear
from layerwright.nn.slices import linear_weight, slice_linear
from layerwright.treat.engine._products import (
    DenseProduct,
    JoinedProduct,
    KernelProduct,
    Layout,
    ModuleProduct,
    Product,
    PromptWeights,
    dense,
)
from layerwright.treat.engine._sources import (
    Shape,
    SourceBlock,
    final_norm,
    position_table,
    rotary_factors,
    source_blocks,
)

__all__ = ["Block", "Decoder", "Norm", "fold_norm_", "fuse_linears", "read_decoder"]


@dataclass(frozen=True)
class Norm:
    """A norm over the last dimension.

    Attributes:
        kind: ``rms`` or ``layer``.
        eps: added to the mean square.
        bias: ``(features,)`` or None.
        gain: ``(features,)`` in float32 for ``rms``, None where it is folded into the layers that read the result.
            What is folded is ``gain * sqrt(features)``, and the norm divides by the root of the sum of squares, not of
            their mean: one operation fewer in each step.
    """

    kind: str
    eps: float
    gain: Tensor | None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of `x` ``(..., features)``, a new tensor; the slow, obvious form, for many rows."""
        if self.kind == "layer":
            return nn.functional.layer_norm(x, x.shape[-1:], self.gain, self.bias, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.mul_(x.shape[-1] ** -0.5 if self.gain is None else self.gain).to(x.dtype)


@dataclass(frozen=True)
class Block:
    """One block, ready to compute.

    Attributes:
        norm1, norm2: before attention and before the feed-forward part.
        qkv: queries, keys and values of all heads side by side; features of a head are ordered so that the two that
            turn together are neighbours.
        qk_gain: float32 ``(heads + kv_heads, head_dim)`` where queries and keys are normalised, else None.
        out, down: back to the hidden size.
        up: gate and up side by side, or up alone.
        width: of the feed-forward part.
        scale: of attention scores.
    """

    norm1: Norm
    qkv: Product
    qk_gain: Tensor | None
    out: Product
    norm2: Norm
    up: Product
    down: Product
    width: int
    scale: float


@dataclass(frozen=True)
class Decoder:
    """A whole decoder: `embedding` ``(vocabulary, hidden)``, `positions` (GPT-2) or `turns` (rotary), blocks, head."""

    shape: Shape
    embedding: Tensor
    positions: Tensor | None
    turns: Tensor | None
    blocks: tuple[Block, ...]
    norm: Norm
    head: Product
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Memory of all weights, a shared table once."""
        products = [self.head, *(p for b in self.blocks for p in (b.qkv, b.out, b.up, b.down))]
        norms = [self.norm, *(n for b in self.blocks for n in (b.norm1, b.norm2))]
        vectors = [v for n in norms for v in (n.gain, n.bias)] + [b.qk_gain for b in self.blocks]
        tables = [self.embedding, self.positions, self.turns]
        return sum(p.nbytes for p in products) + sum(t.nbytes for t in (*vectors, *tables) if t is not None)


@dataclass(frozen=True)
class _Settings:
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    rows: int
    fold: bool
    prompts: PromptWeights


def read_decoder(
    model: nn.Module,
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout = "auto",
    max_batch: int = 1,
    max_length: int = 1024,
    fold_norms: bool | None = None,
    prompt_weights: PromptWeights = "codes",
) -> Decoder:
    """Copy a decoder's weights into the engine's form; see `compile_inference` for the arguments."""
    fold = dtype == torch.float32 if fold_norms is None else fold_norms
    settings = _Settings(dtype, device, layout, max_batch, fold, prompt_weights)
    rotary = position_table(model) is None
    order = _pair_order(shape.head_dim).to(device) if rotary else None
    with torch.no_grad():
        blocks = tuple(_block(source, shape, order, settings) for source in source_blocks(model))
        embedding, head, norm = _ends(model, shape, settings)
        learned = position_table(model)
        turns = rotary_factors(model, shape, max_length).to(device) if rotary else None
    positions = None if learned is None else learned.detach().to(device, dtype)
    return Decoder(shape, embedding, positions, turns, blocks, norm, head, dtype)


def _block(source: SourceBlock, shape: Shape, order: Tensor | None, settings: _Settings) -> Block:
    norm1, gain1 = _norm(source.norm1, shape, source.qkv, settings)
    norm2, gain2 = _norm(source.norm2, shape, source.up, settings)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wanted = (queries, keys, keys) if len(source.qkv) == 3 else (queries + 2 * keys,)
    if tuple(_extent(layer)[0] for layer in source.qkv) != wanted:
        raise InputError(
            f"attention: heads were removed; the engine needs {shape.heads} and {shape.kv_heads} in every block"
        )
    turned = (queries, keys, 0)  # values are not
    orders = [_rows_in_order(rows, order) for rows, _ in zip(turned, source.qkv)]
    qkv = fuse_linears(source.qkv, settings, gain1, orders)
    up = fuse_linears(source.up, settings, gain2)
    gain = None
    if source.qk_norms is not None:
        q, k = (n.weight.detach().float().to(settings.device) for n in source.qk_norms)  # type: ignore[union-attr,operator]
        assert order is not None
        gain = torch.cat([q[order].expand(shape.heads, -1), k[order].expand(shape.kv_heads, -1)]).contiguous()
    down = fuse_linears((source.down,), settings)
    out = fuse_linears((source.out,), settings)
    width = up.rows // len(source.up)
    if down.columns != width:
        raise InputError(f"feed-forward part: {width} features go in and {down.columns} are read")
    return Block(norm1, qkv, gain, out, norm2, up, down, width, source.scale)


def _ends(model: Any, shape: Shape, settings: _Settings) -> tuple[Tensor, Product, Norm]:
    """Embedding table, head, and the norm before it."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = table.weight
    tied = isinstance(head, nn.Linear) and head.weight is weight
    embedding = torch.as_tensor(weight.dense() if hasattr(weight, "dense") else weight).detach()
    embedding = embedding.to(settings.device, settings.dtype)
    norm, _ = _norm(final_norm(model), shape, (), settings)  # `encode` returns it, so that it keeps its gain
    if tied:
        return embedding, DenseProduct(embedding, None, shared=True), norm
    return embedding, fuse_linears((head,), settings), norm


def fuse_linears(
    layers: Sequence[nn.Module],
    settings: _Settings,
    gain: Tensor | None = None,
    orders: Sequence[Tensor | None] | None = None,
) -> Product:
    """One product for layers that read the same input.

    Dense ones become one matrix, integer ones of equal form one packed matrix; others stand side by side.

    Args:
        layers: linear layers, GPT-2's ``Conv1D``, or layers in our own stored forms.
        settings: dtype, device, layout.
        gain: float32 ``(columns,)`` that multiplies their input; dense layers only.
        orders: for each layer, its outputs in this order.
    """
    orders = orders or [None] * len(layers)
    if all(_is_dense(layer) for layer in layers):
        weight, bias = _joined(layers, orders, settings, gain)
        return dense(weight, bias, settings.layout, settings.rows)
    assert gain is None
    fused = _fused_kernel(layers, orders, settings)
    if fused is not None:
        return fused
    if len(layers) > 1:
        return JoinedProduct([fuse_linears([x], settings, None, [o]) for x, o in zip(layers, orders, strict=True)])
    rows, columns = _extent(layers[0])
    return ModuleProduct(layers[0].to(settings.device), rows, columns, orders[0])


def _joined(
    layers: Sequence[nn.Module], orders: Sequence[Tensor | None], settings: _Settings, gain: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    weights, biases = [], []
    for layer, order in zip(layers, orders, strict=True):
        weight, bias = slice_linear(layer, order)
        weight = weight.detach().to(settings.device)
        weights.append((weight.float() * gain if gain is not None else weight).to(settings.dtype))
        biases.append(None if bias is None else bias.detach().to(settings.device, settings.dtype))
    some = any(bias is not None for bias in biases)
    filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return torch.cat(weights), torch.cat(filled) if some else None


def _fused_kernel(
    layers: Sequence[nn.Module], orders: Sequence[Tensor | None], settings: _Settings
) -> KernelProduct | None:
    """One packed matrix for integer layers of equal form, where the processor has a product for it."""
    usable = settings.dtype == torch.bfloat16 and settings.device.type == "cpu"
    parts = [layer for layer in layers if isinstance(layer, QuantLinear)]
    if not usable or len(parts) < len(layers) or any(p.quantize != parts[0].quantize for p in parts):
        return None
    if parts[0].quantize.act_bits or any(p.weight_packed.device.type != "cpu" for p in parts):
        return None

    def stacked(name: str) -> Tensor | None:
        values = [part._buffers[name] for part in parts]
        chosen = [v if v is None or o is None else v[o] for v, o in zip(values, orders, strict=True)]
        held = [v for v in chosen if v is not None]
        return torch.cat(held) if held else None

    packed, scale, zero = stacked("weight_packed"), stacked("weight_scale"), stacked("weight_zero")
    assert packed is not None
    assert scale is not None
    kernel = build_kernel(packed, scale.to(torch.bfloat16), zero, parts[0].quantize.bits, parts[0].columns)
    if kernel is None:
        return None
    biases = [torch.zeros(p.rows) if p.bias is None else p.bias for p in parts]
    ordered = [b if o is None else b[o] for b, o in zip(biases, orders, strict=True)]
    bias = torch.cat(ordered).to(settings.dtype) if any(p.bias is not None for p in parts) else None
    prompts = None
    if settings.prompts == "dense":
        matrices = [p.matrix(0, settings.dtype) for p in parts]
        whole = torch.cat([m if o is None else m[o] for m, o in zip(matrices, orders, strict=True)])
        prompts = dense(whole, bias, settings.layout, settings.rows)
    return KernelProduct(kernel, len(packed), parts[0].columns, bias, prompts)


def _norm(module: Any, shape: Shape, readers: Sequence[nn.Module], settings: _Settings) -> tuple[Norm, Tensor | None]:
    """The norm, and the gain that its readers take over (None: the norm keeps it)."""
    gain = module.weight.detach().to(settings.device, copy=True)
    if shape.norm == "layer":
        bias = None if module.bias is None else module.bias.detach().to(settings.device, settings.dtype, copy=True)
        return Norm("layer", shape.eps, gain.to(settings.dtype), bias), None
    foldable = settings.fold and bool(readers) and all(_is_dense(layer) for layer in readers)
    kept = None if foldable else gain.float()
    return Norm("rms", shape.eps, kept), gain.float() * len(gain) ** 0.5 if foldable else None


def fold_norm_(norm: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Multiply the gain of an RMSNorm into the columns of the dense layers that read its result; it becomes 1.

    Raises:
        TypeError: a layer that is not dense.
        InputError: a gain that does not fit.
    """
    gain: Any = norm.weight
    with torch.no_grad():
        matrices = [linear_weight(layer) for layer in layers]
        if any(matrix.shape[1] != len(gain) for matrix in matrices):
            raise InputError(f"norm: a gain of {len(gain)} for layers of {[m.shape[1] for m in matrices]} inputs")
        for matrix in matrices:
            matrix.copy_(matrix.float() * gain.float())
        gain.fill_(1.0)


def _is_dense(layer: nn.Module) -> bool:
    return type(layer) in (nn.Linear, ResizedLinear) or type(layer).__name__ == "Conv1D"


def _extent(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs."""
    if type(layer).__name__ == "Conv1D":
        rows, columns = linear_weight(layer).shape
        return rows, columns
    found: Any = layer
    if not hasattr(layer, "out_features"):
        raise InputError(
            f"layer: {type(layer).__name__} does not say how many features it has; the engine cannot run it"
        )
    return int(found.out_features), int(found.in_features)


def _pair_order(head_dim: int) -> Tensor:
    """Features of a head in the order 0, d/2, 1, d/2 + 1, ...: the two that turn together are neighbours."""
    half = head_dim // 2
    return torch.arange(head_dim).view(2, half).t().flatten()


def _rows_in_order(rows: int, order: Tensor | None) -> Tensor | None:
    """The order of features, for each head; None to leave them."""
    if order is None or not rows:
        return None
    heads = torch.arange(rows // len(order), device=order.device) * len(order)
    return (heads[:, None] + order).flatten()
