"""What studies of quantized vision transformers share: trained ViTs on digits, uniform plans, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, logits_of
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers, structure_copy, treatable
from layerwright.core.treatment import Quantize, RoundActivations, RoundAttention, Treatments
from layerwright.data.demo_data import digits
from layerwright.treat.apply import apply_plan
from layerwright.treat.migrate import find_norm_readers, migrate_
from layerwright.treat.prepare import prepare_

__all__ = [
    "METHODS",
    "Method",
    "Setting",
    "accuracy",
    "build_vit",
    "calibration_digits",
    "digit_batches",
    "find_setting",
    "output_divergence",
    "quantized",
    "small_vit",
    "spread_channels",
    "train_vit_",
    "unseen_digits",
    "vit_plan",
]

Architecture = Literal["vit", "deit", "swin"]
Method = Literal["minmax", "smooth", "mptq", "mptq_chosen", "evol_q"]
METHODS: tuple[Method, ...] = ("minmax", "smooth", "mptq", "mptq_chosen", "evol_q")
"""Ways to quantize at one precision: see `quantized`."""


def build_vit(
    architecture: Architecture = "vit",
    *,
    hidden_size: int = 48,
    depth: int = 4,
    num_heads: int = 4,
    image_size: int = 8,
    patch_size: int = 2,
    seed: int = 0,
) -> nn.Module:
    """An untrained Hugging Face ViT, DeiT or Swin for digits ``(batch, 1, image_size, image_size)`` of 10 classes.

    Swin has two stages of ``depth / 2`` blocks with windows of 2; its second stage is twice as wide.
    """
    import transformers

    names: dict[str, Any] = {
        "id2label": {digit: str(digit) for digit in range(10)},
        "label2id": {str(digit): digit for digit in range(10)},
    }
    common = {"image_size": image_size, "patch_size": patch_size, "num_channels": 1, **names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "swin":
            config: Any = transformers.SwinConfig(
                embed_dim=hidden_size,
                depths=[depth // 2, depth - depth // 2],
                num_heads=[num_heads, num_heads],
                window_size=2,
                drop_path_rate=0.0,
                **common,
            )
            model: nn.Module = transformers.SwinForImageClassification(config)
        else:
            kind = "ViT" if architecture == "vit" else "DeiT"
            config = getattr(transformers, f"{kind}Config")(
                hidden_size=hidden_size,
                num_hidden_layers=depth,
                num_attention_heads=num_heads,
                intermediate_size=4 * hidden_size,
                **common,
            )
            model = getattr(transformers, f"{kind}ForImageClassification")(config)
    return model.eval()


def train_vit_(model: nn.Module, epochs: int, *, rate: float = 2e-3, batch_size: int = 64, seed: int = 0) -> nn.Module:
    """Train `model` on the digits, in place: AdamW, one cycle of `rate`. Returned in evaluation mode."""
    images, labels = digits("train")
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            model(pixel_values=images[chosen], labels=labels[chosen]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    return model.eval()


@cache
def small_vit(seed: int = 0, epochs: int = 30, depth: int = 4, hidden_size: int = 48) -> nn.Module:
    """A ViT of 4 heads, trained; about 20 seconds on a core. Do not change it: it is kept."""
    return train_vit_(build_vit(hidden_size=hidden_size, depth=depth, seed=seed), epochs, seed=seed)


@dataclass(frozen=True)
class Setting:
    """Trained networks (one per seed) and a precision at which the start of a method loses enough to win some back.

    Attributes:
        hidden_size, depth, bits: of the setting that was taken.
        models: its networks, by seed.
        lost: points of accuracy that the start loses, mean of the seeds, by ``(hidden size, depth, bits)`` as tried.
        enough: the last of `lost` reaches what was asked for.
    """

    hidden_size: int
    depth: int
    bits: int
    models: tuple[nn.Module, ...]
    lost: Mapping[tuple[int, int, int], float]
    enough: bool


def find_setting(
    loss: Callable[[nn.Module, int, int], float],
    least: float,
    shapes: Sequence[tuple[int, int]],
    bits: Sequence[int],
    *,
    seeds: int,
    epochs: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Setting:
    """The first of the network `shapes`, and at it the first of `bits`, where a start loses `least` points or more.

    The rule looks at the start alone, never at what a treatment makes of it: on a network that loses next to nothing
    there is nothing to win back, and a claim about winning it back is not tested. The last setting if none is enough.

    Args:
        loss: points of accuracy that the start loses: ``loss(model, seed, bits)``.
        least: points, mean of the seeds.
        shapes: ``(hidden size, depth)`` of ViTs (`small_vit`), in the order in which they are tried.
        bits: likewise.
        seeds, epochs: of training.
        progress: told after each network.

    Raises:
        InputError: nothing to try.
    """
    if not shapes or not bits or seeds < 1:
        raise InputError(
            f"{len(shapes)} shapes, {len(bits)} widths of bits and {seeds} seeds leave nothing to try: give one of each"
        )
    lost: dict[tuple[int, int, int], float] = {}
    for hidden_size, depth in shapes:
        models = []
        for seed in range(seeds):
            models.append(small_vit(seed, epochs, depth, hidden_size))
            if progress:
                progress(f"training networks {hidden_size} wide, {depth} deep", seed + 1, seeds)
        for width in bits:
            key = hidden_size, depth, width
            lost[key] = sum(loss(model, seed, width) for seed, model in enumerate(models)) / seeds
            if lost[key] >= least:
                break
        if lost[key] >= least:
            break
    return Setting(*key, tuple(models), lost, lost[key] >= least)


def digit_batches(
    chosen: Tensor, part: Literal["train", "calibration", "heldout"] = "train", size: int = 64
) -> Calibration:
    """The digits at the positions `chosen` of one part, ``(batch, 1, 8, 8)`` with labels."""
    images, labels = digits(part)
    return _batches(images[chosen], labels[chosen], size)


def calibration_digits(samples: int = 256, *, seed: int = 0, size: int = 64) -> Calibration:
    """`samples` images of the training part, drawn at random; methods here do not look at the labels."""
    order = torch.randperm(len(digits("train")[1]), generator=torch.Generator().manual_seed(seed))
    return digit_batches(order[:samples], size=size)


def unseen_digits(samples: int = 500) -> Calibration:
    """`samples` images that no model was trained on (at most 538)."""
    parts = [digits("heldout"), digits("calibration")]
    images, labels = (torch.cat([part[place] for part in parts])[:samples] for place in (0, 1))
    return _batches(images, labels, 128)


def _batches(images: Tensor, labels: Tensor, size: int) -> Calibration:
    pairs = zip(images.split(size), labels.split(size), strict=True)
    return Calibration([{"pixel_values": x, "labels": y} for x, y in pairs], name="digits", unit="nats/sample")


@torch.no_grad()
def accuracy(model: nn.Module, data: Calibration) -> float:
    """Share of the samples that `model` labels right, in percent."""
    right = sum(int((logits_of(data.forward(model, b)).argmax(-1) == b["labels"]).sum()) for b in data)
    return 100 * right / data.samples


def output_divergence(model: nn.Module, reference: nn.Module, data: Calibration) -> float:
    """Mean divergence of the predictions of `model` from those of `reference`, in nats."""
    from layerwright.score.replay import model_damage

    return model_damage(reference, model, data)


def vit_plan(
    model: nn.Module,
    weight_bits: int,
    activation_bits: int,
    *,
    attention_bits: int | None = None,
    weight_symmetric: bool = True,
    weight_method: Literal["rtn", "mse"] = "mse",
    observer: Literal["minmax", "mse"] = "mse",
    two_regions: bool = False,
) -> dict[str, Treatments]:
    """Every linear layer of the blocks at one precision: weights per output channel, inputs per tensor, both products
    of attention. The patch embedding and the head stay as they are.

    Args:
        model: a vision transformer.
        weight_bits, activation_bits: of weights, and of layer inputs.
        attention_bits: of query, key, probabilities and value; by default `activation_bits`.
        weight_symmetric: no zero points in the weights.
        weight_method: range of a weight.
        observer: of activation ranges.
        two_regions: two-region grids for what GELU gives (layers whose role is ``down``) and for probabilities.
    """
    refs = list_layers(model)
    plan: dict[str, Treatments] = {}
    for ref in treatable(model, refs):
        if ref.layout != "linear":
            continue
        regions = two_regions and ref.role == "down" and activation_bits >= 3
        rounding = RoundActivations(
            activation_bits, "two_region" if regions else "uniform", observer="output" if regions else observer
        )
        weight = Quantize(weight_bits, symmetric=weight_symmetric, method=weight_method)
        plan[ref.path] = (weight, rounding)
    bits = activation_bits if attention_bits is None else attention_bits
    probabilities: Literal["two_region", "uniform"] = "two_region" if two_regions and bits >= 3 else "uniform"
    plan |= {r.path: (RoundAttention(bits, probabilities, observer=observer),) for r in refs if r.kind == "attention"}
    return plan


def quantized(
    model: nn.Module, method: Method, weight_bits: int, activation_bits: int, data: Calibration, *, seed: int = 0
) -> nn.Module:
    """`model` at one precision by `method`; what was given is left alone.

    ``minmax``: extremes of weights and activations. ``smooth``: SmoothQuant, then uniform grids with MSE ranges.
    ``mptq``: SQ-b as published and two-region grids (OPT-m). ``mptq_chosen``: SQ-b only on norms where it pays at that
    precision. ``evol_q``: asymmetric weights with MSE ranges, and evolved scales.
    """
    if method == "minmax":
        plan = vit_plan(model, weight_bits, activation_bits, weight_method="rtn", observer="minmax")
        return apply_plan(model, plan, data)[0]
    if method == "evol_q":
        from layerwright.tune.evolq import EvolQ

        start = apply_plan(model, vit_plan(model, weight_bits, activation_bits, weight_symmetric=False), data)[0]
        return EvolQ(passes=4, cycles=6, seed=seed).fit(start, data, model)[0]
    copy = structure_copy(model)
    settings: dict[str, Any] = {"alpha": 0.5, "shift": False if method == "smooth" else "auto"}
    if method == "mptq_chosen":
        settings["judge_bits"] = min(weight_bits, activation_bits)
    prepare_(copy, {"smooth": settings}, data)
    plan = vit_plan(copy, weight_bits, activation_bits, two_regions=method != "smooth")
    return apply_plan(copy, plan, data)[0]


def spread_channels(model: nn.Module, data: Calibration, *, seed: int = 0, width: float = 1.0) -> nn.Module:
    """A copy that computes the same with norm outputs as large vision transformers have them: channels of very different
    size (factors ``exp(width * N(0, 1))``) around different means (U(-4, 4) times `width`).

    Factor and shift go into each norm and out of the layers behind it (`migrate_`).
    """
    copy = structure_copy(model)
    generator = torch.Generator().manual_seed(seed)
    for group in find_norm_readers(model, data):
        factor = (width * torch.randn(group.channels, generator=generator)).exp()
        mean = 4 * width * (2 * torch.rand(group.channels, generator=generator) - 1)
        if not group.others:
            migrate_(copy, group, 1 / factor, -mean if group.shift else None)
    return copy
