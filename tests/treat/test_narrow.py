"""Fewer neurons: the right ones stay, the rest is fitted, and the model is really smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.core.layers import parameter_bytes
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Narrow, Quantize, treatments_from_data, treatments_to_data
from layerwright.nn.replace import rebuild_, structure_of
from layerwright.score.statistics import InputStatistics
from layerwright.treat.apply import apply_plan
from layerwright.treat.compute import treated
from layerwright.treat.narrow import choose_neurons, feed_forwards, fitted_columns, keep_neurons_
from zoo import EXPECTED, ZOO, logits

WITHOUT = {"albert", "resnet", "convnext", "mixtral", "qwen3_moe", "gpt_oss", "llama4"}


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - WITHOUT))
def test_neurons_that_nothing_reads_can_go(name: str) -> None:
    model, batches = ZOO[name]()
    parts = feed_forwards(model)
    assert len(parts) == sum(EXPECTED[name].values())
    for part in parts.values():
        weight = model.get_submodule(part.down.path).weight
        silent = [1, 3, part.neurons - 1]
        with torch.no_grad():
            (weight if part.down.layout == "conv1d" else weight.T)[silent] = 0
    before = logits(model, batches[0])
    gone = 0
    for part in parts.values():
        kept = torch.tensor([i for i in range(part.neurons) if i not in (1, 3, part.neurons - 1)])
        gone += parameter_bytes(model)
        now = keep_neurons_(model, part, kept)
        gone -= parameter_bytes(model)
        assert now.neurons == part.neurons - 3
    assert torch.allclose(logits(model, batches[0]), before, atol=1e-5)
    assert gone > 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "resnet"])
def test_experts_and_convolutions_are_left_out(name: str) -> None:
    assert not any("experts" in path or "conv" in path for path in feed_forwards(ZOO[name]()[0]))


def test_the_loudest_neurons_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=generator) * torch.linspace(0.1, 2, 16)
    weight = torch.randn(8, 16, generator=generator)
    weight[:, 15] = 1e-4
    kept = choose_neurons(weight, x.T @ x, Narrow(0.5, multiple=1))
    energy = [float((x[:, i] * weight[:, i].norm()).square().sum()) for i in range(16)]
    assert kept.tolist() == sorted(sorted(range(16), key=lambda i: -energy[i])[:8])
    by_weight = choose_neurons(weight, x.T @ x, Narrow(0.5, method="magnitude", multiple=1))
    norms = weight.norm(dim=0).tolist()
    assert by_weight.tolist() == sorted(sorted(range(16), key=lambda i: -norms[i])[:8])


def test_fitted_columns_are_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    gram = x.T @ x
    columns = fitted_columns(weight, gram, kept)

    def error(values: torch.Tensor) -> float:
        return float((x @ weight.T - x[:, kept] @ values.T).square().sum())

    best = torch.linalg.lstsq(x[:, kept].double(), (x @ weight.T).double()).solution.T.float()
    assert error(best) <= error(columns) <= 1.05 * error(best)
    assert error(columns) < 0.9 * error(weight[:, kept])
    assert torch.allclose(fitted_columns(weight, gram, torch.arange(12)), weight, atol=1e-4)
    assert torch.equal(fitted_columns(weight, None, kept), weight[:, kept])


def test_share_and_multiple() -> None:
    assert [Narrow(share).kept(64) for share in (0.01, 0.5, 0.74, 0.99)] == [8, 32, 48, 64]
    assert Narrow(0.3, multiple=1).kept(10) == 3
    assert treatments_from_data(treatments_to_data((Narrow(0.5),))) == (Narrow(0.5),)
    for bad in ({"share": 0.0}, {"share": 1.0}, {"share": True}, {"multiple": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            Narrow(**bad)


def planned(model: torch.nn.Module, bits: int | None = None) -> dict[str, Any]:
    plan: dict[str, Any] = {}
    for number, part in enumerate(feed_forwards(model).values()):
        quantize = (Quantize(bits),) if bits else ()
        plan[part.down.path] = (Narrow(0.5 if number % 2 else 0.75), *quantize)
        plan |= {ref.path: quantize for ref in part.producers if quantize}
    return plan


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3", "vit", "t5"])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_plan_makes_a_model_narrower_and_it_loads_back(name: str, bits: int | None) -> None:
    model, batches = ZOO[name]()
    before = logits(model, batches[0])
    plan = planned(model, bits)
    smaller, report = apply_plan(model, plan, batches)
    after = logits(smaller, batches[0])
    assert parameter_bytes(smaller) < parameter_bytes(model)
    assert torch.equal(logits(model, batches[0]), before)
    assert 0 < float((after - before).abs().max()) < 10 * float(before.abs().max())
    notes = {record.layer: record.note for record in report if record.treatment.startswith("width")}
    assert set(notes) == {path for path, own in plan.items() if isinstance(own[0], Narrow)}
    empty, _ = ZOO[name]()
    rebuild_(empty, structure_of(smaller))
    empty.load_state_dict(smaller.state_dict())
    assert torch.equal(logits(empty, batches[0]), after)


def test_predicted_bytes_are_stored_bytes_and_the_score_sees_what_is_applied() -> None:
    model, batches = ZOO["llama"]()
    (path, part), *_ = feed_forwards(model).items()
    plan = {path: (Narrow(0.5), Quantize(4, method="rtn"))}
    smaller, _ = apply_plan(model, plan, batches)
    layer = smaller.get_submodule(path)
    out, in_ = part.down.shape
    assert layer.in_features == 32
    predicted = stored_bytes(plan[path], out, in_, 1, 4)
    assert sum(t.nbytes for t in layer.state_dict().values()) == predicted
    seen = InputStatistics(in_)

    def see(_module: Any, args: Any) -> None:
        seen.update(args[0])

    handle = model.get_submodule(path).register_forward_pre_hook(see)
    for batch in batches:
        logits(model, batch)
    handle.remove()
    weight = model.get_submodule(path).weight.detach()[None]
    stored, _ = treated(weight, plan[path], seen, scale_dtype=torch.float32)
    dense = stored.to_dense()[0]
    kept = dense.abs().sum(0).nonzero().squeeze(1)
    assert torch.allclose(dense[:, kept], layer.dequantize(torch.float32), atol=1e-6)
    assert smaller.get_submodule(part.producers[0].path).weight.shape == (32, 32)


@pytest.mark.parametrize(
    ("kept", "message"), [([], "kept: got"), ([0, 0], "kept: got"), ([2, 1], "ascending"), ([0, 64], "below 64")]
)
def test_refused(kept: list[int], message: str) -> None:
    model, _ = ZOO["llama"]()
    part = next(iter(feed_forwards(model).values()))
    with pytest.raises(InputError, match=message):
        keep_neurons_(model, part, torch.tensor(kept, dtype=torch.long))


def test_only_last_projections() -> None:
    model, batches = ZOO["llama"]()
    with pytest.raises(InputError, match="is not the last projection of a plain feed-forward part"):
        apply_plan(model, {"model.layers.0.self_attn.o_proj": (Narrow(),)}, batches)
