"""Accuracy of quantized vision transformers by method and precision: ``python -m benchmarks.vit_quantization``.

Weights and activations of 3, 4 and 6 bits on ``demo:vit`` and on a ViT of three times its width, which is trained at
the first run (minutes on a core) and kept. ``--spread`` adds both with channels spread as large ViTs have them;
``--write docs/vit_quantization.md`` writes the page of the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.data.loading import load
from layerwright.studies._vit import METHODS, calibration_digits, spread_channels
from layerwright.studies._vit_table import LargeVit, compare_methods, enlarged, large_vit

PAGE = """# Quantized vision transformers

Accuracy in percent on {tested} unseen digits after one calibration on {samples} unlabeled ones; weights per output channel, layer
inputs and the operands of attention's products at the bits of the row, patch embedding and head in full precision. One run.
`python -m benchmarks.vit_quantization {arguments}--write docs/vit_quantization.md` writes this page.

{table}

| method | |
| --- | --- |
| `minmax` | ranges between the extremes |
| `smooth` | SmoothQuant, then ranges of least squared error |
| `mptq` | [MPTQ-ViT](recipes/mptq-vit.md) at one precision: every norm centred and smoothed (SQ-b as published), two-region grids |
| `mptq_chosen` | the same with SQ-b only on norms whose readers' output error falls by a quarter or more |
| `evol_q` | [Evol-Q](recipes/evol-q.md): asymmetric weights, ranges of least squared error, evolved scales |
| `lrp_qvit` | the recipe [LRP-QViT](recipes/lrp-qvit.md) at the same average of bits, uneven over the layers |

{models}
"""


def main() -> None:
    """Print a line per model and precision; what is being measured goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=["demo", "large"], default=["demo", "large"])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 6])
    parser.add_argument("--samples", type=int, default=128, help="calibration images")
    parser.add_argument("--tested", type=int, default=500, help="images to judge by, at most 538")
    parser.add_argument("--epochs", type=int, default=LargeVit.epochs, help="of training the larger ViT")
    parser.add_argument(
        "--models-folder", type=Path, help="where trained networks are kept (default: the user's cache)"
    )
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "lrp_qvit"])
    parser.add_argument("--spread", action=argparse.BooleanOptionalAction, default=False, help="spread channels too")
    parser.add_argument("--write", type=Path, help="write the page of the table to this file")
    a = parser.parse_args()

    def tell(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    models: dict[str, nn.Module] = {}
    words = []
    if "demo" in a.model:
        models["demo:vit"] = load("demo:vit", dtype="float32")[0]
        words.append("`demo:vit` ships with the package: width 64, 8 blocks, 17 tokens.")
    if "large" in a.model:
        form = LargeVit(epochs=a.epochs)
        begun = time.perf_counter()
        models[form.name] = large_vit(form, a.models_folder, tell)
        print(f"{form.name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        words.append(
            f"`{form.name}` is trained by the benchmark: width {form.width}, {form.depth} blocks, "
            f"{(form.image_size // form.patch_size) ** 2 + 1} tokens of digits enlarged to {form.image_size} x "
            f"{form.image_size}, {form.epochs} epochs of turned, scaled and moved digits."
        )
    if a.spread:
        data = calibration_digits(a.samples)
        models |= {f"{name}, spread": spread_channels(m, enlarged(data, m)) for name, m in models.items()}
        words.append("Spread: the same function with norm outputs of very different size and mean by channel.")
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        for bits in a.bits:
            rows += compare_methods({name: model}, [bits], samples=a.samples, tested=a.tested, methods=a.methods)
            print(rows[-1], file=sys.stderr, flush=True)
    found = table(rows, a.methods)
    print(found)
    if a.write:
        arguments = "".join(f"{part} " for part in ("--spread",) if a.spread)
        a.write.write_text(
            PAGE.format(
                tested=a.tested,
                samples=a.samples,
                arguments=arguments,
                table=found,
                models="\n".join(f"- {w}" for w in words),
            )
        )


def table(rows: list[dict[str, Any]], methods: list[str]) -> str:
    """Markdown; a method that cannot reach a precision has an empty cell."""
    lines = ["| model | precision | full | " + " | ".join(f"`{m}`" for m in methods) + " |"]
    lines.append("| --- | --- | --- | " + " | ".join("---" for _ in methods) + " |")
    for row in rows:
        values = " | ".join("" if row[m] is None else f"{row[m]:.1f}" for m in methods)
        lines.append(f"| {row['model']} | {row['precision']} | {row['full']:.1f} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
