"""From a transformers configuration to a shape; what the cost model does not cover is refused, not guessed."""

from __future__ import annotations

from typing import Any

from layerwright.core.errors import InputError
from layerwright.score.device.shapes import LMShape

__all__ = ["shape_from_config"]

# Feed-forward layers of two matrices; every other architecture of transformers that has the fields below gates them.
_TWO_MATRICES = frozenset(
    [
        "biogpt",
        "bloom",
        "codegen",
        "cpmant",
        "ctrl",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_neox_japanese",
        "gptj",
        "mpt",
        "nemotron",
        "openai-gpt",
        "opt",
        "persimmon",
        "phi",
        "starcoder2",
        "xglm",
    ]
)
_NOT_COVERED = {
    "kv_lora_rank": "attention over a compressed cache (MLA)",
    "linear_num_key_heads": "linear attention",
    "mamba_d_state": "state-space blocks",
    "attn_layer_period": "state-space blocks",
    "ssm_cfg": "state-space blocks",
}
_FULL, _SLIDING = {"full_attention", "attention"}, {"sliding_attention", "chunked_attention"}


def shape_from_config(config: Any, name: str = "") -> LMShape:
    """The shape of a decoder-only model.

    Args:
        config: a configuration of transformers; that of the text part is taken where there are several.
        name: for tables; the model type if it is left out.

    Raises:
        InputError: an encoder-decoder, a state-space or linear-attention model, a compressed cache, or fields that
            are missing.
    """
    whole, config = config, config.get_text_config()
    kind = str(config.model_type)
    name = name or kind
    if getattr(whole, "is_encoder_decoder", False):
        raise InputError(f"{name}: an encoder-decoder ({kind}) was given, expected a decoder-only language model")
    for field, what in _NOT_COVERED.items():
        if getattr(config, field, None) is not None:
            raise InputError(f"{name}: {kind} has {what}, expected full or sliding attention over keys and values")
    layers = int(_first(config, name, "num_hidden_layers", "n_layers"))
    heads = int(_first(config, name, "num_attention_heads", "n_heads"))
    hidden = int(_first(config, name, "hidden_size", "d_model"))
    experts = int(_first(config, name, "num_local_experts", "num_experts", "n_routed_experts", default=0) or 0)
    top_k = int(_first(config, name, "num_experts_per_tok", default=0) or 0) if experts else 0
    routed = experts if top_k else 0
    moe = _moe_layers(config, layers) if routed else ()
    sliding = _windowed(config, name, layers)
    width = int(_first(config, name, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", default=0) or 0)
    return LMShape(
        name=name,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=int(getattr(config, "intermediate_size_mlp", 0) or width or 4 * hidden),
        num_heads=heads,
        num_kv_heads=_kv_heads(config, heads),
        head_dim=int(getattr(config, "head_dim", 0) or 0),
        num_experts=routed if moe else 0,
        top_k=top_k if moe else 0,
        expert_size=int(getattr(config, "moe_intermediate_size", 0) or width) if moe else 0,
        shared_size=_shared(config, width) if moe else 0,
        moe_layers=moe,
        gated=kind not in _TWO_MATRICES,
        window=int(getattr(config, "sliding_window", 0) or 0) if sliding else 0,
        windowed_layers=sliding,
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
    )


def _first(config: Any, name: str, *fields: str, default: Any = None) -> Any:
    for field in fields:
        if getattr(config, field, None) is not None:
            return getattr(config, field)
    if default is None:
        raise InputError(f"{name}: the configuration has none of {', '.join(fields)}: expected a language model")
    return default


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "model_type", "") == "falcon" and not getattr(config, "new_decoder_architecture", False):
        return 1 if getattr(config, "multi_query", False) else heads
    if getattr(config, "model_type", "") == "gpt_bigcode" and getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads)


def _moe_layers(config: Any, layers: int) -> tuple[int, ...]:
    """Blocks with experts, in the words of the several families."""
    listed = getattr(config, "moe_layers", None)
    if isinstance(listed, list | tuple):
        return tuple(int(place) for place in listed)
    step = int(getattr(config, "decoder_sparse_step", None) or getattr(config, "moe_layer_freq", None) or 1)
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    first = int(getattr(config, "first_k_dense_replace", None) or 0)
    return tuple(place for place in range(first, layers) if (place + 1) % step == 0 and place not in dense)


def _shared(config: Any, width: int) -> int:
    if getattr(config, "shared_expert_intermediate_size", None):
        return int(config.shared_expert_intermediate_size)
    if config.model_type == "llama4_text":
        return width
    return int(getattr(config, "n_shared_experts", None) or 0) * int(getattr(config, "moe_intermediate_size", 0) or 0)


def _windowed(config: Any, name: str, layers: int) -> tuple[int, ...]:
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return tuple(range(layers)) if getattr(config, "sliding_window", None) else ()
    for kind in kinds:
        if kind not in _FULL | _SLIDING:
            raise InputError(f"{name}: {kind} blocks, expected full or sliding attention over keys and values")
    if not getattr(config, "sliding_window", None):
        return ()
    return tuple(place for place, kind in enumerate(kinds) if kind in _SLIDING)
