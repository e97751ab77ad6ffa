from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.core.errors import InputError
from layerwright.nn.ngram_embedding import NGramHashEmbedding
from layerwright.studies.sequence import tiny_bert
from layerwright.treat.swap_embeddings import size_report, swap_embeddings
from layerwright.tune.distill_embeddings import distill_embeddings
from zoo import ZOO


def strings(count: int) -> list[str]:
    return [f"word{number * 7919 % 10007}" for number in range(count)]


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=batch["input_ids"]).logits
    return result


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "albert"])
def test_swapped_saved_and_loaded(name: str, tmp_path: Path) -> None:
    built, batches = ZOO[name]()
    model: Any = built
    old = model.get_input_embeddings()
    before, vocabulary = logits(model, batches[0]), strings(old.num_embeddings)
    swapped: Any = swap_embeddings(model, vocabulary, seed=4)
    new = swapped.get_input_embeddings()
    assert isinstance(new, NGramHashEmbedding) and new.embedding_dim == old.embedding_dim
    assert new.std == pytest.approx(float(old.weight.detach().std()))
    assert torch.equal(logits(model, batches[0]), before)  # the one it was given is as it was
    assert not torch.allclose(logits(swapped, batches[0]), before)
    rows = old.num_embeddings
    assert not any(rows in tensor.shape for tensor in swapped.state_dict().values())
    lw.save(swapped, tmp_path / "out")
    loaded = lw.load(tmp_path / "out")[0]
    assert torch.equal(logits(loaded, batches[0]), logits(swapped, batches[0]))


def test_vectors_are_those_of_the_spelling() -> None:
    model = tiny_bert(16, 1, 2, vocabulary=50, labels=2)
    reference = tiny_bert(16, 1, 2, vocabulary=50, labels=2)
    swapped: Any = swap_embeddings(model, strings(50), std=0.05)
    with torch.no_grad():
        reference.get_input_embeddings().weight.copy_(NGramHashEmbedding(strings(50), 16, std=0.05).weight)
    ids = torch.randint(50, (3, 9))
    assert torch.equal(logits(swapped, {"input_ids": ids}), logits(reference, {"input_ids": ids}))


def test_a_tied_head_gets_a_weight_of_its_own(tmp_path: Path) -> None:
    model = tiny_bert(16, 1, 2, vocabulary=50)
    with pytest.raises(InputError, match=r"tie_word_embeddings\); pass untie=True"):
        swap_embeddings(model, strings(50))
    swapped: Any = swap_embeddings(model, strings(50), untie=True)
    table = model.get_input_embeddings().weight
    head = swapped.get_output_embeddings().weight
    assert torch.equal(head, table) and head is not table and head.data_ptr() != table.data_ptr()
    assert model.config.tie_word_embeddings and not swapped.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is table
    ids = torch.randint(50, (3, 9))
    swapped(input_ids=ids, labels=ids).loss.backward()
    assert head.grad is not None
    head.data.add_(1.0)
    lw.save(swapped, tmp_path / "out")
    loaded: Any = lw.load(tmp_path / "out")[0]
    assert torch.equal(loaded.get_output_embeddings().weight, head)
    assert torch.equal(logits(loaded, {"input_ids": ids}), logits(swapped, {"input_ids": ids}))


def test_bfloat16() -> None:
    model = tiny_bert(16, 1, 2, vocabulary=50, labels=2).bfloat16()
    swapped = swap_embeddings(model, strings(50))
    assert logits(swapped, {"input_ids": torch.arange(9)[None]}).dtype == torch.bfloat16


def bert_tiny(dim: int) -> Any:
    """BERT-tiny's shape (2 layers, 512 positions, 30,522 tokens) at width `dim`, as a classifier."""
    model: Any = tiny_bert(dim, 2, 2, context=512, vocabulary=30_522, labels=2)
    return model


def test_size_of_bert_tiny() -> None:
    report = size_report(bert_tiny(128))
    assert report.table_bytes == 4 * 30_522 * 128
    assert report.total_bytes == pytest.approx(17.5e6, rel=0.01)
    assert report.without_table_bytes == pytest.approx(1.9e6, rel=0.02)
    assert report.head_bytes == report.vocabulary_bytes == 0


@pytest.mark.parametrize(("dim", "predicted"), [(128, 1.92e6), (98, 1.17e6)])
def test_files_of_the_predicted_size(dim: int, predicted: float, tmp_path: Path) -> None:
    vocabulary = strings(30_522)
    vocabulary = [f"{token}{number}" for number, token in enumerate(vocabulary)]
    swapped = swap_embeddings(bert_tiny(dim), vocabulary)
    report = size_report(swapped)
    assert report.total_bytes == report.without_table_bytes == pytest.approx(predicted, rel=0.01)
    lw.save(swapped, tmp_path / "out")
    saved = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert saved == pytest.approx(report.total_bytes, rel=0.05)
    structure = (tmp_path / "out" / "layerwright.json").stat().st_size
    assert report.vocabulary_bytes < structure < report.vocabulary_bytes + 16 * 30_522


def test_size_of_an_untied_head() -> None:
    model = tiny_bert(16, 1, 2, vocabulary=50)
    assert size_report(model).head_bytes == 0
    report = size_report(swap_embeddings(model, strings(50), untie=True))
    assert report.table_bytes == 0 and report.head_bytes == 4 * (50 * 16 + 50)
    assert report.encoder_bytes == size_report(model).without_table_bytes


def test_bad_input() -> None:
    model = tiny_bert(16, 1, 2, vocabulary=50, labels=2)
    with pytest.raises(InputError, match="51 strings, the table 50 rows"):
        swap_embeddings(model, strings(51))
    with pytest.raises(InputError, match="expected the width of the table, 16"):
        swap_embeddings(model, strings(50), project_to=8)
    with pytest.raises(InputError, match="is empty"):
        swap_embeddings(model, ["", *strings(49)])
    with pytest.raises(TypeError, match=r"expected an nn\.Embedding to swap"):
        swap_embeddings(swap_embeddings(model, strings(50)), strings(50))
    with pytest.raises(TypeError, match="get_input_embeddings"):
        swap_embeddings(nn.Linear(3, 3), strings(50))
    with pytest.raises(TypeError, match="get_input_embeddings"):
        size_report(nn.Linear(3, 3))
    bart: Any = ZOO["bart"]()[0]
    with pytest.raises(InputError, match="only encoders"):
        swap_embeddings(bart, strings(bart.get_input_embeddings().num_embeddings), untie=True)


def test_distilled_table_is_the_least_squares_solution() -> None:
    table = nn.Embedding(200, 6)
    table.weight.data = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    table.requires_grad_(False)
    fitted, share = distill_embeddings(table, strings(200), 16, seed=2)
    features = torch.cat([NGramHashEmbedding(strings(200), 16, seed=2).weight, torch.ones(200, 1)], 1).double()
    solution = torch.linalg.pinv(features) @ table.weight.detach().double()
    expected = features @ solution
    assert torch.allclose(fitted.weight.double(), expected, atol=1e-4)
    error = (table.weight.double() - expected).square().sum() / (table.weight - table.weight.mean(0)).square().sum()
    assert share == pytest.approx(1 - float(error), abs=1e-4) and 0 < share < 1
    assert fitted.embedding_dim == 6 and distill_embeddings(table, strings(200), 40)[1] > share


def test_a_table_that_follows_from_spelling_is_reached() -> None:
    table = nn.Embedding(200, 6)
    hashed = NGramHashEmbedding(strings(200), 16)
    table.weight.data = hashed.weight @ torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) + 1.0
    fitted, share = distill_embeddings(table, strings(200), 16)
    assert share == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(fitted(torch.arange(200)), table.weight, atol=1e-4)


def test_distilling_bad_input() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Embedding"):
        distill_embeddings(nn.Linear(3, 3), strings(3), 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 4 strings"):
        distill_embeddings(nn.Embedding(5, 3), strings(4), 2)
    with pytest.raises(InputError, match="dim: got 5, expected 1 to 4"):
        distill_embeddings(nn.Embedding(5, 3), strings(5), 5)
