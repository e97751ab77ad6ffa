"""Use of retrieved experts: against counting by hand, and at its two ends."""

from __future__ import annotations

import math

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.explain.retrieved_experts import RetrievedExperts, retrieved_experts
from layerwright.nn.peer import PEER
from layerwright.treat.swap_peer import swap_peer
from zoo import ZOO


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_are_those_by_hand() -> None:
    layer = PEER(8, 36, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    layer(draw(50, 8) + 1)
    batches = [draw(4, 5, 8, seed=1), draw(3, 8, seed=2)]
    layer.train()
    found = retrieved_experts(layer, batches)[""]
    assert layer.training
    counts, weight = [0] * 36, [0.0] * 36
    layer.eval()
    for batch in batches:
        gates, indices = layer.router(batch)
        for gate, index in zip(gates.flatten().tolist(), indices.flatten().tolist(), strict=True):
            counts[index] += 1
            weight[index] += gate
    assert found.counts.tolist() == counts
    assert found.weight.tolist() == pytest.approx(weight)
    assert found.tokens == 23
    assert float(found.weight.sum()) == pytest.approx(23 * 2)  # gates of a head sum to 1
    assert found.usage == sum(value > 0 for value in weight) / 36
    p = [value / sum(weight) for value in weight]
    assert found.unevenness == pytest.approx(math.log(36) + sum(v * math.log(v) for v in p if v))
    assert "36 experts" in str(found)


def test_a_router_that_takes_all_alike_is_even() -> None:
    layer = PEER(4, 9, 1, 9, 2, query_norm="none")
    layer.router.keys.data.zero_()
    found = retrieved_experts(layer, [draw(7, 4)])[""]
    assert found.usage == 1
    assert found.unevenness == pytest.approx(0, abs=1e-6)


def test_one_expert_for_all_is_as_uneven_as_can_be() -> None:
    layer = PEER(4, 9, 1, 1, 2, query_norm="none")
    layer.router.query.data.zero_()
    found = retrieved_experts(layer, [draw(7, 4)])[""]
    assert found.usage == 1 / 9
    assert found.unevenness == pytest.approx(math.log(9))
    assert found.counts.sum() == 7


def test_a_model_with_padding() -> None:
    model, _ = ZOO["llama"]()
    swapped, names = swap_peer(model, "all", num_experts=16, heads=2, top_k=2, query_dim=8)
    ids = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    found = retrieved_experts(swapped, [{"input_ids": ids, "attention_mask": mask}])
    assert tuple(found) == names
    for used in found.values():
        assert used.tokens == 9
        assert int(used.counts.sum()) == 9 * 4
        assert isinstance(used, RetrievedExperts)
    assert not any(layer.router._forward_hooks for layer in swapped.modules() if isinstance(layer, PEER))


def test_a_model_without() -> None:
    model, batches = ZOO["llama"]()
    with pytest.raises(InputError, match="no PEER layer"):
        retrieved_experts(model, batches)
