"""Our own layout; and a plain Hugging Face checkpoint where there is nothing to describe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.nn.replace import structure_of
from layerwright.treat.export._dense import tied_apart
from layerwright.treat.export._staging import staged_folder
from layerwright.treat.writer import copy_side_files, save_model

__all__ = ["write"]


def write(model: nn.Module, out: Path, *, processor: Any = None, force: bool = False) -> Path:
    """Write `model` to the folder `out`, exactly.

    A model without treated layers (also one that only lost blocks) becomes a checkpoint that transformers' own
    ``from_pretrained`` reads; any other is for `layerwright.load`.

    Raises:
        CheckpointError: the folder cannot be used, or the model has no Hugging Face configuration.
    """
    with staged_folder(out, force) as folder, stating_ties(model):
        if not structure_of(model) and hasattr(model, "save_pretrained"):
            save_plain(model, folder)
        else:
            save_model(model, folder)
            save_generation(model, folder)
        copy_side_files(None, folder, processor)
    return out


@contextmanager
def stating_ties(model: Any) -> Iterator[None]:
    """For the block, the configuration does not tie a head and a table that were parted."""
    if not tied_apart(model):
        yield
        return
    config = model.config
    model.config = copy.deepcopy(config)
    model.config.tie_word_embeddings = False
    try:
        yield
    finally:
        model.config = config


def save_plain(model: Any, folder: Path) -> None:
    """``save_pretrained``, with the names that published checkpoints use."""
    from layerwright.data.loading import _quiet

    with _quiet():
        model.save_pretrained(folder)


def save_generation(model: Any, folder: Path) -> None:
    """How the model generates, where it does."""
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        generation.save_pretrained(folder)
