"""ONNX files whose treated weights stay integers: 8-bit and 4-bit tensors with ``DequantizeLinear`` (opset 21).

The graph is traced with plain layers; afterwards the tensor of every quantized layer is taken out and its codes are put
in. Codes of up to 4 bits are stored in 4, others in 8. Everything else, scales included, is float32: ONNX Runtime's CPU
kernels compute in it. A low-rank layer is two products. Activations that a layer rounds to integers are rounded by
plain operations in the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, require_extra
from layerwright.core.layers import structure_copy
from layerwright.nn.activation import InputQuantizer
from layerwright.nn.attached import attached
from layerwright.nn.attention_products import AttentionProducts
from layerwright.nn.experts import ExpertStack
from layerwright.nn.kv import CacheBudget
from layerwright.nn.mixed_rows import MixedRowLinear
from layerwright.nn.quantized import QuantConv, QuantEmbedding, QuantLinear
from layerwright.nn.quantized_weight import quantized_activations
from layerwright.nn.rounded_cache import KeyValueRounding
from layerwright.nn.sparse_weight import SparseWeight
from layerwright.nn.tied import TiedEmbedding, TiedLinear
from layerwright.nn.w4a8 import W4A8Linear
from layerwright.treat.export._onnx_inputs import Traced, example
from layerwright.treat.export._staging import refuse, staged_file, target_file
from layerwright.treat.export._treated import describe, treated_layers

__all__ = ["Codes", "traceable", "write"]

OPSET = 21
_PROTOBUF_BYTES = 1_500_000_000
Quantized = QuantLinear | W4A8Linear | QuantConv | QuantEmbedding


@dataclass(frozen=True)
class Codes:
    """A quantized weight as ``DequantizeLinear`` takes it.

    Attributes:
        codes: int8 ``(out, in)``.
        scale: float32 ``(out, groups)``.
        zero: int8 ``(out, groups)``, None if symmetric.
        bits: 4 or 8, as stored.
        shape: of the weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    shape: tuple[int, ...]


def write(model: nn.Module, out: Path, *, processor: Any = None, force: bool = False) -> Path:
    """Write `model` to `out` (or to ``out/model.onnx``): token ids and mask, or pixels, to logits.

    Memory: the whole model dense in float32. Weights above 1.5 GB go to a file ``.data`` beside it.

    Raises:
        CheckpointError: sparse weights or experts, a model that cannot be traced, or a file that cannot be written.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    del processor
    require_extra("onnx", "export")
    require_extra("onnxscript", "export")
    refuse("onnx", problems(model))
    copy, codes = traceable(model)
    with staged_file(out, "model.onnx", force) as path:
        program = _trace(copy, type(model).__name__)
        names = _initializer_names(copy)
        _forget_traces(program.model.graph)
        stored = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        for name, quantized in codes.items():
            stored += _replace_initializer(program.model.graph, names[name], quantized)
        program.save(path, external_data=stored > _PROTOBUF_BYTES)
    return target_file(out, "model.onnx")


def problems(model: nn.Module) -> list[tuple[str, str]]:
    """``(layer, reason)`` of every treated layer that this format cannot express."""
    found = []
    for path, module in treated_layers(model):
        if isinstance(
            module, ExpertStack | SparseWeight | MixedRowLinear | AttentionProducts | CacheBudget | KeyValueRounding
        ):
            found.append((path, f"{describe(module)}: plain integer weights and rounded inputs of layers are"))
    return found


@torch.no_grad()
def traceable(model: nn.Module) -> tuple[nn.Module, dict[str, Codes]]:
    """A float32 copy of `model` with plain layers, and the codes of each quantized weight by parameter name."""
    copy = structure_copy(model)
    plain: dict[nn.Module, nn.Module] = {}
    codes: dict[str, Codes] = {}
    for path, module in model.named_modules():
        if isinstance(module, Quantized):
            old = copy.get_submodule(path)
            plain[old] = _plain(module)
            beside = attached(old, InputQuantizer.child)
            if beside is not None:
                beside.attach_(plain[old])
            weight = plain[old].weight
            assert isinstance(weight, Tensor)
            codes[f"{path}.weight"] = _codes(module, tuple(weight.shape))
    for module in list(copy.modules()):
        if isinstance(module, TiedLinear | TiedEmbedding):
            source = plain.get(module.source, module.source)
            multiplier = module.multiplier if isinstance(module, TiedEmbedding) else 1.0
            bias = module.bias if isinstance(module, TiedLinear) else None
            weight = source.weight
            assert isinstance(weight, Tensor)
            plain[module] = _Rows(weight, multiplier) if isinstance(module, TiedEmbedding) else _Product(weight, bias)
    for parent in list(copy.modules()):
        for name, child in list(parent._modules.items()):
            if child in plain:
                parent._modules[name] = plain[child]
    return _to_float32(copy).eval(), codes


class _Product(nn.Module):
    """A linear layer that may round its input to 8 bits first."""

    def __init__(self, weight: Tensor, bias: Tensor | None, act_bits: bool = False, scale: Tensor | None = None):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", scale)
        self.act_bits = act_bits

    def forward(self, x: Tensor) -> Tensor:
        """`x` is ``(..., in)``."""
        if self.act_bits:
            codes, scale = quantized_activations(x, self.input_scale)  # type: ignore[arg-type]
            x = codes.to(x.dtype) * scale
        return nn.functional.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class _Rows(nn.Module):
    """An embedding times a constant."""

    def __init__(self, weight: Tensor, multiplier: float):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` of any shape."""
        rows = nn.functional.embedding(ids, self.weight)
        return rows if self.multiplier == 1.0 else rows * self.multiplier


class _Convolution(nn.Module):
    """A convolution that may round its input to 8 bits first."""

    def __init__(self, layer: QuantConv, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.settings, self.act_bits = layer.settings, layer.quantize.act_bits
        self.register_buffer("bias", layer.bias)
        self.register_buffer("input_scale", layer.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        """`x` is ``(batch, channels, *size)``."""
        if self.act_bits:
            x = self.settings.round_input(x, self.input_scale)  # type: ignore[arg-type]
        return self.settings.run(x, self.weight, self.bias)  # type: ignore[arg-type]


def _plain(module: Quantized) -> nn.Module:
    dense = module.matrix(0, torch.float32)
    if isinstance(module, QuantConv):
        return _Convolution(module, module.settings.kernel(dense))
    if isinstance(module, QuantEmbedding):
        return _Rows(dense, module.multiplier)
    rounds = isinstance(module, W4A8Linear) or bool(module.quantize.act_bits)
    return _Product(dense, module.bias, rounds, module.input_scale)


def _codes(module: Quantized, shape: tuple[int, ...]) -> Codes:
    zero = None if module.weight_zero is None else module.weight_zero.cpu()
    bits = 4 if module.quantize.bits <= 4 else 8
    scale = module.weight_scale.detach().float().cpu()
    return Codes(module.codes(0, 0, module.rows).cpu(), scale, zero, bits, shape)


def _to_float32(copy: nn.Module) -> nn.Module:
    """`copy` with float32 tensors of its own where the original, whose tensors it shares, has others."""
    made: dict[int, nn.Parameter] = {}
    for module in copy.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != torch.float32:
                if id(parameter) not in made:  # tied ones stay tied
                    made[id(parameter)] = nn.Parameter(parameter.detach().float(), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    return copy


def _trace(copy: nn.Module, name: str) -> Any:
    """The graph of `copy`."""
    inputs, shapes = example(copy, name)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                Traced(copy, tuple(inputs)),
                tuple(inputs.values()),
                dynamo=True,
                optimize=False,  # folding would replace the weights by others
                opset_version=OPSET,
                dynamic_shapes=(tuple(shapes.values()),),  # one entry: the inputs are variadic
                input_names=list(inputs),
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong in the model's own code
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise CheckpointError(f"onnx: {name} cannot be traced ({reason}); use --format safetensors") from error


def _forget_traces(graph: Any) -> None:
    """Drop the stack traces of the machine that traced it: paths, and most of a small file."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()


def _initializer_names(copy: nn.Module) -> dict[str, list[str]]:
    """All names that a parameter may have in the graph, by each of its names."""
    same: dict[int, list[str]] = {}
    named = dict(copy.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        same.setdefault(id(parameter), []).append(f"model.{name}")
    return {name: same[id(parameter)] for name, parameter in named.items()}


def _replace_initializer(graph: Any, names: list[str], quantized: Codes) -> int:
    """Put codes in place of a float tensor; returns the bytes that this adds (a negative number)."""
    from onnxscript import ir

    old = next((graph.initializers[name] for name in names if name in graph.initializers), None)
    if old is None:
        raise CheckpointError(f"onnx: the traced graph lost the weight {names[0]}; use --format safetensors")
    name, rows, groups = old.name, *quantized.scale.shape
    columns = quantized.codes.shape[1]
    flat = groups > 1 and len(quantized.shape) > 2
    tensors = {"codes": _integers(quantized.codes if groups > 1 else quantized.codes.view(quantized.shape), quantized)}
    tensors["scale"] = (quantized.scale if groups > 1 else quantized.scale.view(rows)).contiguous().numpy()
    if quantized.zero is not None:
        tensors["zero"] = _integers(quantized.zero if groups > 1 else quantized.zero.view(rows), quantized)
    if flat:
        tensors["shape"] = torch.tensor(quantized.shape).numpy()
    added: Mapping[str, Any] = {key: _initializer(graph, f"{name}.{key}", value) for key, value in tensors.items()}
    inputs = [added[key] for key in ("codes", "scale", "zero") if key in added]
    settings = {"axis": 1, "block_size": columns // groups} if groups > 1 else {"axis": 0}
    nodes = [ir.node("DequantizeLinear", inputs, settings, name=f"{name}.dequantize")]
    if flat:
        nodes.append(ir.node("Reshape", [nodes[0].outputs[0], added["shape"]], name=f"{name}.reshape"))
    new = nodes[-1].outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.insert_before(graph[0], nodes)
    ir.convenience.replace_all_uses_with(old, new)
    del graph.initializers[name]
    new.name = name
    return int(sum(value.const_value.nbytes for value in added.values()) - old.const_value.nbytes)


def _integers(values: Tensor, quantized: Codes) -> Any:
    """int8, or 4-bit integers, of which a file holds two to the byte."""
    import ml_dtypes

    array = values.contiguous().numpy()
    return array.astype(ml_dtypes.int4) if quantized.bits == 4 else array


def _initializer(graph: Any, name: str, array: Any) -> Any:
    from onnxscript import ir

    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
