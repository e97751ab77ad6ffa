"""Greedy decoding of a transducer, all samples of a batch side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.models._rnnt_parts import Predictor
from layerwright.nn.transducer import TransducerJoiner

__all__ = ["greedy_search"]


@torch.no_grad()
def greedy_search(
    frames: Tensor, lengths: Tensor, predictor: Predictor, joiner: TransducerJoiner, max_symbols: int
) -> list[list[int]]:
    """Labels of each sample: at every frame the most probable symbol, again and again until it is blank.

    A frame and a label follow each other, so that this is a loop over them; samples run side by side.

    Args:
        frames: ``(batch, frames, dim)`` of the encoder.
        lengths: real frames.
        predictor, joiner: of the model.
        max_symbols: labels of one frame at most.

    Raises:
        InputError: `max_symbols` below 1.
    """
    if max_symbols < 1:
        raise InputError(f"max_symbols: got {max_symbols}, expected at least 1")
    prefix, state = predictor.start(len(frames))
    said: list[Tensor] = []
    for t in range(frames.shape[1]):
        open_ = t < lengths
        for _ in range(max_symbols):
            symbol = joiner(frames[:, t : t + 1], prefix[:, None])[:, 0, 0].argmax(-1)
            open_ = open_ & (symbol != predictor.blank)
            if not bool(open_.any()):
                break
            said.append(torch.where(open_, symbol, predictor.blank))
            after, later = predictor.step(said[-1], state)
            prefix = torch.where(open_[:, None], after, prefix)
            h, c = (torch.where(open_[None, :, None], new, old) for new, old in zip(later, state, strict=True))
            state = h, c
    if not said:
        return [[] for _ in range(len(frames))]
    rows = torch.stack(said, 1).tolist()
    return [[symbol for symbol in row if symbol != predictor.blank] for row in rows]
