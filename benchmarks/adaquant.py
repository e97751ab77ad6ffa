"""AdaQuant's two pipelines on convolutional networks, against one width for all layers in no more bytes.

``python -m benchmarks.adaquant`` prints a table: the demo CNN and a Hugging Face ResNet with BatchNorm that is trained
here (10 s, kept in ``~/.cache/layerwright`` by its settings), at 2.5, 3 and 4 bits. Columns are held-out losses in nats
per digit with the share of right labels; GPTQ and rounding to nearest take the budget's widths for all layers, one bit
more in the first ones until the bytes of the larger of the two results are used up.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import time
from pathlib import Path

import torch
from benchmarks.recipe_baselines import baselines, tuned
from torch import nn

from layerwright.core.layers import parameter_bytes
from layerwright.recipes.bench import Bench, open_bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide
from layerwright.recipes.measure import sample_losses
from layerwright.studies._fixtures import digit_images, digits_resnet
from layerwright.treat.apply import apply_plan

MODELS = ("demo:cnn", "resnet")
HEADS = (
    "model",
    "budget",
    "before",
    "to nearest",
    "GPTQ",
    "light",
    "advanced",
    "bytes: GPTQ, light, advanced",
    "seconds",
)
EPOCHS = 15


def resnet(cache: Path, epochs: int = EPOCHS) -> nn.Module:
    """The trained ResNet, from `cache` where the same code has trained it before."""
    from transformers import ResNetForImageClassification

    key = hashlib.sha256(f"{inspect.getsource(digits_resnet)} {epochs}".encode()).hexdigest()[:16]
    folder = cache / f"digits-resnet-{key}"
    if not folder.exists():
        digits_resnet(epochs).save_pretrained(folder)  # type: ignore[operator]
    model: nn.Module = ResNetForImageClassification.from_pretrained(folder).eval()
    return model


def opened(name: str, cache: Path, samples: int) -> Bench:
    """The model with calibration and held-out digits."""
    if name != "resnet":
        return open_bench(name, samples=samples)
    data = digit_images("calibration", torch.arange(samples), 32)
    return Bench(resnet(cache), None, data, digit_images("heldout", torch.arange(359)), "resnet")


def words(model: nn.Module, bench: Bench) -> str:
    """Held-out loss and share of right labels."""
    losses, right = sample_losses(model, bench.heldout)
    return f"{float(losses.mean()):.4f}" + ("" if right is None else f" ({float(right.double().mean()):.1%})")


def row(name: str, bits: float, bench: Bench, seed: int) -> list[str]:
    """One line of the table."""
    results, seconds = {}, []
    for chosen in ("adaquant_light", "adaquant"):
        begun = time.perf_counter()
        decision = decide(bench, f"bits={bits:g}", recipe(chosen), seed=seed)
        after = tuned(bench, decision, apply_plan(bench.model, decision.plan, bench.calibration)[0], seed)
        seconds.append(f"{time.perf_counter() - begun:.0f}")
        results[chosen] = decision, after
    decision, after = max(results.values(), key=lambda item: parameter_bytes(item[1]))
    plain = baselines(bench, decision, after, seed)
    assert plain.nearest is not None
    models = (bench.model, plain.nearest, plain.best, results["adaquant_light"][1], results["adaquant"][1])
    sizes = [f"{parameter_bytes(model):,}" for model in models[2:]]
    return [name, f"{bits:g} bits", *(words(model, bench) for model in models), ", ".join(sizes), " and ".join(seconds)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=float, default=[2.5, 3, 4])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "layerwright")
    a = parser.parse_args()
    for line in (HEADS, ("---",) * len(HEADS)):
        print(f"| {' | '.join(line)} |", flush=True)
    for name in a.models:
        bench = opened(name, a.cache, a.samples)
        for bits in a.bits:
            print(f"| {' | '.join(row(name, bits, bench, a.seed))} |", flush=True)


if __name__ == "__main__":
    main()
