"""Evol-Q: never worse, exact prefix caching, one seed one result, restored after an exception."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration, logits_of
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import Quantize
from layerwright.nn.quantized import QuantLinear
from layerwright.studies._vit import build_vit, vit_plan
from layerwright.treat.apply import apply_plan
from layerwright.tune import TUNERS
from layerwright.tune._scales import BlockScales, blocks_with_scales
from layerwright.tune.evolq import FLOOR, PAPER_STEPS, EvolQ, Population
from layerwright.tune.losses import info_nce_outputs

SHORT = {"passes": 2, "cycles": 3, "population": 5, "tournament": 3, "step": 0.05, "relative": True}


def images(count: int = 40, batch: int = 16) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return [{"pixel_values": part} for part in x.split(batch)]


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    """``(original, quantized, batches)``; weights are made larger, so that quantization hurts an untrained network."""
    model = build_vit(hidden_size=16, depth=3, num_heads=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(8)
    data = images()
    quantized, _ = apply_plan(model, vit_plan(model, 3, 8, weight_symmetric=False), data)
    return model, quantized, data


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def fitness(model: nn.Module, reference: nn.Module, data: list[dict[str, Tensor]]) -> float:
    calibration = as_calibration(data)
    full = [batch for batch in data if len(batch["pixel_values"]) == len(data[0]["pixel_values"])]
    losses = [
        info_nce_outputs(logits_of(calibration.forward(model, b)), logits_of(calibration.forward(reference, b)))
        for b in full
    ]
    return float(torch.stack(losses).mean())


def test_fitness_never_rises_and_is_what_the_model_gives(pair: Any) -> None:
    reference, quantized, data = pair
    before = state(quantized)
    tuned, report = EvolQ(**SHORT).fit(quantized, data, reference)
    assert same(state(quantized), before)
    losses = [report.start_loss, *(step.loss for step in report.history)]
    assert all(a >= b for a, b in itertools.pairwise(losses))
    assert report.best_loss < report.start_loss and report.best_loss == losses[-1]
    assert report.start_loss == pytest.approx(fitness(quantized, reference, data), abs=1e-6)
    assert report.best_loss == pytest.approx(fitness(tuned, reference, data), abs=1e-6)
    # Three attention modules, the last one first; two starts and three children each.
    blocks = [step.block for step in report.history]
    assert blocks == [f"vit.layers.{i}.attention" for i in (2, 1, 0)] * 2
    assert report.n_evals == 2 + 2 * 3 * 3
    # Only scales and codes of attention's linear layers moved, and zero points did not.
    moved = {key for key, value in state(tuned).items() if not torch.equal(value, before[key])}
    assert moved and all(".attention." in key and key.endswith(("weight_scale", "weight_packed")) for key in moved)
    assert any(key.endswith("weight_packed") for key in moved)
    assert set(report.rounded) == {
        p for p, m in quantized.named_modules() if isinstance(m, QuantLinear) and ".attention." in p
    }


def test_prefix_caching_is_exact_and_saves(pair: Any) -> None:
    reference, quantized, data = pair
    _, cached = EvolQ(**SHORT).fit(quantized, data, reference)
    _, whole = EvolQ(**SHORT, keep_prefix=False).fit(quantized, data, reference)
    assert cached.history == whole.history and cached.best_loss == pytest.approx(whole.best_loss, abs=1e-6)
    assert whole.forwards == pytest.approx(whole.n_evals)
    # Children of the last of three blocks cost a third of a forward, of the first all: 2/3 on average.
    assert cached.forwards == pytest.approx(2 + 18 * 2 / 3)
    _, forward = EvolQ(**SHORT, order="forward").fit(quantized, data, reference)
    _, plain = EvolQ(**SHORT, order="forward", keep_prefix=False).fit(quantized, data, reference)
    assert forward.history == plain.history
    assert [step.block[-11] for step in forward.history] == list("012012")


def test_one_seed_one_result(pair: Any) -> None:
    reference, quantized, data = pair
    random = torch.get_rng_state()
    first, a = EvolQ(**SHORT, seed=4).fit(quantized, data, reference)
    second, b = EvolQ(**SHORT, seed=4).fit(quantized, data, reference)
    other, _ = EvolQ(**SHORT, seed=5).fit(quantized, data, reference)
    assert a == b and same(state(first), state(second)) and not same(state(first), state(other))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("settings", [{"cycles": 0}, {"passes": 0}])
def test_no_children_change_no_bit(pair: Any, settings: dict[str, int]) -> None:
    reference, quantized, data = pair
    tuned, report = EvolQ(**(SHORT | settings)).fit(quantized, data, reference)
    assert same(state(tuned), state(quantized))
    assert report.start_loss == report.best_loss and report.n_evals == 1 and not report.history


def test_restored_after_an_exception(pair: Any) -> None:
    reference, quantized, data = pair
    mine = copy.deepcopy(quantized)
    seen: list[int] = []

    def stop(_what: str, done: int, _all: int) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EvolQ(**SHORT).fit_(mine, data, reference, progress=stop)
    assert seen == [1, 2, 3, 4] and same(state(mine), state(quantized))
    assert not any("forward" in module.__dict__ for module in mine.modules())


def test_population_keeps_its_size_and_its_best() -> None:
    population = Population.of(1.0, torch.zeros(1), 4)
    generator = torch.Generator().manual_seed(0)
    for loss in (2.0, 0.5, 0.7, 3.0, 0.9):
        population.insert(loss, torch.tensor([loss]))
        assert len(population.members) == 4
    assert sorted(member[0] for member in population.members) == [0.5, 0.7, 0.9, 1.0]
    assert population.best[0] == 0.5
    # A tournament among all finds the best, one draw finds anyone.
    assert float(population.parent(200, generator)) == 0.5
    assert len({float(population.parent(1, generator)) for _ in range(50)}) > 1


def test_scales_stay_positive_and_a_large_step_warns(pair: Any) -> None:
    reference, quantized, data = pair
    with pytest.warns(UserWarning, match="is not below its smallest scale"):
        tuned, _ = EvolQ(passes=1, cycles=4, step=1e3).fit(quantized, data, reference)
    for block in blocks_with_scales(tuned):
        assert float(block.read().min()) >= FLOOR


def test_a_mutation_stays_within_the_step_of_its_width(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, _, data = pair
    assert PAPER_STEPS == {2: 1e-3, 3: 1e-3, 4: 1e-3, 5: 1e-4, 6: 1e-4, 7: 1e-4, 8: 1e-4}
    owner = "vit.layers.1.attention"
    plan = {f"{owner}.{name}": (Quantize(bits, method="mse"),) for name, bits in (("q_proj", 4), ("o_proj", 8))}
    quantized, _ = apply_plan(reference, plan, data)
    (block,) = blocks_with_scales(quantized, None, reference)
    wide = {module.quantize.bits: module.weight_scale.numel() for _, module in block.layers}
    assert block.steps(PAPER_STEPS).tolist() == pytest.approx([1e-3] * wide[4] + [1e-4] * wide[8])
    start, written = block.read(), []
    write = BlockScales.write_

    def see(self: BlockScales, theta: Tensor) -> None:
        written.append(theta.clone())
        write(self, theta)

    monkeypatch.setattr(BlockScales, "write_", see)
    for settings, widths in (
        ({}, block.steps(PAPER_STEPS)),
        ({"step": 5e-4}, torch.full_like(start, 5e-4)),
        ({"step": 0.01, "relative": True}, torch.full_like(start, 0.01 * float(start.median()))),
    ):
        written.clear()
        # One cycle: the child's parent is the start.
        EvolQ(passes=1, cycles=1, **settings).fit(quantized, data, reference)
        moved = (written[0] - start).abs()
        assert bool((moved <= widths * 1.001 + 1e-9).all()) and bool((moved > 0.5 * widths).any())


def test_scales_of_other_rounding_keep_their_codes(pair: Any) -> None:
    reference, _, data = pair
    path = "vit.layers.1.attention.q_proj"
    gptq, _ = apply_plan(reference, {path: (Quantize(3, method="gptq"),)}, data)
    tuned, report = EvolQ(**SHORT).fit(gptq, data, reference)
    assert report.rounded == ()
    moved = {key for key, value in state(tuned).items() if not torch.equal(value, state(gptq)[key])}
    assert moved <= {f"{path}.weight_scale"}
    # Given outputs instead of the model: the same.
    calibration = as_calibration(data)
    with torch.no_grad():
        outputs = [logits_of(calibration.forward(reference, batch)) for batch in data]
    again, other = EvolQ(**SHORT).fit(gptq, data, outputs)
    assert other == report and same(state(again), state(tuned))


def test_codes_follow_the_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    quantized, _ = apply_plan(model, {"0": (Quantize(3, symmetric=False, method="mse"),)}, [torch.randn(4, 8)])
    layer = quantized[0]
    weight = model[0].weight.detach()
    before = layer.codes(0, 0, 4).clone()
    kept = copy.deepcopy(layer)
    kept.set_scale_(layer.weight_scale * 2)
    assert torch.equal(kept.codes(0, 0, 4), before)
    torch.testing.assert_close(kept.dequantize(), 2 * layer.dequantize())
    layer.set_scale_(layer.weight_scale * 2, weight)
    assert not torch.equal(layer.codes(0, 0, 4), before)
    inside = (weight / layer.weight_scale).round() + layer.weight_zero
    assert torch.equal(layer.codes(0, 0, 4), inside.clamp(-4, 3).to(torch.int8))
    with pytest.raises(InputError, match="expected positive numbers"):
        layer.set_scale_(-layer.weight_scale)
    with pytest.raises(InputError, match=r"weight: got \(4, 7\)"):
        layer.set_scale_(layer.weight_scale, weight[:, 1:])


def test_heldout_batches_choose_the_pass(pair: Any) -> None:
    reference, quantized, _ = pair
    data = images(64)
    tuned, report = EvolQ(**(SHORT | {"passes": 3}), heldout=0.25).fit(quantized, data, reference)
    assert len(report.heldout_losses) == 3
    assert fitness(tuned, reference, data[3:]) == pytest.approx(min(report.heldout_losses), abs=1e-6)
    with pytest.raises(InputError, match="leaves nothing"):
        EvolQ(**SHORT, heldout=0.01).fit(quantized, data, reference)


def test_last_small_batch_is_dropped_and_networks_without_attention_work(pair: Any) -> None:
    reference, quantized, data = pair
    assert [len(batch["pixel_values"]) for batch in data] == [16, 16, 8]
    _, report = EvolQ(**SHORT).fit(quantized, data, reference)
    _, without = EvolQ(**SHORT).fit(quantized, data[:2], reference)
    assert report == without
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    x = [torch.randn(12, 8)]
    small, _ = apply_plan(plain, {"0": (Quantize(3, method="mse"),), "2": (Quantize(3, method="mse"),)}, x)
    _, report = EvolQ(**SHORT, blocks=("2", "0")).fit(small, x, plain)
    assert {step.block for step in report.history} == {"0", "2"} and report.best_loss <= report.start_loss


def test_bfloat16(pair: Any) -> None:
    reference, _, data = pair
    half = copy.deepcopy(reference).bfloat16()
    batches = [{"pixel_values": batch["pixel_values"].bfloat16()} for batch in data]
    quantized, _ = apply_plan(half, vit_plan(half, 3, 8, weight_symmetric=False), batches)
    tuned, report = EvolQ(**SHORT).fit(quantized, batches, half)
    assert report.best_loss <= report.start_loss
    assert all(m.weight_scale.dtype == torch.bfloat16 for m in tuned.modules() if isinstance(m, QuantLinear))


class Shuffling:
    """Another order in every walk."""

    def __init__(self) -> None:
        self.walks = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.walks += 1
        batches = images(32)
        yield from batches if self.walks % 2 else batches[::-1]


def test_bad_input(pair: Any) -> None:
    reference, quantized, data = pair
    with pytest.raises(InputError, match="reference: the original model"):
        EvolQ(**SHORT).fit(quantized, data)
    with pytest.raises(TypeError, match="has no weight scales"):
        EvolQ(**SHORT).fit(reference, data, reference)
    with pytest.raises(InputError, match="the list is empty"):
        EvolQ(**SHORT, blocks=()).fit(quantized, data, reference)
    with pytest.raises(InputError, match=r"unknown block 'vit.layers.7'"):
        EvolQ(**SHORT, blocks=("vit.layers.7",)).fit(quantized, data, reference)
    with pytest.raises(InputError, match="classifier: it holds no quantized layer"):
        EvolQ(**SHORT, blocks=("classifier",)).fit(quantized, data, reference)
    with pytest.raises(InputError, match="batch_size"):
        EvolQ(**SHORT).fit(quantized, images(3, 1), reference)
    with pytest.raises(InputError, match="temperature: got 0"):
        EvolQ(temperature=0)
    with pytest.raises(InputError, match="in another order"):
        EvolQ(**SHORT).fit(quantized, Calibration(Shuffling()), reference)
    with pytest.raises(InputError, match="outputs of 1 batches, the data has 3"):
        EvolQ(**SHORT).fit(quantized, data, [torch.zeros(16, 10)])
    for bad in ({"step": 0.0}, {"population": 0}, {"cycles": -1}, {"heldout": 1.0}, {"order": "up"}, {"loss": "l1"}):
        with pytest.raises(InputError):
            EvolQ(**bad)
    with pytest.raises(InputError, match="calibration"):
        EvolQ(**SHORT).fit(quantized, [], reference)
    tuner = TUNERS.get("evolq")
    with pytest.raises(InputError, match=r"evolq: .*'cycle'"):
        tuner(quantized, data, teacher=reference, cycle=3)
    assert isinstance(tuner(quantized, data, teacher=reference, seed=0, passes=1, cycles=1), nn.Module)


def test_blocks_of_a_treated_model_are_its_attention_modules(pair: Any) -> None:
    reference, quantized, _ = pair
    found = [block.path for block in blocks_with_scales(quantized, None, reference)]
    assert found == [ref.path for ref in list_layers(reference) if ref.kind == "attention"]
