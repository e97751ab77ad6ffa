"""Shapes from transformers configurations, against the real parameters of models without memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from layerwright.core.errors import InputError
from layerwright.score.device import LMShape

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96}
GQA = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2}
CASES = {
    "llama": GQA,
    "mixtral": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 8},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 96, "n_positions": 8},
    "gpt_neox": {**SMALL, "intermediate_size": 128},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 96},
    "falcon": {**SMALL, "multi_query": True, "new_decoder_architecture": False},
    "qwen3_moe": {
        **GQA, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "decoder_sparse_step": 2, "mlp_only_layers": [3],
    },
    "qwen2_moe": {
        **GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "olmoe": {**GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**GQA, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen3": {**GQA, "head_dim": 32},
    "starcoder2": GQA,
    "gemma2": {**GQA, "head_dim": 32, "sliding_window": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_parameters_are_those_of_the_model(kind: str) -> None:
    config = CONFIG_MAPPING[kind](**CASES[kind])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    matrices = {id(p): p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "bias" not in name}
    small = sum(
        p.numel()
        for n, p in model.named_parameters()
        if any(part in n for part in ("wpe", "embed_positions", "shared_expert_gate"))
    )
    assert LMShape.from_config(config).params == sum(matrices.values()) - small


def test_windows() -> None:
    found = LMShape.from_config(CONFIG_MAPPING["gpt_oss"](**CASES["gpt_oss"]))
    assert (found.window, found.windowed_layers) == (8, (0, 2))
    assert LMShape.from_config(CONFIG_MAPPING["llama"](**GQA)).windowed_layers == ()


def test_the_text_part_of_a_larger_model() -> None:
    config = transformers.LlavaConfig(text_config=CONFIG_MAPPING["llama"](**GQA))
    assert LMShape.from_config(config, "seeing").hidden_size == 64


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("deepseek_v3", {}, "attention over a compressed cache"),
        ("qwen3_next", {}, "linear attention"),
        ("jamba", {}, "state-space blocks"),
        ("t5", {}, "an encoder-decoder"),
        ("vit", {"num_attention_heads": 3, "hidden_size": 64}, "give head_dim"),
        ("llama", {**GQA, "num_key_value_heads": 3}, "no multiple of num_kv_heads"),
        ("mixtral", {**GQA, "num_local_experts": 2, "num_experts_per_tok": 3}, "top_k 3 is more than num_experts 2"),
    ],
)
def test_what_is_not_covered_is_refused(kind, settings, message) -> None:
    with pytest.raises(InputError, match=message):
        LMShape.from_config(CONFIG_MAPPING[kind](**settings))
