"""Accuracy of quantized vision transformers by method and precision: ``python -m benchmarks.vit_quantization``.

Weights and activations of 3, 4 and 6 bits on ``demo:vit``, a larger ViT trained here, and both with channels spread as
large ViTs have them. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys

from torch import nn

from layerwright.data.loading import load
from layerwright.studies._vit import METHODS, calibration_digits, compare_methods, larger_vit, spread_channels


def main() -> None:
    """Print a line per model and precision; what is being measured goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--samples", type=int, default=128, help="calibration images")
    parser.add_argument("--epochs", type=int, default=20, help="of training the larger ViT; 0 leaves it out")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "lrp_qvit"])
    parser.add_argument(
        "--spread", action=argparse.BooleanOptionalAction, default=True, help="with spread channels too"
    )
    a = parser.parse_args()
    models: dict[str, nn.Module] = {"demo:vit": load("demo:vit", dtype="float32")[0]}
    if a.epochs:
        models["ViT 96 x 8"] = larger_vit(epochs=a.epochs)
    if a.spread:
        data = calibration_digits(a.samples)
        models |= {f"{name}, spread": spread_channels(model, data) for name, model in models.items()}

    def tell(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    rows = compare_methods(models, a.bits, samples=a.samples, methods=a.methods, progress=tell)
    print("| model | precision | full | " + " | ".join(a.methods) + " |")
    print("| --- | --- | --- | " + " | ".join("---" for _ in a.methods) + " |")
    for row in rows:
        values = " | ".join("" if row[m] is None else f"{row[m]:.1f}" for m in a.methods)
        print(f"| {row['model']} | {row['precision']} | {row['full']:.1f} | {values} |")


if __name__ == "__main__":
    main()
