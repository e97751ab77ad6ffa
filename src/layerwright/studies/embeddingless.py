"""Embeddingless byte models (Shaham & Levy, 2021, arXiv 2008.09396): one-hot bytes, and what dropout does to them.

Small encoder-decoders learn to read numbers, dates and pseudo-words byte by byte: with embeddings, without, with
embeddings and dropout of whole tokens, and without embeddings and without dropout on the decoder's input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.evidence import Check, Evidence
from layerwright.data.byte_codec import ByteCodec
from layerwright.models.byte_seq2seq import ByteSeq2Seq
from layerwright.score.token_errors import edit_distance
from layerwright.studies._number_words import byte_batch, pairs
from layerwright.studies.sequence import mean_of
from layerwright.tune._loop import Schedule, train_

__all__ = ["ARMS", "CLAIM", "run", "smoothed_loss"]

CLAIM = (
    "A byte model without embedding matrices does as well as one with them; what it gains comes from dropout of whole "
    "tokens on the decoder's input, which a model with embeddings can have too."
)
DROPOUT, SMOOTHING, RATE, BATCH = 0.2, 0.1, 2e-3, 32
ARMS: dict[str, Mapping[str, Any]] = {
    "embeddings": {"embed": "learned"},
    "embeddingless": {"embed": "onehot"},
    "embeddings, token dropout": {"embed": "learned", "token_dropout": DROPOUT},
    "embeddingless, no decoder input dropout": {"embed": "onehot", "decoder_input_dropout": 0.0},
}
SHAPE: dict[str, Any] = {"dim": 264, "enc_layers": 1, "dec_layers": 1, "heads": 4, "ffn": 256, "dropout": DROPOUT}
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    steps, tested = (20, 60) if quick else (400, 500)
    used = tuple(range(1 if quick else seeds))
    test = pairs(tested, "test", seed=999)
    rows: list[dict[str, Any]] = []
    for seed in used:
        for name, settings in ARMS.items():
            rows.append(_measured(name, settings, steps, test, seed))
            if progress:
                progress(f"seed {seed}", len(rows), len(used) * len(ARMS))
    plain, bare, erased, still = (mean_of(rows, name, "CER") for name in ARMS)
    checks = (
        Check("character errors, embeddingless less embeddings", bare - plain, 0.005),
        Check(
            "character errors, embeddings with token dropout off from embeddingless",
            abs(erased - bare),
            max(0.01, 0.35 * plain),
        ),
    )
    notes = [
        f"{steps} steps of {BATCH} pairs; {tested} unseen sources, decoded greedily with a cache; width {SHAPE['dim']}, "
        f"{SHAPE['enc_layers']} and {SHAPE['dec_layers']} layers, dropout {DROPOUT}",
        "steps and rate were chosen with the first two arms on another seed and other sources of the same unseen part",
        "pairs of training hardly repeat and no arm has converged: there is little to overfit, so that dropout costs steps and gains "
        "nothing; the second claim needs longer training on fewer pairs",
        f"embeddingless without dropout on the decoder's input: character errors {still:.4f}, with it {bare:.4f}",
    ]
    return Evidence("embeddingless", CLAIM, rows, checks, time.perf_counter() - begun, used, notes)


def _measured(
    name: str, settings: Mapping[str, Any], steps: int, test: Sequence[tuple[str, str]], seed: int
) -> dict[str, Any]:
    begun = time.perf_counter()
    codec = ByteCodec()
    model = ByteSeq2Seq(**SHAPE | dict(settings), seed=seed)
    data = pairs(steps * BATCH, "train", seed=seed)
    batches = [byte_batch(data[first : first + BATCH], codec) for first in range(0, len(data), BATCH)]
    schedule = Schedule(steps, RATE, 1e-4, 0.1, seed=seed)
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(seed)
        losses = train_(model, batches, smoothed_loss, schedule, distributed=False, training=True)
    errors, exact = _errors(model.eval(), test, codec)
    return {
        "arm": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": sum(losses[-10:]) / len(losses[-10:]),
        "CER": errors,
        "exact": exact,
        "seconds": time.perf_counter() - begun,
    }


def smoothed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the next byte, labels smoothed by a tenth."""
    logits = model(batch["src"], batch["tgt_in"])
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100, label_smoothing=SMOOTHING
    )


def _errors(model: ByteSeq2Seq, test: Sequence[tuple[str, str]], codec: ByteCodec) -> tuple[float, float]:
    """Edits for each character of the targets, and the share of targets that are right, free-running."""
    edits = right = 0
    for first in range(0, len(test), 100):
        part = test[first : first + 100]
        found = model.generate(byte_batch(part, codec)["src"], beam=1, max_length=16)
        for (_, target), ids in zip(part, found, strict=True):
            distance = edit_distance(codec.encode(target), ids)
            edits += distance
            right += distance == 0
    return edits / sum(len(target) for _, target in test), right / len(test)
