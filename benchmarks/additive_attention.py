"""Time of additive attention over the number of tokens, beside softmax attention: ``python -m benchmarks.additive_attention``.

One sequence of 96 features, one thread; the clock counts the time that the process ran; both take turns within a round
and the least of the rounds counts. The exponent is the slope of the logarithms. The floor is four products of all tokens
with a matrix, measured in the same run: the layer's multiply-adds without its norms and element-wise products.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from layerwright.nn.additive_attention import EfficientAdditiveAttention
from layerwright.studies.swiftformer import SoftmaxAttention, exponent

TOKENS, DIM, LARGEST = (196, 784, 3136, 12544), 96, 1.1


@torch.no_grad()
def measure(rounds: int = 7) -> list[dict[str, Any]]:
    """Milliseconds at each number of tokens."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"additive": EfficientAdditiveAttention(DIM), "softmax": SoftmaxAttention(DIM)}
    matrix = torch.randn(DIM, DIM)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(1, tokens, DIM)
        jobs: dict[str, tuple[Callable[[], object], int]] = {
            "additive": (lambda x=x: layers["additive"](x), max(2, 40_000 // tokens)),  # type: ignore[misc]
            "softmax": (lambda x=x: layers["softmax"](x), max(1, 4_000_000 // tokens**2)),  # type: ignore[misc]
            "floor": (lambda x=x: [functional.linear(x, matrix) for _ in range(4)], max(2, 40_000 // tokens)),  # type: ignore[misc]
        }
        best = dict.fromkeys(jobs, float("inf"))
        for number in range(rounds):
            for name, (job, repeats) in jobs.items():
                if name == "softmax" and tokens > 10_000 and number:
                    continue
                begun = time.process_time()
                for _ in range(repeats):
                    job()
                best[name] = min(best[name], (time.process_time() - begun) * 1e3 / repeats)
        rows.append({"tokens": tokens} | {f"{name}, ms": value for name, value in best.items()})
    return rows


def main() -> None:
    """Print the table and the exponents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(given.rounds)
    slopes = {name: exponent(rows, f"{name}, ms") for name in ("additive", "softmax", "floor")}
    if given.json:
        print(json.dumps({"rows": rows, "exponents": slopes}, indent=1))
    else:
        print("| " + " | ".join(rows[0]) + " |\n|" + " ---: |" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
        print("exponents: " + ", ".join(f"{name} {value:.2f}" for name, value in slopes.items()))
    if slopes["additive"] > LARGEST:
        sys.exit(f"additive: exponent {slopes['additive']:.2f}, expected at most {LARGEST}")


if __name__ == "__main__":
    main()
