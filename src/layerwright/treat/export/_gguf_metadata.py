"""What a GGUF file says about a model besides its weights: sizes, rotary embedding, tokenizer."""

from __future__ import annotations

import json
import warnings
from typing import Any

__all__ = ["ARCHITECTURES", "add_model", "add_tokenizer", "unsupported"]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""llama.cpp's name of each transformers class that can be written."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
"""llama.cpp's names for the rules by which text is split before merging."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def unsupported(config: Any) -> str:
    """Which setting of the architecture llama.cpp cannot follow; ``""`` if none."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return f"the rotary embedding {kind!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "a rotary embedding of a part of each head"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r}"
    return ""


def add_model(writer: Any, config: Any, architecture: str) -> None:
    """Sizes and constants.

    llama.cpp attends to the whole context in these architectures: where a model looks only through a window, the
    context is declared to be no longer than that, so that both compute the same.
    """
    rope = config.rope_parameters
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    window = config.sliding_window if sliding or config.model_type == "mistral" else None
    writer.add_name(config.name_or_path.rstrip("/").rpartition("/")[2] or architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type", "default") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: Any, processor: Any, config: Any) -> None:
    """Vocabulary, merges and special tokens of a byte-level BPE tokenizer.

    Without one, or with another kind (a warning says so), the file holds weights only.
    """
    data = _byte_level(processor)
    split = None if data is None else _split(data)
    if data is None or split is None:
        if processor is not None:
            warnings.warn(
                f"gguf: {type(processor).__name__} is no byte-level BPE tokenizer that llama.cpp has a name for; the "
                "file holds the weights without a vocabulary",
                stacklevel=4,
            )
        writer.add_tokenizer_model("no_vocab")
        return
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    for token, index in data["model"]["vocab"].items():
        if index < config.vocab_size:
            tokens[index], types[index] = token, _NORMAL
    for added in data["added_tokens"]:
        if added["id"] < config.vocab_size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(processor, f"{name}_token_id", None)
        if index is not None and index < config.vocab_size:
            getattr(writer, f"add_{name}_token_id")(index)
    first = processor("a")["input_ids"][:1]
    writer.add_add_bos_token(processor.bos_token_id is not None and first == [processor.bos_token_id])
    if getattr(processor, "chat_template", None):
        writer.add_chat_template(processor.chat_template)


def _byte_level(processor: Any) -> dict[str, Any] | None:
    """The description of a fast byte-level BPE tokenizer."""
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        return None
    data: dict[str, Any] = json.loads(backend.to_str())
    if data["model"]["type"] != "BPE" or data["model"].get("byte_fallback"):
        return None
    return data if any(step["type"] == "ByteLevel" for step in _steps(data)) else None


def _split(data: dict[str, Any]) -> str | None:
    """llama.cpp's name of the rule that splits text; without merges any rule gives the same tokens."""
    patterns = [step["pattern"].get("Regex") for step in _steps(data) if step["type"] == "Split"]
    whole = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in _steps(data))
    if (whole and not patterns) or not data["model"]["merges"]:
        return "gpt-2"
    return _SPLITS.get(patterns[0]) if len(patterns) == 1 and not whole else None


def _steps(data: dict[str, Any]) -> list[dict[str, Any]]:
    first = data.get("pre_tokenizer") or {"type": "none"}
    steps: list[dict[str, Any]] = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    return steps
