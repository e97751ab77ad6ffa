"""Pass keys at several times the length of training: a byte model with a memory, and its twin without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.studies._passkey import passkey_prompt
from layerwright.studies._recall import recall_llama, recall_memory, train_answers
from layerwright.treat.memory import MemoryHandle
from layerwright.tune._loop import Schedule

__all__ = ["KEYS", "KEYS_PLAIN", "LENGTHS", "LONG", "STEPS", "passkey_batch", "passkey_recall", "passkey_rows"]

LONG = 192
"""Bytes of a text of training, question and answer included: a previous window and the current one."""
LENGTHS, PLACES = (1, 2, 4, 8), (0.0, 0.25, 0.5, 0.75, 1.0)
DIGITS, ROWS, STEPS, RATE, KNOWN, RECENT = 4, 8, 400, 1.5e-3, 0.95, 20
KEYS, KEYS_PLAIN = "pass keys, memory", "pass keys, plain"
_FILLING = 3
Progress = Callable[[str, int, int], None]


def _texts(length: int, places: Sequence[float], seed: int) -> Tensor:
    """Prompt and answer, `length` bytes in all, for each place of the key: ``(texts, length)``."""
    draw = torch.Generator().manual_seed(seed)
    low, high = 10 ** (DIGITS - 1), 10**DIGITS
    rows = []
    for place in places:
        key, start = torch.randint(low, high, (2,), generator=draw).tolist()
        prompt, answer = passkey_prompt(length - DIGITS, key, place, start)
        rows.append(list(prompt + answer))
    return torch.tensor(rows)


def passkey_batch(seed: int, plain: bool, filler: bool) -> dict[str, Tensor]:
    """Texts with the key at random places, labels on answers alone: rows of previous and current windows, or of both.

    With `filler` every other document is filler without key or question, which the one before it sees as a negative.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = _texts(LONG, torch.rand(ROWS, generator=draw).tolist(), seed)
    labels = ids.clone()
    labels[:, :-DIGITS] = -100
    if plain:
        return {"input_ids": ids, "labels": labels}
    if filler:
        long = _texts(_FILLING * LONG, [1.0] * ROWS, seed)[:, LONG : 2 * LONG]  # far from the key and the question
        ids = torch.stack([ids, long], 1).flatten(0, 1)
        labels = torch.stack([labels, torch.full_like(labels, -100)], 1).flatten(0, 1)
    return {name: torch.cat(part.split(LONG // 2, 1)) for name, part in (("input_ids", ids), ("labels", labels))}


@torch.no_grad()
def passkey_recall(
    model: nn.Module, handle: MemoryHandle | None, length: int, place: float, rows: int, seed: int
) -> float:
    """Share of pass keys that greedy decoding gets wholly right.

    Args:
        model: to be called.
        handle: of its memory: all but the last `LONG` / 2 bytes go there, window by window. None: all is context.
        length: bytes of prompt and answer.
        place: of the key, see `passkey_prompt`.
        rows: prompts.
        seed: of keys and filler.
    """
    model.eval()
    ids = _texts(length, [place] * rows, seed)
    local = ids
    if handle is not None:
        handle.reset()
        local = ids[:, -(LONG // 2) :]
        handle.read(ids[:, : -(LONG // 2)], LONG // 2)
    logits = model(input_ids=local[:, :-1], logits_to_keep=DIGITS, use_cache=False).logits
    if handle is not None:
        handle.reset()
    # greedy decoding writes the answer exactly if each digit is the likeliest after the right ones
    return (logits.argmax(-1) == ids[:, -DIGITS:]).all(1).float().mean().item()


def passkey_rows(
    seed: int, steps: int, lengths: Sequence[int], rows: int, progress: Progress | None
) -> list[dict[str, Any]]:
    """One row for each arm: accuracy in training, and by length (in texts of training) and place."""
    found = []
    for name in (KEYS, KEYS_PLAIN):
        model: Any = recall_llama(seed, 256, 2 * LONG)
        handle = recall_memory(model) if name == KEYS else None
        stages = [(_maker(handle is None, False), 1), (_maker(handle is None, True), 2)]
        schedule = Schedule(steps, RATE, warmup=0.1, seed=seed)
        shares, _ = train_answers(model, handle, stages, schedule, KNOWN, RECENT, progress)
        row: dict[str, Any] = {
            "arm": name,
            "seed": seed,
            "train accuracy": sum(shares[-RECENT:]) / len(shares[-RECENT:]),
        }
        for times in lengths:
            by_place = [
                passkey_recall(model, handle, times * LONG, p, rows, 7_000_000 + n) for n, p in enumerate(PLACES)
            ]
            row[f"{times}x"] = sum(by_place) / len(by_place)
            row[f"{times}x by place"] = " ".join(f"{share:.2f}" for share in by_place)
        found.append(row)
    return found


def _maker(plain: bool, filler: bool) -> Callable[[int], dict[str, Tensor]]:
    return lambda item: passkey_batch(item, plain, filler)
