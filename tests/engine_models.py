"""Tiny decoders that the engine runs, ragged prompts, and what transformers makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo

__all__ = ["ARCHITECTURES", "decoder", "hf_logits", "ragged"]

ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


def decoder(name: str, seed: int = 0) -> Any:
    """A decoder with large random weights, biases and gains; grouped heads where the architecture has them."""
    if name == "mistral":
        return zoo._build("MistralForCausalLM", "MistralConfig", seed, **zoo.GROUPED, sliding_window=None)
    if name == "qwen2":
        return zoo._build("Qwen2ForCausalLM", "Qwen2Config", seed, **(zoo.TEXT | {"num_key_value_heads": 2}))
    model, _ = zoo.ZOO[name]()
    return model


def ragged(rows: int = 4, tokens: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and their mask; the first has no padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, zoo.VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        pad = int(torch.randint(1, tokens, (1,), generator=generator))
        mask[row, :pad], ids[row, :pad] = 0, 0
    return ids, mask


@torch.no_grad()
def hf_logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of transformers after the last token, without a cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    return logits
