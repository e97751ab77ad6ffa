"""A small byte language model that studies train themselves, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.data.demo.train_lm import VOCABULARY, byte_stream, byte_tokenizer
from layerwright.data.stdlib import stdlib_text
from layerwright.studies._fixtures import byte_windows

__all__ = ["byte_data", "perplexity", "train_byte_lm"]


def train_byte_lm(
    steps: int,
    *,
    seed: int = 0,
    batch: int = 8,
    length: int = 64,
    rate: float = 4e-3,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A Llama of 4 blocks, 128 wide, over bytes, trained on the standard library's text; in evaluation mode.

    Byte tokens, 4 heads, 384 hidden units, a head of its own: 0.9 million parameters. AdamW with a cosine schedule.
    900 steps of 8 windows of 64 bytes take about 70 seconds of one core and reach a perplexity of 8.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
    stream = _train_stream()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        now = rate * min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = now
        starts = torch.randint(len(stream) - length - 1, (batch,), generator=generator)
        ids = stream[starts[:, None] + torch.arange(length)]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress and (step + 1) % 20 == 0:
            progress(step + 1, steps)
    return model.eval()


def byte_data(
    part: Literal["train", "calibration", "heldout"], samples: int, length: int, *, seed: int = 0, batch_size: int = 8
) -> Calibration:
    """Windows of one part of the standard library's text, as `byte_windows` draws them."""
    return byte_windows(part, byte_tokenizer(), samples, length, seed=seed, batch_size=batch_size)


def perplexity(model: nn.Module, data: Calibration) -> float:
    """``exp`` of the mean loss."""
    return math.exp(data.mean_loss(model))


@cache
def _train_stream() -> torch.Tensor:
    return byte_stream(stdlib_text("train", 4_000_000))
