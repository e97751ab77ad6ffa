"""Generated reports with findings among filler words, and summaries that name the abnormal ones in a fixed order."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration

__all__ = ["VOCABULARY", "denoising", "reports", "summaries", "summary_f1"]

PAD, BOS, EOS, MASK = 0, 1, 2, 3
KEYS, VALUES = 6, 6
"""Findings in a report, and the values of each; the second half of them is abnormal."""
FIRST_KEY = 8
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_FILLER = FIRST_VALUE + KEYS * VALUES
VOCABULARY = 200
LENGTH = 28


def reports(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(reports (count, 28), summaries (count, 13))`` of token ids, padded with 0.

    A report names six findings, key and value, in random order, each followed by one or two filler words; its
    summary names those of abnormal value, key and value, in the order of the keys.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(VALUES, (count, KEYS), generator=generator)
    order = torch.rand(count, KEYS, generator=generator).argsort(1)
    gaps = torch.randint(1, 3, (count, KEYS), generator=generator)
    ends = 1 + (2 + gaps).cumsum(1)
    starts = torch.cat([torch.ones(count, 1, dtype=torch.long), ends[:, :-1]], 1)
    text = torch.randint(FIRST_FILLER, VOCABULARY, (count, LENGTH), generator=generator)
    text[:, 0] = BOS
    text.scatter_(1, starts, FIRST_KEY + order)
    text.scatter_(1, starts + 1, FIRST_VALUE + order * VALUES + values.gather(1, order))
    text[torch.arange(LENGTH) >= ends[:, -1:]] = PAD
    text.scatter_(1, ends[:, -1:], EOS)
    return text, _summaries(values)


def _summaries(values: Tensor) -> Tensor:
    count, keys = values.shape
    abnormal = values >= VALUES // 2
    spare = 2 * keys + 1  # where the words of normal findings are put, and cut off
    place = torch.where(abnormal, 2 * (abnormal.cumsum(1) - 1), spare)
    key = torch.arange(keys).expand(count, -1)
    text = torch.full((count, spare + 2), PAD)
    text.scatter_(1, place, FIRST_KEY + key)
    text.scatter_(1, place + 1, FIRST_VALUE + key * VALUES + values)
    text = text[:, :spare]
    ends = 2 * abnormal.sum(1, keepdim=True)
    text[torch.arange(spare) >= ends] = PAD
    return text.scatter(1, ends, EOS)


def denoising(count: int, seed: int, batch_size: int = 16) -> Calibration:
    """Reports with a third of their words hidden, three in a row; the labels are the whole reports."""
    text, _ = reports(count, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.rand(text.shape, generator=generator) < 0.1
    hidden = hidden | hidden.roll(1, 1) | hidden.roll(2, 1)
    hidden[:, 0] = False
    return _batches(torch.where(hidden & (text != PAD), MASK, text), text[:, 1:], batch_size)


def summaries(count: int, seed: int, batch_size: int = 16) -> Calibration:
    """Reports, with their summaries as labels."""
    return _batches(*reports(count, seed), batch_size)


def _batches(inputs: Tensor, targets: Tensor, batch_size: int) -> Calibration:
    labels = torch.where(targets == PAD, -100, targets)
    parts = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    return Calibration(
        [{"input_ids": x, "attention_mask": (x != PAD).long(), "labels": y} for x, y in parts], name="generated reports"
    )


@torch.no_grad()
def summary_f1(model: nn.Module, count: int, seed: int) -> float:
    """Mean F1 of the words of greedy summaries against the right ones; 1 where both are empty."""
    text, right = reports(count, seed)
    mask = (text != PAD).long()
    made = model.generate(  # type: ignore[operator]
        input_ids=text, attention_mask=mask, max_new_tokens=right.shape[1], do_sample=False, num_beams=1
    )[:, 1:]
    total = 0.0
    for own, goal in zip(made.tolist(), right.tolist(), strict=True):
        a, b = _words(own), _words(goal)
        total += 2 * (a & b).total() / max(a.total() + b.total(), 1) if a or b else 1.0
    return total / count


def _words(ids: list[int]) -> Counter[int]:
    return Counter(ids[: ids.index(EOS)] if EOS in ids else ids)
