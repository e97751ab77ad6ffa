"""Tiny models of many architectures, built with fixed seeds, and batches for them that give a scalar loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EXPECTED", "ZOO", "Batch", "causal", "logits", "on_meta"]

Batch = dict[str, Any]
Built = tuple[nn.Module, list[Batch]]

VOCAB = 96
BATCHES, SAMPLES, TOKENS = 3, 2, 12

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}

EXPECTED: dict[str, dict[str, int]] = {
    "albert": {"albert.encoder.albert_layer_groups.0.albert_layers": 1},
    "bart": {"model.encoder.layers": 2, "model.decoder.layers": 3},
    "bert": {"bert.encoder.layer": 3},
    "bloom": {"transformer.h": 3},
    "clip": {"vision_model.encoder.layers": 2, "text_model.encoder.layers": 3},
    "convnext": {"convnext.encoder.stages.0.layers": 2, "convnext.encoder.stages.1.layers": 3},
    "deit": {"deit.layers": 3},
    "distilbert": {"distilbert.transformer.layer": 3},
    "falcon": {"transformer.h": 3},
    "gemma2": {"model.layers": 4},
    "gemma3": {"model.layers": 4},
    "gpt2": {"transformer.h": 4},
    "gpt_neox": {"gpt_neox.layers": 3},
    "gpt_oss": {"model.layers": 3},
    "llama": {"model.layers": 4},
    "llama4": {"model.layers": 4},
    "mistral": {"model.layers": 3},
    "mixtral": {"model.layers": 3},
    "opt": {"model.decoder.layers": 3},
    "phi3": {"model.layers": 3},
    "qwen2": {"model.layers": 4},
    "qwen3": {"model.layers": 3},
    "qwen3_moe": {"model.layers": 3},
    "resnet": {"resnet.encoder.stages.0.layers": 2, "resnet.encoder.stages.1.layers": 3},
    "roberta": {"roberta.encoder.layer": 3},
    "swin": {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 2},
    "t5": {"encoder.block": 3, "decoder.block": 2},
    "vit": {"vit.layers": 3},
    "whisper": {"model.encoder.layers": 2, "model.decoder.layers": 3},
}
"""Stacks in order of execution and the number of blocks of each, by architecture."""


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(generator: torch.Generator, length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCAB, (SAMPLES, length), generator=generator)


def _build(model_class: str, config_class: str, seed: int = 0, **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, model_class)(config)
        _enliven(model)
    return model.eval()


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Larger matrices, and biases and norms that are not 0 and 1: every block then matters, and so does every bias."""
    for parameter in model.parameters():
        if parameter.dim() >= 2 and parameter.numel() > 1:
            parameter.mul_(0.15 / parameter.std().clamp(min=0.15 / 8, max=0.15))
        else:
            parameter.add_(0.05 * torch.randn_like(parameter))


def _language(generator: torch.Generator) -> Batch:
    tokens = _tokens(generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def _classes(generator: torch.Generator) -> Batch:
    tokens = _tokens(generator)
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def _images(generator: torch.Generator, size: int = 16) -> Batch:
    labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
    return {"pixel_values": torch.randn(SAMPLES, 3, size, size, generator=generator), "labels": labels}


def _sequence_to_sequence(generator: torch.Generator) -> Batch:
    return {"input_ids": _tokens(generator), "labels": _tokens(generator, 8)}


def _speech(generator: torch.Generator) -> Batch:
    return {"input_features": torch.randn(SAMPLES, 8, 32, generator=generator), "labels": _tokens(generator, 6)}


def _image_text(generator: torch.Generator) -> Batch:
    tokens = _tokens(generator)
    pixels = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels, "return_loss": True}


def _entry(batch: Callable[[torch.Generator], Batch], model: str, config: str, **settings: Any) -> Callable[[], Built]:
    def build() -> Built:
        generator = _generator(1)
        return _build(model, config, **settings), [batch(generator) for _ in range(BATCHES)]

    return build


MIXED_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]

ZOO: dict[str, Callable[[], Built]] = {
    "albert": _entry(
        _classes, "AlbertForSequenceClassification", "AlbertConfig", **(TEXT | {"embedding_size": 16, "num_labels": 3})
    ),
    "bart": _entry(
        _sequence_to_sequence,
        "BartForConditionalGeneration",
        "BartConfig",
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    ),
    "bert": _entry(_classes, "BertForSequenceClassification", "BertConfig", **TEXT, num_labels=3),
    "bloom": _entry(
        _language,
        "BloomForCausalLM",
        "BloomConfig",
        vocab_size=VOCAB,
        hidden_size=32,
        n_layer=3,
        n_head=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "clip": _entry(
        _image_text,
        "CLIPModel",
        "CLIPConfig",
        text_config=TEXT | {"projection_dim": 24},
        vision_config=VISION | {"num_hidden_layers": 2, "projection_dim": 24},
        projection_dim=24,
    ),
    "convnext": _entry(
        _images,
        "ConvNextForImageClassification",
        "ConvNextConfig",
        num_stages=2,
        hidden_sizes=[16, 32],
        depths=[2, 3],
        patch_size=2,
        layer_scale_init_value=1.0,
        num_labels=3,
    ),
    "deit": _entry(_images, "DeiTForImageClassification", "DeiTConfig", **VISION, num_labels=3),
    "distilbert": _entry(
        _classes,
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=VOCAB,
        dim=32,
        hidden_dim=64,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    ),
    "falcon": _entry(
        _language,
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gemma2": _entry(
        _language,
        "Gemma2ForCausalLM",
        "Gemma2Config",
        **(GROUPED | {"num_hidden_layers": 4, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    ),
    "gemma3": _entry(
        _language,
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **(
            GROUPED
            | {"num_hidden_layers": 4, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": MIXED_LAYERS}
        ),
    ),
    "gpt2": _entry(
        _language,
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": _entry(_language, "GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT),
    "gpt_oss": _entry(
        _language,
        "GptOssForCausalLM",
        "GptOssConfig",
        **(
            GROUPED
            | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 6}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        ),
    ),
    "llama": _entry(_language, "LlamaForCausalLM", "LlamaConfig", **(GROUPED | {"num_hidden_layers": 4})),
    "llama4": _entry(
        _language,
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **(
            GROUPED
            | {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
            | {"interleave_moe_layer_step": 2, "attention_chunk_size": 8}
        ),
    ),
    "mistral": _entry(_language, "MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=6),
    "mixtral": _entry(
        _language, "MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
    "opt": _entry(
        _language,
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi3": _entry(_language, "Phi3ForCausalLM", "Phi3Config", **(TEXT | {"num_key_value_heads": 2})),
    "qwen2": _entry(
        _language,
        "Qwen2ForCausalLM",
        "Qwen2Config",
        **(TEXT | {"num_key_value_heads": 2, "num_hidden_layers": 4}),
        use_sliding_window=True,
        sliding_window=6,
        layer_types=MIXED_LAYERS,
    ),
    "qwen3": _entry(_language, "Qwen3ForCausalLM", "Qwen3Config", **GROUPED, tie_word_embeddings=True),
    "qwen3_moe": _entry(
        _language,
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
    ),
    "resnet": _entry(
        _images,
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[2, 3],
        layer_type="basic",
        num_labels=3,
    ),
    "roberta": _entry(
        _classes, "RobertaForSequenceClassification", "RobertaConfig", **(TEXT | {"pad_token_id": 1}), num_labels=3
    ),
    "swin": _entry(
        _images,
        "SwinForImageClassification",
        "SwinConfig",
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=3,
    ),
    "t5": _entry(
        _sequence_to_sequence,
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    ),
    "vit": _entry(_images, "ViTForImageClassification", "ViTConfig", **VISION, num_labels=3),
    "whisper": _entry(
        _speech,
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=VOCAB,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
}
"""Architecture name to a function that builds (model in eval mode, three batches of two samples)."""


def causal() -> tuple[str, ...]:
    """Names of the decoder-only language models."""
    encoders = {"albert", "bert", "distilbert", "roberta", "vit", "deit", "swin", "clip", "resnet", "convnext"}
    return tuple(name for name in ZOO if name not in encoders | {"t5", "bart", "whisper"})


def on_meta(name: str) -> nn.Module:
    """The same model without values."""
    model, _ = ZOO[name]()
    with torch.device("meta"):
        empty: nn.Module = type(model)(model.config)
    return empty.eval()


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits on `batch`; for CLIP, those of images against texts."""
    output = model(**batch)
    found = output.logits_per_image if hasattr(output, "logits_per_image") else output.logits
    assert isinstance(found, Tensor)
    return found
