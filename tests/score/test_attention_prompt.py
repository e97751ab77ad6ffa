from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.allocate.kv_budgets import kmeans_1d, kv_budgets
from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.score.attention_prompt import PromptSimilarity, attention_prompt_similarity
from layerwright.score.base import Subject
from layerwright.score.blocks import attention_similarity
from zoo import ZOO


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
@torch.no_grad()
def test_it_is_the_cosine_around_attention(name: str) -> None:
    model, batches = ZOO[name]()
    model.eval()
    ids = batches[0]["input_ids"]
    found = attention_prompt_similarity(model, ids)
    blocks = find_blocks(model)[0]
    subject = Subject(model, as_calibration([{"input_ids": ids}]), blocks=blocks.names)
    scores = attention_similarity(subject).sensitivities
    torch.testing.assert_close(
        found, 1 - torch.tensor([scores[n] for n in blocks.names]).double(), rtol=1e-5, atol=1e-6
    )
    one = torch.stack([attention_prompt_similarity(model, row[None]) for row in ids])
    torch.testing.assert_close(found, one.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention_prompt_similarity(model, ids, row=1), one[1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_by_hand_in_a_llama() -> None:
    model, batches = ZOO["llama"]()
    ids = batches[0]["input_ids"][:1]
    inner = model.eval().model
    stream, rotary = inner.embed_tokens(ids), None
    places = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(stream, places)
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min).triu(1)
    values = []
    for block in inner.layers:
        change = block.self_attn(block.input_layernorm(stream), position_embeddings=rotary, attention_mask=mask)[0]
        values.append(float(torch.cosine_similarity(stream, stream + change, -1).mean()))
        stream = stream + change
        stream = stream + block.mlp(block.post_attention_layernorm(stream))
    torch.testing.assert_close(
        attention_prompt_similarity(model, ids), torch.tensor(values).double(), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_attention_that_adds_nothing_has_similarity_one_and_is_squeezed() -> None:
    model, batches = ZOO["llama"]()
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    found = attention_prompt_similarity(model.eval(), batches[0]["input_ids"]).tolist()
    assert abs(found[1] - 1) < 1e-6
    assert kmeans_1d(found, 3)[1] == 2
    budgets = kv_budgets(found, 20)
    assert budgets[1] == min(budgets) < 20


@torch.no_grad()
def test_padding_does_not_count() -> None:
    model, batches = ZOO["llama"]()
    ids = batches[0]["input_ids"][:1]
    mask = torch.ones_like(ids)
    padded = torch.cat([ids.new_zeros(1, 3), ids], 1)
    wide = torch.cat([mask.new_zeros(1, 3), mask], 1)
    model.eval()
    found = attention_prompt_similarity(model, padded, wide)
    torch.testing.assert_close(found, attention_prompt_similarity(model, ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, attention_prompt_similarity(model, padded), atol=1e-4)


def test_what_has_no_decoder_is_refused() -> None:
    with pytest.raises(InputError, match="decoder"):
        PromptSimilarity(nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]))
    model, _ = ZOO["llama"]()
    with pytest.raises(InputError, match="watch"):
        PromptSimilarity(model).values()
