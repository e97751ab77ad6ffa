"""Write a model in a form that other programs load.

- ``safetensors``: our own layout, everything exact; a plain Hugging Face checkpoint where no layer is treated.
- ``compressed-tensors``: packed integers that transformers (and vLLM) load.
- ``gguf``: Llama-like language models for llama.cpp.
- ``onnx``: a graph with integer weights for ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.core.registry import Registry
from layerwright.treat.export._dense import dense_copy

__all__ = ["FORMATS", "Writer", "dense_copy", "export_model"]

Writer = Callable[..., Path]
"""``write(model, out, *, processor, force)``: writes the whole model and returns the file or folder."""

FORMATS: Registry[Writer] = Registry("export format")
"""Writers by name of their format."""

for _name, _target in {
    "compressed-tensors": "layerwright.treat.export._compressed_tensors:write",
    "gguf": "layerwright.treat.export._gguf:write",
    "onnx": "layerwright.treat.export._onnx:write",
    "safetensors": "layerwright.treat.export._safetensors:write",
}.items():
    FORMATS.add(_name, _target)


def export_model(
    model: nn.Module,
    out: str | Path,
    format: str = "safetensors",
    *,
    processor: Any = None,
    dequantize: bool = False,
    force: bool = False,
) -> Path:
    """Write `model` to `out`; nothing appears there before everything is written.

    Args:
        model: treated or not; left untouched.
        out: a folder, or for ``gguf`` and ``onnx`` also a file with that ending.
        format: one of `FORMATS`.
        processor: tokenizer or image processor, written with the model where the format has a place for it.
        dequantize: write treated weights as plain ones, for formats that cannot express the treatment.
        force: replace an output that is there.

    Returns:
        The folder, or the file for ``gguf`` and ``onnx``.

    Raises:
        InputError: an unknown format (with close matches).
        CheckpointError: `out` cannot be used, or the format cannot express a layer; both before anything is written.
        MissingExtraError: the format needs a package that is not installed.
    """
    write = FORMATS.get(format)
    if dequantize:
        model = dense_copy(model)
    return write(model, Path(out), processor=processor, force=force)
