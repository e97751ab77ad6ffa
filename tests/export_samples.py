"""Treated tiny models for the export tests."""

from __future__ import annotations

import torch
from torch import nn

from layerwright.core.layers import list_layers
from layerwright.core.treatment import Drop, LowRank, Quantize, Sparsify, Treatments
from layerwright.treat.apply import apply_plan
from zoo import ZOO, Batch

__all__ = ["Sample", "cast_", "int4", "linears", "plan_of", "sample", "treat"]

Sample = tuple[nn.Module, nn.Module, dict[str, Treatments], Batch]


def rtn(bits: int, group: int = -1, **settings: object) -> Quantize:
    return Quantize(bits, group, method="rtn", **settings)  # type: ignore[arg-type]


int4 = rtn(4, 16)
half = Sparsify(0.5, "unstructured", "magnitude")


def linears(model: nn.Module) -> list[str]:
    """Plain linear layers inside the blocks."""
    return [
        ref.path
        for ref in list_layers(model)
        if ref.layout in ("linear", "conv1d")
        and ref.kind == "linear"
        and ref.block is not None
        and "Router" not in type(model.get_submodule(ref.path)).__name__
    ]


def experts(model: nn.Module) -> list[str]:
    return [ref.path for ref in list_layers(model) if ref.kind == "experts"]


def blocks(model: nn.Module) -> list[str]:
    return [ref.path for ref in list_layers(model) if ref.kind == "block"]


def plan_of(model: nn.Module, form: str) -> dict[str, Treatments]:
    inside = linears(model)
    if form == "quantized":
        kinds: list[Treatments] = [(int4,), (rtn(3),), (rtn(8, act_bits=8),), (rtn(6, 32, symmetric=False),)]
    elif form == "symmetric":
        kinds = [(int4,), (rtn(3),), (rtn(8, act_bits=8),), (rtn(6, 32),)]
    elif form == "sparse":
        kinds = [(half,), (half, int4), (Sparsify(0.5, "2:4", "magnitude"),)]
    elif form == "low_rank":
        kinds = [(LowRank(5, "svd"),), (LowRank(6, "svd"), rtn(8))]
    elif form == "mixed":
        kinds = [(int4,), (half,), (LowRank(5, "svd"),), (), (half, rtn(4))]
    elif form == "dropped":
        return {blocks(model)[1]: (Drop(),), inside[0]: (int4,), inside[-1]: (rtn(3),)}
    elif form == "only_dropped":
        return {blocks(model)[1]: (Drop(),)}
    elif form == "experts":
        kinds = [(int4,), (half,), (LowRank(4, "svd"),)]
        inside = experts(model)
    else:  # tied: the table that the head uses too
        return {"model.embed_tokens": (rtn(4, 8),), inside[0]: (int4,)}
    return {path: kinds[index % len(kinds)] for index, path in enumerate(inside) if kinds[index % len(kinds)]}


def treat(model: nn.Module, plan: dict[str, Treatments]) -> nn.Module:
    return apply_plan(model, plan)[0].eval()


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in `dtype`; computed buffers (rotary frequencies) stay float32, as after loading."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if dtype != torch.float32:
        model.config.dtype = dtype  # type: ignore[union-attr]


def sample(name: str, form: str, dtype: torch.dtype = torch.float32) -> Sample:
    """The model, the treated model, the plan, a batch without labels."""
    model, batches = ZOO[name]()
    cast_(model, dtype)
    plan = plan_of(model, form)
    return model, treat(model, plan), plan, {k: v for k, v in batches[0].items() if k != "labels"}
