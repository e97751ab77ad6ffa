"""All-attention key by key, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["all_attention"]


def turned(vector: Tensor, place: int) -> Tensor:
    """A vector of a head at a place, pair by pair."""
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = place * 10_000.0 ** (-i / half)
        a, b = vector[i].clone(), vector[i + half].clone()
        out[i], out[i + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


@torch.no_grad()
def all_attention(layer: nn.Module, x: Tensor, memory: Tensor | None = None) -> Tensor:
    """What `nn.all_attention.AllAttention` gives, without dropout: loops over samples, heads, queries and keys."""
    x = x.double()
    memory = x[:, :0] if memory is None else memory.double()
    width, heads, limit = layer.head_dim, layer.num_heads, layer.max_span or 10**9
    batch, tokens, dim = x.shape
    if not layer.mask_empty:
        memory = torch.cat([x.new_zeros(batch, limit, dim), memory], 1)
    states = torch.cat([memory, x], 1)

    def project(linear: nn.Linear, values: Tensor) -> Tensor:
        out = values @ linear.weight.double().T
        return out if linear.bias is None else out + linear.bias.double()

    q, k, v = (project(getattr(layer, name), states) for name in ("q_proj", "k_proj", "v_proj"))
    stored = layer.persistent
    scale = (math.sqrt(width), math.sqrt(max(1, layer.num_vectors))) if stored.rescale else (1, 1)
    result = torch.zeros(batch, tokens, dim, dtype=torch.float64)
    for sample in range(batch):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for token in range(tokens):
                place = memory.shape[1] + token
                query = q[sample, place, part]
                rows = []
                for other in range(place + 1):
                    rank = place - other - (0 if layer.include_self else 1)
                    if not 0 <= rank < limit:
                        continue
                    key = k[sample, other, part]
                    if layer.position == "rope":
                        score = turned(query, place) @ turned(key, other)
                    else:
                        score = query @ key
                    if layer.relative is not None:
                        score = score + query @ layer.relative.weight.double()[:, limit - 1 - rank]
                    seen = 1.0
                    if layer.span is not None:
                        z = float(layer.span.z[head])
                        seen = min(1.0, max(0.0, (z * limit - rank) / layer.span.ramp + 1))
                    rows.append((score / math.sqrt(width), seen, v[sample, other, part]))
                for n in range(layer.num_vectors):
                    score = query @ stored.keys[head, n].double() * scale[0] / math.sqrt(width)
                    rows.append((score, 1.0, stored.values[head, n].double() * scale[1]))
                highest = max(score for score, _, _ in rows)
                weights = [math.exp(score - highest) * seen for score, seen, _ in rows]
                total = sum(weights)
                for weight, (_, _, value) in zip(weights, rows, strict=True):
                    result[sample, token, part] += weight / total * value
    return project(layer.o_proj, result)
