"""Train ``demo:vit`` and ``demo:cnn`` from nothing: ``python -m layerwright.data.demo.train_vision vit`` (or ``cnn``).

A Hugging Face ViT (8 blocks) and a Hugging Face ResNet with BatchNorm on scikit-learn's handwritten digits; some
minutes each on two cores. ``digits`` writes the data file from scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.data.demo_data import digits, enlarge

HERE = Path(__file__).parent


def write_digits(path: Path = HERE / "digits.npz") -> None:
    """Write images, labels and the split (train 70 %, calibration 10 %, held out 20 %) from scikit-learn."""
    import numpy
    from sklearn.datasets import load_digits

    data = load_digits()
    order = numpy.random.default_rng(0).permutation(len(data.target))
    held, calibration = len(order) // 5, len(order) // 10
    numpy.savez_compressed(
        path,
        images=data.images.astype("uint8"),
        labels=data.target.astype("uint8"),
        heldout=order[:held],
        calibration=order[held : held + calibration],
        train=order[held + calibration :],
    )


def build(kind: str) -> nn.Module:
    """The untrained model."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    labels = {str(digit): digit for digit in range(10)}
    names = {digit: str(digit) for digit in range(10)}
    if kind == "vit":
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=8,
                num_attention_heads=4,
                intermediate_size=256,
                image_size=8,
                patch_size=2,
                num_channels=1,
                label2id=labels,
                id2label=names,
            )
        )
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64, 96],
            depths=[2, 2, 2],
            layer_type="basic",
            label2id=labels,
            id2label=names,
        )
    )


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment ``(samples, 1, 8, 8)``: turn by up to 12 degrees, scale and shear by up to 12 %, move by up to one pixel,
    change the contrast by up to 15 %.
    """

    def draw(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    count = len(images)
    angle = draw(count) * 0.21
    scale = 1 + 0.12 * draw(count, 2)
    matrix = torch.stack(
        [
            torch.stack([angle.cos() * scale[:, 0], -angle.sin() + 0.12 * draw(count), 0.25 * draw(count)], 1),
            torch.stack([angle.sin(), angle.cos() * scale[:, 1], 0.25 * draw(count)], 1),
        ],
        1,
    )
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images + 1, grid, align_corners=False)
    return (moved * (1 + 0.15 * draw(count, 1, 1, 1)) - 1).clamp(-1, 1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` that `model` labels right."""
    model.eval()
    right = sum(
        (model(pixel_values=x).logits.argmax(-1) == y).sum().item()
        for x, y in zip(images.split(256), labels.split(256), strict=True)
    )
    model.train()
    return right / len(labels)


def train(kind: str, out: Path, epochs: int, seed: int) -> float:
    """Train, save to `out` in the Hugging Face layout and return the held-out accuracy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build(kind).train()
    prepare: Any = enlarge if kind == "cnn" else lambda images: images
    images, labels = digits("train")
    held_images, held_labels = digits("heldout")
    batch, peak = (64, 1e-3) if kind == "vit" else (64, 2e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(order) // batch * batch].split(batch):
            rate = peak * min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = model(pixel_values=prepare(jittered(images[chosen], generator))).logits
            loss = nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(model)
            step += 1
        if (epoch + 1) % 10 == 0:
            print(
                f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}  held out {accuracy(average.module, prepare(held_images), held_labels):.4f}",
                flush=True,
            )
    trained: Any = average.module.eval()
    trained.save_pretrained(out)
    size = 8 if kind == "vit" else 32
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return accuracy(trained, prepare(held_images), held_labels)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["vit", "cnn", "digits"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.kind == "digits":
        write_digits()
        return
    out = a.out or HERE / a.kind
    score = train(a.kind, out, a.epochs or (320 if a.kind == "vit" else 40), a.seed)
    print(f"held-out accuracy {score:.4f}; saved to {out}")


if __name__ == "__main__":
    main()
