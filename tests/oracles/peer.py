"""Retrieval among all keys, and experts one token, head and expert at a time, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwright.nn.peer import PEER

__all__ = ["all_keys", "best_of_all", "peer_output", "sampled_dots"]


def all_keys(keys: Tensor) -> Tensor:
    """Every expert's whole key ``(n * n, query_dim)`` from two codebooks ``(2, n, half)``."""
    n = keys.shape[1]
    return torch.stack([torch.cat([keys[0, i], keys[1, j]]) for i in range(n) for j in range(n)])


def best_of_all(query: Tensor, keys: Tensor, top_k: int) -> tuple[list[float], list[int]]:
    """Scores and indices of the `top_k` best experts for one query ``(2, half)``, by sorting all of them."""
    scores = (all_keys(keys).double() @ query.flatten().double()).tolist()
    order = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
    return [scores[e] for e in order], order


@torch.no_grad()
def peer_output(layer: PEER, x: Tensor) -> Tensor:
    """The output ``(tokens, dim)`` of `layer` in evaluation mode, float64, with a softmax gate and GELU."""
    router = layer.router
    mean, variance = torch.zeros(len(router.query)), torch.ones(len(router.query))
    weight, bias, eps = torch.ones_like(mean), torch.zeros_like(mean), 0.0
    if router.query_norm == "batch":
        norm = router.norm
        assert norm is not None
        mean, variance, weight, bias, eps = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    result = torch.zeros(len(x), layer.dim, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        query = router.query.double() @ token
        query = (query - mean.double()) / (variance.double() + eps).sqrt() * weight.double() + bias.double()
        for head, own in enumerate(query.view(router.heads, 2, -1)):
            keys = router.keys if router.share_keys else router.keys[:, head]
            scores, chosen = best_of_all(own, keys.double(), router.top_k)
            powers = [math.exp(score - max(scores)) for score in scores]
            for power, e in zip(powers, chosen, strict=True):
                inner = F.gelu(layer.down[e].double() @ token)
                result[t] += power / sum(powers) * inner * layer.up[e].double()
    return result


def sampled_dots(x: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``x[b] . table[indices[b, r]]`` one number at a time."""
    return torch.stack([torch.stack([x[b] @ table[int(e)] for e in row]) for b, row in enumerate(indices)])
