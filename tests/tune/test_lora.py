from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import Quantize
from layerwright.nn import QuantLinear, module_from_spec, rebuild_, structure_of
from layerwright.nn.lora import LoraLinear
from layerwright.treat.apply import apply_plan
from layerwright.tune import TUNERS, full, lora
from layerwright.tune.lora import attach_lora, lora_targets, ranks_for
from zoo import ZOO, logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def packed(name: str = "llama", bits: int = 3) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, batches = ZOO[name]()
    plan = {
        r.path: (Quantize(bits, method="rtn"),)
        for r in list_layers(model)
        if r.kind == "linear" and r.block is not None
    }
    return apply_plan(model, plan)[0], batches


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_gives_the_logits_of_the_adapter_and_the_input_stays(name: str) -> None:
    model, batches = ZOO[name]()
    before = snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    settings = {"steps": 4, "learning_rate": 1e-2, "seed": 3}
    kept = lora(model, batches, merge=False, **settings)
    merged = lora(model, batches, merge=True, **settings)
    assert same(before, model)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged, batches[0]), logits(kept, batches[0]), atol=1e-5, rtol=1e-5)
    assert (logits(merged, batches[0]) - logits(model, batches[0])).abs().max() > 1e-3
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(p.requires_grad for p in merged.parameters())


def test_base_weights_are_the_same_bits_before_the_merge() -> None:
    model, batches = ZOO["llama"]()
    before = snapshot(model)
    kept = lora(model, batches, merge=False, steps=3, learning_rate=1e-2)
    state = kept.state_dict()
    for name, tensor in before.items():
        layer, _, last = name.rpartition(".")
        names = [f"base_model.model.{name}", f"base_model.model.{layer}.base_layer.{last}"]
        assert torch.equal(next(state[n] for n in names if n in state), tensor)
    assert sum("lora_A" in n for n in state) == 7 * 4


def test_the_loss_falls() -> None:
    model, batches = ZOO["llama"]()
    data = as_calibration(batches)
    for method in ("lora", "full"):
        tuned = TUNERS.get(method)(model, data, steps=20, learning_rate=3e-3)
        assert data.mean_loss(tuned) < data.mean_loss(model) - 0.1, method


def test_same_seed_same_weights_and_the_callers_generator_goes_on() -> None:
    model, batches = ZOO["llama"]()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = lora(model, batches, steps=2, learning_rate=1e-2, seed=1)
    assert torch.equal(torch.rand(3), expected)
    second = lora(model, batches, steps=2, learning_rate=1e-2, seed=1)
    other = lora(model, batches, steps=2, learning_rate=1e-2, seed=2)
    assert same(snapshot(first), second)
    assert not same(snapshot(first), other)


def test_every_linear_of_the_blocks_is_a_target_in_both_layouts() -> None:
    llama, _ = ZOO["llama"]()
    assert len(lora_targets(llama)) == 4 * 7
    gpt2, _ = ZOO["gpt2"]()
    assert {path.rpartition(".")[2] for path in lora_targets(gpt2)} == {"c_attn", "c_proj", "c_fc"}
    assert lora_targets(llama, ["q_proj"]) == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(4))
    assert lora_targets(llama, ["lm_head"]) == ("lm_head",)
    with pytest.raises(InputError, match=r"q_prj.*did you mean"):
        lora_targets(llama, ["q_prj"])


def test_ranks_follow_sensitivities() -> None:
    model, batches = ZOO["llama"]()
    paths = lora_targets(model, ["q_proj"])
    numbers = {f"model.layers.{i}": float(i) for i in range(4)}
    assert list(ranks_for(model, paths, numbers, 6).values()) == [1, 4, 8, 12]
    assert max(ranks_for(model, paths, numbers | {"model.layers.0": 1e6}, 2).values()) == 8
    adapted = attach_lora(model, rank=6, sensitivities=numbers, targets=["q_proj"], rank_pattern={paths[0]: 3})
    found = [m.r["default"] for m in adapted.model.modules() if hasattr(m, "lora_A") and hasattr(m, "r")]
    assert found == [3, 4, 8, 12]
    with pytest.raises(InputError, match="sensitivities"):
        ranks_for(model, paths, {"elsewhere": 1.0}, 6)
    with pytest.raises(InputError, match="rank_pattern"):
        lora(model, batches, rank_pattern={"nowhere": 3})


def test_the_adapter_is_saved_and_loaded(tmp_path: object) -> None:
    import peft

    model, batches = ZOO["llama"]()
    kept = lora(model, batches, merge=False, steps=2, learning_rate=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(ZOO["llama"]()[0], tmp_path)
    torch.testing.assert_close(logits(again, batches[0]), logits(kept, batches[0]))


def test_packed_weights_keep_their_adapter() -> None:
    model, batches = packed()
    before = snapshot(model)
    data = as_calibration(batches)
    tuned = lora(model, data, merge=False, steps=20, learning_rate=1e-2)
    assert same(before, model)
    assert data.mean_loss(tuned) < data.mean_loss(model) - 0.05
    inner = [m for m in tuned.modules() if isinstance(m, LoraLinear)]
    assert len(inner) == 28
    assert all(isinstance(m.base, QuantLinear) for m in inner)
    with pytest.raises(InputError, match=r"merge=False.*dequantize=True"):
        lora(model, data, steps=1)
    dense = lora(model, data, merge=True, dequantize=True, steps=20, learning_rate=1e-2)
    assert not any(isinstance(m, LoraLinear | QuantLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense, batches[0]), logits(tuned, batches[0]), atol=1e-4, rtol=1e-4)


def test_a_fresh_adapter_changes_nothing() -> None:
    for built in (packed(), ZOO["llama"](), ZOO["gpt2"]()):
        model, batches = built
        assert torch.equal(logits(attach_lora(model).model, batches[0]), logits(model, batches[0]))


def test_adapted_layers_are_rebuilt_from_their_structure() -> None:
    for base in ("packed", "linear"):
        model, batches = packed() if base == "packed" else ZOO["llama"]()
        if base == "packed":
            tuned = lora(model, batches, merge=False, steps=2, learning_rate=1e-2)
        else:
            tuned = model
            tuned.model.layers[1].mlp.up_proj = LoraLinear(model.model.layers[1].mlp.up_proj, 3)
            nn.init.normal_(tuned.model.layers[1].mlp.up_proj.lora_B)
        fresh = ZOO["llama"]()[0]
        rebuild_(fresh, structure_of(tuned))
        fresh.load_state_dict(tuned.state_dict())
        assert torch.equal(logits(fresh, batches[0]), logits(tuned, batches[0]))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_own_adapter_merges_exactly(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6)
    layer = LoraLinear(base, 2, 4.0, generator)
    nn.init.normal_(layer.lora_B, generator=generator)
    x = torch.randn(3, 6, generator=generator)
    expected = base(x) + 2.0 * (x @ layer.lora_A.t()) @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged()(x), expected)
    assert type(layer.merged()) is type(base)
    again = module_from_spec(layer.spec())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_half_precision_weights_take_small_steps() -> None:
    model, batches = ZOO["llama"]()
    model = model.bfloat16()
    data = as_calibration(batches)
    tuned = full(model, data, steps=12, learning_rate=3e-4, weight_decay=0.0)
    assert next(tuned.parameters()).dtype is torch.bfloat16
    assert data.mean_loss(tuned) < data.mean_loss(model) - 0.02
    adapted = lora(model, data, steps=4, learning_rate=1e-2)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert data.mean_loss(adapted) < data.mean_loss(model)


def test_bad_input() -> None:
    model, batches = ZOO["llama"]()
    for settings, words in (
        ({"rank": 0}, "rank"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"batches_per_step": 0}, "batches_per_step"),
    ):
        with pytest.raises(InputError, match=words):
            lora(model, batches, **settings)
    with pytest.raises(TypeError, match="loss_fn"):
        lora(model, [{"input_ids": batches[0]["input_ids"]}], steps=1)
    with pytest.raises(InputError, match="not finite"):
        full(model, as_calibration(batches, lambda m, b: m(**b).loss * float("nan")), steps=1)
    with pytest.raises(InputError, match="no linear layer"):
        lora(nn.Sequential(nn.BatchNorm1d(4)), [(torch.zeros(2, 4), torch.zeros(2))])


def test_a_process_started_by_accelerate_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = ZOO["llama"]()
    plain = full(model, batches, steps=3, learning_rate=1e-3)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launched = full(model, batches, steps=3, learning_rate=1e-3)
    torch.testing.assert_close(logits(launched, batches[0]), logits(plain, batches[0]))
    assert not torch.equal(logits(launched, batches[0]), logits(model, batches[0]))
