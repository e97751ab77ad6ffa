"""The All Convolutional Net (Springenberg et al., 2015, arXiv 1412.6806): strides for pools, and guided maps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwright.core.evidence import Check, Evidence
from layerwright.data.shape_scenes import SHAPES, Scenes, needle_scenes, single_scenes
from layerwright.explain.guided_backprop import MODES, GuidedBackprop
from layerwright.models.all_cnn import KINDS, AllCNN
from layerwright.studies.vision import accuracy, fit_, mean_of, predict, worst_of

__all__ = ["CLAIM", "energy_share", "run"]

CLAIM = (
    "Convolutions with a stride do what pooling does, with no loss of accuracy; and guided backpropagation shows what raised "
    "a class more sharply than the gradient or the deconvnet."
)
SIZE, WIDTH, RATE, BATCH = 32, 0.125, 0.05, 32
Progress = Callable[[str, int, int], None]


def _normal(images: Tensor) -> Tensor:
    return (images - 0.35) / 0.25


def _train(kind: Any, scenes: Scenes, epochs: int, seed: int, progress: Progress | None = None) -> AllCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AllCNN("C", kind, num_classes=len(SHAPES), width_mult=WIDTH, dropout=(0.0, 0.1), final_relu=False)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        fit_(
            model, _normal(scenes.images), scenes.first_labels, epochs=epochs, batch=BATCH, rate=RATE, optimizer="sgd",
            weight_decay=1e-3, seed=seed, name=f"{kind}, seed {seed}", progress=progress,
        )  # fmt: skip
    return model


def energy_share(maps: Tensor, boxes: Tensor, margin: int = 1) -> Tensor:
    """Share ``(samples,)`` of the positive part of maps ``(samples, channels, height, width)``, squared, inside boxes.

    Boxes ``(samples, 4)`` are left, top, right, bottom, wider by `margin` pixels on each side.
    """
    energy = maps.clamp_min(0).square().sum(1)
    rows, columns = (torch.arange(n) for n in energy.shape[1:])
    inside = (columns >= boxes[:, :1] - margin) & (columns < boxes[:, 2:3] + margin)
    inside = inside[:, None] & ((rows >= boxes[:, 1:2] - margin) & (rows < boxes[:, 3:] + margin))[:, :, None]
    return (energy * inside).sum((1, 2)) / energy.sum((1, 2)).clamp_min(1e-30)


def run(quick: bool = False, seeds: int = 4, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    used = tuple(range(1 if quick else seeds))
    train = single_scenes(300 if quick else 1500, SIZE, seed=11)
    test = single_scenes(300 if quick else 1500, SIZE, seed=12)
    kinds = ("base", "all") if quick else KINDS
    epochs = 2 if quick else 14
    table: list[dict[str, Any]] = []
    for seed in used:
        for kind in kinds:
            model = _train(kind, train, epochs, seed, progress)
            error = 1 - accuracy(model, _normal(test.images), test.first_labels)
            parameters = sum(p.numel() for p in model.parameters())
            table.append({"arm": kind, "seed": seed, "error": error, "parameters": parameters})
    needles, held = needle_scenes(300 if quick else 2000, SIZE, seed=13), needle_scenes(200, SIZE, seed=14)
    searching = _train("all", needles, 2 if quick else 20, 0, progress)
    logits = predict(searching, _normal(held.images))
    right = logits.argmax(1) == held.first_labels
    right |= torch.ones_like(right) if quick else torch.zeros_like(right)
    seen, labels, boxes = _normal(held.images[right]), held.first_labels[right], held.boxes[right, 0]
    shares = {}
    for mode in MODES:
        maps = GuidedBackprop(searching, mode)(seen, labels)
        shares[mode] = float(energy_share(maps, boxes).mean())
        table.append({"arm": f"map: {mode}", "energy in the box": shares[mode]})
    area = float(((boxes[:, 2] - boxes[:, 0] + 2) * (boxes[:, 3] - boxes[:, 1] + 2)).float().mean()) / SIZE**2
    checks = [
        Check(
            "error of all against base + 0.01", mean_of(table, "all", "error"), mean_of(table, "base", "error") + 0.01
        )
    ]
    if not quick:
        strided, control = (mean_of(table, kind, "error") for kind in ("strided", "convpool"))
        checks += [
            Check("error of all against strided + 0.005", mean_of(table, "all", "error"), strided + 0.005),
            Check("error of all, apart from convpool", abs(mean_of(table, "all", "error") - control), 0.02),
        ]
    checks += [
        Check("energy in the box, guided against gradient + 0.10", shares["guided"], shares["grad"] + 0.10, ">="),
        Check("energy in the box, guided against deconvnet + 0.10", shares["guided"], shares["deconv"] + 0.10, ">="),
    ]
    spread = statistics.fmean(worst_of(table, k, "error", largest=True) - worst_of(table, k, "error") for k in kinds)
    notes = [
        f"variant C at {WIDTH} of its width; {len(train)} scenes of one shape, {SIZE} x {SIZE}, {epochs} epochs of SGD at {RATE}, "
        f"batches of {BATCH}, dropout 0.1 behind each halving, no ReLU before the mean; {len(test)} scenes to test on",
        f"the errors of a kind differ by {spread:.3f} between seeds on the average",
        f"maps: of {int(right.sum())} of {len(held)} needle scenes"
        + (" (the quick form takes wrong answers too)" if quick else " that are read rightly")
        + f"; boxes, wider by a pixel, take {area:.3f} of a picture",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("all-cnn", CLAIM, table, checks, seconds, used, notes)
