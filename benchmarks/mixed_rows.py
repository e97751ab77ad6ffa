"""Rows of mixed widths against dense bfloat16: ``python -m benchmarks.mixed_rows [--hidden 2048] [--share 0.1]``.

Both multiply the same inputs in turn in one process; printed is the time of the dense layer over that of the mixed one
(above 1: the mixed one is faster), the median and the spread of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from layerwright.core.row_ranges import rows_to_text
from layerwright.core.treatment import MixRows
from layerwright.nn.mixed_rows import MixedRowLinear
from layerwright.treat.quantize import mix_rows

TARGET = 1.3
"""What one token at a time should reach at 2048 inputs and outputs."""


def mixed(weight: Tensor, share: float, group_size: int) -> MixedRowLinear:
    """`weight` ``(out, in)`` with a random `share` of rows at 8 bits, the rest at 4."""
    rows = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[: int(share * len(weight))]
    treatment = MixRows(4, rows_to_text({8: rows.tolist()}), group_size, "rtn")
    stored, _ = mix_rows(weight, treatment, None, 0, torch.bfloat16)
    return MixedRowLinear.from_stored(stored, None, torch.bfloat16)


@torch.no_grad()
def ratios(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor, *, pairs: int, calls: int
) -> list[float]:
    """Time of `first` over that of `second`, for each pair of runs of `calls` calls."""
    found = []
    for number in range(pairs + 1):
        taken = []
        for function in (first, second):
            begun = time.perf_counter()
            for _ in range(calls):
                function(x)
            taken.append(time.perf_counter() - begun)
        if number:  # the first pair warms up
            found.append(taken[0] / taken[1])
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(a.hidden, a.hidden, generator=generator) / a.hidden**0.5
    dense = nn.Linear(a.hidden, a.hidden, bias=False).bfloat16().requires_grad_(False)
    dense.weight.copy_(weight)
    layer = mixed(weight, a.share, a.group_size)
    print(f"{layer.average_bits:.3f} bits a weight; {torch.backends.cpu.get_cpu_capability()}, {a.threads} thread(s)")
    for tokens in (1, 4, 16, 128):
        x = torch.randn(tokens, a.hidden, generator=generator).bfloat16()
        found = ratios(dense, layer, x, pairs=a.pairs, calls=max(1, 40 // tokens))
        middle, low, high = statistics.median(found), min(found), max(found)
        verdict = f"  target {TARGET}: {'reached' if middle >= TARGET else 'missed'}" if tokens == 1 else ""
        print(f"{tokens:4d} tokens: {middle:.2f}x ({low:.2f} to {high:.2f}){verdict}", flush=True)


if __name__ == "__main__":
    main()
