"""Seconds of relevance for one set of images, beside a forward pass: ``python -m benchmarks.lrp``.

Both take turns in one process; the smallest of `--repeats` runs counts. The target is ten seconds for 256 images of
``demo:vit`` on one thread.
"""

from __future__ import annotations

import argparse
import time

import torch

from layerwright.data.demo_data import digits
from layerwright.data.loading import load
from layerwright.score.relevance import lrp_contribution


def main() -> None:
    """Print the two times, their ratio and the layers that contribute most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", default="grad_positive", choices=["grad_positive", "share", "abs"])
    a = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load("demo:vit", dtype="float32")
    batches = [{"pixel_values": part} for part in digits("train")[0][: a.images].split(a.batch_size)]
    forward, relevance = [], []
    for _ in range(a.repeats):
        begun = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        forward.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        omega = lrp_contribution(model, batches, a.kind)
        relevance.append(time.perf_counter() - begun)
    print(f"{a.images} images  forward {min(forward):.2f} s  relevance {min(relevance):.2f} s  ", end="")
    print(f"ratio {min(relevance) / min(forward):.1f}")
    for name, share in sorted(omega.items(), key=lambda item: -item[1])[:8]:
        print(f"{share:8.4f}  {name}")


if __name__ == "__main__":
    main()
