"""Small classifiers and data for the tests of subset training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Residual", "bert", "images", "mlp", "resnet", "vit"]


class Residual(nn.Module):
    """``x + conv(relu(norm(conv(x))))``, with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(self.norm(self.first(x)).relu()))


class _ResNet(nn.Module):
    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).relu().mean((2, 3)))


def resnet(depth: int = 4, width: int = 6, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _ResNet(depth, width, classes)
        model.train()
        model(torch.randn(16, 1, 8, 8))  # statistics that are not the initial ones
    return model.eval()


def mlp(depth: int = 4, width: int = 8, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(depth))
        return nn.Sequential(nn.Sequential(*blocks), nn.LayerNorm(width), nn.Linear(width, classes)).eval()


def vit(depth: int = 3, classes: int = 3) -> nn.Module:
    from layerwright.studies._vit import build_vit

    del classes
    return build_vit(depth=depth, hidden_size=16, num_heads=2, image_size=8, patch_size=4).eval()


def bert(depth: int = 3, classes: int = 3) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=depth,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=classes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


def images(samples: int = 24, classes: int = 3, seed: int = 0, mapping: bool = False) -> list[Any]:
    """Batches of 8: the class is where the bright stripe lies."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    x = 0.3 * torch.randn(samples, 1, 8, 8, generator=generator)
    x[torch.arange(samples), 0, 2 * labels] += 2
    pairs = zip(x.split(8), labels.split(8), strict=True)
    return [{"pixel_values": a, "labels": b} if mapping else (a, b) for a, b in pairs]
