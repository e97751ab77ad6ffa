"""SparseGPT where its answer is known."""

from __future__ import annotations

import torch

from layerwright.core.treatment import Sparsify
from layerwright.treat.prune import sparsegpt
from layerwright.treat.quantize import prepare


def test_no_zeros_returns_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 6, 24, generator=generator)
    x = torch.randn(50, 24, generator=generator)
    factor = prepare(x.t() @ x, 50, order="natural")
    stored = sparsegpt(weight, factor, Sparsify(0.5), removed=torch.tensor([0]))
    torch.testing.assert_close(stored.to_dense(), weight, rtol=1e-6, atol=1e-6)


def test_inputs_that_are_not_related_give_magnitude_pruning_of_each_block() -> None:
    weight = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(1))
    factor = prepare(torch.eye(256), 256, order="natural")
    stored = sparsegpt(weight, factor, Sparsify(0.5))
    for block in (slice(0, 128), slice(128, 256)):
        part, found = weight[0, :, block], stored.to_dense()[0, :, block]
        cut = part.abs().flatten().kthvalue(part.numel() // 2).values
        torch.testing.assert_close(found, part * (part.abs() > cut), rtol=1e-6, atol=1e-6)
