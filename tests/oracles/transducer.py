"""The transducer loss, slowly: every alignment written out, and one cell of the lattice after the other."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

__all__ = ["edit_distance", "enumerated_loss", "loop_loss", "loop_loss_batched"]


def enumerated_loss(logits: Tensor, target: list[int], blank: int = 0) -> float:
    """Loss of one sample ``(frames, labels + 1, symbols)``: the sum over every order of labels and blanks."""
    frames, labels = logits.shape[0], len(target)
    logs = logits.double().log_softmax(-1)
    total = 0.0
    # The last step is blank; the others are `frames - 1` blanks and all labels in any order.
    for places in itertools.combinations(range(frames - 1 + labels), labels):
        t = u = 0
        weight = 0.0
        for step in range(frames - 1 + labels):
            if step in places:
                weight += float(logs[t, u, target[u]])
                u += 1
            else:
                weight += float(logs[t, u, blank])
                t += 1
        total += math.exp(weight + float(logs[t, u, blank]))
    return -math.log(total)


def loop_loss(logits: Tensor, targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor, blank: int = 0) -> Tensor:
    """Losses ``(batch,)``, one cell of one sample after the other; the gradient is autograd's."""
    losses = []
    for own, target, frames, labels in zip(
        logits, targets, frame_lengths.tolist(), target_lengths.tolist(), strict=True
    ):
        logs = own.log_softmax(-1)
        cells: dict[tuple[int, int], Tensor] = {(0, 0): logs.new_zeros(())}
        for t in range(frames):
            for u in range(labels + 1):
                ways = []
                if t:
                    ways.append(cells[t - 1, u] + logs[t - 1, u, blank])
                if u:
                    ways.append(cells[t, u - 1] + logs[t, u - 1, target[u - 1]])
                if ways:
                    cells[t, u] = ways[0] if len(ways) == 1 else torch.logaddexp(*ways)
        losses.append(-(cells[frames - 1, labels] + logs[frames - 1, labels, blank]))
    return torch.stack(losses)


def loop_loss_batched(
    logits: Tensor, targets: Tensor, frame_lengths: Tensor, target_lengths: Tensor, blank: int = 0
) -> Tensor:
    """Losses ``(batch,)``, one cell after the other, all samples at once; the gradient is autograd's."""
    logs = logits.log_softmax(-1)
    rows = torch.arange(len(logits))
    cells: dict[tuple[int, int], Tensor] = {(0, 0): logs.new_zeros(len(logits))}
    for t in range(logits.shape[1]):
        for u in range(logits.shape[2]):
            ways = []
            if t:
                ways.append(cells[t - 1, u] + logs[:, t - 1, u, blank])
            if u:
                ways.append(cells[t, u - 1] + logs[rows, t, u - 1, targets[:, u - 1]])
            if ways:
                cells[t, u] = ways[0] if len(ways) == 1 else torch.logaddexp(*ways)
    ends = [
        cells[t - 1, u][row] + logs[row, t - 1, u, blank]
        for row, (t, u) in enumerate(zip(frame_lengths.tolist(), target_lengths.tolist(), strict=True))
    ]
    return -torch.stack(ends)


def edit_distance(a: list[int], b: list[int]) -> int:
    """Fewest insertions, deletions and replacements, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    if a[-1] == b[-1]:
        return edit_distance(a[:-1], b[:-1])
    return 1 + min(edit_distance(a[:-1], b), edit_distance(a, b[:-1]), edit_distance(a[:-1], b[:-1]))
