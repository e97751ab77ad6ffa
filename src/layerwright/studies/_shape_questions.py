"""Pictures of a few coloured shapes, questions on them whose answer is one word, and the same scenes in words.

A scene is a grid of 4 x 4 cells, one to three of which hold a shape. As a picture it has 16 x 16 pixels; in words it has
a token for each cell, so that a picture's 16 patch features stand where the 16 words of a description would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "IMAGE_TOKEN",
    "VOCABULARY",
    "PatchEncoder",
    "Questions",
    "draw_questions",
    "image_batches",
    "text_batches",
    "train_encoder",
]

COLOURS = ("red", "green", "blue")
SHAPES = ("square", "cross", "ring")
KINDS = len(COLOURS) * len(SHAPES)
CELLS = 16
_WORDS = (
    "image",
    "empty",
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
    "count",
    "left",
    "colour",
    "?",
    *COLOURS,
    *SHAPES,
    *map(str, range(4)),
    "yes",
    "no",
    "none",
)
WORDS = {word: number for number, word in enumerate(_WORDS)}
VOCABULARY = len(WORDS)
IMAGE_TOKEN = WORDS["image"]
_FIRST_KIND = WORDS["red square"]


@dataclass(frozen=True)
class Questions:
    """Scenes, questions on each, and their answers.

    Attributes:
        cells: ``(scenes, 16)``: 0 for an empty cell, else one more than ``3 colour + shape``.
        question: ``(scenes, each, 4)`` tokens: what is asked, its two arguments (``?`` for none), ``?``.
        answer: ``(scenes, each)`` tokens.
    """

    cells: Tensor
    question: Tensor
    answer: Tensor


def draw_questions(count: int, seed: int, each: int = 4) -> Questions:
    """`count` scenes with one to three shapes of different cells, and `each` questions of three kinds on each.

    "count red": 0 to 3. "left red blue": yes where a red shape has a blue one further right. "colour ring": the colour
    of the scene's rings, none without a ring or where rings differ in colour.
    """
    draw = torch.Generator().manual_seed(seed)
    places = torch.rand(count, CELLS, generator=draw).argsort(1)[:, :3]
    kinds = torch.randint(1, KINDS + 1, (count, 3), generator=draw)
    kinds[torch.arange(3) >= torch.randint(1, 4, (count, 1), generator=draw)] = 0
    cells = torch.zeros(count, CELLS, dtype=torch.long).scatter(1, places, kinds)
    colour, shape = (cells - 1).div(3, rounding_mode="floor")[:, None], ((cells - 1) % 3)[:, None]
    full = (cells > 0)[:, None]
    first, second = torch.randint(3, (2, count, each), generator=draw)
    second = torch.where(second == first, (first + 1) % 3, second)
    red = full & (colour == first[..., None])
    column = torch.arange(CELLS) % 4
    leftmost = torch.where(red, column, CELLS).amin(-1)
    rightmost = torch.where(full & (colour == second[..., None]), column, -1).amax(-1)
    wanted = full & (shape == first[..., None])
    high = torch.where(wanted, colour, -1).amax(-1)
    low = torch.where(wanted, colour, len(COLOURS)).amin(-1)
    answers = torch.stack(
        [
            WORDS["0"] + red.sum(-1),
            torch.where(leftmost < rightmost, WORDS["yes"], WORDS["no"]),
            torch.where((high == low) & (high >= 0), WORDS["red"] + high, WORDS["none"]),
        ]
    )
    asked = torch.randint(3, (count, each), generator=draw)
    subject = torch.where(asked == 2, WORDS["square"] + first, WORDS["red"] + first)
    other = torch.where(asked == 1, WORDS["red"] + second, WORDS["?"])
    question = torch.stack([WORDS["count"] + asked, subject, other, torch.full_like(asked, WORDS["?"])], -1)
    return Questions(cells, question, answers.gather(0, asked[None])[0])


def _labelled(scene: Tensor, questions: Questions) -> dict[str, Tensor]:
    """Tokens of the scene, then of each question and its answer, with labels for the answers alone."""
    asked = torch.cat([questions.question, questions.answer[..., None]], -1)
    ids = torch.cat([scene, asked.flatten(1)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, CELLS + 4 :: 5] = questions.answer
    return {"input_ids": ids, "labels": labels}


def text_batches(questions: Questions, batch_size: int = 64) -> list[dict[str, Tensor]]:
    """Batches for a language model: the scene in 16 words, questions with answers; only the answers count."""
    scene = torch.where(questions.cells > 0, questions.cells - 1 + _FIRST_KIND, WORDS["empty"])
    return _split(_labelled(scene, questions), batch_size)


def image_batches(questions: Questions, seed: int, batch_size: int = 64) -> list[dict[str, Tensor]]:
    """Batches for a model that reads images: 16 placeholders, questions with answers, and ``pixel_values``."""
    data = _labelled(torch.full_like(questions.cells, IMAGE_TOKEN), questions)
    return _split({**data, "pixel_values": draw_scenes(questions.cells, seed)}, batch_size)


def _split(data: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(next(iter(data.values())))
    return [{name: value[start : start + size] for name, value in data.items()} for start in range(0, count, size)]


def draw_scenes(cells: Tensor, seed: int) -> Tensor:
    """Pictures ``(scenes, 3, 16, 16)`` of `cells`: brightness of each shape 0.6 to 1, noise of deviation 0.1."""
    draw = torch.Generator().manual_seed(seed)
    square, ring, cross = torch.ones(4, 4), torch.ones(4, 4), torch.zeros(4, 4)
    ring[1:3, 1:3] = 0
    cross[1:3], cross[:, 1:3] = 1, 1
    stamps = torch.stack([square, cross, ring])
    colour, shape = (cells - 1).clamp(min=0).div(3, rounding_mode="floor"), (cells - 1).clamp(min=0) % 3
    bright = 0.6 + 0.4 * torch.rand(cells.shape, generator=draw)
    painted = nn.functional.one_hot(colour, 3)[..., None, None] * stamps[shape][:, :, None]
    painted = painted * (bright * (cells > 0))[..., None, None, None]
    grid = painted.reshape(-1, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 16, 16)
    return grid + 0.1 * torch.randn(grid.shape, generator=draw)


class PatchEncoder(nn.Module):
    """Convolutions from a picture ``(batch, 3, 16, 16)`` to 16 patch features ``(batch, 16, features)``."""

    def __init__(self, features: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, features, 4, stride=4), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features of each cell, in the order of words."""
        result: Tensor = self.body(images).flatten(2).transpose(1, 2)
        return result


def train_encoder(steps: int, seed: int) -> PatchEncoder:
    """An encoder that learned to name the SHAPE of each cell (not its colour), in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = PatchEncoder()
        head: Any = nn.Linear(48, len(SHAPES) + 1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for step in range(steps):
        cells = draw_questions(64, 10_000 * (seed + 1) + step).cells
        named = torch.where(cells > 0, (cells - 1) % 3 + 1, 0)
        loss = nn.functional.cross_entropy(head(encoder(draw_scenes(cells, step))).flatten(0, 1), named.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)
