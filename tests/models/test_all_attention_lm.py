"""The language model of all-attention layers: causal, block by block, what it counts, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.models.all_attention_lm import AllAttentionLM

IDS = torch.randint(20, (2, 13), generator=torch.Generator().manual_seed(0))


def made(**settings: Any) -> AllAttentionLM:
    return AllAttentionLM(20, 16, 3, 4, 8, **({"max_span": 5} | settings)).eval()


@pytest.mark.parametrize(
    "settings", [{}, {"mask_empty": False}, {"adaptive_span": True, "ramp": 2, "init_span": 0.4}, {"ffn": 24}]
)
def test_block_by_block_is_one_run(settings: dict[str, Any]) -> None:
    model, memory, parts = made(**settings), None, []
    for block in IDS.split(4, 1):
        logits, memory = model.read(block, memory)
        parts.append(logits)
    assert memory is not None
    assert all(states.shape == (2, 5, 16) and not states.requires_grad for states in memory)
    assert torch.allclose(torch.cat(parts, 1), model(IDS), atol=1e-5)


def test_the_cache_follows_the_span() -> None:
    model = made(max_span=300, adaptive_span=True, ramp=4)
    ids = IDS.repeat(1, 30)
    _, memory = model.read(ids)
    kept = 300 - (300 - 4) // 64 * 64
    assert [states.shape[1] for states in memory] == [kept] * 3
    logits, _ = model.read(IDS, memory)
    whole = model(torch.cat([ids, IDS], 1))[:, -13:]
    assert torch.allclose(logits, whole, atol=1e-5)


def test_later_tokens_change_nothing_before_them() -> None:
    model, other = made(), IDS.clone()
    other[:, 6] = (other[:, 6] + 1) % 20
    a, b = model(IDS), model(other)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_one_table_and_the_published_number_of_parameters() -> None:
    model = made()
    assert len({id(attention.relative) for attention in model.attentions}) == 1
    assert sum(name.endswith("relative.weight") for name, _ in model.named_parameters()) == 1
    with torch.device("meta"):  # 18 layers, 512 features, 1024 vectors, span 8192: 39 million
        small = AllAttentionLM(205, 512, 18, 8, 1024, max_span=8192, adaptive_span=True)
    total = sum(parameter.numel() for parameter in small.parameters())
    layer = 4 * 512**2 + 2 * 1024 * 512 + 2 * 512 + 8
    assert total == 18 * layer + 64 * 8192 + 205 * 512 * 2 + 205
    assert 38.5e6 < total < 39.5e6


def test_persistent_share_and_spans() -> None:
    model = made(adaptive_span=True, init_span=0.5)
    mass = model.attention_mass(IDS)
    assert mass.shape == (3, 4)
    assert bool(((mass > 0) & (mass < 1)).all())
    assert model.span_penalty().item() == pytest.approx(3 * 2.5)
    assert made().span_penalty().item() == 0
    with torch.no_grad():
        for attention in model.attentions:
            attention.span.z.fill_(-3)
    model.clamp_spans_()
    assert model.span_penalty().item() == 0


def test_it_learns_and_seeds_are_kept() -> None:
    model, again = made(seed=3), made(seed=3)
    before = torch.random.get_rng_state()
    assert not torch.equal(made(seed=4)(IDS), model(IDS))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(again(IDS), model(IDS))
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_wrong_inputs() -> None:
    with pytest.raises(InputError, match="layers: got 0"):
        AllAttentionLM(20, 16, 0, 4, 8, max_span=5)
    with pytest.raises(InputError, match="memory: got 1 layers, expected 3"):
        made().read(IDS, [torch.zeros(2, 3, 16)])
