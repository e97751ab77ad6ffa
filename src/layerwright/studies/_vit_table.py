"""Accuracy of quantized vision transformers by method and precision, and a larger ViT to measure it on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.calibration import Calibration
from layerwright.core.errors import BudgetError, InputError
from layerwright.data.demo.train_vision import jittered
from layerwright.data.demo_data import digits
from layerwright.studies._vit import METHODS, Method, accuracy, build_vit, calibration_digits, quantized, unseen_digits
from layerwright.studies.systems import verdicts_file
from layerwright.treat.apply import apply_plan

__all__ = ["LargeVit", "compare_methods", "enlarged", "large_vit"]


@dataclass(frozen=True)
class LargeVit:
    """A ViT of the width of DeiT-Tiny and how it is trained, on digits that are turned, scaled and moved at random.

    Attributes:
        width, depth, heads: of the network.
        image_size, patch_size: digits are enlarged to that size.
        epochs, rate, batch_size: AdamW, one cycle of `rate`.
        seed: of the network and of all draws.
    """

    width: int = 192
    depth: int = 8
    heads: int = 3
    image_size: int = 32
    patch_size: int = 8
    epochs: int = 24
    rate: float = 1e-3
    batch_size: int = 32
    seed: int = 0

    @property
    def name(self) -> str:
        """For tables."""
        return f"ViT {self.width} x {self.depth}"

    @property
    def key(self) -> str:
        """Short hash of all settings."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def build(self) -> nn.Module:
        """The untrained network."""
        return build_vit(
            hidden_size=self.width,
            depth=self.depth,
            num_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            seed=self.seed,
        )


def large_vit(
    form: LargeVit = LargeVit(),
    folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """The network of `form`: read from `folder` if it was trained before, else trained and kept there.

    Args:
        form: what to train.
        folder: networks are kept in ``vit-<key>`` below it; by default beside the verdicts of studies.
        progress: told after each epoch.
    """
    place = (Path(folder) if folder is not None else verdicts_file().parent / "models") / f"vit-{form.key}"
    model: Any = form.build()
    if (place / "config.json").exists():
        return cast(nn.Module, type(model).from_pretrained(place).eval())
    _train_(model, form, progress)
    model.save_pretrained(place)
    return cast(nn.Module, model)


def _train_(model: nn.Module, form: LargeVit, progress: Callable[[str, int, int], None] | None) -> None:
    images, labels = digits("train")
    generator = torch.Generator().manual_seed(form.seed)
    steps = form.epochs * (len(labels) // form.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=form.rate, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, form.rate, total_steps=steps)
    model.train()
    for epoch in range(form.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // form.batch_size * form.batch_size].split(form.batch_size):
            seen = _sized(jittered(images[chosen], generator), form.image_size)
            model(pixel_values=seen, labels=labels[chosen]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if progress:
            progress(f"training {form.name}", epoch + 1, form.epochs)
    model.eval()


def enlarged(data: Calibration, model: nn.Module) -> Calibration:
    """The images of `data` in the size that `model` takes."""
    config: Any = model.config
    size = int(config.image_size)
    batches = [{**batch, "pixel_values": _sized(batch["pixel_values"], size)} for batch in data]
    return Calibration(batches, name=data.name, unit=data.unit)


def _sized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def compare_methods(
    models: Mapping[str, nn.Module],
    precisions: Sequence[int] = (3, 4, 6),
    *,
    samples: int = 128,
    tested: int = 500,
    methods: Sequence[str] = (*METHODS, "lrp_qvit"),
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """One row for each model and precision n (weights and activations of n bits): accuracy by method, in percent.

    Args:
        models: vision transformers for digits of any size, by name.
        precisions: bits.
        samples: calibration images.
        tested: images that no model was trained on.
        methods: of `METHODS`; ``lrp_qvit`` is the recipe of that name at the same average of bits, None where that
            cannot be reached.
        progress: told after each row.
    """
    for method in methods:
        if method not in (*METHODS, "lrp_qvit"):
            raise InputError(f"methods: got {method!r}, expected {', '.join(METHODS)} or lrp_qvit")
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        data, test = (enlarged(found, model) for found in (calibration_digits(samples), unseen_digits(tested)))
        full = accuracy(model, test)
        for bits in precisions:
            row: dict[str, Any] = {"model": name, "precision": f"W{bits}A{bits}", "full": full}
            for method in methods:
                if method == "lrp_qvit":
                    found = _by_recipe(model, method, bits, data, test)
                else:
                    found = quantized(model, cast(Method, method), bits, bits, data)
                row[method] = None if found is None else accuracy(found, test)
            rows.append(row)
            if progress:
                progress("comparing methods", len(rows), len(models) * len(precisions))
    return rows


def _by_recipe(model: nn.Module, name: str, bits: int, data: Calibration, test: Calibration) -> nn.Module | None:
    """`model` as the recipe `name` leaves it at an average of `bits`; None where it cannot come down to so few (scales
    and ranges count).
    """
    from layerwright.recipes.bench import Bench
    from layerwright.recipes.book import recipe
    from layerwright.recipes.job import decide

    bench = Bench(model, None, data, test, type(model).__name__)
    try:
        plan = decide(bench, f"bits={bits}", recipe(name)).plan
    except BudgetError:
        return None
    return apply_plan(model, plan, data)[0]
