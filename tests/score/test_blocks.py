from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.allocate import keep_blocks
from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import Quantize
from layerwright.score import block_magnitude, block_perplexity, block_removal, block_taylor
from layerwright.score.base import Subject
from layerwright.treat.apply import apply_plan
from layerwright.treat.drop import drop_blocks
from zoo import ZOO


def subject(name: str = "llama") -> Subject:
    model, batches = ZOO[name]()
    return Subject(model, as_calibration(batches), blocks=find_blocks(model)[0].names)


class Product(nn.Module):
    """A chain of blocks of one factor each, twice side by side: ``y = x * prod(w)``."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Factor(value) for value in values)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Factor(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 1), value, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight + self.offset)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).pow(2).mean()


def products(values: list[float], batches: list[tuple[float, float]]) -> Subject:
    rows = [tuple(torch.full((2, 1), value, dtype=torch.float64) for value in pair) for pair in batches]
    model = Product(values)
    return Subject(model, Calibration(rows, squared), blocks=[f"layers.{i}" for i in range(len(values))])


def test_perplexity_without_a_block_that_does_nothing_is_that_of_the_whole_model() -> None:
    found = subject()
    block = found.model.model.layers[2]
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        nn.init.zeros_(layer.weight)
    scores = block_perplexity(found)
    whole = math.exp(found.calibration.mean_loss(found.model))
    assert scores.sensitivities["model.layers.2"] == pytest.approx(whole, rel=1e-6)
    assert scores.base_loss == pytest.approx(math.log(whole), rel=1e-6)
    # Every other block of the untrained model is made worth keeping: without it the perplexity is infinite.
    others = {
        path: value if path == "model.layers.2" else max(value, whole + 1)
        for path, value in scores.sensitivities.items()
    }
    assert keep_blocks(others, 1, protect_first=0, protect_last=0) == [0, 1, 3]


def test_a_block_that_does_nothing_ranks_first_in_a_trained_chain() -> None:
    found = products([1.3, 1.0, 1.2], [(1.0, 1.56), (2.0, 3.12)])
    scores = block_perplexity(found)
    assert keep_blocks(scores, 1, protect_first=0, protect_last=0) == [0, 2]
    assert scores.sensitivities["layers.1"] == pytest.approx(1.0)
    assert block_removal(found).sensitivities["layers.1"] == pytest.approx(0.0)


def test_perplexity_equals_that_of_the_model_with_the_block_dropped() -> None:
    found = subject("gpt2")
    for path, value in block_perplexity(found).sensitivities.items():
        shorter, _ = drop_blocks(found.model, [path])
        assert value == pytest.approx(math.exp(found.calibration.mean_loss(shorter)), rel=1e-5)


def naive_taylor(found: Subject, accumulate: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for path in found.blocks:
        total = 0.0
        for _name, weight in found.model.get_submodule(path).named_parameters():
            if _name.endswith("bias"):
                continue
            sums = [0.0] * weight.numel()
            for batch in found.calibration:
                gradient = torch.autograd.grad(found.calibration.loss(found.model, batch), weight)[0]
                for i, (w, g) in enumerate(zip(weight.flatten().tolist(), gradient.flatten().tolist(), strict=True)):
                    sums[i] += w * g if accumulate == "signed" else abs(w * g)
            total += sum(abs(value) for value in sums)
        values[path] = total
    return values


@pytest.mark.parametrize("accumulate", ["signed", "absolute"])
def test_taylor_against_a_loop_over_elements(accumulate: str) -> None:
    found = subject("gpt2")
    found = Subject(found.model, found.calibration, blocks=found.blocks[1:2])
    scores = block_taylor(found, accumulate=accumulate)  # type: ignore[arg-type]
    expected = naive_taylor(found, accumulate)
    assert dict(scores.sensitivities) == pytest.approx(expected, rel=1e-4)


def test_taylor_is_the_first_order_of_removing_an_element() -> None:
    for value in (1e-3, 1e-4):
        found = products([value], [(1.0, 3.0)])
        score = block_taylor(found).sensitivities["layers.0"]
        loss = found.calibration.mean_loss(found.model)
        without = products([0.0], [(1.0, 3.0)])
        difference = abs(loss - without.calibration.mean_loss(without.model))
        assert abs(score - difference) <= 2 * value**2


def test_opposite_gradients_cancel_only_with_their_sign() -> None:
    found = products([1.0], [(1.0, 3.0), (1.0, -1.0)])
    assert block_taylor(found).sensitivities["layers.0"] == pytest.approx(0.0, abs=1e-9)
    assert block_taylor(found, accumulate="absolute").sensitivities["layers.0"] == pytest.approx(8.0)


def test_taylor_reductions_and_power_by_hand() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            self.b = nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return x

    network = nn.Module()
    network.layers = nn.ModuleList([Block(), Block()])  # type: ignore[assignment]

    def loss(found: nn.Module, _batch: Any) -> Tensor:
        block = found.layers[0]  # type: ignore[index]
        return block.a.sum() + 2 * block.b.sum()

    def score(**settings: Any) -> float:
        found = Subject(network, Calibration([torch.ones(1)], loss), blocks=["layers.0", "layers.1"])
        return block_taylor(found, **settings).sensitivities["layers.0"]

    # w * g is [[1, 2], [3, 4]] and [[4, 0], [0, 2]]: rows sum to (3, 7) and (4, 2).
    assert score() == 16
    assert score(power=2) == 30 + 20
    assert score(row_reduction="max") == 7 + 4
    assert score(row_reduction="mean") == 5 + 3
    assert score(row_reduction="prod", matrix_reduction="max") == 21
    assert score(matrix_reduction="mean") == 8
    assert score(matrix_reduction="prod") == 60


def test_magnitude_is_a_hand_sum_and_knows_no_data() -> None:
    found = subject("gpt2")
    scores = block_magnitude(found).sensitivities
    for path in found.blocks:
        block = found.model.get_submodule(path)
        weights = [p for name, p in block.named_parameters() if not name.endswith("bias")]
        assert len(weights) == 6  # four matrices and two norms
        expected = sum(float(w.detach().double().abs().sum()) for w in weights)
        assert scores[path] == pytest.approx(expected, rel=1e-5)
    other = Subject(found.model, as_calibration(ZOO["gpt2"]()[1][:1]), blocks=found.blocks)
    assert block_magnitude(other).sensitivities == scores
    squared_sum = block_magnitude(found, power=2).sensitivities
    first = found.model.get_submodule(found.blocks[0])
    by_hand = sum(float(p.detach().pow(2).sum()) for n, p in first.named_parameters() if not n.endswith("bias"))
    assert squared_sum[found.blocks[0]] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("scorer", [block_taylor, block_perplexity, block_magnitude])
def test_the_model_is_left_as_it_was(scorer: Any) -> None:
    found = subject()
    found.model.train()
    frozen = found.model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    scorer(found)
    assert found.model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in found.model.model.layers.parameters())
    assert all(p.grad is None for p in found.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.model.modules())


def test_half_precision_sums_in_float32() -> None:
    found = subject()
    reference = block_taylor(found).sensitivities
    found.model.bfloat16()
    for path, value in block_taylor(found).sensitivities.items():
        assert value == pytest.approx(reference[path], rel=0.1)


def test_an_infinite_perplexity_is_infinite_importance_with_a_warning() -> None:
    found = products([1.0, 1e-200, 1.0], [(1e200, 1.0)])
    with pytest.warns(UserWarning, match="layers.1 is not finite"):
        scores = block_perplexity(found)
    assert scores.sensitivities["layers.1"] == math.inf
    assert 1 in keep_blocks(scores, 2, protect_first=0, protect_last=0)


def test_bad_input() -> None:
    found = subject()
    with pytest.raises(TypeError, match="loss_fn"):
        block_perplexity(
            Subject(found.model, as_calibration([torch.zeros(1, 3, dtype=torch.long)]), blocks=found.blocks)
        )
    with pytest.raises(InputError, match="empty"):
        as_calibration([])
    plan = {r.path: (Quantize(4, method="rtn"),) for r in list_layers(found.model) if r.role == "q"}
    packed, _ = apply_plan(found.model, plan)
    assert block_perplexity(Subject(packed, found.calibration, blocks=found.blocks)).sensitivities
    with pytest.raises(InputError, match=r"q_proj\.weight has no gradient"):
        block_taylor(Subject(packed, found.calibration, blocks=found.blocks))
    simulated, _ = apply_plan(found.model, plan, simulate=True)
    of_packed = block_magnitude(Subject(packed, found.calibration, blocks=found.blocks)).sensitivities
    of_dense = block_magnitude(Subject(simulated, found.calibration, blocks=found.blocks)).sensitivities
    assert of_packed == pytest.approx(of_dense, rel=1e-5)


def test_short_sequences_are_refused() -> None:
    found = subject()
    one = as_calibration([{"input_ids": torch.tensor([[3]]), "labels": torch.tensor([[3]])}])
    for scorer in (block_perplexity, block_taylor):
        with pytest.raises(InputError, match="batches"):
            scorer(Subject(found.model, one, blocks=found.blocks))


@pytest.mark.parametrize("settings", [{"num_remove": 2}, {"num_remove": -1}, {"num_remove": 9}])
def test_keep_blocks_refuses_counts_and_says_how_many_go(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_remove.*expected 0 to 1"):
        keep_blocks([1.0, 2.0, 3.0, 4.0], protect_first=1, protect_last=1, **settings)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5])
def test_keep_blocks_refuses_ratios(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        keep_blocks([1.0, 2.0, 3.0, 4.0], ratio=ratio, protect_first=0, protect_last=0)
