"""compressed-tensors checkpoints: packed integers that transformers and vLLM load.

A linear layer without integer activations is written as ``pack-quantized``, one with them (W8A8) as
``int-quantized``; layers that share their settings form one group of the configuration, which names them one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError
from layerwright.core.treatment import Quantize
from layerwright.nn.packing import pack
from layerwright.nn.quantized import QuantLinear
from layerwright.nn.replace import structure_of
from layerwright.nn.tied import Tied
from layerwright.nn.treated import dtype_name
from layerwright.treat.export._dense import original_layers
from layerwright.treat.export._safetensors import save_generation, stating_ties
from layerwright.treat.export._staging import refuse, staged_folder
from layerwright.treat.writer import SHARD_BYTES, CheckpointWriter, copy_side_files, unique_tensors, write_json

__all__ = ["quantization_config", "write"]

PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


def write(model: nn.Module, out: Path, *, processor: Any = None, force: bool = False) -> Path:
    """Write `model` to the folder `out` for ``AutoModel....from_pretrained``.

    Only symmetric linear layers can be expressed: transformers 5.23 with compressed-tensors 0.20 does not load packed
    zero points, which the package itself writes.

    Raises:
        CheckpointError: a layer that the format cannot express, no quantized layer at all, no Hugging Face
            configuration, or a folder that cannot be used.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(
            f"compressed-tensors needs a transformers model, got {type(model).__name__}: use --format safetensors"
        )
    treated = {path: model.get_submodule(path) for path in structure_of(model)}
    if not treated:
        raise CheckpointError("compressed-tensors: no layer is quantized; write this model with --format safetensors")
    refuse("compressed-tensors", problems(model, treated))
    layers = {path: module for path, module in treated.items() if isinstance(module, QuantLinear)}
    with stating_ties(model):
        plain = model.config.to_dict()  # type: ignore[operator, union-attr]
    config = plain | {
        "architectures": [type(model).__name__],
        "dtype": dtype_name(next(iter(layers.values())).dtype),
        "quantization_config": quantization_config(model, layers),
    }
    with staged_folder(out, force) as folder:
        writer = CheckpointWriter(folder)
        _write_tensors(writer, checkpoint_tensors(model, layers))
        save_generation(model, folder)
        copy_side_files(None, folder, processor)
        write_json(folder / "config.json", config)
        index = {"metadata": {"total_size": writer.total_bytes}, "weight_map": dict(sorted(writer.weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return out


def problems(model: nn.Module, treated: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """``(layer, reason)`` of every treated layer that this format cannot express."""
    originals = original_layers(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = []
    for path, module in treated.items():
        reason = ""
        if isinstance(module, Tied) or module is head:
            reason = "a head or a tied weight stays in floating point"
        elif not isinstance(module, QuantLinear):
            reason = f"{type(module).__name__}: only quantized linear layers are"
        elif module.weight_zero is not None:
            reason = "asymmetric: transformers does not load packed zero points"
        elif originals is not None and not isinstance(originals.get_submodule(path), nn.Linear):
            reason = f"{type(originals.get_submodule(path)).__name__} is not nn.Linear"
        if reason:
            found.append((path, reason))
    return found


def quantization_config(model: nn.Module, layers: Mapping[str, QuantLinear]) -> dict[str, Any]:
    """The entry ``quantization_config`` of ``config.json`` for the quantized `layers`, by path."""
    groups: dict[tuple[Quantize, bool], list[str]] = {}
    for path, layer in layers.items():
        # How the codes were found is not for the loader to know.
        settings = dataclasses.replace(layer.quantize, method="rtn")
        groups.setdefault((settings, layer.input_scale is not None), []).append(path)
    formats = {_format(settings) for settings, _ in groups}
    inside = tuple(f"{path}." for path in layers)
    ignored = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(inside) and path not in layers
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": _group(settings, static, paths)
            for number, ((settings, static), paths) in enumerate(groups.items())
        },
    }


def checkpoint_tensors(model: nn.Module, layers: Mapping[str, QuantLinear]) -> dict[str, Tensor]:
    """All tensors of the checkpoint by name.

    The names are the model's own, also of experts that stay in floating point: transformers 5.23 does not put the
    single experts of published checkpoints together again where the checkpoint is quantized.
    """
    tensors = unique_tensors(model)
    for path, layer in layers.items():
        if layer.quantize.act_bits is None:
            tensors[f"{path}.weight_shape"] = torch.tensor([layer.rows, layer.columns])
        zero = tensors.pop(f"{path}.weight_zero", None)
        if zero is not None:
            tensors[f"{path}.weight_zero_point"] = pack(zero.t().contiguous(), layer.quantize.bits).t().contiguous()
        static = tensors.get(f"{path}.input_scale")
        if static is not None:
            tensors[f"{path}.input_scale"] = static.reshape(1)
    return tensors


def _write_tensors(writer: CheckpointWriter, tensors: Mapping[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for number, shard in enumerate(shards, 1):
        writer.add(f"model-{number:05d}-of-{len(shards):05d}", shard)


def _format(settings: Quantize) -> str:
    return INTEGER if settings.act_bits else PACKED


def _group(settings: Quantize, static: bool, paths: list[str]) -> dict[str, Any]:
    grouped = settings.group_size != -1
    weights: dict[str, Any] = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": settings.group_size if grouped else None,
        "dynamic": False,
    }
    inputs = None
    if settings.act_bits:
        inputs = {
            "num_bits": settings.act_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor" if static else "token",
            "dynamic": not static,
        }
    return {"targets": paths, "format": _format(settings), "weights": weights, "input_activations": inputs}
