from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, read_matrix, write_matrix_
from layerwright.core.layers import list_layers, parameter_bytes, treatable
from layerwright.core.storage import kept_weights, stored_bytes
from layerwright.core.treatment import LowRank, Quantize, Sparsify, Treatments
from layerwright.nn import (
    LowRankLinear,
    PackedStack,
    QuantConv,
    QuantEmbedding,
    QuantLinear,
    SparseLinear,
    module_from_spec,
    rebuild_,
    replace_,
    structure_of,
)
from layerwright.nn.quantizer import find_scale, quantize
from layerwright.nn.stored import Stored
from layerwright.nn.tied import TiedEmbedding, TiedLinear
from stored_samples import low_rank, normal, quantized, random_mask, sparse, state_bytes
from zoo import ZOO

INT4 = Quantize(4, -1, True, "rtn")
INT3 = Quantize(3, -1, False, "rtn")
HALF = Sparsify(0.5, method="magnitude")
RANK = LowRank(3, "svd")
PLANS: dict[str, Treatments] = {
    "int4": (INT4,),
    "int3 asym": (INT3,),
    "sparse": (HALF,),
    "sparse int3": (HALF, INT3),
    "rank": (RANK,),
    "rank int4": (RANK, INT4),
}


def stored_for(weight: Tensor, plan: Treatments) -> Stored:
    """Round to nearest, prune by magnitude, cut the singular values: the plain forms of the treatments."""
    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    by_tag = {t.tag: t for t in plan}
    if "low_rank" in by_tag:
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        left, right = u[..., :3] * s[:, None, :3], v[:, :3]
        rest = tuple(t for t in plan if t.tag != "low_rank")
        return Stored(shape, factors=(stored_for(left, rest), stored_for(right, rest)))
    mask = None
    if "sparsify" in by_tag:
        kept = kept_weights(shape[1], shape[2], 0.5)
        order = weight.abs().flatten(1).argsort(dim=1, descending=True, stable=True)
        mask = (order.argsort(dim=1) < kept).view(shape)
    if "quantize" not in by_tag:
        return Stored(shape, dense=weight if mask is None else weight * mask, mask=mask)
    q = by_tag["quantize"]
    assert isinstance(q, Quantize)
    scale, zero = find_scale(weight, q.bits, q.group_size, q.symmetric, scale_dtype=weight.dtype)
    return Stored(
        shape, codes=quantize(weight, scale.float(), zero, q.bits), scale=scale, zero=zero, mask=mask, quantize=q
    )


def output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result = model(**batch)
    logits: Tensor = result.logits if "logits" in result else result.logits_per_image
    return logits


def treat_all(model: nn.Module, plan: Treatments, **which: bool) -> tuple[nn.Module, nn.Module, int]:
    """A copy with treated modules, a copy with the same weights dense, and the bytes the first one should take."""
    real, dense = copy.deepcopy(model), copy.deepcopy(model)
    planned = parameter_bytes(model)
    for ref in treatable(model, **which):
        if ref.kind == "embedding" and plan[0].tag != "quantize":
            continue
        stored = stored_for(read_matrix(dense, ref), plan)
        replace_(real, ref, stored)
        write_matrix_(dense, ref, stored.to_dense())
        planned += stored_bytes(plan, *ref.shape, ref.count, 4) - 4 * ref.numel
    return real, dense, planned


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "gpt2", "t5", "resnet"])
def test_models_compute_with_the_dequantized_weights(name: str, plan: str) -> None:
    model, batches = ZOO[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    real, dense, planned = treat_all(model, PLANS[plan], include_head=True)
    wanted = output(dense, batches[0])
    got = output(real, batches[0])
    assert torch.allclose(got, wanted, atol=2e-5 * float(wanted.abs().max()))
    assert not torch.allclose(got, output(model, batches[0]), atol=1e-3 * float(wanted.abs().max()))
    assert parameter_bytes(real) == planned
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    structure = json.loads(json.dumps(structure_of(real)))
    fresh = copy.deepcopy(model)
    rebuild_(fresh, structure)
    if hasattr(fresh, "tie_weights"):
        fresh.tie_weights()
    fresh.load_state_dict(real.state_dict())
    assert torch.equal(output(fresh, batches[0]), got)
    assert structure_of(fresh) == structure
    assert torch.equal(output(copy.deepcopy(real), batches[0]), got)


@pytest.mark.parametrize("name", ["llama4", "qwen3_moe"])
def test_other_mixtures_of_experts(name: str) -> None:
    model, batches = ZOO[name]()
    real, dense, planned = treat_all(model, (INT4,))
    assert any(isinstance(module, PackedStack) for module in real.modules())
    assert torch.allclose(output(real, batches[0]), output(dense, batches[0]), atol=1e-5)
    assert parameter_bytes(real) == planned


def test_the_untouched_model_keeps_its_experts_implementation() -> None:
    model, _ = ZOO["mixtral"]()
    before = model.config._experts_implementation
    shared = copy.copy(model)
    shared._modules = copy.deepcopy(model)._modules
    for module in shared.modules():
        if hasattr(module, "config"):
            module.config = model.config
    ref = next(r for r in treatable(shared) if r.kind == "experts")
    replace_(shared, ref, stored_for(read_matrix(shared, ref), (INT4,)))
    assert model.config._experts_implementation == before
    assert shared.get_submodule(ref.path.rpartition(".")[0]).config._experts_implementation == "eager"


class Net(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 10)
        self.same = nn.Linear(10, 8, bias=False)
        self.again = self.same
        self.image = nn.Conv2d(2, 4, 3, groups=2)


def ref_of(model: nn.Module, path: str) -> LayerRef:
    return next(ref for ref in list_layers(model, ()) if ref.path == path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_layer_keeps(dtype: torch.dtype) -> None:
    model = Net().to(dtype).train()
    model.first.eval()
    bias = model.first.bias
    replace_(model, ref_of(model, "first"), quantized((1, 10, 8), 4, dtype=dtype))
    replace_(model, ref_of(model, "table"), quantized((1, 12, 8), 4, dtype=dtype))
    replace_(model, ref_of(model, "image"), quantized((1, 4, 9), 4, dtype=dtype))
    kinds = {"first": QuantLinear, "table": QuantEmbedding, "image": QuantConv}
    for name, kind in kinds.items():
        module = getattr(model, name)
        assert isinstance(module, kind)
        assert module.dtype == dtype
        assert module.training == (name != "first")
    assert torch.equal(model.first.bias, bias)
    with torch.no_grad():
        model.first.bias += 1
    assert not torch.equal(model.first.bias, bias)


def test_a_module_that_stands_in_two_places_is_replaced_in_both() -> None:
    model = Net()
    replace_(model, ref_of(model, "same"), quantized((1, 8, 10), 4))
    assert isinstance(model.same, QuantLinear)
    assert model.again is model.same


def test_a_dense_weight_becomes_a_new_parameter() -> None:
    model = Net()
    old, dense = model.first.weight, normal(1, 10, 8)
    old.requires_grad_(False)
    before = old.clone()
    replace_(model, ref_of(model, "first"), Stored((1, 10, 8), dense=dense))
    assert isinstance(model.first, nn.Linear)
    assert torch.equal(model.first.weight, dense[0])
    assert not model.first.weight.requires_grad
    assert model.first.weight is not old
    assert torch.equal(old, before)
    dense.zero_()
    assert bool(model.first.weight.abs().sum() > 0)


def test_dense_weights_in_other_layouts() -> None:
    for name, kind in (("gpt2", "linear"), ("mixtral", "experts"), ("gpt_oss", "experts"), ("resnet", "conv")):
        model, _ = ZOO[name]()
        ref = next(r for r in treatable(model) if r.kind == kind)
        dense = normal(ref.count, *ref.shape)
        replace_(model, ref, Stored((ref.count, *ref.shape), dense=dense))
        assert torch.equal(read_matrix(model, ref), dense)


def test_a_tied_head_is_untied_and_the_embedding_stays() -> None:
    model, batches = ZOO["gpt2"]()
    head = next(r for r in list_layers(model) if r.kind == "head")
    assert head.tied
    embedding = model.get_submodule(head.tied)
    table, before = embedding.weight, embedding.weight.clone()
    stored = quantized((1, *head.shape), 4)
    for change in (stored, Stored((1, *head.shape), dense=stored.to_dense())):
        real = copy.deepcopy(model)
        replace_(real, head, change)
        real.tie_weights()
        assert torch.equal(real.get_submodule(head.tied).weight, before)
        assert torch.equal(real.get_submodule(head.path).weight + 0, stored.to_dense()[0])
        assert torch.allclose(output(real, batches[0]), head_output(model, batches[0], stored), atol=1e-5)
    assert embedding.weight is table
    assert model.get_submodule(head.path).weight is table


def head_output(model: nn.Module, batch: dict[str, Any], stored: Stored) -> Tensor:
    untied = copy.deepcopy(model)
    untied.lm_head = nn.Linear(stored.shape[2], stored.shape[1], bias=False)
    untied.lm_head.weight = nn.Parameter(stored.to_dense()[0])
    return output(untied, batch)


def test_what_uses_an_embedding_s_weight_uses_its_new_form() -> None:
    for name, followers in (("gpt2", {"lm_head"}), ("t5", {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"})):
        model, batches = ZOO[name]()
        if not model.config.tie_word_embeddings:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        ref = next(r for r in list_layers(model) if r.kind == "embedding" and r.shape[0] == model.config.vocab_size)
        stored = quantized((1, *ref.shape), 4)
        for change in (stored, Stored((1, *ref.shape), dense=stored.to_dense())):
            real, dense = copy.deepcopy(model), copy.deepcopy(model)
            write_matrix_(dense, ref, stored.to_dense())
            replace_(real, ref, change)
            assert torch.allclose(output(real, batches[0]), output(dense, batches[0]), atol=1e-5)
            saved = parameter_bytes(model) - parameter_bytes(real)
            assert saved == (4 * ref.numel - state_bytes(real.get_submodule(ref.path)) if change is stored else 0)
            if change is stored:
                tied = {p for p, m in real.named_modules() if isinstance(m, TiedLinear | TiedEmbedding)}
                assert {p.removeprefix("transformer.").removeprefix("model.") for p in tied} == followers
                fresh = copy.deepcopy(model)
                rebuild_(fresh, json.loads(json.dumps(structure_of(real))))
                fresh.tie_weights()
                fresh.load_state_dict(real.state_dict())
                assert torch.equal(output(fresh, batches[0]), output(real, batches[0]))


def test_a_tie_holds_even_if_the_owner_has_changed_before() -> None:
    model, batches = ZOO["gpt2"]()
    ref = next(r for r in list_layers(model) if r.kind == "embedding" and r.shape[0] == model.config.vocab_size)
    stored = quantized((1, *ref.shape), 4)
    early = copy.deepcopy(model)
    early.get_submodule(ref.path).weight = nn.Parameter(stored.to_dense()[0])
    replace_(early, ref, stored)
    replace_(model, ref, stored)
    assert torch.equal(output(early, batches[0]), output(model, batches[0]))


def test_a_tied_head_loads_on_the_meta_device() -> None:
    model, batches = ZOO["gpt2"]()
    real, _, _ = treat_all(model, (INT4,), include_head=True)
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config)).eval()
    rebuild_(fresh, structure_of(real))
    assert {t.device.type for t in fresh.state_dict().values()} == {"meta"}
    fresh.load_state_dict(real.state_dict(), assign=True)
    for path, module in real.named_modules():
        for name in module._non_persistent_buffers_set:
            fresh.get_submodule(path)._buffers[name] = module._buffers[name]
    assert torch.equal(output(fresh, batches[0]), output(real, batches[0]))


def test_scaled_embeddings_keep_their_factor() -> None:
    model, batches = ZOO["gemma3"]()
    real, dense, _ = treat_all(model, (INT4,), include_embeddings=True)
    assert any(isinstance(m, QuantEmbedding) and m.multiplier != 1 for m in real.modules())
    assert torch.allclose(output(real, batches[0]), output(dense, batches[0]), atol=1e-5)


def test_layers_that_compute_something_else_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Spelled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T + self.bias

    class Shifted(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + 2)

    class Padded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(input, (1, 1)))

    ref = LayerRef("0", "linear", "0.weight", (6, 8), layout="linear")
    for layer in (Doubled(8, 6), Shifted(6, 8), nn.Embedding(6, 8, max_norm=1.0)):
        model = nn.Sequential(layer)
        with pytest.raises(InputError, match=r"^0: "):
            replace_(model, ref, quantized((1, 6, 8), 4))
        assert model[0] is layer
    model = nn.Sequential(Spelled(8, 6))
    replace_(model, ref, quantized((1, 6, 8), 4))
    assert isinstance(model[0], QuantLinear)
    conv = LayerRef("0", "conv", "0.weight", (6, 8), layout="conv")
    with pytest.raises(InputError, match=r"not a plain nn\.Conv1d or nn\.Conv2d"):
        replace_(nn.Sequential(Padded(2, 6, 2)), conv, quantized((1, 6, 8), 4))


def test_bad_calls_are_named() -> None:
    model = Net()
    with pytest.raises(InputError, match=r"first: got a weight of shape \(1, 4, 4\), expected \(1, 10, 8\)"):
        replace_(model, ref_of(model, "first"), quantized((1, 4, 4), 4))
    with pytest.raises(InputError, match="an embedding can be quantized, not made low rank"):
        replace_(model, ref_of(model, "table"), low_rank((1, 12, 8), 2))
    with pytest.raises(InputError, match="wrap it"):
        replace_(nn.Linear(8, 6), LayerRef("", "linear", "weight", (6, 8), layout="linear"), quantized((1, 6, 8), 4))
    with pytest.raises(InputError, match="unknown module 'quant_lineer'"):
        module_from_spec({"type": "quant_lineer"})
    with pytest.raises(InputError, match="no type"):
        module_from_spec({})
    with pytest.raises(InputError, match="lacks a setting"):
        module_from_spec({"type": "quant_linear", "in_features": 4})
    with pytest.raises(InputError, match="no layer second"):
        rebuild_(model, {"second": QuantLinear(8, 6, INT4, torch.float32, bias=False).spec()})
    with pytest.raises(InputError, match="is a parameter"):
        rebuild_(model, {"first.weight": QuantLinear(8, 6, INT4, torch.float32, bias=False).spec()})


def test_structure_lists_outermost_modules() -> None:
    model = Net()
    replace_(model, ref_of(model, "first"), low_rank((1, 10, 8), 2, bits=4))
    replace_(model, ref_of(model, "same"), sparse((1, 8, 10), 0.5))
    structure = structure_of(model)
    assert list(structure) == ["first", "same"]
    assert isinstance(module_from_spec(structure["first"]), LowRankLinear)
    assert isinstance(module_from_spec(structure["same"]), SparseLinear)
    assert structure_of(model.first) == {"": structure["first"]}


def test_bfloat16_products_are_as_good_as_dense_ones() -> None:
    model, batches = ZOO["llama"]()
    real, dense, _ = treat_all(model.to(torch.bfloat16), (Quantize(4, 32, False, "rtn"),))
    exact = copy.deepcopy(dense).float()
    wanted = output(exact, batches[0])
    errors = [float((output(m, batches[0]).float() - wanted).norm() / wanted.norm()) for m in (real, dense)]
    assert errors[0] < 1.25 * errors[1]


def test_masked_dense_weights_become_sparse_layers() -> None:
    model = Net()
    mask = random_mask((1, 10, 8), 0.5)
    replace_(model, ref_of(model, "first"), quantized((1, 10, 8), 4, mask=mask))
    assert isinstance(model.first, SparseLinear)
    assert int((model.first.dequantize() != 0).sum()) <= int(mask.sum())


@pytest.mark.parametrize("plan", PLANS)
def test_everything_saved_is_contiguous_and_owned(plan: str) -> None:
    model = Net()
    for path in ("first", "same", "image"):
        ref = ref_of(model, path)
        weight = read_matrix(model, ref).transpose(1, 2).contiguous().transpose(1, 2)
        replace_(model, ref, stored_for(weight, PLANS[plan]))
    tensors = model.state_dict(keep_vars=True)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())
