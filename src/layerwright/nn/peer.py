"""A layer of up to a million experts of one neuron each, of which every token retrieves a few (He, 2024, PEER)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._adaptive_gate import AdaptiveCalls
from layerwright.nn._expert_rows import Gradients, RowBackend, RowLists, available_backend, row_dots, row_sums
from layerwright.nn.adaptive import ACTIVATIONS
from layerwright.nn.product_keys import ExpertGate, ProductKeyRouter, QueryNorm
from layerwright.nn.treated import dtype_name, named_dtype

__all__ = ["PEER", "PEERBackend", "bytes_per_token", "expert_tables", "flops_per_token", "matched_ffn_width"]

PEERBackend = Literal["auto", "naive", "bag", "dense", "triton"]
DENSE_LIMIT = 16
"""Experts for each active one up to which a product with all of them is faster than reading the rows in use."""


class PEER(nn.Module):
    """``y = sum over heads and their top_k experts of g_e act(u_e . x) v_e`` with experts found by product keys.

    Takes the place of a feed-forward part: the residual connection and the norm before it stay outside. Heads are
    summed; an expert that several heads retrieve counts several times. Costs `flops_per_token`, whatever the number of
    experts but for its root; reads ``2 heads top_k dim`` numbers for each token without copying them, and keeps a few
    numbers for each of its experts for the backward pass, no rows.

    Source: He, 2024, Mixture of A Million Experts, arXiv 2407.04153.

    Optimizers: with ``gradients="sparse"`` (the default) the gradients of `down` and `up` hold the retrieved rows
    alone, each once. ``torch.optim.SparseAdam``, ``Adagrad`` and ``SGD`` take them; AdamW and gradient clipping over
    all parameters do not. ``SparseAdam`` moves the moments of retrieved rows alone: they differ from those of a dense Adam,
    which also decay where nothing was retrieved. ``gradients="dense"`` suits any optimizer and writes ``2 num_experts
    dim`` numbers in each step. Use no weight decay on `down` and `up`, and a larger rate (up to 10 times).

    Args:
        dim: features of a token.
        num_experts: a square; ``1024 ** 2`` in the paper.
        heads, top_k, query_dim, query_norm, share_keys, gate: see `ProductKeyRouter`.
        activation: of the experts, one of `layerwright.nn.adaptive.ACTIVATIONS`.
        gradients: form of the gradients of `down` and `up`.
        backend: ``auto``; ``naive`` gathers rows; ``bag`` (CPU) and ``triton`` (CUDA) do not; ``dense`` multiplies with
            all experts, which `auto` does up to 16 times the active ones (in training only where gradients are dense).
        generator: of the first weights.

    Raises:
        InputError: a number outside its range, or an unknown name.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 1024**2,
        heads: int = 8,
        top_k: int = 16,
        query_dim: int = 256,
        activation: str = "gelu",
        *,
        query_norm: QueryNorm = "batch",
        share_keys: bool = True,
        gate: ExpertGate = "softmax",
        gradients: Gradients = "sparse",
        backend: PEERBackend = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        for name, given, known in (("gradients", gradients, Gradients), ("backend", backend, PEERBackend)):
            if given not in get_args(known):
                raise unknown_name(name, str(given), get_args(known))
        self.router = ProductKeyRouter(
            dim, num_experts, heads, top_k, query_dim, query_norm, share_keys, gate, generator=generator
        )
        self.activation, self.gradients, self.backend = activation, gradients, backend
        self.down = nn.Parameter(torch.empty(num_experts, dim))
        self.up = nn.Parameter(torch.empty(num_experts, dim))
        self.calls = AdaptiveCalls()
        with torch.no_grad():
            for table in (self.down, self.up):
                if not table.is_meta:
                    table.normal_(0, 1 / math.sqrt(dim), generator=generator)

    @property
    def dim(self) -> int:
        """Features of a token."""
        return self.router.dim

    @property
    def num_experts(self) -> int:
        """Experts in all."""
        return self.router.num_experts

    @property
    def active(self) -> int:
        """Experts of a token, ``heads * top_k``: the granularity."""
        return self.router.heads * self.router.top_k

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The output ``(..., dim)`` in the dtype of `x`; empty input gives empty output.

        Args:
            x: ``(..., dim)``. Experts are computed in the dtype of their tables.
            mask: ``(...)``, zero for padding; None takes the attention mask that the model was given, if it is linked.

        Raises:
            InputError: shapes that do not fit, fewer than two tokens for a batch norm in training, or a backend that
                does not run there.
            TypeError: `x` is not floating-point.
        """
        gates, indices = self.router(x, self.calls.real(x) if mask is None else mask)
        if not x.numel():
            return x.clone()
        rows = x.reshape(-1, self.dim).to(self.down.dtype)
        return self.experts(rows, gates.flatten(0, -3), indices.flatten(0, -3)).view(x.shape).to(x.dtype)

    def experts(self, x: Tensor, gates: Tensor, indices: Tensor) -> Tensor:
        """``sum_r gates[t, r] act(down[indices[t, r]] . x[t]) up[indices[t, r]]``: the experts without the retrieval.

        Args:
            x: ``(tokens, dim)``.
            gates, indices: ``(tokens, ...)``, as many of each.
        """
        gates, indices = gates.flatten(1), indices.flatten(1)
        backend = self._backend(x)
        act: Callable[[Tensor], Tensor] = ACTIVATIONS[self.activation]  # type: ignore[assignment]
        if backend == "dense":
            inner = act(x @ self.down.t())
            shares = torch.zeros_like(inner, dtype=gates.dtype).scatter_add(1, indices, gates)
            return (shares * inner).to(self.up.dtype) @ self.up
        lists = RowLists(indices)
        inner = act(row_dots(x, self.down, lists, backend, self.gradients))
        return row_sums((gates * inner).to(self.up.dtype), self.up, lists, backend, self.gradients)

    def _backend(self, x: Tensor) -> RowBackend | Literal["dense"]:
        if self.backend == "triton" and available_backend(x.device) != "triton":
            raise InputError(f"backend: 'triton' needs CUDA and the package triton, got {x.device}; take 'auto'")
        if self.backend != "auto":
            return self.backend
        training = torch.is_grad_enabled() and (self.down.requires_grad or self.up.requires_grad)
        few = self.num_experts <= DENSE_LIMIT * self.active
        if few and not (training and self.gradients == "sparse"):
            return "dense"
        return available_backend(x.device)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        router = self.router
        return {
            "type": "peer",
            "dim": self.dim,
            "num_experts": self.num_experts,
            "heads": router.heads,
            "top_k": router.top_k,
            "query_dim": router.query_dim,
            "activation": self.activation,
            "query_norm": router.query_norm,
            "share_keys": router.share_keys,
            "gate": router.gate,
            "gradients": self.gradients,
            "dtype": dtype_name(self.down.dtype),
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A layer of that form with uninitialised experts."""
        settings = {name: value for name, value in spec.items() if name not in ("type", "dtype")}
        device = torch.empty(0).device
        with torch.device("meta"):
            layer = cls(**settings)
        layer = layer.to(named_dtype(spec["dtype"]))
        return layer if device.type == "meta" else layer.to_empty(device=device)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_experts} experts, {self.active} active, activation={self.activation!r}"


def flops_per_token(layer: PEER) -> int:
    """Floating-point operations of a forward pass for each token, a multiplication and addition as 2.

    ``2 d h q + 2 h n q + 4 d h k``: queries of width `q`, two codebooks of ``n`` half keys, experts. The search for the
    largest scores counts nothing.
    """
    router = layer.router
    queries = 2 * layer.dim * router.heads * router.query_dim
    return queries + 2 * router.heads * router.num_keys * router.query_dim + 4 * layer.dim * layer.active


def bytes_per_token(layer: PEER) -> int:
    """Bytes of expert rows that a forward pass reads for each token, if none is read from a cache."""
    return 2 * layer.active * layer.dim * layer.down.element_size()


def matched_ffn_width(layer: PEER, gated: bool = False) -> int:
    """Inner width of a dense feed-forward part that costs as many operations: two matrices, or three if `gated`."""
    return max(1, round(flops_per_token(layer) / ((6 if gated else 4) * layer.dim)))


def expert_tables(model: nn.Module) -> list[nn.Parameter]:
    """`down` and `up` of every PEER layer of `model`: what takes sparse gradients, no decay and a larger rate."""
    return [table for module in model.modules() if isinstance(module, PEER) for table in (module.down, module.up)]
