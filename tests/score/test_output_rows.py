from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, read_matrix
from layerwright.core.layers import list_layers, structure_copy, treatable
from layerwright.score.output_rows import RowLosses, output_row_loss, round_rows, row_terms, weight_row_error
from zoo import ZOO

ROUND = round_rows(3, 8)


def linear_refs(model: nn.Module) -> list[LayerRef]:
    return [ref for ref in treatable(model) if ref.layout in ("linear", "conv1d") and ref.block is not None]


def text(count: int = 3, length: int = 7, vocabulary: int = 30) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (count, length), generator=generator)
    return [{"input_ids": ids, "labels": ids}]


def exact_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The next-token loss in float64: the models' own is computed in float32."""
    logits = model(input_ids=batch["input_ids"]).logits[0, :-1].double()
    return nn.functional.cross_entropy(logits, batch["labels"][0, 1:])


@pytest.mark.parametrize("name", ["opt", "gpt2"])  # their norms keep float64
def test_the_term_is_the_derivative_along_the_rows_own_rounding(name: str) -> None:
    model, _ = ZOO[name]()
    model.double().eval()
    data = Calibration(text(1), exact_loss)
    for ref in linear_refs(model)[:4]:
        weight = read_matrix(model, ref)[0]
        delta = (ROUND(weight.float()) - weight.float()).double()
        found = output_row_loss(model, data, [ref], ROUND, order="second").losses[ref.path]
        for row in (0, 3, ref.shape[0] - 1):
            losses = []
            for step in (1e-4, -1e-4):
                moved = weight.clone()
                moved[row] += step * delta[row]
                copy = structure_copy(model)
                owner = copy.get_submodule(ref.path)
                new = moved if ref.layout == "linear" else moved.T.contiguous()
                owner.weight = nn.Parameter(new)  # type: ignore[assignment]
                losses.append(float(data.loss(copy, next(iter(data))).detach()))
            t = (losses[0] - losses[1]) / 2e-4
            assert float(found[row]) == pytest.approx(t * t / 2, rel=2e-3, abs=1e-14)


def test_second_term_is_half_the_rank_one_fisher_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient, delta = (torch.randn(*shape, generator=generator) for shape in ((9, 6), (9, 4), (4, 6)))
    weight_gradient = (gradient.T @ x).double()
    second = torch.stack(
        [0.5 * d @ torch.outer(g, g) @ d for g, d in zip(weight_gradient, delta.double(), strict=True)]
    )
    torch.testing.assert_close(row_terms(x, gradient, delta, "second").double(), second, rtol=1e-4, atol=1e-6)
    first = (weight_gradient * delta).sum(1)
    torch.testing.assert_close(row_terms(x, gradient, delta).double(), (first + second).abs(), rtol=1e-4, atol=1e-6)
    diagonal = (weight_gradient * delta).square().sum(1) / 2
    torch.testing.assert_close(row_terms(x, gradient, delta, "diagonal").double(), diagonal, rtol=1e-4, atol=1e-6)


def test_samples_are_scored_one_at_a_time() -> None:
    model, _ = ZOO["llama"]()
    model.eval()
    refs = linear_refs(model)
    (batch,) = text(3)
    together = output_row_loss(model, Calibration([batch]), refs, ROUND)
    singles = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    apart = output_row_loss(model, Calibration(singles), refs, ROUND)
    unlabelled = output_row_loss(model, Calibration([{"input_ids": batch["input_ids"]}]), refs, ROUND)
    mean = output_row_loss(model, Calibration([batch]), refs, ROUND, reduction="mean")
    assert together.samples == 3 and together.unused == ()
    for path, loss in together.losses.items():
        assert bool((loss >= 0).all()) and float(loss.sum()) > 0
        torch.testing.assert_close(loss, apart.losses[path])
        torch.testing.assert_close(loss, unlabelled.losses[path])
        torch.testing.assert_close(loss, 3 * mean.losses[path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(dtype: torch.dtype) -> None:
    model, _ = ZOO["llama"]()
    model.to(dtype).train()
    first = next(model.parameters())
    first.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # no context of the caller's stands in the way
        found = output_row_loss(model, Calibration(text()), linear_refs(model), ROUND)
    assert all(bool((loss > 0).any()) for loss in found.losses.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not first.requires_grad and all(p.requires_grad for p in list(model.parameters())[1:])
    assert not any(module._forward_hooks for module in model.modules()) and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def both(model: nn.Module) -> list[LayerRef]:
    return [ref for ref in list_layers(model) if ref.layout == "linear"]


class Branch(nn.Module):
    """One of its layers is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y + self.b(y) if bool((x > 0).any()) else y


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def test_layers_that_a_sample_does_not_reach_are_listed() -> None:
    model = Branch()
    refs = both(model)
    data = Calibration([torch.ones(1, 16), -torch.ones(1, 16)], squares)
    found = output_row_loss(model, data, refs, ROUND)
    assert isinstance(found, RowLosses) and found.unused == ("b",)
    only = output_row_loss(model, Calibration([-torch.ones(1, 16)], squares), refs, ROUND)
    assert float(only.losses["b"].sum()) == 0 < float(only.losses["a"].sum())


def test_weight_error_rows() -> None:
    model = Branch()
    errors = weight_row_error(model, both(model), ROUND)
    weight = model.a.weight.detach()
    torch.testing.assert_close(errors["a"], (ROUND(weight) - weight).square().mean(1))


class Detached(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_what_cannot_be_scored() -> None:
    model = Branch()
    refs = both(model)
    data = Calibration([torch.ones(1, 16)], squares)
    with pytest.raises(InputError, match="no gradient"):
        output_row_loss(Detached(), data, refs, ROUND)
    with torch.inference_mode(), pytest.raises(InputError, match="no gradient"):
        output_row_loss(model, data, refs, ROUND)
    with pytest.raises(InputError, match="no loss for this model"):
        output_row_loss(model, Calibration([torch.ones(1, 16)]), refs, ROUND)
    with pytest.raises(InputError, match="order: got 'third'"):
        output_row_loss(model, data, refs, ROUND, order="third")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rows are scored in linear layers"):
        output_row_loss(model, data, [dataclasses.replace(refs[0], layout="conv")], ROUND)
    with pytest.raises(InputError, match="group_size: 7 does not divide"):
        output_row_loss(model, data, refs, round_rows(4, 7))
    with pytest.raises(InputError, match="bits"):
        output_row_loss(model, data, refs, round_rows(9, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_tied_weights_are_refused() -> None:
    model, _ = ZOO["gpt2"]()
    head = [ref for ref in list_layers(model) if ref.kind == "head" or ref.tied]
    table = [ref for ref in list_layers(model) if ref.kind == "embedding"][:1]
    for refs in (head, table):
        if refs:
            with pytest.raises(InputError, match=r"tied|rows are scored in linear"):
                output_row_loss(model, Calibration(text()), refs, ROUND)
    shared = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    shared[1].weight = shared[0].weight
    first = next(ref for ref in list_layers(shared) if ref.path == "0")
    with pytest.raises(InputError, match=r"0: its weight is tied to 1\.weight"):
        output_row_loss(shared, Calibration([torch.ones(1, 16)], squares), [first], ROUND)
