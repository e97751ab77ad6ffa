"""From a transformers decoder to an engine."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.treat.engine._cache import StaticKVCache
from layerwright.treat.engine._model import InferenceModel
from layerwright.treat.engine._products import Layout, PromptWeights
from layerwright.treat.engine._program import activation_into
from layerwright.treat.engine._sources import read_shape
from layerwright.treat.engine._weights import read_decoder

__all__ = ["compile_inference"]

_CPU = (torch.float32, torch.bfloat16)


def compile_inference(
    model: nn.Module,
    max_batch: int = 1,
    max_length: int = 1024,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    layout: Layout = "auto",
    fold_norms: bool | None = None,
    prompt_chunk: int = 2048,
    prompt_weights: PromptWeights = "codes",
) -> InferenceModel:
    """An inference engine with the weights of a transformers decoder (Li et al., 2021, EET, arXiv 2104.12470).

    Queries, keys and values are one product, gate and up another; a prompt is read at once; padding is one number a
    row; keys, values and all results of a step lie in memory that is allocated here. Embedding tables are shared with
    the model where dtype and device are the same, all else is the engine's own: the model may be deleted. Layers in our own integer forms keep their codes and, in bfloat16
    on a CPU, are multiplied as codes; other forms run as they are.

    Args:
        model: Llama, Mistral (without a sliding window), Qwen2, Qwen3 or GPT-2 for causal language modelling, in
            evaluation mode; left as it is.
        max_batch: rows: sequences, times beams where there are any.
        max_length: tokens of a prompt and what follows it.
        dtype: float32 or bfloat16, on other devices than a CPU also float16; the model's own by default.
        device: the model's own by default.
        layout: of dense weights. ``packed`` is oneDNN's, on a CPU; each product allocates its result. With ``plain`` a
            step in float32 allocates nothing of the size of a hidden state. ``auto`` takes what decodes fastest: packed
            in bfloat16 and for several rows, plain for one row in float32, whose prompts ``packed`` would read faster.
        fold_norms: multiply gains of RMSNorms into the layers after them; by default in float32.
        prompt_chunk: tokens that are read at once; bounds the memory of long prompts.
        prompt_weights: what integer layers read prompts with: their ``codes``, or ``dense`` copies besides, which read
            them about twice as fast and take four times the memory of 4-bit codes.

    Raises:
        TypeError: another architecture.
        InputError: a number outside its range; a model in training mode, with hooks or changed classes, that wants
            attention weights, or whose attention slides; a dtype that the device does not compute with.
    """
    for name, value in (("max_batch", max_batch), ("max_length", max_length), ("prompt_chunk", prompt_chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: got {value!r}, expected a whole number of at least 1")
    if prompt_weights not in get_args(PromptWeights):
        raise unknown_name("prompt_weights", str(prompt_weights), get_args(PromptWeights))
    shape = read_shape(model, max_length)
    if max_length > shape.positions:
        raise InputError(f"max_length: got {max_length}, the model has positions for {shape.positions}")
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    place = torch.device(device) if device is not None else table.weight.device
    kind = dtype or table.weight.dtype
    if kind not in _CPU and not (kind == torch.float16 and place.type != "cpu"):
        raise InputError(f"dtype: got {kind} on {place}; use float32 or bfloat16, or float16 on a GPU")
    activation_into(shape.activation, torch.zeros(1), torch.zeros(1))
    decoder = read_decoder(
        model,
        shape,
        dtype=kind,
        device=place,
        layout=layout,
        max_batch=max_batch,
        max_length=max_length,
        fold_norms=fold_norms,
        prompt_weights=prompt_weights,
    )
    cache = StaticKVCache(shape.layers, max_batch, shape.kv_heads, max_length, shape.head_dim, kind, place)
    eos, pad = _special(model)
    with torch.inference_mode():
        return InferenceModel(decoder, cache, eos, pad, prompt_chunk)


def _special(model: Any) -> tuple[tuple[int, ...], int | None]:
    """Tokens that end a text, and the one that fills up."""
    settings = getattr(model, "generation_config", None) or model.config
    end = getattr(settings, "eos_token_id", None)
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    return ends, getattr(settings, "pad_token_id", None)
