from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.nn.factorized_embedding import FactorizedEmbedding
from layerwright.nn.replace import module_from_spec
from layerwright.treat.factorize import factorize_embedding
from zoo import ZOO


def table(tokens: int = 50, hidden: int = 16, padding: int | None = None) -> nn.Embedding:
    embedding = nn.Embedding(tokens, hidden, padding_idx=padding)
    with torch.no_grad():
        embedding.weight.copy_(torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)))
        if padding is not None:
            embedding.weight[padding] = 0
    return embedding


@pytest.mark.parametrize(("tokens", "hidden"), [(50, 16), (9, 16)])
def test_full_rank_is_the_table(tokens: int, hidden: int) -> None:
    embedding = table(tokens, hidden)
    rank = min(tokens, hidden)
    new = factorize_embedding(embedding, rank)
    ids = torch.arange(tokens).view(1, -1)
    assert float((new(ids) - embedding(ids)).detach().abs().max()) < 1e-5
    assert (new.rank, new.num_embeddings, new.embedding_dim) == (rank, tokens, hidden)


@pytest.mark.parametrize("rank", [1, 3, 8, 15])
def test_error_is_what_the_singular_values_left_out_say(rank: int) -> None:
    embedding = table()
    values = torch.linalg.svdvals(embedding.weight.detach().double())
    new = factorize_embedding(embedding, rank)
    error = (new.weight - embedding.weight).detach().double().norm()
    assert float(error) == pytest.approx(float(values[rank:].square().sum().sqrt()), rel=1e-5)
    assert sum(p.numel() for p in new.parameters()) == rank * (50 + 16)


def test_again_from_the_product() -> None:
    embedding = table()
    first = factorize_embedding(embedding, 10)
    with torch.no_grad():
        first.projection.weight.add_(0.1)  # trained since: the factors are no longer those of an SVD
    again = factorize_embedding(first, 4)
    u, s, vt = torch.linalg.svd(first.weight.detach().double(), full_matrices=False)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    assert torch.allclose(again.weight.detach().double(), best, atol=1e-5)
    assert first.rank == 10


def test_padding_row_stays_zero_and_untrained() -> None:
    new = factorize_embedding(table(padding=0), 5)
    assert new.padding_idx == 0
    assert float(new(torch.tensor([0])).detach().abs().max()) < 1e-6
    new(torch.tensor([0, 1])).sum().backward()
    gradient = new.table.weight.grad
    assert gradient is not None
    assert not gradient[0].any() and gradient[1].any()


def test_settings_and_values_of_the_old_one_stay() -> None:
    embedding = table().bfloat16().requires_grad_(False).eval()
    before = embedding.weight.clone()
    new = factorize_embedding(embedding, 16)
    assert new.table.weight.dtype == torch.bfloat16
    assert not new.training and not any(p.requires_grad for p in new.parameters())
    assert torch.equal(before, embedding.weight)
    assert float((new.weight - before).float().norm() / before.float().norm()) < 0.02


def test_spec_there_and_back() -> None:
    new = factorize_embedding(table(padding=3), 5)
    other = module_from_spec(new.spec())
    assert isinstance(other, FactorizedEmbedding)
    assert other.spec() == new.spec()
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(torch.arange(50)), new(torch.arange(50)))


def test_saved_with_its_model(tmp_path: Path) -> None:
    model, batches = ZOO["bert"]()
    inner: Any = model
    inner.bert.embeddings.word_embeddings = factorize_embedding(inner.bert.embeddings.word_embeddings, 7)
    lw.save(model, tmp_path / "out")
    loaded = lw.load(tmp_path / "out")[0]
    assert torch.equal(_logits(model, batches[0]), _logits(loaded, batches[0]))


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    return logits


@pytest.mark.parametrize("rank", [0, -1, 17, True])
def test_bad_ranks(rank: int) -> None:
    with pytest.raises(ValueError, match="rank: got"):
        factorize_embedding(table(), rank)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="rank: got 6, expected 1 to 5"):
        factorize_embedding(factorize_embedding(table(), 5), 6)
    with pytest.raises(TypeError, match="embedding"):
        factorize_embedding(nn.Linear(4, 4), 2)
    with pytest.raises(ValueError, match="leave it alone"):
        factorize_embedding(nn.Embedding(9, 4, max_norm=1.0), 2)
