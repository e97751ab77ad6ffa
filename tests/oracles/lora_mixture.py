"""A mixture of low-rank experts one token and one expert at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwright.nn.lora_experts import LoRAExperts


@torch.no_grad()
def token_weights(experts: LoRAExperts, x: Tensor) -> list[float]:
    """Weights of the experts for one token ``(in,)``."""
    if experts.lora_gate is None:
        return [1.0]
    logits = [float(row.double() @ x.double()) for row in experts.lora_gate]
    top = max(logits)
    powers = [math.exp(v - top) for v in logits]
    p = [v / sum(powers) for v in powers]
    if experts.routing == "top-k":
        chosen = sorted(range(len(p)), key=lambda i: -p[i])[: experts.top_k]
        raw = [p[i] if i in chosen else 0.0 for i in range(len(p))]
    elif experts.routing == "threshold":
        raw = [v if v >= experts.max_threshold else 0.0 for v in p]
    else:
        height = float(experts.lora_threshold[0].double() @ x.double()) + float(experts.lora_offset)
        tau = experts.max_threshold / (1 + math.exp(-height))
        raw = [max(v - tau, 0.0) for v in p]
    total = sum(raw)
    return [v / total if total else 0.0 for v in raw]


@torch.no_grad()
def change(experts: LoRAExperts, rows: Tensor) -> Tensor:
    """What the mixture adds to ``(tokens, in)``."""
    result = torch.zeros(len(rows), experts.lora_B.shape[0], dtype=torch.float64)
    for t, x in enumerate(rows):
        for i, weight in enumerate(token_weights(experts, x)):
            a = experts.lora_A[i * experts.rank : (i + 1) * experts.rank].double()
            b = experts.lora_B[:, i * experts.rank : (i + 1) * experts.rank].double()
            result[t] += weight * experts.alpha / experts.rank * (b @ (a @ x.double()))
    return result
