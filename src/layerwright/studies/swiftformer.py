"""SwiftFormer (Shaker et al., 2023, arXiv 2303.15446): attention at linear cost, as good as softmax attention."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.evidence import Check, Evidence
from layerwright.data.shape_scenes import SHAPES, needle_scenes
from layerwright.models.swiftformer import SwiftFormer
from layerwright.nn.additive_attention import EfficientAdditiveAttention
from layerwright.nn.swiftformer_blocks import SwiftFormerEncoder
from layerwright.studies.vision import accuracy, fit_, mean_of
from layerwright.tune.saved_bytes import SavedBytes

__all__ = ["CLAIM", "SoftmaxAttention", "commonest_colour", "run"]

CLAIM = (
    "Efficient additive attention costs time in proportion to the number of tokens, classifies as well as softmax attention, "
    "and gives a convolutional network the global context it lacks."
)
DIM, SIZE, BATCH, RATE = 96, 32, 64, 2e-3
SIZES = (196, 784, 3136, 12544)
Progress = Callable[[str, int, int], None]


class SoftmaxAttention(nn.Module):
    """Softmax attention with one head and as many matrices as additive attention: queries, keys, values, output."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` to the same."""
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, -1)
        out: Tensor = self.out(functional.scaled_dot_product_attention(query, key, value)[:, 0])
        return out


ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    "additive": EfficientAdditiveAttention,
    "softmax": SoftmaxAttention,
    "none": lambda _dim: nn.Identity(),
}


def commonest_colour(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures ``(count, 3, 32, 32)`` of 8 x 8 cells in four colours, one cell framed; whether its colour leads.

    16 of 64 cells, drawn at random, take one colour, the others any; the framed cell has that one in half of the pictures.
    """
    draw = torch.Generator().manual_seed(seed)
    cells = torch.randint(4, (count, 64), generator=draw)
    leader = torch.randint(4, (count, 1), generator=draw)
    more = torch.rand(count, 64, generator=draw).argsort(1)
    cells.scatter_(1, more[:, :16], leader.expand(-1, 16))
    labels = torch.rand(count, generator=draw) < 0.5
    other = (leader[:, 0] + 1 + torch.randint(3, (count,), generator=draw)) % 4
    place = torch.randint(64, (count,), generator=draw)
    cells[torch.arange(count), place] = torch.where(labels, leader[:, 0], other)
    votes = functional.one_hot(cells, 4).sum(1)
    mark = cells[torch.arange(count), place]
    truth = votes.gather(1, mark[:, None])[:, 0] == votes.amax(1)
    palette = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2]])
    images = palette[cells].view(count, 8, 8, 3).permute(0, 3, 1, 2)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3).contiguous()
    rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)
    inside = (rows // 4 == (place // 8)[:, None, None]) & (columns // 4 == (place % 8)[:, None, None])
    rim = (rows % 4 % 3 == 0) | (columns % 4 % 3 == 0)
    images = torch.where((inside & rim)[:, None], torch.ones(()), images)
    images += 0.05 * torch.randn(images.shape, generator=draw)
    return images, truth.long()


def _train(
    task: str, attention: str, data: tuple[Tensor, Tensor], epochs: int, seed: int, progress: Progress | None
) -> SwiftFormer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape: tuple[Sequence[int], Sequence[int]] = ((16, 24, 32, 48), (2, 2, 2, 2))
        if task == "context":
            shape = ((24, 32), (1, 1))
        classes = len(SHAPES) if task == "needle" else 2
        model = SwiftFormer(*shape, num_classes=classes, distillation=False, layer_scale=1.0)
        for encoder in model.modules():
            if isinstance(encoder, SwiftFormerEncoder):
                encoder.attn = ATTENTIONS[attention](encoder.fc1.in_channels)
        fit_(
            model, *data, epochs=epochs, batch=BATCH, rate=RATE, undecayed=frozenset(model.no_weight_decay()), seed=seed,
            name=f"{task}, {attention}, seed {seed}", progress=progress,
        )  # fmt: skip
    return model


def _data(task: str, quick: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Standardised pictures and labels to train on and to test on."""
    count = 200 if quick else 4000
    if task == "context":
        parts = [commonest_colour(200 if quick else 2000, seed=31), commonest_colour(800, seed=32)]
    else:
        scenes = [needle_scenes(n, SIZE, strokes=(0, 6), seed=seed) for n, seed in ((count, 33), (800, 34))]
        parts = [(part.images, part.first_labels) for part in scenes]
    train, test = (((images - 0.45) / 0.27, labels) for images, labels in parts)
    return train, test


def cost_rows(sizes: Sequence[int], rounds: int = 5) -> list[dict[str, Any]]:
    """Milliseconds of both attentions at several numbers of tokens: time that the process ran, one sequence, no gradients.

    Beside them the megabytes that a forward pass keeps for a backward pass.
    """
    layers = {name: ATTENTIONS[name](DIM) for name in ("additive", "softmax")}
    rows: list[dict[str, Any]] = []
    for size in sizes:
        x = torch.randn(1, size, DIM, generator=torch.Generator().manual_seed(size))
        row: dict[str, Any] = {"arm": f"{size} tokens", "tokens": size}
        for name, layer in layers.items():
            repeats = max(1, (20_000 if name == "additive" else 4_000) // size)
            with torch.no_grad():
                layer(x)
                row[f"{name}, ms"] = min(_milliseconds(layer, x, repeats) for _ in range(rounds if repeats > 1 else 1))
            with SavedBytes(layer) as saved:
                layer(x)
            row[f"{name}, MB kept"] = saved.bytes / 1e6
        rows.append(row)
    return rows


def _milliseconds(layer: nn.Module, x: Tensor, repeats: int) -> float:
    begun = time.process_time()
    for _ in range(repeats):
        layer(x)
    return (time.process_time() - begun) * 1e3 / repeats


def exponent(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    """Slope of the logarithm of a time over that of the tokens, least squares."""
    x, y = ([math.log(row[name]) for row in rows] for name in ("tokens", column))
    return statistics.linear_regression(x, y).slope


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    used = tuple(range(1 if quick else seeds))
    costs = cost_rows(SIZES[:3] if quick else SIZES, 3 if quick else 5)
    table: list[dict[str, Any]] = [*costs]
    plan = {"needle": ("additive", "softmax"), "context": ("additive", "none")}
    epochs = {"needle": 1 if quick else 4, "context": 1 if quick else 20}
    for task, arms in plan.items():
        train, test = _data(task, quick)
        for seed in used:
            for arm in arms:
                model = _train(task, arm, train, epochs[task], seed, progress)
                table.append({"arm": f"{task}, {arm}", "seed": seed, "accuracy": accuracy(model, *test)})
    mean = {(task, arm): mean_of(table, f"{task}, {arm}", "accuracy") for task, arms in plan.items() for arm in arms}
    checks = [
        Check("exponent of additive time in the tokens", exponent(costs, "additive, ms"), 1.15),
        Check("exponent of softmax time, last two sizes", exponent(costs[-2:], "softmax, ms"), 1.6, ">="),
        Check(
            "needle: accuracy of additive against softmax - 0.02", mean["needle", "additive"],
            mean["needle", "softmax"] - 0.02, ">=",
        ),
        Check(
            "context: accuracy of additive against none + 0.05", mean["context", "additive"],
            mean["context", "none"] + 0.05, ">=",
        ),
    ]  # fmt: skip
    share = float(_data("context", True)[1][1].double().mean())
    means = ", ".join(f"{task} {arm} {value:.3f}" for (task, arm), value in mean.items())
    notes = [
        f"mean accuracies: {means}; chance is {max(share, 1 - share):.3f} for context and {1 / len(SHAPES):.3f} for needle",
        f"needle: one small shape of {len(SHAPES)} kinds among up to 6 strokes, {SIZE} x {SIZE}, widths 16, 24, 32, 48, two "
        f"blocks a stage, {epochs['needle']} epochs of AdamW at {RATE:g}",
        "context: whether the colour of the framed cell is the commonest of 64; two stages of one encoder, widths 24 and 32, "
        f"{epochs['context']} epochs. Deeper stages would see the whole picture without attention",
        "context at full length: both arms stay near chance on new pictures while they fit those they train on, and seeds differ by "
        "more than arms do, so that the check shows no benefit of attention at this size and says little against it",
        "settings were tried on seed 7, which is not reported. There the context task was in favour of attention (0.63 against 0.51); with 5000 pictures for 6 epochs or 4000 for 16 neither arm learnt the context "
        "task, and with 24 cells of the leading colour, 2500 pictures, 12 epochs and narrower layers the network without attention was ahead "
        "(0.61 against 0.57), since cells near the frame then tell enough; with 1200 needle pictures for 12 epochs both arms "
        "learnt them by heart, additive attention more so (0.26 against 0.38)",
        "scales of attention and MLP start at 1, in all arms, not at 1e-5 as for 300 epochs; no distillation",
        f"time: one sequence of {DIM} features; softmax through PyTorch's fused product, whose memory is linear as well",
    ]
    return Evidence("swiftformer", CLAIM, table, checks, time.perf_counter() - begun, used, notes)
