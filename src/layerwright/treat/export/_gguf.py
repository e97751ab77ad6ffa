"""GGUF files for llama.cpp: Llama-like language models in one file.

Codes are written as they are: int8 becomes Q8_0 and int4 becomes Q4_0, blocks of 32 weights with a scale in float16. A
group larger than 32 (or a whole row) repeats its scale. Matrices that are not treated keep their dtype, vectors become
float32, as llama.cpp expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, require_extra
from layerwright.nn.quantized import QuantEmbedding, QuantLinear
from layerwright.nn.replace import structure_of
from layerwright.nn.tied import Tied
from layerwright.treat.export._gguf_metadata import ARCHITECTURES, add_model, add_tokenizer, unsupported
from layerwright.treat.export._staging import refuse, staged_file, target_file
from layerwright.treat.export._treated import describe, treated_layers
from layerwright.treat.writer import unique_tensors

__all__ = ["llama_rows", "pack_q4_0", "pack_q8_0", "write"]

BLOCK = 32
_TYPES = {4: "Q4_0", 8: "Q8_0"}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(model: nn.Module, out: Path, *, processor: Any = None, force: bool = False) -> Path:
    """Write `model` to `out` (or to ``out/model.gguf``). Memory: the size of the file.

    Scales are rounded to float16, which is exact for scales of bfloat16 and float16 models and changes those of a
    float32 model by at most one part in 2048.

    Raises:
        CheckpointError: another architecture than Llama, Mistral, Qwen2 or Qwen3, a setting of it or a treatment that
            the format cannot express, or a file that cannot be written.
        MissingExtraError: gguf is not installed.
    """
    gguf = require_extra("gguf", "export")
    config = getattr(model, "config", None)
    if type(model).__name__ not in ARCHITECTURES:
        raise CheckpointError(
            f"gguf cannot express {type(model).__name__} (known: {', '.join(sorted(ARCHITECTURES))}): "
            "use --format safetensors"
        )
    if reason := unsupported(config):
        raise CheckpointError(f"gguf cannot express {reason}: use --format safetensors")
    refuse("gguf", problems(model))
    architecture = ARCHITECTURES[type(model).__name__]
    with staged_file(out, "model.gguf", force) as path:
        writer = gguf.GGUFWriter(path, architecture)
        add_model(writer, config, architecture)
        sizes: dict[str, int] = {}
        for name, tensor, kind in _tensors(model, architecture, gguf):
            raw = tensor.numpy()
            writer.add_tensor(name, raw, raw_dtype=None if kind == "F32" else gguf.GGMLQuantizationType[kind])
            sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
        _add_file_type(writer, sizes, gguf)
        add_tokenizer(writer, processor, config)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return target_file(out, "model.gguf")


def problems(model: nn.Module) -> list[tuple[str, str]]:
    """``(layer, reason)`` of every treated layer that this format cannot express."""
    return [
        (path, reason)
        for path, module in treated_layers(model)
        if (reason := "" if isinstance(module, Tied) else _problem(module))
    ]


def _problem(module: nn.Module) -> str:
    if not isinstance(module, QuantLinear | QuantEmbedding):
        return f"{describe(module)}: only quantized linear layers and embeddings are"
    settings = module.quantize
    if settings.bits not in _TYPES:
        return f"{settings.bits} bits: only 4 and 8 are"
    if settings.act_bits:
        return "integer activations"
    if module.weight_zero is not None:
        return "asymmetric"
    group = module.columns // module.weight_scale.shape[1]
    if group % BLOCK:
        return f"groups of {group}: only multiples of {BLOCK} are"
    if isinstance(module, QuantEmbedding) and module.multiplier != 1.0:
        return "a scaled embedding"
    scale = module.weight_scale.float()
    off = (scale.half().float() - scale).abs() > scale.abs() / 1024  # overflow, or below the normal numbers
    if off.any() and _used(module)[off].any():
        return "scales outside float16"
    return ""


def _used(module: QuantLinear | QuantEmbedding) -> Tensor:
    """Which groups hold any code but zero, ``(rows, groups)``."""
    groups = module.weight_scale.shape[1]
    return module.codes(0, 0, module.rows).view(module.rows, groups, -1).ne(0).any(-1)


def _tensors(model: Any, architecture: str, gguf: Any) -> Iterator[tuple[str, Tensor, str]]:
    """``(name in the file, raw tensor, type)`` of everything that is stored."""
    config = model.config
    known = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    structure = {path: model.get_submodule(path) for path in structure_of(model)}
    for path, module in structure.items():
        if isinstance(module, Tied):
            continue
        rows = _rows_of(f"{path}.weight", config, architecture, module.rows)
        yield f"{names.get_name(path)}.weight", *_packed(module, rows)
    for name, tensor in unique_tensors(model).items():
        owner, _, last = name.rpartition(".")
        if owner in structure and last != "bias":
            continue
        base = names.get_name(owner)
        if base is None:
            raise CheckpointError(f"gguf has no name for {name}: use --format safetensors")
        rows = _rows_of(name, config, architecture, tensor.shape[0])
        values = tensor.detach().cpu()
        values = (values if rows is None else values[rows]).contiguous()
        if values.ndim < 2:
            values = values.float()
        kind = _FLOATS[values.dtype]
        yield f"{base}.{last}", values.view(torch.uint8) if kind == "BF16" else values, kind
    factors = rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors, "F32"


def _rows_of(name: str, config: Any, architecture: str, rows: int) -> Tensor | None:
    """The order in which rows are written; None keeps it."""
    if architecture != "llama" or not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return None
    query = ".q_proj." in name
    return llama_rows(rows, config.num_attention_heads if query else config.num_key_value_heads)


def llama_rows(rows: int, heads: int) -> Tensor:
    """Row order of query and key projections: llama.cpp rotates neighbours, transformers the halves of a head."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def rope_factors(model: Any) -> Tensor | None:
    """By what each frequency of Llama 3's scaled rotary embedding is divided, ``(head_dim / 2,)``; None unscaled."""
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    frequencies = model.model.rotary_emb.inv_freq.detach().float()
    exponents = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
    factors: Tensor = 1.0 / rope["rope_theta"] ** exponents / frequencies
    return factors.contiguous()


def _packed(module: QuantLinear | QuantEmbedding, rows: Tensor | None) -> tuple[Tensor, str]:
    codes, scale = module.codes(0, 0, module.rows).cpu(), module.weight_scale.detach().cpu()
    if rows is not None:
        codes, scale = codes[rows], scale[rows]
    scale = scale.repeat_interleave(module.columns // BLOCK // scale.shape[1], dim=1)
    kind = _TYPES[module.quantize.bits]
    pack = pack_q4_0 if kind == "Q4_0" else pack_q8_0
    return pack(codes, scale.half()), kind


def pack_q8_0(codes: Tensor, scale: Tensor) -> Tensor:
    """int8 codes ``(rows, columns)`` and float16 scales ``(rows, columns / 32)`` as uint8 ``(rows, blocks * 34)``."""
    blocks = codes.reshape(*scale.shape, BLOCK).view(torch.uint8)
    return torch.cat([_bytes(scale), blocks], -1).flatten(1)


def pack_q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes in [-8, 7] as uint8 ``(rows, blocks * 18)``: weights 0 to 15 of a block in the low half of its bytes."""
    blocks = (codes + 8).view(torch.uint8).reshape(*scale.shape, 2, BLOCK // 2)
    return torch.cat([_bytes(scale), blocks[..., 0, :] | (blocks[..., 1, :] << 4)], -1).flatten(1)


def _bytes(scale: Tensor) -> Tensor:
    return scale.contiguous().unsqueeze(-1).view(torch.uint8)


def _add_file_type(writer: Any, sizes: dict[str, int], gguf: Any) -> None:
    """What most bytes are, as llama.cpp shows it."""
    kind = max(sizes, key=lambda kind: sizes[kind])
    names = {"F32": "ALL_F32", "F16": "MOSTLY_F16"}
    writer.add_file_type(gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
