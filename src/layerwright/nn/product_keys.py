"""Exact retrieval of the best of n x n experts for a token, from two codebooks of n keys (product keys)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._expert_rows import RowLists, available_backend, row_dots
from layerwright.nn._largest import largest

__all__ = ["ExpertGate", "ProductKeyRouter", "QueryBatchNorm", "QueryNorm", "codebook_size", "product_top_k"]

QueryNorm = Literal["batch", "layer", "none"]
ExpertGate = Literal["softmax", "sigmoid", "relu"]


def product_top_k(first: Tensor, second: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` largest of all ``first[i] + second[j]``, exactly, without forming the ``n * n`` sums.

    A sum among the largest has both parts among the largest of their half, and the pair of ranks ``(a, b)`` from 0 has
    ``(a + 1)(b + 1)`` sums at least as large, itself among them; so only pairs with ``(a + 1)(b + 1) <= top_k`` are
    formed: 50 for 16. Where sums tie, any of them may be returned.

    Args:
        first, second: ``(..., n)``.
        top_k: from 1 to ``n * n``.

    Returns:
        The sums ``(..., top_k)``, falling, and their indices ``i * n + j``, int64.
    """
    n = first.shape[-1]
    kept = min(top_k, n)
    values_a, places_a = largest(first, kept)
    values_b, places_b = largest(second, kept)
    ranks_a, ranks_b = torch.tensor(_rank_pairs(kept, top_k), device=first.device)
    values, chosen = largest(values_a.index_select(-1, ranks_a) + values_b.index_select(-1, ranks_b), top_k)
    indices = places_a.index_select(-1, ranks_a) * n + places_b.index_select(-1, ranks_b)
    return values, indices.gather(-1, chosen)


def _rank_pairs(kept: int, top_k: int) -> tuple[list[int], list[int]]:
    """Ranks ``(a, b)`` below `kept` that the `top_k` largest sums can have."""
    pairs = [(a, b) for a in range(kept) for b in range(min(kept, top_k // (a + 1)))]
    return [a for a, _ in pairs], [b for _, b in pairs]


class QueryBatchNorm(nn.Module):
    """Batch norm of queries ``(tokens, features)`` in float32, with padding left out of the statistics.

    Batch statistics in training mix all tokens of the batch, later positions too: evaluate in evaluation mode, where
    running statistics make each token's result its own. Each process has statistics of its own batch.

    Args:
        features: of a query, all heads together.
        eps: added to the variance.
        momentum: share of the new statistics in the running ones.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, queries: Tensor, real: Tensor | None = None) -> Tensor:
        """Normalized queries, in float32 or wider.

        Args:
            queries: ``(tokens, features)``.
            real: boolean ``(tokens,)``, tokens that are no padding; all by default.

        Raises:
            InputError: fewer than two tokens in training.
        """
        wide = queries.to(torch.promote_types(queries.dtype, torch.float32))
        mean, variance = self.running_mean, self.running_var
        if self.training:
            counted = wide if real is None else wide[real]
            if counted.shape[0] < 2:
                raise InputError(
                    f"query_norm: 'batch' got {counted.shape[0]} tokens in training, expected at least 2; give more "
                    "tokens, call eval(), or take query_norm='layer'"
                )
            variance, mean = torch.var_mean(counted, 0, correction=0)
            self._remember(mean.detach(), variance.detach(), counted.shape[0])
        scale = (variance + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias - mean * scale, wide, scale).to(wide.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = (variance * (count / (count - 1))).to(self.running_var.dtype)
        self.running_var.lerp_(unbiased, self.momentum)

    def _apply(self, fn: object, recurse: bool = True) -> nn.Module:
        """Running statistics stay float32 in a model of half precision, where their small steps would be lost."""
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)  # type: ignore[arg-type, no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            assert new is not None
            if new.dtype.itemsize < 4:
                self._buffers[name] = new.float() if old.is_meta else old.to(new.device)
        return self


class ProductKeyRouter(nn.Module):
    """Chooses `top_k` of ``num_experts = n * n`` experts for each head of each token, exactly, and weighs them.

    Expert ``i * n + j`` has the key ``[first_i ; second_j]``. A head's query ``BN(x W)`` is compared with ``2 n``
    half keys instead of ``n * n`` whole ones: ``n * query_dim + top_k log top_k`` operations for each. Indices carry no
    gradient: query and keys learn through the gates. Scores, norms and gates are float32 whatever the dtype of `x`.

    Lample et al., 2019, Large Memory Layers with Product Keys, arXiv 1907.05242; He, 2024, arXiv 2407.04153.

    Args:
        dim: features of a token.
        num_experts: a square.
        heads: queries of a token, at least 1.
        top_k: experts of a head, from 1 to `num_experts`.
        query_dim: of one head, even; each half meets one codebook.
        query_norm: of queries: ``batch`` spreads the use of experts (see `QueryBatchNorm`); ``layer`` takes each head's
            query by itself.
        share_keys: one pair of codebooks for all heads; False gives each its own.
        gate: of the scores that were kept, for each head.
        generator: of the first weights.

    Raises:
        InputError: a number outside its range, or an unknown name.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        heads: int = 8,
        top_k: int = 16,
        query_dim: int = 256,
        query_norm: QueryNorm = "batch",
        share_keys: bool = True,
        gate: ExpertGate = "softmax",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_keys = codebook_size(num_experts)
        if dim < 1 or heads < 1:
            raise InputError(f"dim, heads: got {dim} and {heads}, expected at least 1")
        if not 1 <= top_k <= num_experts:
            raise InputError(f"top_k: got {top_k}, expected 1 to {num_experts}, the number of experts")
        if query_dim < 2 or query_dim % 2:
            raise InputError(f"query_dim: got {query_dim}, expected an even number: each half meets one codebook")
        if query_norm not in get_args(QueryNorm):
            raise unknown_name("query_norm", str(query_norm), get_args(QueryNorm))
        if gate not in get_args(ExpertGate):
            raise unknown_name("gate", str(gate), get_args(ExpertGate))
        self.dim, self.num_experts, self.heads, self.top_k = dim, num_experts, heads, top_k
        self.query_dim, self.query_norm, self.share_keys, self.gate = query_dim, query_norm, share_keys, gate
        self.query = nn.Parameter(torch.empty(heads * query_dim, dim))
        tables = (2, self.num_keys) if share_keys else (2, heads, self.num_keys)
        self.keys = nn.Parameter(torch.empty(*tables, query_dim // 2))
        self.norm: nn.Module | None = None
        if query_norm == "batch":
            self.norm = QueryBatchNorm(heads * query_dim)
        elif query_norm == "layer":
            self.norm = nn.LayerNorm(query_dim)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw query weights and keys anew, so that scores of normalized queries have unit deviation."""
        for parameter, fan_in in ((self.query, self.dim), (self.keys, self.query_dim // 2)):
            if not parameter.is_meta:
                parameter.normal_(0, 1 / math.sqrt(fan_in), generator=generator)

    def queries(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Normalized queries ``(tokens, heads, 2, query_dim / 2)`` in float32 or wider of `x` ``(tokens, dim)``."""
        found = x.to(self.query.dtype) @ self.query.t()
        if isinstance(self.norm, QueryBatchNorm):
            found = self.norm(found, real)
        elif self.norm is not None:
            found = self.norm(found.view(-1, self.heads, self.query_dim))
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found.view(-1, self.heads, 2, self.query_dim // 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates and indices of the experts of each token.

        Args:
            x: ``(..., dim)``.
            mask: ``(...)``, zero for padding, which does not enter the statistics of a batch norm; none by default.

        Returns:
            Gates ``(..., heads, top_k)``, float32 or wider; indices of that shape, int64.

        Raises:
            InputError: shapes that do not fit, or fewer than two tokens for a batch norm in training.
            TypeError: `x` is not floating-point.
        """
        if not x.is_floating_point():
            raise TypeError(f"x: got {x.dtype}, expected a floating-point tensor")
        if x.shape[-1:] != (self.dim,):
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (..., {self.dim})")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise InputError(f"mask: got shape {tuple(mask.shape)}, expected {tuple(x.shape[:-1])}")
        shape = (*x.shape[:-1], self.heads, self.top_k)
        if not x.numel():
            gates = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
            return gates, x.new_zeros(shape, dtype=torch.int64)
        queries = self.queries(x.reshape(-1, self.dim), None if mask is None else mask.reshape(-1).bool())
        scores, indices = self.retrieve(queries)
        return self._weigh(scores).view(shape), indices.view(shape)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The best experts of each query ``(tokens, heads, 2, half)``: scores and indices ``(tokens, heads, top_k)``.

        On the CPU the search runs without gradients, and the scores of the few that were found are computed once more
        with them: their derivative then costs ``top_k`` keys for each query instead of ``num_keys``.
        """
        with torch.autocast(queries.device.type, enabled=False):
            return self._retrieve(queries, self.keys.to(queries.dtype))

    def _retrieve(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        again = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
        again = again and available_backend(queries.device) == "bag"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not again):
            if self.share_keys:
                first, second = (queries[:, :, half] @ keys[half].t() for half in (0, 1))
            else:
                halves = queries.permute(2, 1, 0, 3)  # heads first, so that rows of scores stay contiguous
                first, second = (halves[half] @ keys[half].transpose(1, 2) for half in (0, 1))
            scores, indices = product_top_k(first, second, self.top_k)
            if not self.share_keys:
                scores, indices = scores.transpose(0, 1), indices.transpose(0, 1).contiguous()
        return (self._scores(queries, keys, indices), indices) if again else (scores, indices)

    def _scores(self, queries: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
        """Scores of the experts at `indices`, which is ``(tokens, heads, top_k)``."""
        halves = torch.stack([indices // self.num_keys, indices % self.num_keys], 2)
        if not self.share_keys:
            halves = halves + self.num_keys * torch.arange(self.heads, device=indices.device)[None, :, None, None]
        found = [
            row_dots(queries[:, :, half].flatten(0, 1), table.flatten(0, -2), RowLists(own.flatten(0, 1)), "bag")
            for half, (table, own) in enumerate(zip(keys, halves.unbind(2), strict=True))
        ]
        return (found[0] + found[1]).view(indices.shape)

    def _weigh(self, scores: Tensor) -> Tensor:
        if self.gate == "softmax":
            return scores.softmax(-1)
        return scores.sigmoid() if self.gate == "sigmoid" else scores.relu()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, heads={self.heads}, top_k={self.top_k}, "
            f"query_dim={self.query_dim}, share_keys={self.share_keys}, gate={self.gate!r}"
        )


def codebook_size(num_experts: int) -> int:
    """``n`` of ``num_experts = n * n``.

    Raises:
        InputError: not the square of a number from 1 on.
    """
    n = math.isqrt(max(num_experts, 0))
    if n < 1 or n * n != num_experts:
        raise InputError(
            f"num_experts: got {num_experts}, expected a square such as {max(1, n) ** 2} or {(n + 1) ** 2}: two "
            "codebooks of equal size"
        )
    return n
