"""Bits of weights and activations by measuring whole models: the assembled model is the applied one, limits hold."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.budget import Budget
from layerwright.core.calibration import as_calibration, logits_of
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layers import list_layers, parameter_bytes, structure_copy, treatable
from layerwright.core.option import OptionTable
from layerwright.core.storage import quantized_bytes
from layerwright.core.target import Target
from layerwright.core.treatment import Quantize, RoundActivations, RoundAttention
from layerwright.data.loading import load
from layerwright.nn.activation import InputQuantizer
from layerwright.nn.attached import attached
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.decided import decided_table
from layerwright.recipes.deciders import DECIDERS, Task
from layerwright.recipes.measured_descent import decide_descent, decide_uniform
from layerwright.recipes.mixed_precision import Forms, MixedPrecision, find_variables
from layerwright.recipes.table import limits_of
from layerwright.score.costs import find_blocks_or_none, profile_model
from layerwright.studies._vit import build_vit
from layerwright.treat.apply import apply_plan
from layerwright.treat.prepare import prepare_
from layerwright.treat.writer import save_model
from layerwright.tune.losses import kl_outputs

LOADS_ALL = Target("layerwright", kinds=frozenset({"quantize", "activations", "attention"}))
FEW = {"widths": [6, 4], "samples": 8}
SHORT = {"widths": [6, 4], "samples": 8, "two_regions": False, "attention": False}


def images(count: int = 16) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(count, 1, 8, 8, generator=g), torch.randint(10, (count,), generator=g)
    return [{"pixel_values": a, "labels": b} for a, b in zip(x.split(8), y.split(8), strict=True)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network = build_vit(hidden_size=16, depth=2, num_heads=2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(6)
    return network


def task(model: nn.Module, name: str, budget: str, **settings: Any) -> Task:
    chosen = recipe(name)
    chosen = dataclasses.replace(chosen, decider_settings={**chosen.decider_settings, **settings})
    data = as_calibration(images())
    network = structure_copy(model)
    prepare_(network, chosen.prepare, data)
    refs = treatable(network)
    profile = profile_model(network, data, timing=False)
    limits = Budget.parse(budget)
    table = OptionTable((), original=profile.total)
    bench = Bench(network, None, data, data, "vit")
    return Task(
        bench, chosen, limits, limits_of(limits, table, refs, -1, 4), refs, find_blocks_or_none(network), profile, 4, LOADS_ALL
    )  # fmt: skip


def test_variables_share_inputs_and_count_values(model: nn.Module) -> None:
    data = as_calibration(images())
    found = {v.name: v for v in find_variables(model, treatable(model), data)}
    first = found["vit.layers.0.attention.q_proj input"]
    assert [path.rpartition(".")[2] for path in first.paths] == ["q_proj", "k_proj", "v_proj"]
    assert first.numel == 8 * 17 * 16 and not first.gelu
    assert "vit.layers.0.attention.k_proj input" not in found
    assert found["vit.layers.0.mlp.fc2 input"].gelu and found["vit.layers.0.mlp.fc2 input"].numel == 8 * 17 * 64
    # Query, key, value: 17 x 16 each; probabilities: 2 heads x 17 x 17.
    assert found["vit.layers.1.attention products"].numel == 8 * (3 * 17 * 16 + 2 * 17 * 17)
    assert sum(v.numel for v in found.values() if v.kind == "weight") == sum(r.numel for r in treatable(model))
    assert not any("products" in dict(m.named_children()) for m in model.modules())
    # With norms, one more variable for each: what it reads, with a range for each of its channels.
    norms = {ref.path for ref in list_layers(model) if ref.kind == "norm"}
    more = {v.name: v for v in find_variables(model, treatable(model), data, norms=True)}
    added = [v for name, v in more.items() if name not in found]
    assert {v.paths for v in added} == {(path,) for path in norms} and len(norms) == 5
    assert {(v.name, v.kind, v.channels) for v in added} == {(f"{path} norm", "norm", 16) for path in norms}
    assert all(v.numel == 8 * 17 * 16 for v in added)


@torch.no_grad()
def test_choices_are_measured_as_a_whole_model_would_be(model: nn.Module) -> None:
    data = as_calibration(images())
    mixed = MixedPrecision(model, treatable(model), data, (6, 4), Forms(two_regions=True), samples=16, norms=True)
    wanted = [logits_of(data.forward(model, b)) for b in data]
    generator = torch.Generator().manual_seed(0)
    base = mixed.kept
    for number in range(6):
        drawn = torch.randint(2, (len(base),), generator=generator).tolist()
        choice = {name: (6, 4)[place] for name, place in zip(base, drawn, strict=True)}
        got = mixed.keep(choice) if number % 3 == 2 else mixed.evaluate(choice)
        outputs = [logits_of(data.forward(mixed.model, b)) for b in data]
        by_hand = sum(float(kl_outputs(q, k)) * len(q) for q, k in zip(outputs, wanted, strict=True)) / 16
        assert got == pytest.approx(by_hand, abs=1e-6)
    # One width throughout is the applied plan, bit for bit.
    choice = dict.fromkeys(base, 4)
    mixed.evaluate(choice)
    applied, _ = apply_plan(model, mixed.layers(choice), data, simulate=True)
    for batch in data:
        assert torch.equal(logits_of(data.forward(applied, batch)), logits_of(data.forward(mixed.model, batch)))


def test_descent_holds_both_limits_and_can_be_applied(model: nn.Module) -> None:
    asked = task(model, "mptq_vit", "bits=4.5", **FEW)
    before = {key: value.clone() for key, value in asked.bench.model.state_dict().items()}
    found = decide_descent(asked)
    assert all(torch.equal(value, before[key]) for key, value in asked.bench.model.state_dict().items())
    history = found.extra["history"]
    sizes = [step["costs"] for step in history]
    assert all(b["bytes"] <= a["bytes"] for a, b in itertools.pairwise(sizes))
    assert sizes[-1]["bytes"] <= asked.limits["bytes"] and sizes[-1]["activation bits"] <= 4.5
    treated, report = apply_plan(asked.bench.model, found.layers, asked.bench.calibration)
    assert parameter_bytes(treated) == sizes[-1]["bytes"] and all(record.status == "done" for record in report)
    kinds = {type(t) for treatments in found.layers.values() for t in treatments}
    assert kinds == {Quantize, RoundActivations, RoundAttention}
    grids = {
        t.grid for p, ts in found.layers.items() if p.endswith("fc2") for t in ts if isinstance(t, RoundActivations)
    }
    assert grids == {"two_region"}
    assert set(found.reasons) == set(found.layers) and "evaluations" in found.notes
    again = decide_descent(asked)
    assert again.layers == found.layers


def test_lazy_measures_less_and_holds_as_much(model: nn.Module) -> None:
    lazy, full = (task(model, "mptq_vit", "bits=5", **SHORT, lazy=lazy) for lazy in (True, False))
    found = [decide_descent(asked).extra for asked in (lazy, full)]
    assert found[0]["evaluations"] < 0.6 * found[1]["evaluations"]
    for extra in found:
        assert extra["history"][-1]["costs"]["bytes"] <= lazy.limits["bytes"]
        assert extra["history"][-1]["costs"]["activation bits"] <= 5


def test_fixed_activations_and_accuracy(model: nn.Module) -> None:
    found = decide_descent(task(model, "mptq_vit", "bits=5", **SHORT, activation_bits=8, metric="accuracy"))
    rounded = [t for ts in found.layers.values() for t in ts if isinstance(t, RoundActivations | RoundAttention)]
    assert {t.bits for t in rounded} == {8}
    assert 0 <= found.damage <= 1


def test_one_precision_fills_the_budget(model: nn.Module) -> None:
    for budget in ("bits=4", "bits=6"):
        asked = task(model, "evol_q", budget)
        found = decide_uniform(asked)
        treated, _ = apply_plan(asked.bench.model, found.layers, asked.bench.calibration)
        left = asked.limits["bytes"] - parameter_bytes(treated)
        bits = {t.bits for ts in found.layers.values() for t in ts if isinstance(t, Quantize)}
        widths = asked.recipe.decider_settings["widths"]
        assert left >= 0 and "8 for activations" in found.notes
        # Zero points and ranges take bytes as well: the width below the budget's, and the next one where it fits.
        assert len(bits) == 2 and widths.index(min(bits)) - widths.index(max(bits)) == 1
        low = [p for p, ts in found.layers.items() for t in ts if isinstance(t, Quantize) and t.bits == min(bits)]
        shapes = {ref.path: ref.shape for ref in asked.refs}
        more = {p: quantized_bytes(*shapes[p], Quantize(max(bits), symmetric=False), 4) for p in low}
        less = {p: quantized_bytes(*shapes[p], Quantize(min(bits), symmetric=False), 4) for p in low}
        assert all(more[p] - less[p] > left for p in low)
    whole = decide_uniform(task(model, "mptq_vit", "bits=4.4"))
    assert {t.bits for ts in whole.layers.values() for t in ts if isinstance(t, RoundActivations)} == {4}


@pytest.mark.parametrize("name", ["evol_q", "mptq_vit"])
def test_what_norms_read_is_in_the_plan_the_budget_and_the_files(model: nn.Module, name: str, tmp_path: Path) -> None:
    asked = task(model, name, "bits=5", **(SHORT | {"norms": True}))
    found = DECIDERS.get(asked.recipe.decider)(asked)
    norms = [ref.path for ref in list_layers(model) if ref.kind == "norm"]
    widths = {t.bits for path in norms for t in found.layers[path] if isinstance(t, RoundActivations)}
    assert widths == {8} if name == "evol_q" else widths <= {6, 4}
    assert {found.layers[path][0].label()[2:] for path in norms} == {" power-of-two"}
    treated, _ = apply_plan(asked.bench.model, found.layers, asked.bench.calibration)
    _, allocation = decided_table(asked, found)
    assert parameter_bytes(treated) == allocation.cost.bytes <= asked.limits["bytes"]
    # A float32 step and an 8-bit zero point for each of the 16 channels of the 5 norms.
    plain = {path: ts for path, ts in found.layers.items() if path not in norms}
    without, _ = apply_plan(asked.bench.model, plain, asked.bench.calibration)
    assert parameter_bytes(treated) - parameter_bytes(without) == 5 * 16 * 5
    save_model(treated, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    data = as_calibration(images())
    for batch in data:
        got, wanted, other = (logits_of(data.forward(m, batch)) for m in (again, treated, without))
        assert torch.equal(got, wanted) and not torch.equal(got, other)
    for path in norms:
        beside = attached(again.get_submodule(path), "input_quantizer")
        assert isinstance(beside, InputQuantizer) and beside.quantizer.scale is not None
        assert set((beside.quantizer.scale / beside.quantizer.scale.min()).tolist()) <= {1.0, 2.0, 4.0, 8.0}


def test_registered_by_name() -> None:
    for name in ("mptq_vit", "evol_q"):
        assert callable(DECIDERS.get(recipe(name).decider))


def test_bad_input(model: nn.Module) -> None:
    with pytest.raises(BudgetError, match="with every variable at its lowest level: bytes"):
        decide_descent(task(model, "mptq_vit", "bits=2.5", **FEW))
    with pytest.raises(BudgetError, match="are not reachable; with 3 bits"):
        decide_uniform(task(model, "evol_q", "bits=2.5", widths=[8, 3]))
    with pytest.raises(BudgetError, match="changes bits alone and cannot lower params"):
        decide_descent(task(model, "mptq_vit", "bits=4,params=0.5x", **FEW))
    with pytest.raises(BudgetError, match="does not limit bits or size"):
        decide_descent(task(model, "mptq_vit", "params=0.9x", **FEW))
    with pytest.raises(InputError, match="unknown setting 'width'"):
        decide_descent(task(model, "mptq_vit", "bits=4", width=[4]))
    with pytest.raises(InputError, match="expected falling numbers"):
        decide_descent(task(model, "mptq_vit", "bits=4", widths=[4, 8]))
    asked = dataclasses.replace(task(model, "evol_q", "bits=4"), target=Target("hf", asymmetric=False))
    with pytest.raises(InputError, match="hf cannot load"):
        decide_uniform(asked)
    with pytest.raises(InputError, match="it is empty"):
        find_variables(model, treatable(model), _Empty())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no linear layer"):
        find_variables(model, (), as_calibration(images()))


class _Empty:
    def __iter__(self) -> Any:
        return iter(())
