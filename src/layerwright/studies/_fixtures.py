"""What several studies share: the demo model, windows of text, losses, times of decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.data.loading import load
from layerwright.data.stdlib import stdlib_text

__all__ = ["byte_windows", "decode_ratio", "demo_language_model"]

Part = Literal["train", "calibration", "heldout"]


def demo_language_model() -> tuple[nn.Module, Any]:
    """The demo language model (8 blocks, byte tokens) in float32, and its tokenizer."""
    return load("demo:lm", dtype="float32")


def byte_windows(
    part: Part, tokenizer: Any, samples: int, length: int, *, seed: int = 0, batch_size: int = 8
) -> Calibration:
    """`samples` windows of `length` tokens, drawn at random from one part of the standard library's text.

    Args:
        part: ``train``, ``calibration`` or ``heldout``: they share no file.
        tokenizer: callable as ``tokenizer(text)["input_ids"]``.
        samples, length: number of windows and tokens in each.
        seed: of the places of the windows.
        batch_size: windows in one batch.
    """
    text = "".join(stdlib_text(part, limit_bytes=max(400_000, 4 * samples * length)))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (samples,), generator=generator)
    windows = ids[starts[:, None] + torch.arange(length)]
    batches = [{"input_ids": rows, "labels": rows} for rows in torch.split(windows, batch_size)]
    return Calibration(batches, name=f"stdlib {part}", unit="nats/token")


@torch.no_grad()
def decode_ratio(
    model: nn.Module, reference: nn.Module, prompt: Tensor, *, tokens: int = 64, pairs: int = 7
) -> tuple[float, Sequence[float]]:
    """Time of a greedy decode with `model` over that with `reference`: the median of `pairs`, and all of them.

    Both take turns in one process, so that a busy machine slows both.

    Args:
        prompt: ``(batch, tokens)``.
        tokens: tokens to decode.
        pairs: runs of each.
    """
    times: dict[str, list[float]] = {"model": [], "reference": []}
    for number in range(pairs + 1):
        for name, network in (("reference", reference), ("model", model)):
            begun = time.perf_counter()
            _decode(network, prompt, tokens)
            if number:  # the first pair warms up
                times[name].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(times["model"], times["reference"], strict=True)]
    return statistics.median(ratios), ratios


def _decode(model: nn.Module, prompt: Tensor, tokens: int) -> None:
    step = model(input_ids=prompt, use_cache=True)
    for _ in range(tokens):
        token = step.logits[:, -1:].argmax(-1)
        step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)
