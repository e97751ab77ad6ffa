from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import CheckpointError, InputError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import Quantize
from layerwright.nn.lora_mixture import LoRAMixture, NotMergeableError
from layerwright.treat.apply import apply_plan
from layerwright.treat.drop import drop_blocks
from layerwright.tune import TUNERS
from layerwright.tune.mixture import MixtureHandle, attach_lora_mixture, find_mixture, mixture_targets
from layerwright.tune.mixture_files import load_adapter, save_adapter
from zoo import ZOO, logits

SMALL = {"total_rank": 8, "num_experts": 4, "dropout": 0.0}


def shake_(handle: MixtureHandle, seed: int = 0) -> MixtureHandle:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return handle


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_step_zero_detach_and_disabled(name: str) -> None:
    model, batches = ZOO[name]()
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    expected = logits(model, batches[0])
    handle = attach_lora_mixture(model, **SMALL)
    assert torch.equal(logits(handle.model, batches[0]), expected)
    shake_(handle)
    assert not torch.equal(logits(handle.model, batches[0]), expected)
    with handle.disabled():
        assert torch.equal(logits(handle.model, batches[0]), expected)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    modules = {path: module for path, module in model.named_modules() if path}
    own = shake_(attach_lora_mixture(model, copy=False, **SMALL))
    assert own.model is model
    trained = {id(p) for p in own.parameters()}
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
    own.detach()
    assert dict(model.named_modules()).items() >= modules.items()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model._forward_pre_hooks


def test_the_tuner_lowers_the_loss_and_repeats_itself() -> None:
    model, batches = ZOO["llama"]()
    data = as_calibration(batches)
    before = snapshot(model)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    arguments = {"rank": 8, "num_experts": 4, "steps": 15, "learning_rate": 1e-2, "seed": 1}
    tuned = TUNERS.get("adamole")(model, data, **arguments)
    assert torch.equal(torch.rand(2), expected)
    again = TUNERS.get("adamole")(model, data, **arguments)
    assert data.mean_loss(tuned) < data.mean_loss(model) - 0.1
    assert torch.equal(logits(tuned, batches[0]), logits(again, batches[0]))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    base = snapshot(find_mixture(tuned).detach())
    assert all(torch.equal(before[key], value) for key, value in base.items())


@pytest.mark.parametrize("routing", ["top-k", "threshold"])
def test_other_routings_train(routing: str) -> None:
    model, batches = ZOO["gpt2"]()
    tuned = TUNERS.get("adamole")(model, batches, rank=8, num_experts=4, routing=routing, steps=8, learning_rate=1e-2)
    assert as_calibration(batches).mean_loss(tuned) < as_calibration(batches).mean_loss(model)


def test_aux_loss_is_the_sum_over_layers_and_checkpointing_does_not_double_it() -> None:
    model, batches = ZOO["llama"]()
    handle = shake_(attach_lora_mixture(model, **SMALL))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            handle.model.gradient_checkpointing_enable({"use_reentrant": False})
        handle.model.train()
        handle.reset_usage()
        loss = handle.model(**batches[0], use_cache=False).loss
        aux = handle.aux_loss()
        torch.testing.assert_close(aux, torch.stack([layer.aux_loss for layer in handle.layers.values()]).sum())
        value = float(aux.detach())
        (loss + 0.5 * aux).backward()
        assert float(handle.aux_loss().detach()) == value
        tokens = {usage.tokens for usage in handle.expert_usage().values()}
        assert tokens == {batches[0]["input_ids"].numel()}
        gradients.append([value, *(p.grad.clone() for p in handle.parameters())])
        handle.model.zero_grad()
    assert gradients[0][0] == pytest.approx(gradients[1][0])
    for plain, checkpointed in zip(gradients[0][1:], gradients[1][1:], strict=True):
        torch.testing.assert_close(plain, checkpointed)
    handle.model.eval()
    assert float(handle.aux_loss()) == 0
    assert handle.aux_loss().grad_fn is None


def test_reentrant_checkpointing_is_refused_in_one_line() -> None:
    model, batches = ZOO["llama"]()
    handle = attach_lora_mixture(model, **SMALL)
    handle.model.gradient_checkpointing_enable({"use_reentrant": True})
    handle.model.enable_input_require_grads()
    handle.model.train()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        handle.aux_loss() if handle.model(**batches[0], use_cache=False) else None
    fresh = attach_lora_mixture(model, **SMALL)
    fresh.model.train()
    with pytest.raises(RuntimeError, match="call the model"):
        fresh.aux_loss()
    with torch.no_grad():
        fresh.model(**batches[0])
    assert not fresh.aux_loss().requires_grad


def test_padding_is_left_out() -> None:
    model, batches = ZOO["llama"]()
    ids = batches[0]["input_ids"][:1, :7].clamp(min=3)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 7 + [0] * 4])
    for masked in (True, False):
        handle = shake_(attach_lora_mixture(model, mask_padding=masked, **SMALL))
        with handle.learning():
            handle.model(input_ids=ids)
            plain, seen = handle.aux_loss(), handle.expert_usage()
            handle.reset_usage()
            handle.model(input_ids=padded, attention_mask=mask)
        usage = handle.expert_usage()
        assert {u.tokens for u in usage.values()} == {7 if masked else 11}
        if masked:
            for path, found in usage.items():
                assert found.shares == pytest.approx(seen[path].shares)
        with handle.learning():
            close = torch.allclose(handle.aux_loss(), plain, atol=1e-5)
        assert close is masked


def test_several_adapters_and_switching() -> None:
    model, batches = ZOO["llama"]()
    handle = shake_(attach_lora_mixture(model, ["q_proj"], name="first", **SMALL))
    first = logits(handle.model, batches[0])
    handle.add("second", ["q_proj", "up_proj"], total_rank=4, num_experts=1, routing="none", seed=1)
    assert handle.active == "second"
    assert torch.equal(logits(handle.model, batches[0]), logits(model, batches[0]))
    shake_(handle, 1)
    second = logits(handle.model, batches[0])
    handle.use("first")
    assert torch.equal(logits(handle.model, batches[0]), first)
    assert not any(p.requires_grad for p in handle.parameters("second"))
    assert all(p.requires_grad for p in handle.parameters("first"))
    copied = copy.deepcopy(handle.model)
    find_mixture(copied).use("second")
    assert torch.equal(logits(copied, batches[0]), second)
    assert torch.equal(logits(handle.model, batches[0]), first)
    assert len(handle.layers) == 8
    with pytest.raises(NotMergeableError):
        handle.merge()
    handle.remove("first")
    assert handle.names == ("second",)
    assert torch.equal(logits(handle.model, batches[0]), second)
    with pytest.raises(InputError, match="only adapter"):
        handle.remove("second")
    with pytest.raises(InputError, match="unknown adapter"):
        handle.use("third")
    with pytest.raises(InputError, match="taken"):
        handle.add("second")
    merged = handle.merge()
    assert not any(isinstance(m, LoRAMixture) for m in merged.modules())
    torch.testing.assert_close(logits(merged, batches[0]), second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("routing", ["adaptive", "top-k", "threshold"])
def test_saved_and_loaded(routing: str, tmp_path) -> None:
    model, batches = ZOO["llama"]()
    handle = shake_(attach_lora_mixture(model, routing=routing, **SMALL))
    expected = logits(handle.model, batches[0])
    save_adapter(handle, tmp_path / "one")
    keys = load_file(tmp_path / "one" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.3.weight" in keys
    again = load_adapter(ZOO["llama"]()[0], tmp_path / "one", name="mine")
    assert torch.equal(logits(again.model, batches[0]), expected)
    assert again.active == "mine"
    assert not any(p.requires_grad for p in again.model.parameters())
    load_adapter(again, tmp_path / "one", name="other", trainable=True)
    assert torch.equal(logits(again.model, batches[0]), expected)
    assert all(p.requires_grad for p in again.parameters())
    with pytest.raises(InputError, match="taken"):
        load_adapter(again, tmp_path / "one", name="mine")
    again.detach()
    assert torch.equal(logits(again.model, batches[0]), logits(model, batches[0]))


def test_a_folder_of_the_released_code_is_read(tmp_path) -> None:
    model, batches = ZOO["llama"]()
    handle = shake_(attach_lora_mixture(model, ["q_proj"], **SMALL))
    save_adapter(handle, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    doubled = {
        key.replace(".lora_A.", ".moe_layer.experts.lora_A."): value + 0
        for key, value in tensors.items()
        if ".lora_A." in key
    }
    save_file(tensors | doubled, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "ADAMOLE", "lora_rank": 2, "lora_alpha": 16, "num_experts": 4, "max_threshold": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = load_adapter(ZOO["llama"]()[0], tmp_path)
    assert torch.equal(logits(again.model, batches[0]), logits(handle.model, batches[0]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_expert_goes_to_peft_and_back(name: str, tmp_path) -> None:
    import peft

    model, batches = ZOO[name]()
    handle = shake_(attach_lora_mixture(model, total_rank=4, num_experts=1))
    save_adapter(handle, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(ZOO[name]()[0], tmp_path / "ours")
    torch.testing.assert_close(logits(theirs, batches[0]), logits(handle.model, batches[0]))
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(ZOO[name]()[0], tmp_path / "theirs")
    torch.testing.assert_close(logits(again.model, batches[0]), logits(handle.model, batches[0]))


def test_peft_refuses_a_mixture(tmp_path) -> None:
    import peft

    save_adapter(attach_lora_mixture(ZOO["llama"]()[0], **SMALL), tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(ZOO["llama"]()[0], tmp_path)


def test_damaged_folders(tmp_path) -> None:
    model, _ = ZOO["llama"]()
    handle = attach_lora_mixture(model, ["q_proj"], **SMALL)
    with pytest.raises(CheckpointError, match="adapter_config"):
        load_adapter(model, tmp_path)
    save_adapter(handle, tmp_path)
    with pytest.raises(InputError, match="another model"):
        load_adapter(ZOO["gpt2"]()[0], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, words in (
        ({"peft_type": "XLORA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"num_experts": 3}, "3 experts"),
        ({"peft_type": "MOLE", "routing": "top-k", "top_k": 2}, "expected"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=words):
            load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(model, tmp_path)
    assert not any(isinstance(m, LoRAMixture) for m in model.modules())


def test_over_packed_weights() -> None:
    model, batches = ZOO["llama"]()
    plan = {r.path: (Quantize(4, method="rtn"),) for r in list_layers(model) if r.role in ("q", "v")}
    packed = apply_plan(model, plan)[0]
    data = as_calibration(batches)
    tuned = TUNERS.get("adamole")(packed, data, rank=8, num_experts=4, steps=10, learning_rate=1e-2)
    assert data.mean_loss(tuned) < data.mean_loss(packed)


def test_block_surgery_refuses_adapters() -> None:
    model, _ = ZOO["llama"]()
    with pytest.raises(InputError, match="adapter"):
        drop_blocks(attach_lora_mixture(model, **SMALL).model, ["model.layers.1"])


def test_targets() -> None:
    model, _ = ZOO["llama"]()
    assert {path.rpartition(".")[2] for path in mixture_targets(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(TypeError, match=r"targets.*expected linear"):
        attach_lora_mixture(model, ["input_layernorm"], **SMALL)
    with pytest.raises(InputError, match=r"targets.*did you mean"):
        attach_lora_mixture(model, ["q_prj"], **SMALL)


def test_bad_input() -> None:
    model, batches = ZOO["llama"]()
    for given, words in (
        ({"total_rank": 10}, "total_rank.*multiple"),
        ({"total_rank": 0}, "total_rank"),
        ({"num_experts": 0}, "num_experts"),
        ({"max_threshold": 2.0}, "max_threshold"),
        ({"routing": "top-k", "top_k": 5}, "top_k"),
        ({"top_k": 2, "max_threshold": 0.2}, "top_k and max_threshold"),
    ):
        with pytest.raises(InputError, match=words):
            attach_lora_mixture(model, **(SMALL | given))
    with pytest.raises(InputError, match="balance"):
        TUNERS.get("adamole")(model, batches, balance=-1.0)
    with pytest.raises(InputError, match="no mixture"):
        find_mixture(model)
    with pytest.raises(InputError, match="already"):
        attach_lora_mixture(attach_lora_mixture(model, **SMALL).model, **SMALL)
