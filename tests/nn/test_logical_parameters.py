"""Parameters are counted by what is computed with, whatever form they are stored in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.layers import treatable
from layerwright.core.recipe import Recipe
from layerwright.core.storage import kept_weights
from layerwright.core.treatment import LowRank, Quantize, Sparsify, Treatments
from layerwright.nn import (
    LowRankConv,
    LowRankLinear,
    LowRankStack,
    PackedStack,
    QuantConv,
    QuantEmbedding,
    QuantLinear,
    SparseConv,
    SparseLinear,
    SparseStack,
)
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.lora import LoraLinear
from layerwright.nn.tied import TiedLinear
from layerwright.nn.treated import logical_parameters
from layerwright.recipes.bench import Bench
from layerwright.recipes.job import decide
from layerwright.recipes.measure import measure
from layerwright.treat.apply import apply_plan
from stored_samples import low_rank, normal, quantized, random_mask, sparse
from zoo import ZOO

F32 = torch.float32
SHAPE = (1, 24, 16)
STACK = (3, 24, 16)
CONV = ConvSettings.of(nn.Conv2d(4, 24, 2))
BIAS = normal(24)
MASK = random_mask(SHAPE, 0.5)
KEPT = kept_weights(24, 16, 0.5)

MODULES: dict[str, tuple[nn.Module, int]] = {
    "int4": (QuantLinear.from_stored(quantized(SHAPE, 4), None, F32), 24 * 16),
    "int4 bias": (QuantLinear.from_stored(quantized(SHAPE, 4), BIAS, F32), 24 * 16 + 24),
    "int3 groups, zero points": (QuantLinear.from_stored(quantized(SHAPE, 3, 8, False), None, F32), 24 * 16),
    "int8 static": (
        QuantLinear.from_stored(quantized(SHAPE, 8, act_bits=8, input_scale=0.1), None, F32),
        24 * 16,
    ),
    "int4 convolution": (QuantConv.from_stored(quantized(SHAPE, 4), BIAS, F32, CONV), 24 * 16 + 24),
    "int4 embedding": (QuantEmbedding.from_stored(quantized(SHAPE, 4), F32), 24 * 16),
    "int4 stack": (PackedStack.from_stored(quantized(STACK, 4), F32), 3 * 24 * 16),
    "sparse": (SparseLinear.from_stored(sparse(SHAPE, 0.5), BIAS, F32), KEPT + 24),
    "sparse int4": (SparseLinear.from_stored(quantized(SHAPE, 4, mask=MASK), None, F32), KEPT),
    "sparse convolution": (SparseConv.from_stored(sparse(SHAPE, 0.5), BIAS, F32, CONV), KEPT + 24),
    "sparse stack": (SparseStack.from_stored(sparse(STACK, 0.5), F32), 3 * KEPT),
    "rank": (LowRankLinear.from_stored(low_rank(SHAPE, 4), BIAS, F32), 4 * (24 + 16) + 24),
    "rank int4": (LowRankLinear.from_stored(low_rank(SHAPE, 4, bits=4), BIAS, F32), 4 * (24 + 16) + 24),
    "rank convolution": (LowRankConv.from_stored(low_rank(SHAPE, 4), BIAS, F32, CONV), 4 * (24 + 16) + 24),
    "rank stack": (LowRankStack.from_stored(low_rank(STACK, 4), F32), 3 * 4 * (24 + 16)),
    "rank int4 stack": (LowRankStack.from_stored(low_rank(STACK, 4, bits=4), F32), 3 * 4 * (24 + 16)),
    "adapter on int4": (
        LoraLinear(QuantLinear.from_stored(quantized(SHAPE, 4), None, F32), rank=2),
        24 * 16 + 2 * (24 + 16),
    ),
    "dense": (nn.Linear(16, 24), 24 * 16 + 24),
}


@pytest.mark.parametrize("kind", MODULES)
def test_every_stored_kind(kind: str) -> None:
    module, expected = MODULES[kind]
    assert logical_parameters(module) == expected
    assert logical_parameters(nn.Sequential(module, nn.LayerNorm(24))) == expected + 2 * 24


def test_a_shared_weight_counts_once() -> None:
    source = QuantLinear.from_stored(quantized(SHAPE, 4), None, F32)
    tied = TiedLinear("0", BIAS)
    tied.link(source)
    assert logical_parameters(nn.Sequential(source, tied, source)) == 24 * 16 + 24


PLANS: dict[str, Treatments] = {
    "int4": (Quantize(4, method="rtn"),),
    "sparse": (Sparsify(0.5, method="magnitude"),),
    "sparse int4": (Sparsify(0.5, method="magnitude"), Quantize(4, method="rtn")),
    "rank": (LowRank(4, method="svd"),),
    "rank int4": (LowRank(4, method="svd"), Quantize(4, method="rtn")),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "resnet"])
def test_what_a_plan_predicts_is_what_is_counted(name: str, kind: str) -> None:
    model, batches = ZOO[name]()
    data = Calibration(batches)
    recipe = Recipe("one", candidates=(PLANS[kind],), scorer="weight_error", allocator="uniform")
    decision = decide(Bench(model, None, data, data, name), "size=0.9x", recipe)
    treated, _ = apply_plan(model, decision.plan, data)
    found = measure({"before": model, "after": treated}, data, timing=False)
    assert found["before"].params == sum(p.numel() for p in model.parameters())
    assert any(decision.plan.layers.values())
    assert found["after"].params == decision.allocation.cost.params


def test_the_plan_s_own_dense_count_is_unchanged_by_packing() -> None:
    model, _ = ZOO["llama"]()
    plan = {ref.path: PLANS["int4"] for ref in treatable(model)}
    packed, _ = apply_plan(model, plan, None)
    assert logical_parameters(packed) == logical_parameters(model)
    assert sum(p.numel() for p in packed.parameters()) < logical_parameters(model)
