from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.attention_heads import attention_heads
from layerwright.score.exit_curve import ExitRecords, exit_curve, exit_records
from layerwright.score.exit_taylor import exit_taylor, taylor_magnitude
from layerwright.treat.encoder_exits import add_encoder_exits
from layerwright.tune.multi_exit import MultiExitDistillation
from zoo import ZOO


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([3.0, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.theta * x).sum()


def test_opposite_gradients_do_not_cancel() -> None:
    model = Weighted()
    batches = [torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 4.0])]
    scores = taylor_magnitude(model, batches, ["theta"], lambda network, x: network(x))
    # |3| (|2| + |-2|) and |-0.5| (|1| + |4|); with signs the first would be 3 |2 - 2| = 0.
    assert scores["theta"].tolist() == [12.0, 2.5]
    signed = (model.theta.detach() * sum(batches)).abs()
    assert signed.tolist() == [0.0, 2.5]


def test_two_sentences_in_one_batch_do_cancel() -> None:
    scores = taylor_magnitude(
        Weighted(), [torch.tensor([[2.0, 1.0], [-2.0, 4.0]])], ["theta"], lambda network, x: network(x)
    )
    assert scores["theta"].tolist() == [0.0, 2.5]


def test_dropout_is_off_and_nothing_is_changed() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.9), nn.Linear(8, 1)).train()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones(1, 8)
    batches = list(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)))

    def loss(network: nn.Module, x: Tensor) -> Tensor:
        value: Tensor = network(x).square().mean()
        return value

    first, again = (taylor_magnitude(model, batches, ["0.weight", "2.weight"], loss) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(module.training for module in model.modules())
    assert not model[0].weight.requires_grad and model[0].weight.grad is None
    assert torch.equal(model[2].weight.grad, torch.ones(1, 8))


def _loop_scores(model: nn.Module, batches: list[Any], loss: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Every column and row by itself, in float64."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, torch.zeros(())) + parameter.grad.double().abs()
    found = {}
    for number in range(3):
        block = f"model.bert.encoder.layer.{number}"
        value = {
            part: (
                model.get_parameter(f"{block}.{part}.weight").detach().double() * sums[f"{block}.{part}.weight"]
            ).abs()
            for part in ("attention.output.dense", "intermediate.dense", "output.dense")
        }
        heads = torch.stack([value["attention.output.dense"][:, 8 * h : 8 * h + 8].sum() for h in range(4)])
        rows, columns = value["intermediate.dense"], value["output.dense"]
        neurons = torch.stack([rows[n].sum() + columns[:, n].sum() for n in range(64)])
        found[block] = (heads, neurons)
    model.zero_grad()
    return found


def test_heads_and_neurons_against_loops() -> None:
    model, batches = ZOO["bert"]()
    exits = add_encoder_exits(model)
    distillation = MultiExitDistillation(ZOO["bert"]()[0], "final")

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return distillation.loss(network, batch, hard=0.1)

    scores = exit_taylor(exits, batches, loss)
    expected = _loop_scores(exits, batches, loss)
    assert set(scores) == set(expected) == set(attention_heads(exits))
    for path, own in scores.items():
        assert torch.allclose(own.heads.double(), expected[path][0], rtol=1e-4)
        assert torch.allclose(own.neurons.double(), expected[path][1], rtol=1e-4)
        assert own.heads.dtype == torch.float32


def test_early_exits_count() -> None:
    model, batches = ZOO["bert"]()
    exits = add_encoder_exits(model)

    def all_exits(network: Any, batch: Any) -> Tensor:
        loss: Tensor = network(**batch).loss
        return loss

    def last(network: Any, batch: Any) -> Tensor:
        out = network(**batch)
        return nn.functional.cross_entropy(out.logits, batch["labels"])

    wide, narrow = exit_taylor(exits, batches, all_exits), exit_taylor(exits, batches, last)
    first = next(iter(wide))
    assert not torch.allclose(
        wide[first].heads / wide[first].heads.sum(), narrow[first].heads / narrow[first].heads.sum()
    )


def test_half_precision_is_summed_in_float32() -> None:
    model, batches = ZOO["bert"]()
    scores = exit_taylor(add_encoder_exits(model.bfloat16()), batches, lambda network, batch: network(**batch).loss)
    assert all(own.neurons.dtype == torch.float32 and bool(own.neurons.isfinite().all()) for own in scores.values())


def test_bad_scores() -> None:
    with pytest.raises(ValueError, match="does not depend on theta"):
        taylor_magnitude(Weighted(), [torch.ones(2)], ["theta"], lambda _network, x: (x.requires_grad_() * 2).sum())
    with pytest.raises(ValueError, match="not finite"):
        taylor_magnitude(Weighted(), [torch.ones(2)], ["theta"], lambda network, x: network(x) * float("nan"))
    with pytest.raises(TypeError, match="model"):
        model, batches = ZOO["gpt2"]()
        exit_taylor(model, batches, lambda network, batch: network(**batch).loss)


RECORDS = ExitRecords(
    (1, 2, 4),
    torch.tensor([[0.1, 0.2, 0.9], [0.6, 0.3, 0.1], [0.7, 0.65, 0.2], [0.9, 0.8, 0.7]]),
    torch.tensor([[1, 1, 1], [0, 1, 1], [2, 0, 0], [1, 1, 2]]),
    torch.tensor([1, 1, 0, 2]),
)


def test_a_threshold_by_hand() -> None:
    point = RECORDS.point(0.61)
    assert RECORDS.blocks(0.61).tolist() == [1, 1, 4, 4]
    assert (point.blocks, point.accuracy) == (2.5, 0.75)
    assert RECORDS.accuracies() == [0.25, 0.75, 1.0]
    assert RECORDS.point(0.0).blocks == 4
    assert RECORDS.point(float("inf")).blocks == 1
    assert RECORDS.blocks(0.1).tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("blocks", [1.0, 1.7, 2.0, 2.5, 3.9, 4.0])
def test_threshold_for_a_number_of_blocks_is_the_smallest(blocks: float) -> None:
    found = RECORDS.threshold_for(blocks)
    assert RECORDS.point(found).blocks <= blocks
    below = [value for value in RECORDS.entropies[:, :-1].flatten().tolist() if value < found]
    assert all(RECORDS.point(value).blocks > blocks for value in [0.0, *below] if value < found and found > 0)
    with pytest.raises(ValueError, match="blocks"):
        RECORDS.threshold_for(0.5)


def test_threshold_within_a_loss_runs_the_fewest_blocks() -> None:
    values = [0.0, *(value + 1e-3 for value in RECORDS.entropies[:, :-1].flatten().tolist())]
    for loss in (0.0, 0.25, 0.5, 0.8):
        found = RECORDS.point(RECORDS.threshold_within(loss))
        assert found.accuracy >= 1.0 - loss
        assert found.blocks == min(p.blocks for p in map(RECORDS.point, values) if p.accuracy >= 1.0 - loss)
    with pytest.raises(ValueError, match="loss"):
        RECORDS.threshold_within(-0.1)


def test_curve_agrees_with_prediction() -> None:
    model, batches = ZOO["bert"]()
    exits = add_encoder_exits(model)
    for position in (1, 2):
        head: Any = exits.head(position)
        head.classifier.weight.data.mul_(20)
    records = exit_records(exits, batches)
    curve = exit_curve(exits, batches, rounds=2)
    assert [point.threshold for point in curve] == sorted({point.threshold for point in curve})
    assert (curve[0].blocks, curve[-1].blocks) == (3, 1)
    threshold = records.threshold_for(2.0)
    found = [exits.predict(batch, threshold) for batch in batches]
    assert torch.equal(torch.cat([own.exits for own in found]), records.blocks(threshold))
    right = torch.cat([own.labels == batch["labels"] for own, batch in zip(found, batches, strict=True)])
    assert records.point(threshold).accuracy == pytest.approx(float(right.double().mean()))
    row = curve[1].to_data()
    assert row["ms"] > 0 and row["speed_up"] > 0
    assert exit_curve(exits, batches, [0.3])[0].ms is None
    with pytest.raises(ValueError, match="threshold"):
        exit_curve(exits, batches, [-1.0])
    with pytest.raises(ValueError, match="thresholds"):
        exit_curve(exits, batches, [])
    with pytest.raises(ValueError, match="labels"):
        exit_records(exits, [{"input_ids": batches[0]["input_ids"]}])
