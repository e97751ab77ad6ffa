"""Windows of bytes, a small model that learned them, and an interval for losses of two models over them."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.data.demo.train_lm import VOCABULARY, byte_tokenizer
from layerwright.studies._fixtures import byte_windows
from layerwright.tune.full import full

__all__ = ["byte_data", "paired_interval", "small_byte_model"]


def byte_data(
    part: Literal["train", "calibration", "heldout"], samples: int, length: int, *, seed: int = 0, batch_size: int = 8
) -> Calibration:
    """Windows of one part of the standard library's text, as `byte_windows` draws them."""
    return byte_windows(part, byte_tokenizer(), samples, length, seed=seed, batch_size=batch_size)


def paired_interval(losses: Tensor, others: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of ``losses - others``, both ``(windows,)`` of the same windows; normal over windows."""
    difference = (losses - others).double()
    mean, half = float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return mean - half, mean + half


@cache
def small_byte_model(steps: int, layers: int = 6, seed: int = 0) -> nn.Module:
    """A byte-level Llama of width 128 that learned the standard library's text, in evaluation mode.

    AdamW, `steps` batches of 8 windows of 64 bytes, rate 3e-3; 600 steps take about a minute on a core.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    data = byte_data("train", 8 * steps, 64, seed=seed)
    return full(model, data, steps=steps, learning_rate=3e-3, weight_decay=0.01, seed=seed).eval()
