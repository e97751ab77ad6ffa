from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers, structure_copy, treatable
from layerwright.score.activation_range import activation_range
from layerwright.treat.log_equalize import equalizable_layers, log_equalize_
from layerwright.treat.smooth import log_factors
from zoo import ZOO, logits


def test_the_formula() -> None:
    m = torch.tensor([2.0, 14.0, 0.0, 1e-6, 1000.0])
    torch.testing.assert_close(log_factors(m)[:4], torch.tensor([1.0, 3.5, 1.0, 1.0]))
    assert float(m[4] / log_factors(m)[4]) == pytest.approx(9.97, abs=5e-3)


def test_ranges_are_the_largest_sizes() -> None:
    model, batches = ZOO["llama"]()
    model.eval()
    refs = treatable(model)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(ref.path).register_forward_pre_hook(
            lambda _m, args, path=ref.path: seen.setdefault(path, []).append(args[0].flatten(0, -2))
        )
        for ref in refs
    ]
    with torch.no_grad():
        for batch in batches:
            logits(model, batch)
    for handle in handles:
        handle.remove()
    found = activation_range(model, as_calibration(batches), refs)
    for path, rows in seen.items():
        torch.testing.assert_close(found[path], torch.cat(rows).abs().amax(0))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "phi3", "opt"])
def test_ranges_become_logarithms_and_the_function_stays(name: str) -> None:
    model, batches = ZOO[name]()
    model.eval()
    data = as_calibration(batches)
    items = equalizable_layers(model, data)
    assert len(items) >= 4
    layers = [item.readers[0] for item in items if item.norm is not None]
    refs = [ref for ref in list_layers(model) if ref.path in {p for item in items for p in item.readers}]
    before = activation_range(model, data, refs)
    moved = structure_copy(model)
    state = copy.deepcopy(model.state_dict())
    notes = log_equalize_(moved, data, layers=layers)
    assert len(notes) == len(layers)
    after = activation_range(moved, data, refs)
    for item in items:
        if item.norm is not None:
            for path in item.readers:  # all readers of one norm share the factors
                m = before[path]
                expected = torch.where(m < 1e-5, m, torch.log2(2 + m))
                torch.testing.assert_close(after[path], expected, rtol=2e-4, atol=1e-5)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(logits(moved, batch), logits(model, batch), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_query_key_and_value_share_one_division() -> None:
    model, batches = ZOO["llama"]()
    model.eval()
    moved = structure_copy(model)
    path = "model.layers.0.self_attn"
    (note,) = log_equalize_(moved, as_calibration(batches), layers=[f"{path}.q_proj"])
    assert all(f"{path}.{name}" in note for name in ("q_proj", "k_proj", "v_proj"))
    before, after = (m.get_submodule(path) for m in (model, moved))
    factors = [
        after.get_parameter(f"{n}.weight")[0] / before.get_parameter(f"{n}.weight")[0]
        for n in ("q_proj", "k_proj", "v_proj")
    ]
    torch.testing.assert_close(factors[0], factors[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors[0], factors[2], rtol=1e-4, atol=1e-5)


def test_a_gated_product_takes_the_factor_in_its_up_rows() -> None:
    model, batches = ZOO["llama"]()
    model.eval()
    data = as_calibration(batches)
    down = "model.layers.0.mlp.down_proj"
    refs = [ref for ref in list_layers(model) if ref.path == down]
    moved = structure_copy(model)
    log_equalize_(moved, data, layers=[down])
    m = activation_range(model, data, refs)[down]
    torch.testing.assert_close(activation_range(moved, data, refs)[down], torch.log2(2 + m), rtol=1e-4, atol=1e-5)
    up = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(moved.get_parameter(up), model.get_parameter(up) / log_factors(m)[:, None])
    with torch.no_grad():
        torch.testing.assert_close(logits(moved, batches[0]), logits(model, batches[0]), rtol=1e-4, atol=1e-4)


def test_bounds_choose_the_layers() -> None:
    model, batches = ZOO["llama"]()
    model.eval()
    data = as_calibration(batches)
    items = equalizable_layers(model, data)
    refs = [ref for ref in list_layers(model) if ref.path in {p for item in items for p in item.readers}]
    tops = {path: float(m.max()) for path, m in activation_range(model, data, refs).items()}
    inputs = sorted({tops[item.readers[0]] for item in items})
    low, high = inputs[1] * 1.0001, inputs[-2] * 1.0001
    notes = log_equalize_(structure_copy(model), data, v0=low, v1=high)
    expected = [item for item in items if low < tops[item.readers[0]] < high]
    assert len(notes) == len(expected) > 0
    assert log_equalize_(structure_copy(model), data, v0=1e6, v1=1e7) == []


def test_what_is_refused() -> None:
    model, batches = ZOO["llama"]()
    data = as_calibration(batches)
    with pytest.raises(InputError, match=r"o_proj: its input comes from no norm.*round it dynamically"):
        log_equalize_(model, data, layers=["model.layers.0.self_attn.o_proj"])
    for v0, v1 in ((15, 15), (20, 10), (-1, 5)):
        with pytest.raises(InputError, match="v0, v1: got"):
            log_equalize_(model, data, v0=v0, v1=v1)
    conv = [ref for ref in list_layers(ZOO["vit"]()[0]) if ref.layout == "conv"]
    with pytest.raises(InputError, match="ranges are measured at linear layers"):
        activation_range(ZOO["vit"]()[0], data, conv)


class Bad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x / 0)
        return y


def test_ranges_that_are_not_finite() -> None:
    model = Bad()
    refs = [ref for ref in list_layers(model) if ref.path == "a"]
    with pytest.raises(InputError, match="a: its calibration activations hold NaN or infinity"):
        activation_range(model, as_calibration([torch.ones(2, 16)]), refs)
