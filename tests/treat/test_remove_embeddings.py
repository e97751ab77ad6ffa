from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwright as lw
from layerwright.core.errors import InputError
from layerwright.models.byte_seq2seq import ByteSeq2Seq
from layerwright.nn.one_hot import OneHotEmbedding, OneHotHead
from layerwright.studies.sequence import tiny_bert, tiny_llama
from layerwright.treat.remove_embeddings import remove_embeddings
from zoo import ZOO


def test_of_a_byte_model() -> None:
    model = ByteSeq2Seq(264, 1, 2, 4, 32, embed="learned", seed=3)
    rates: Any = [layer.dropout.p for layer in model.decoder_layers]
    bare = remove_embeddings(model)
    assert bare.settings() == model.settings() | {"embed": "onehot"}
    assert bare.decoder_layers[0].mlp[0].weight is model.decoder_layers[0].mlp[0].weight  # type: ignore[index,union-attr]
    assert [layer.dropout.p for layer in model.decoder_layers] == rates  # type: ignore[union-attr]
    assert bare.decoder_layers[-1].dropout.p == 0  # type: ignore[union-attr]
    fresh = ByteSeq2Seq(264, 1, 2, 4, 32, embed="onehot")
    state = {name: t for name, t in model.state_dict().items() if "embedding" not in name}
    fresh.load_state_dict(state, strict=False)
    src, tgt = torch.randint(256, (2, 5)), torch.randint(256, (2, 4))
    with torch.no_grad():
        assert torch.equal(bare.eval()(src, tgt), fresh.eval()(src, tgt))
    with pytest.raises(InputError, match="no embedding matrices already"):
        remove_embeddings(bare)
    with pytest.raises(InputError, match="dim: got 64 for num_embeddings 259"):
        remove_embeddings(ByteSeq2Seq(64, 1, 1, embed="learned"))


def test_of_a_tied_causal_model() -> None:
    model = tiny_llama(256, 1, 2, ffn=32)
    before = {name: id(p) for name, p in model.named_parameters()}
    bare: Any = remove_embeddings(model)
    assert isinstance(bare.get_input_embeddings(), OneHotEmbedding) and isinstance(bare.lm_head, OneHotHead)
    assert {name: id(p) for name, p in model.named_parameters()} == before and model.lm_head.weight is not None
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in bare.parameters())
    assert gone == 256 * 256 - 2
    ids = torch.randint(256, (2, 6))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(256) * 16)  # tied: the head is the same
        assert torch.allclose(bare(ids).logits, model(ids).logits, atol=1e-4)
    bare(input_ids=ids, labels=ids).loss.backward()
    assert bare.lm_head.scale.grad is not None and bare.get_input_embeddings().scale.grad is not None


def test_dropout_of_the_last_block_goes() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.3))
    bare: Any = remove_embeddings(model)
    first, last = bare.transformer.h
    assert (last.attn.resid_dropout.p, last.mlp.dropout.p, last.attn.attn_dropout.p) == (0.0, 0.0, 0.1)
    assert (first.attn.resid_dropout.p, model.transformer.h[1].mlp.dropout.p) == (0.3, 0.3)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="dim: got 64 for num_embeddings 256"):
        remove_embeddings(tiny_llama(64, 1, 2))
    with pytest.raises(TypeError, match="no tables to remove"):
        remove_embeddings(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="expected a linear layer without a bias"):
        remove_embeddings(tiny_bert(256, 1, 2))
    with pytest.raises(TypeError, match="OneHotEmbedding, expected an nn"):
        remove_embeddings(remove_embeddings(tiny_llama(256, 1, 2, ffn=32)))
    opt: Any = ZOO["opt"]()[0]
    opt.set_input_embeddings(nn.Embedding(opt.config.vocab_size, opt.lm_head.in_features + 1))
    with pytest.raises(InputError, match="not of one shape"):
        remove_embeddings(opt)


def test_a_model_without_embeddings_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_llama(264, 1, 4).eval()
    plain = remove_embeddings(model)
    lw.save(plain, tmp_path / "plain")
    loaded, _ = lw.load(tmp_path / "plain")
    ids = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain.eval()(ids).logits)
    assert not any(p.dim() == 2 and p.shape[0] == 256 for p in loaded.parameters())
