"""Sampling with the state of the core, beside reading the whole prefix again for each word.

Run: ``python -m benchmarks.text_sampling``. Both draw the same sentences; they take turns, times are of the thread's own clock, and the
median of the ratios is printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from layerwright.models.text_gan import TextGenerator
from layerwright.nn.sequence_core import CoreKind


def seconds(call: Callable[[], object]) -> float:
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def main() -> None:
    """Print the ratios for cores and lengths."""
    torch.set_num_threads(1)
    kinds: tuple[CoreKind, ...] = ("lstm", "gru", "transformer")
    for kind in kinds:
        for length in (14, 40):
            model = TextGenerator(1000, 64, 64, length, kind)

            def draw(cached: bool) -> torch.Tensor:
                return model.sample(128, torch.Generator().manual_seed(0), cached=cached)[0]  # noqa: B023

            same = float((draw(True) == draw(False)).all(1).float().mean())
            pairs = [(seconds(lambda: draw(True)), seconds(lambda: draw(False))) for _ in range(3)]
            ratio = statistics.median(slow / quick for quick, slow in pairs)
            quick = statistics.median(first for first, _ in pairs)
            print(
                f"{kind:12} {length:3} words: {ratio:.1f} times the time without the state ({quick * 1e3:.0f} ms with it for 128 "
                f"sentences); {same:.0%} of the sentences are equal"
            )


if __name__ == "__main__":
    main()
