"""compressed-tensors checkpoints: packed integers that transformers and vLLM load.

A linear layer is written as ``pack-quantized``, with one range of its input for the tensor or for each token where it is
rounded (W4A8 and the like); one of integer products (W8A8) as ``int-quantized``. Layers that share their settings form
one group of the configuration, which names them one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError
from layerwright.core.treatment import Quantize
from layerwright.nn.activation import ActivationQuantizer, InputQuantizer
from layerwright.nn.attached import attached
from layerwright.nn.packing import pack
from layerwright.nn.quantized import QuantLinear
from layerwright.nn.tied import Tied
from layerwright.nn.treated import dtype_name
from layerwright.nn.w4a8 import W4A8Linear
from layerwright.treat.export._dense import original_layers
from layerwright.treat.export._safetensors import save_generation, stating_ties
from layerwright.treat.export._staging import refuse, staged_folder
from layerwright.treat.export._treated import describe, treated_layers
from layerwright.treat.writer import SHARD_BYTES, CheckpointWriter, copy_side_files, unique_tensors, write_json

__all__ = ["quantization_config", "write"]

PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
Integers = QuantLinear | W4A8Linear


@dataclass(frozen=True)
class Inputs:
    """How a layer rounds what it reads.

    Attributes:
        bits: of a code.
        static: one range for the tensor from the calibration; else one for each token as it comes.
        symmetric: no zero point.
    """

    bits: int
    static: bool
    symmetric: bool = True


def write(model: nn.Module, out: Path, *, processor: Any = None, force: bool = False) -> Path:
    """Write `model` to the folder `out` for ``AutoModel....from_pretrained``.

    Only symmetric linear layers can be expressed: transformers 5.23 with compressed-tensors 0.20 does not load packed
    zero points, which the package itself writes. Their inputs may be rounded to a uniform grid of 2 to 8 bits, with a
    static range for the tensor or a symmetric one for each token. Logits are equal in float32; in bfloat16 the package
    rounds activations in bfloat16 and we in float32, and it takes an input of two dimensions for one token.

    Raises:
        CheckpointError: a layer that the format cannot express, no quantized layer at all, no Hugging Face
            configuration, or a folder that cannot be used.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(
            f"compressed-tensors needs a transformers model, got {type(model).__name__}: use --format safetensors"
        )
    treated = treated_layers(model)
    if not treated:
        raise CheckpointError("compressed-tensors: no layer is quantized; write this model with --format safetensors")
    refuse("compressed-tensors", problems(model, treated))
    layers = {path: module for path, module in treated if isinstance(module, Integers)}
    if not layers:
        raise CheckpointError(
            "compressed-tensors: no weight is quantized, only what layers read; write this model with --format safetensors"
        )
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


def problems(model: nn.Module, treated: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, str]]:
    """``(layer, reason)`` of everything `treated` that this format cannot express."""
    originals = original_layers(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = []
    for path, module in treated:
        owner = model.get_submodule(path)
        reason = ""
        if isinstance(module, Tied) or owner is head:
            reason = "a head or a tied weight stays in floating point"
        elif isinstance(module, InputQuantizer):
            reason = _problem_of_inputs(owner, module.quantizer)
        elif not isinstance(module, Integers):
            reason = f"{describe(module)}: only quantized linear layers are"
        elif module.weight_zero is not None:
            reason = "asymmetric: transformers does not load packed zero points"
        elif originals is not None and not isinstance(originals.get_submodule(path), nn.Linear):
            reason = f"{type(originals.get_submodule(path)).__name__} is not nn.Linear"
        if reason:
            found.append((path, reason))
    return found


def _problem_of_inputs(owner: nn.Module, quantizer: ActivationQuantizer) -> str:
    what = describe(InputQuantizer(quantizer))
    if not isinstance(owner, QuantLinear) or owner.quantize.act_bits:
        return f"{what}: only beside an integer weight"
    if quantizer.kind != "uniform" or quantizer.share == "channel":
        return f"{what}: only uniform grids per tensor or token are"
    if quantizer.share == "token" and not quantizer.symmetric:
        return f"{what}: zero points of tokens are not whole there"
    return ""


def inputs_of(layer: Integers) -> Inputs | None:
    """How `layer` rounds what it reads, None if it does not."""
    if isinstance(layer, W4A8Linear):
        return Inputs(8, layer.input_scale is not None)
    if layer.quantize.act_bits:
        return Inputs(layer.quantize.act_bits, layer.input_scale is not None)
    beside = attached(layer, InputQuantizer.child)
    if not isinstance(beside, InputQuantizer):
        return None
    return Inputs(beside.quantizer.bits, beside.quantizer.scale is not None, beside.quantizer.symmetric)


def quantization_config(model: nn.Module, layers: Mapping[str, Integers]) -> dict[str, Any]:
    """The entry ``quantization_config`` of ``config.json`` for the quantized `layers`, by path."""
    groups: dict[tuple[Quantize, Inputs | None], list[str]] = {}
    for path, layer in layers.items():
        # How the codes were found is not for the loader to know.
        settings = dataclasses.replace(layer.quantize, method="rtn")
        groups.setdefault((settings, inputs_of(layer)), []).append(path)
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
            f"group_{number}": _group(settings, inputs, paths)
            for number, ((settings, inputs), paths) in enumerate(groups.items())
        },
    }


def checkpoint_tensors(model: nn.Module, layers: Mapping[str, Integers]) -> dict[str, Tensor]:
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
        beside = f"{path}.{InputQuantizer.child}.quantizer"
        static = tensors.pop(f"{beside}.scale", tensors.get(f"{path}.input_scale"))
        if static is not None:
            tensors[f"{path}.input_scale"] = static.reshape(1)
        shift = tensors.pop(f"{beside}.zero", None)
        if shift is not None:
            tensors[f"{path}.input_zero_point"] = shift.reshape(1)
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


def _group(settings: Quantize, inputs: Inputs | None, paths: list[str]) -> dict[str, Any]:
    grouped = settings.group_size != -1
    weights: dict[str, Any] = {
        "num_bits": settings.bits,
        "type": "int",
        "symmetric": settings.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": settings.group_size if grouped else None,
        "dynamic": False,
    }
    read = None
    if inputs is not None:
        read = {
            "num_bits": inputs.bits,
            "type": "int",
            "symmetric": inputs.symmetric,
            "strategy": "tensor" if inputs.static else "token",
            "dynamic": not inputs.static,
        }
    return {"targets": paths, "format": _format(settings), "weights": weights, "input_activations": read}
