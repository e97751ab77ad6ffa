"""Efficient additive attention by its definition: one token, one feature at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwright.nn.additive_attention import EfficientAdditiveAttention


def additive_attention(layer: EfficientAdditiveAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weights of a layer with Euclidean weights, from its parameters alone."""
    weights = {name: tensor.double() for name, tensor in layer.state_dict().items()}

    def linear(name: str, row: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ row + weights[f"{name}.bias"]

    def unit(row: Tensor) -> Tensor:
        return row / math.sqrt(sum(float(value) ** 2 for value in row))

    outputs, scores = [], []
    for sample in x.double():
        queries = [unit(linear("to_query", token)) for token in sample]
        keys = [unit(linear("to_key", token)) for token in sample]
        raw = [float(query @ weights["w_g"][:, 0]) / math.sqrt(layer.dim) for query in queries]
        length = math.sqrt(sum(value**2 for value in raw))
        shares = [value / length for value in raw]
        pooled = torch.zeros_like(queries[0])
        for share, query in zip(shares, queries, strict=True):
            pooled = pooled + share * query
        outputs.append(
            torch.stack(
                [
                    linear("final", linear("proj", pooled * key) + query)
                    for key, query in zip(keys, queries, strict=True)
                ]
            )
        )
        scores.append(torch.tensor(shares, dtype=torch.float64)[:, None])
    return torch.stack(outputs), torch.stack(scores)
