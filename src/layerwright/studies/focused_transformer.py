"""Focused Transformer (Tworkowski et al., 2023, arXiv 2307.03170): keys of other documents in training, many in the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.evidence import Check, Evidence
from layerwright.explain.positive_mass import positive_attention_mass
from layerwright.studies._passkey import RECORD, SYMBOLS, VOCABULARY, Records, dictionary
from layerwright.studies.sequence import mean_of, tiny_llama
from layerwright.treat.memory import MemoryHandle, add_memory
from layerwright.tune._loop import Schedule, train_
from layerwright.tune.crossbatch import next_token_loss

__all__ = ["CLAIM", "memory_model", "recall", "run", "train_recall"]

CLAIM = (
    "A layer that sees a memory keeps finding the right keys among those of many documents if it was trained with keys of "
    "other documents beside its own; without them it is distracted, and so is a transformer given everything as context."
)
DIM, LAYERS, HEADS, RECORDS = 64, 3, 4, 8
WINDOW = RECORDS * RECORD
BATCH, STEPS, RATE, WARMUP = 16, 2000, 3e-3, 50
SPREAD = 0.1
"""Deviation of the first weights: with 0.02 nothing is learned for hundreds of steps."""
MANY, KNOWN, RECENT = 8, 0.95, 20
ALONE, FOCUSED, PLAIN = "one context", "one, then eight contexts", "plain, all as context"
_HELD_OUT = 1_000_000
Progress = Callable[[str, int, int], None]


def memory_model(seed: int) -> MemoryHandle:
    """A Llama of three layers, the third with a memory, a learned temperature and no positions."""
    model = _llama(seed)
    return add_memory(model, [LAYERS - 1], position="none", temperature="learned", dtype=None, copy=False)


def _llama(seed: int) -> Any:
    sizes: dict[str, Any] = {"context": 2 * WINDOW, "vocabulary": VOCABULARY, "initializer_range": SPREAD}
    return tiny_llama(DIM, LAYERS, HEADS, seed=seed, **sizes)


def _batch(seed: int, plain: bool) -> dict[str, Tensor]:
    """Definitions and queries of `BATCH` documents: rows of previous and current windows, or one row of both."""
    records = dictionary(BATCH, RECORDS, seed)
    labels = torch.where(records.answers, records.queries, -100)
    nothing = torch.full_like(labels, -100)
    side = 1 if plain else 0
    ids = torch.cat([records.definitions, records.queries], side)
    return {"input_ids": ids, "labels": torch.cat([nothing, labels], side)}


def train_recall(
    model: nn.Module, handle: MemoryHandle | None, many: int, steps: int, seed: int, progress: Progress | None = None
) -> tuple[list[float], int | None]:
    """Train on fresh dictionaries, with one context until `KNOWN` answers are right, then with `many`.

    Returns:
        The share of right answers of each step, and the step from which `many` were used (None: never).
    """
    shares: list[float] = []
    switched: int | None = None

    def set_contexts(_optimizer: Any, step: int) -> None:
        nonlocal switched
        recent = shares[-RECENT:]
        if switched is None and len(recent) == RECENT and sum(recent) / RECENT >= KNOWN:
            switched = step

    def loss_of(_: nn.Module, item: int) -> Tensor:
        batch = _batch(item, handle is None)
        seen: list[Tensor] = []
        head: Any = model.get_submodule("lm_head")
        hook = head.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
        try:
            if handle is None:
                loss = next_token_loss(model, batch)
            else:
                with handle.crossing(many if switched is not None else 1):
                    loss = next_token_loss(model, batch)
        finally:
            hook.remove()
        labels = batch["labels"][(batch["labels"] >= 0).any(1), 1:]
        right = seen[0][:, :-1].argmax(-1) == labels
        shares.append(right[labels >= 0].float().mean().item())
        return loss

    schedule = Schedule(steps, RATE, warmup=min(0.5, WARMUP / steps), seed=seed)
    items = [seed * STEPS * 10 + step for step in range(steps)]
    train_(
        model, items, loss_of, schedule, before_step=set_contexts, progress=progress, name="recall", distributed=False
    )
    return shares, switched


def _right(logits: Tensor, records: Records, row: int) -> float:
    """Share of right answers of a query window, given its logits ``(1, tokens, vocabulary)``."""
    found = logits[0, -WINDOW:-1].argmax(-1) == records.queries[row, 1:]
    return found[records.answers[1:]].float().mean().item()


@torch.no_grad()
def recall(model: nn.Module, handle: MemoryHandle | None, documents: int, rows: int, seed: int) -> float:
    """Share of right answers with the definitions of `documents` documents in the memory, or, without one, as context.

    Args:
        model: to be called.
        handle: of its memory.
        documents: that are remembered.
        rows: query windows that are asked, each of another of them (fewer where there are fewer documents).
        seed: of the dictionary; no key appears twice in it.
    """
    model.eval()
    records = dictionary(documents, RECORDS, seed)
    asked = torch.linspace(0, documents - 1, min(rows, documents)).long().tolist()
    text = records.definitions.view(1, -1)
    if handle is None:
        outs = [
            model(input_ids=torch.cat([text, records.queries[i : i + 1]], 1), logits_to_keep=WINDOW).logits
            for i in asked
        ]
    else:
        handle.reset()
        handle.read(text, WINDOW)
        outs = [model(input_ids=records.queries[i : i + 1], use_cache=False).logits for i in asked]
        handle.reset()
    return sum(_right(out, records, i) for out, i in zip(outs, asked, strict=True)) / len(asked)


def _focus(handle: MemoryHandle, documents: int, seed: int) -> float:
    """Mass on the positive as a share of that on `documents` windows, where answers are about to be given."""
    records = dictionary(documents, RECORDS, seed)
    before = torch.cat([records.answers[1:], records.answers[:1] & False]).expand(documents, -1)
    batch = {"input_ids": torch.cat([records.definitions, records.queries])}
    return next(iter(positive_attention_mass(handle.model, batch, documents, before).values()))


def _arm(name: str, seed: int, steps: int, sizes: Sequence[int], tell: Progress) -> dict[str, Any]:
    begun = time.perf_counter()
    handle = None if name == PLAIN else memory_model(seed)
    model: nn.Module = _llama(seed) if handle is None else handle.model
    shares, switched = train_recall(model, handle, MANY if name == FOCUSED else 1, steps, seed, tell)
    recent = shares[-RECENT:]
    row: dict[str, Any] = {"arm": name, "seed": seed, "train accuracy": sum(recent) / len(recent), "switched": switched}
    for size in sizes:
        rows = 32 if handle is not None or size * WINDOW < 2048 else 3
        repeats = max(1, min(8, 32 // size))
        found = [recall(model, handle, size, rows, _HELD_OUT + 100 * seed + n) for n in range(repeats)]
        row[f"accuracy, {size}"] = sum(found) / repeats
    if handle is not None:
        many = min(16, sizes[-1])
        row["r_16"] = sum(_focus(handle, many, _HELD_OUT + 5000 + n) for n in range(4)) / 4
    return row | {"seconds": time.perf_counter() - begun}


def run(quick: bool = False, seeds: int = 2, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    chosen = tuple(range(1 if quick else seeds))
    steps, sizes = (6, (1, 4)) if quick else (STEPS, (1, 16, 64, 256))
    rows = [_arm(name, seed, steps, sizes, tell) for seed in chosen for name in (ALONE, FOCUSED, PLAIN)]
    few, most = (f"accuracy, {sizes[1]}", f"accuracy, {sizes[-1]}")
    mean = {(arm, key): mean_of(rows, arm, key) for arm in (ALONE, FOCUSED, PLAIN) for key in (few, most)}
    checks = (
        Check(
            "one context: accuracy in training, the worst seed",
            min(r["train accuracy"] for r in rows if r["arm"] == ALONE),
            KNOWN,
            ">=",
        ),
        Check(
            f"{sizes[-1]} documents: FoT against one context + 0.10 (accuracy)",
            mean[FOCUSED, most],
            mean[ALONE, most] + 0.1,
            ">=",
        ),
        Check(
            "r_16 of FoT against twice that of one context",
            mean_of(rows, FOCUSED, "r_16"),
            2 * mean_of(rows, ALONE, "r_16"),
            ">=",
        ),
        Check(f"{sizes[1]} documents: FoT (accuracy)", mean[FOCUSED, few], 0.8, ">="),
        Check(
            f"{sizes[-1]} documents: FoT against plain + 0.2 (accuracy)",
            mean[FOCUSED, most],
            mean[PLAIN, most] + 0.2,
            ">=",
        ),
    )
    notes = [
        f"dictionary of {SYMBOLS} symbols, keys of three, {RECORDS} records a window; {LAYERS} layers of width {DIM}, {HEADS} heads, "
        f"memory in the last, without positions there; {steps} steps of {BATCH} documents at {RATE:g}, loss on answers alone",
        f"FoT: one context until {KNOWN:.0%} of the answers of {RECENT} steps are right, then {MANY}; the plain model reads both "
        "windows as one",
        f"first weights of deviation {SPREAD:g} and, as published for models trained from nothing, a learned temperature: found on "
        "seed 10, which is not reported; there one context reached 0.36 in training after 2000 steps, too little for the claims "
        "to be tested. With 0.02 and 1 / sqrt(head_dim) no answer was learned in 500 steps of 32 documents",
        "no key appears in two documents of a batch or of a memory; guessing is right in 3 % of answers",
    ]
    return Evidence("focused-transformer", CLAIM, rows, checks, time.perf_counter() - begun, chosen, notes)
