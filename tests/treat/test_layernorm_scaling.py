from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.core.errors import InputError
from layerwright.treat.layernorm_scaling import apply_layernorm_scaling, find_layernorm_scaling
from zoo import ZOO

PRE = ("llama", "gpt2", "qwen2", "qwen3", "gemma2", "opt", "gpt_neox", "vit", "mixtral")


def tiny(name: str) -> tuple[Any, dict[str, Tensor]]:
    model, batches = ZOO[name]()
    torch.manual_seed(0)
    for path, parameter in model.named_parameters():
        if "norm" in path.lower() or ".ln_" in path:  # gains of their own, so that order matters
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(path)))
    return model.eval(), batches[0]


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


@pytest.mark.parametrize("name", PRE)
def test_norms_give_less_by_depth_and_fold(name: str) -> None:
    model, batch = tiny(name)
    before = logits(model, batch)
    handle = apply_layernorm_scaling(model, calibration=[batch])
    factors = handle.factors()
    assert len(factors) >= 2 and torch.equal(logits(model, batch), before)
    for path, factor in factors.items():
        number = next(int(part) for part in path.split(".") if part.isdigit())
        assert factor == pytest.approx((number + 1) ** -0.5)
        x = torch.randn(2, 3, model.get_submodule(path).weight.shape[0])
        scaled, plain = handle.model.get_submodule(path)(x), model.get_submodule(path)(x)
        torch.testing.assert_close(scaled, plain * factor, rtol=1e-6, atol=0)
    scaled = logits(handle.model, batch)
    assert not torch.allclose(scaled, before, atol=1e-4)
    folded = handle.fold_()
    assert find_layernorm_scaling(folded) is None
    torch.testing.assert_close(logits(folded, batch), scaled, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, batch), before)


def test_both_norms_of_each_block_and_not_the_last_one() -> None:
    model, batch = tiny("llama")
    factors = apply_layernorm_scaling(model).factors()
    assert set(factors) == {
        f"model.layers.{n}.{norm}" for n in range(4) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    chosen = apply_layernorm_scaling(model, [1, 2], start=3, power=1.0, calibration=[batch]).factors()
    assert chosen["model.layers.1.input_layernorm"] == pytest.approx(1 / 4)
    assert len(chosen) == 4


def test_power_zero_and_removal() -> None:
    model, batch = tiny("llama")
    before = logits(model, batch)
    assert torch.equal(logits(apply_layernorm_scaling(model, power=0).model, batch), before)
    handle = apply_layernorm_scaling(model)
    assert torch.equal(logits(handle.remove(), batch), before)
    assert find_layernorm_scaling(handle.model) is None


def test_save_and_load(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    handle = apply_layernorm_scaling(model)
    lw.save(handle.model, tmp_path / "scaled")
    loaded, _ = lw.load(tmp_path / "scaled")
    assert torch.equal(logits(loaded, batch), logits(handle.model, batch))
    found = find_layernorm_scaling(loaded)
    assert found is not None and found.factors() == handle.factors()


def test_gains_learn() -> None:
    model, batch = tiny("llama")
    handle = apply_layernorm_scaling(model)
    handle.model(**batch).loss.backward()
    gain = handle.model.get_submodule("model.layers.3.input_layernorm").weight
    assert gain.grad is not None and bool(gain.grad.any())


def test_bad_input() -> None:
    model, _ = tiny("llama")
    with pytest.raises(InputError, match="power: got -1"):
        apply_layernorm_scaling(model, power=-1)
    with pytest.raises(InputError, match="layers: got 9, expected numbers from 0 to 3"):
        apply_layernorm_scaling(model, [0, 9])
    with pytest.raises(InputError, match="already"):
        apply_layernorm_scaling(apply_layernorm_scaling(model).model)
    bert, words = tiny("bert")
    with pytest.raises(InputError, match="residual stream"):
        apply_layernorm_scaling(bert, calibration=[words])
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)))
    with pytest.raises(InputError, match="no norm before a linear layer"):
        apply_layernorm_scaling(plain, calibration=[torch.zeros(2, 4)])
    with pytest.raises(InputError, match="calibration="):
        apply_layernorm_scaling(plain)
    handle = apply_layernorm_scaling(model)
    handle.model.get_submodule("model.layers.1.input_layernorm")._parameters["weight"] = None
    with pytest.raises(InputError, match="without a gain"):
        handle.fold_()
    assert len(handle.factors()) == 8
