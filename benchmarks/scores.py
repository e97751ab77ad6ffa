"""Rank correlation of predicted with measured damage for every scorer: ``python -m benchmarks.scores``.

Layers are sampled, so that the three models take minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time

from layerwright.recipes.bench import open_bench
from layerwright.recipes.validate import BLOCK_SCORERS, rank_correlations


def main() -> None:
    """Print a line per model and scorer; what is being measured goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo:lm", "demo:vit", "demo:cnn"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sample of text")
    parser.add_argument("--every", type=int, default=3, help="score every n-th layer")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    for name in a.models:
        bench = open_bench(name, samples=a.samples, length=a.length)
        times: dict[str, float] = {}

        def see(scorer: str, seconds: float, name: str = name, times: dict[str, float] = times) -> None:
            times[scorer] = seconds
            print(f"{time.strftime('%H:%M:%S')}  {name}  {scorer}  {seconds:.1f} s", file=sys.stderr, flush=True)

        found = rank_correlations(bench, every=a.every, seed=a.seed, progress=see)
        for scorer, value in sorted(found.items(), key=lambda item: (item[0] in BLOCK_SCORERS, -item[1])):
            judged = "blocks" if scorer in BLOCK_SCORERS else "layers"
            print(f"{name:9s}  {judged}  {scorer:22s} {value:+.3f}  {times[scorer]:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
