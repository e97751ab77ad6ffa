"""What several studies share: small models, windows of text, digits, times of decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.data.demo_data import digits, enlarge
from layerwright.data.loading import load
from layerwright.data.stdlib import stdlib_text

__all__ = ["byte_windows", "decode_ratio", "demo_language_model", "digit_images", "digits_resnet"]

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
    text = _text(part, max(400_000, 4 * samples * length))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length + 1, (samples,), generator=generator)
    windows = ids[starts[:, None] + torch.arange(length)]
    batches = [{"input_ids": rows, "labels": rows} for rows in torch.split(windows, batch_size)]
    return Calibration(batches, name=f"stdlib {part}", unit="nats/token")


@cache
def _text(part: Part, limit_bytes: int) -> str:
    # Finding the files takes longer than reading them.
    return "".join(stdlib_text(part, limit_bytes=limit_bytes))


def digit_images(part: Part, chosen: Tensor, batch_size: int = 64) -> Calibration:
    """The digits at the positions `chosen` of one part, as images ``(batch, 1, 32, 32)`` with labels."""
    images, labels = digits(part)
    inputs, answers = enlarge(images[chosen]).split(batch_size), labels[chosen].split(batch_size)
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(inputs, answers, strict=True)]
    return Calibration(batches, name=f"digits {part}", unit="nats/sample")


def digits_resnet(epochs: int = 15, seed: int = 0, batch_size: int = 64, rate: float = 3e-3) -> nn.Module:
    """A Hugging Face ResNet with BatchNorm, 32 to 64 channels and 125 thousand parameters, trained on the digits.

    Two convolutions and, from the second stage on, a shortcut in each of three stages. AdamW, one cycle of `rate`;
    15 epochs take about 10 seconds on a core. Returned in evaluation mode.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetForImageClassification(
            ResNetConfig(
                num_channels=1,
                embedding_size=32,
                hidden_sizes=[32, 48, 64],
                depths=[1, 1, 1],
                layer_type="basic",
                num_labels=10,
            )
        )
    images, labels = digits("train")
    images = enlarge(images)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            model(pixel_values=images[chosen], labels=labels[chosen]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval()


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
