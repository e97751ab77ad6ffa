"""TroL (Lee et al., 2024, arXiv 2406.12246): blocks that run twice on the prompt, blended by a gate for each token.

A small language model that learned questions on described scenes learns to read pictures of them, in two steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.models.tiny_vlm import TinyVLM, image_projector
from layerwright.studies._fixtures import decode_ratio
from layerwright.studies._shape_questions import (
    CELLS,
    IMAGE_TOKEN,
    VOCABULARY,
    draw_questions,
    image_batches,
    text_batches,
    train_encoder,
)
from layerwright.studies.sequence import tiny_llama
from layerwright.treat.traverse import find_traversal, traverse
from layerwright.tune._loop import Schedule
from layerwright.tune.full import full
from layerwright.tune.two_step import Stage, two_step

__all__ = ["CLAIM", "run", "scene_reader"]

CLAIM = (
    "Blocks that run twice on the prompt, blended by a gate for each token, read pictures better than the same blocks "
    "run once, for one linear layer a block; generation costs what it did."
)
WIDTH = 64
RATES = (3e-3, 2e-3)
PARTS = ("projector", "mixers")
WITHOUT_CLAIM = ("plain, 8 blocks", "TroL, one step")
"""Arms that are reported, on the first seed."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Size:
    """How long the study trains: steps of the text model, of each stage, scenes to judge by."""

    pretraining: int = 1500
    stage: int = 200
    heldout: int = 1000
    timing: int = 7


@cache
def scene_reader(layers: int, steps: int, seed: int = 0) -> nn.Module:
    """A Llama of width 64 that learned to answer questions on scenes in words, in evaluation mode."""
    model = _llama(WIDTH, layers, seed)
    data = Calibration(text_batches(draw_questions(64 * steps, seed + 1)), name="described scenes")
    return full(model, data, steps=steps, learning_rate=3e-3, weight_decay=0.01, seed=seed).eval()


def _llama(width: int, layers: int, seed: int = 0) -> nn.Module:
    return tiny_llama(width, layers, 4, ffn=3 * width, context=1024, vocabulary=VOCABULARY, seed=seed)  # type: ignore[no-any-return]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    size = Size(16, 5, 64, 1) if quick else Size()
    encoder = train_encoder(40 if quick else 400, seed=0)
    llms = {layers: scene_reader(layers, size.pretraining) for layers in (4, 8)}
    heldout = image_batches(draw_questions(size.heldout, 7_000_001), seed=7_000_001)
    table: list[dict[str, Any]] = []
    gates: list[Tensor] = []
    for seed in range(1 if quick else seeds):
        data = Calibration(image_batches(draw_questions(64 * size.stage, 1000 + seed), seed=1000 + seed), name="scenes")
        for arm, model, stages in _arms(encoder, llms, size, seed):
            if seed and arm in WITHOUT_CLAIM:
                continue
            tuned = two_step(model, data, stages, seed=seed, progress=tell)
            row = {"arm": arm, "seed": seed, "accuracy": _accuracy(tuned, heldout)}
            handle = find_traversal(tuned)
            if handle is not None and arm == "TroL":
                gates.append(_gates(tuned, heldout))
                row |= {
                    "gate, image tokens": float(gates[-1][:, 0].mean()),
                    "gate, text": float(gates[-1][:, 1].mean()),
                }
            table.append({**row, "parameters": sum(p.numel() for p in tuned.parameters())})
    mean = _means(table, "accuracy")
    count = _means(table, "parameters")
    prompt_ratio, decoding = _times(size.timing)
    by_block = torch.stack(gates).mean((0, 2))
    checks = (
        Check("TroL less plain 4 blocks (accuracy)", mean["TroL"] - mean["plain, 4 blocks"], 0.01, ">="),
        Check("TroL less gates fixed at 1/2 (accuracy)", mean["TroL"] - mean["gates fixed at 1/2"], -0.005, ">="),
        Check("parameters of the gates, off 4 (64 + 1)", abs(count["TroL"] - count["plain, 4 blocks"] - 4 * 65), 0.0),
        Check("time of a prompt of 512 tokens against plain", prompt_ratio, 1.6, ">="),
        Check("time of a prompt of 512 tokens against plain", prompt_ratio, 2.2),
        Check("time of decoding against plain", decoding, 1.1),
        Check("deviation of gates between blocks", float(by_block.std()), 0.02, ">="),
    )
    notes = [
        f"{size.pretraining} steps of 64 described scenes for each text model, then two stages of {size.stage} steps of 64 "
        f"pictures, rates {RATES[0]:g} and {RATES[1]:g}, adapters of rank 8; {size.heldout} held-out scenes, 4 questions each",
        "gates by block (mean): " + ", ".join(f"{value:.3f}" for value in by_block.tolist()),
        f"times: a random model of width 256; {' and '.join(WITHOUT_CLAIM)} carry no claim and ran on the first seed alone",
        "answers stand within the prompt, so that training and use pass them through the same blocks",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("trol", CLAIM, table, checks, seconds, tuple(range(1 if quick else seeds)), notes)


def _arms(
    encoder: nn.Module, llms: Mapping[int, nn.Module], size: Size, seed: int
) -> list[tuple[str, nn.Module, tuple[Stage, ...]]]:
    """Each arm's name, model before it has seen a picture, and stages."""
    first, second = (Schedule(size.stage, rate, seed=seed) for rate in RATES)
    once = Schedule(2 * size.stage, RATES[1], seed=seed)
    plain = (Stage(("projector",), first), Stage(("projector", "lora"), second))
    mixed = (Stage(PARTS, first), Stage((*PARTS, "lora"), second))

    def reader(llm: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = image_projector(48, WIDTH)
        return TinyVLM(encoder, projector, llm, IMAGE_TOKEN).eval()

    return [
        ("plain, 4 blocks", reader(llms[4]), plain),
        ("TroL", reader(traverse(llms[4]).model), mixed),
        ("plain, 8 blocks", reader(llms[8]), plain),
        ("gates fixed at 1/2", reader(traverse(llms[4]).model), plain),
        ("TroL, one step", reader(traverse(llms[4]).model), (Stage((*PARTS, "lora"), once),)),
    ]


@torch.no_grad()
def _accuracy(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Share of answers that are the likeliest token after their question."""
    right = total = 0
    for batch in batches:
        guessed, labels = model(**batch).logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
        right += int((guessed == labels).sum())
        total += int((labels >= 0).sum())
    return right / total


@torch.no_grad()
def _gates(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean gate ``(blocks, 2)`` of image tokens and of text tokens."""
    handle = find_traversal(model)
    assert handle is not None
    model(**batches[0])
    found = [gate for gate in handle.gates() if gate is not None]
    return torch.stack([torch.stack([gate[:, :CELLS].mean(), gate[:, CELLS:].mean()]) for gate in found])


def _times(pairs: int) -> tuple[float, float]:
    """Time of a long prompt and of decoding, traversed against plain: medians of pairs that take turns.

    A random model of width 256: at the study's width most of the time is spent between the products.
    """
    llm = _llama(256, 4).eval()
    model = traverse(llm).model
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(VOCABULARY, (1, 512), generator=draw)
    ratios = []
    with torch.no_grad():
        for _ in range(pairs + 1):
            times = []
            for network in (llm, model):
                begun = time.perf_counter()
                network(input_ids=prompt, use_cache=False)
                times.append(time.perf_counter() - begun)
            ratios.append(times[1] / times[0])
    decoding, _ = decode_ratio(model, llm, prompt[:, :8], tokens=64, pairs=pairs)
    return statistics.median(ratios[1:]), decoding


def _means(table: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Mean of a column by arm."""
    arms = dict.fromkeys(row["arm"] for row in table)
    return {arm: statistics.fmean(row[name] for row in table if row["arm"] == arm) for arm in arms}
