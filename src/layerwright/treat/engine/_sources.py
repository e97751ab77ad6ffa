"""What the engine reads from a transformers decoder: which module is what, and whether it computes what is expected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.class_swap import swapped
from layerwright.core.errors import InputError

__all__ = ["SUPPORTED", "Shape", "SourceBlock", "read_shape", "source_blocks"]

SUPPORTED = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Model type of the configuration to the class of the model."""


@dataclass(frozen=True)
class Shape:
    """Extents and constants of a decoder.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, vocabulary: its sizes; heads are those of every block.
        positions: the longest sequence that its positions are made for.
        norm: ``rms`` or ``layer``.
        eps: of the norms.
        activation: name of the function in feed-forward parts.
        gated: whether these have a gate.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    norm: str
    eps: float
    activation: str
    gated: bool


@dataclass(frozen=True)
class SourceBlock:
    """The modules of one block; `qkv` and `up` are layers whose outputs the engine computes side by side."""

    norm1: nn.Module
    qkv: tuple[nn.Module, ...]
    qk_norms: tuple[nn.Module, nn.Module] | None
    out: nn.Module
    norm2: nn.Module
    up: tuple[nn.Module, ...]
    down: nn.Module
    scale: float


def read_shape(model: nn.Module, max_length: int) -> Shape:
    """The shape of a supported decoder.

    Raises:
        TypeError: another architecture.
        InputError: a supported one with something that the engine does not compute.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    known = ", ".join(f"{name} ({cls})" for name, cls in SUPPORTED.items())
    if kind not in SUPPORTED or type(model).__name__ != SUPPORTED[kind]:
        raise TypeError(f"model: got {type(model).__name__}, the engine runs {known}")
    if model.training:
        raise InputError("model: it is in training mode, where dropout acts; call model.eval() first")
    if getattr(config, "output_attentions", False):
        raise InputError(
            "output_attentions: the engine keeps no attention weights; set it to False in the configuration"
        )
    _refuse_changes(model)
    if kind == "gpt2":
        if config.add_cross_attention:
            raise InputError("model: GPT-2 with cross-attention is not a decoder alone")
        norm, eps, activation, gated = "layer", config.layer_norm_epsilon, config.activation_function, False
        head_dim, kv_heads = config.hidden_size // config.num_attention_heads, config.num_attention_heads
    else:
        _refuse_window(config, max_length)
        norm, eps, activation, gated = "rms", config.rms_norm_eps, config.hidden_act, True
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = config.num_key_value_heads
    return Shape(
        config.hidden_size,
        len(_stack(model)),
        config.num_attention_heads,
        kv_heads,
        head_dim,
        config.vocab_size,
        config.max_position_embeddings,
        norm,
        eps,
        activation,
        gated,
    )


def source_blocks(model: nn.Module) -> tuple[SourceBlock, ...]:
    """The blocks in order of execution."""
    found: list[SourceBlock] = []
    for block in _stack(model):
        if hasattr(block, "self_attn"):
            attention, mlp = block.self_attn, block.mlp
            norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            up = (mlp.gate_proj, mlp.up_proj)
            found.append(
                SourceBlock(
                    block.input_layernorm,
                    qkv,
                    norms,
                    attention.o_proj,
                    block.post_attention_layernorm,
                    up,
                    mlp.down_proj,
                    float(attention.scaling),
                )
            )
        else:
            attention, mlp = block.attn, block.mlp
            scale = float(attention.scaling)
            found.append(
                SourceBlock(
                    block.ln_1, (attention.c_attn,), None, attention.c_proj, block.ln_2, (mlp.c_fc,), mlp.c_proj, scale
                )
            )
    return tuple(found)


def final_norm(model: Any) -> nn.Module:
    """The norm before the head."""
    norm: nn.Module = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    return norm


def position_table(model: Any) -> Tensor | None:
    """GPT-2's learned positions ``(positions, hidden)``; None for rotary ones."""
    return model.transformer.wpe.weight if hasattr(model, "transformer") else None


def rotary_factors(model: Any, shape: Shape, length: int) -> Tensor:
    """``scaling * exp(i position frequency)``, complex64 ``(length, head_dim / 2)``.

    Raises:
        InputError: frequencies that depend on the length of the input, or that turn a part of each head alone.
    """
    rotary = model.model.rotary_emb
    kind = getattr(rotary, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise InputError(
            f"rope_type: got {kind!r}, whose frequencies change with the length; the engine needs fixed ones"
        )
    frequencies = rotary.inv_freq.float()
    if 2 * len(frequencies) != shape.head_dim:
        raise InputError(
            f"rope: {2 * len(frequencies)} of {shape.head_dim} features turn; the engine turns all or none"
        )
    angles = torch.arange(length, device=frequencies.device)[:, None].float() * frequencies
    return torch.complex(angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling)


def _stack(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _refuse_window(config: Any, max_length: int) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else config.model_type == "mistral" and window is not None
    if slides and (window or 0) < max_length:
        raise InputError(
            f"sliding_window: got {window} for max_length {max_length}; the engine attends to all tokens, so that a window "
            "must be at least that long"
        )
    if kinds - {"full_attention", "sliding_attention"}:
        raise InputError(f"layer_types: got {', '.join(sorted(kinds))}; the engine runs full attention")


def _refuse_changes(model: nn.Module) -> None:
    """A changed class or a hook would be lost without a word."""
    for path, module in model.named_modules():
        if swapped(module):
            raise InputError(f"{path}: its class was changed ({type(module).__mro__[1].__name__}); remove that first")
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not (getattr(hook, "__module__", "") or "").startswith("transformers.") for hook in hooks):
            raise InputError(f"{path}: it has forward hooks, which the engine would not run; remove them first")
        part = path.rpartition(".")[2]
        own = type(module).__module__.startswith(("transformers.", "torch.nn."))
        if part in ("self_attn", "attn", "mlp", "rotary_emb") and not own:
            raise InputError(
                f"{path}: {type(module).__name__} is no part of the original architecture; it cannot be run"
            )
