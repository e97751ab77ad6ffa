from __future__ import annotations

import math

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.models.masked_lm import IGNORED, bert_mask, masked_lm, masked_lm_loss


def test_shares_of_the_mask() -> None:
    ids = torch.randint(250, (400, 100), generator=torch.Generator().manual_seed(0))
    read, labels = bert_mask(ids, 256, vocabulary=256, generator=torch.Generator().manual_seed(1))
    chosen = labels != IGNORED
    assert chosen.sum(1).tolist() == [15] * 400
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(read[~chosen], ids[~chosen])
    masked = read[chosen] == 256
    same = read[chosen] == ids[chosen]
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(same.float().mean()) == pytest.approx(0.1 + 0.1 / 256, abs=0.015)
    assert float(chosen.float().mean(0).std()) < 0.03  # every place is chosen about as often
    again = bert_mask(ids, 256, vocabulary=256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], read)


def test_loss_counts_chosen_tokens_alone() -> None:
    model = masked_lm(16, 2, 2, max_len=20).eval()
    ids = torch.randint(256, (4, 20), generator=torch.Generator().manual_seed(0))
    read, labels = bert_mask(ids, 256, vocabulary=256, ratio=0.3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = masked_lm_loss(model, read, labels)
        theirs = model(input_ids=read, labels=labels).loss
    torch.testing.assert_close(loss, theirs)
    assert float(loss) == pytest.approx(math.log(257), rel=0.05)


def test_shape_and_seed() -> None:
    before = torch.get_rng_state()
    model = masked_lm(24, 3, 4, ffn_dim=40, vocabulary=100, max_len=30)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 3, 4)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (40, 100, 30)
    assert torch.equal(torch.get_rng_state(), before)
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    same = masked_lm(24, 3, 4, ffn_dim=40, vocabulary=100, max_len=30).state_dict()[weight]
    assert torch.equal(model.state_dict()[weight], same)


def test_bad_input() -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(InputError, match="mask_ratio: got 1"):
        bert_mask(ids, 256, vocabulary=256, ratio=1)
    with pytest.raises(InputError, match="ids: got shape"):
        bert_mask(ids[:, :1], 256, vocabulary=256)
    with pytest.raises(InputError, match="heads: got 5"):
        masked_lm(16, 2, 5)
    with pytest.raises(InputError, match="depth: got 0"):
        masked_lm(16, 0, 2)
