"""Cross-batch training: windows of a document see its previous window among those of others (Focused Transformer, 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.cross_batch import packed_contexts
from layerwright.treat.memory import MemoryHandle, add_memory, find_memory
from layerwright.tune._loop import Progress, Schedule, train_, trainable_copy

__all__ = ["CrossBatchLoader", "crossbatch", "focus_schedule", "next_token_loss"]

Stages = Mapping[int, int | Sequence[int]]
_IGNORED = -100


class CrossBatchLoader:
    """Batches in which a row keeps to its document until that ends.

    With ``pack=1`` a batch has ``2 batch`` rows: previous windows, then the current ones of the same documents; the loss
    is on the current ones, and the current window is the previous one of the next batch. What is left of a document and
    fills no window is dropped. With ``pack=k`` it has `batch` rows, each `k` consecutive ones `k` consecutive windows;
    documents follow one another there, with `separator` between them.

    Args:
        documents: ids, each ``(tokens,)``.
        batch: rows with a loss.
        window: tokens of a row.
        pack: consecutive rows for one document; 1 for previous and current windows.
        separator: ids between two documents of a packed batch, such as end and begin of text.
        seed: of the order of the documents.

    Raises:
        InputError: a number outside its range, rows that packs do not divide, or documents that are too short.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        batch: int,
        window: int,
        pack: int = 1,
        *,
        separator: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        for name, value in (("batch", batch), ("window", window), ("pack", pack)):
            if value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        if batch % pack:
            raise InputError(f"pack: got {pack} for a batch of {batch} rows, expected a divisor")
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        self.documents = [documents[i].long() for i in order if pack > 1 or len(documents[i]) >= 2 * window]
        if len(self.documents) < (batch if pack == 1 else 1):
            raise InputError(
                f"documents: {len(self.documents)} of {len(documents)} are of {2 * window} tokens or more, expected {batch}; "
                "use a smaller batch or window"
            )
        self.batch, self.window, self.pack, self.separator = batch, window, pack, list(separator)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches ``input_ids``, ``labels`` without end: the documents come round again."""
        return self._pairs() if self.pack == 1 else self._packs()

    def take(self, count: int) -> list[dict[str, Tensor]]:
        """The first `count` batches."""
        batches = iter(self)
        return [next(batches) for _ in range(count)]

    def _pairs(self) -> Iterator[dict[str, Tensor]]:
        number, size = self.batch, self.window
        rows = [(self.documents[i], 0) for i in range(self.batch)]
        while True:
            previous = torch.stack([text[at : at + size] for text, at in rows])
            current = torch.stack([text[at + size : at + 2 * size] for text, at in rows])
            labels = torch.cat([torch.full_like(previous, _IGNORED), current])
            yield {"input_ids": torch.cat([previous, current]), "labels": labels}
            for row, (text, at) in enumerate(rows):
                if at + 3 * size <= len(text):
                    rows[row] = (text, at + size)
                else:
                    rows[row] = (self.documents[number % len(self.documents)], 0)
                    number += 1

    def _packs(self) -> Iterator[dict[str, Tensor]]:
        end = torch.tensor(self.separator, dtype=torch.long)
        stream, place = torch.cat([part for text in self.documents for part in (text, end)]), 0
        need = self.pack * self.window
        stream = stream.repeat(-(-need * 2 // len(stream)))
        while True:
            packs = []
            for _ in range(self.batch // self.pack):
                if place + need > len(stream):
                    place = 0
                packs.append(stream[place : place + need].view(self.pack, self.window))
                place += need
            ids = torch.cat(packs)
            yield {"input_ids": ids, "labels": ids}


def focus_schedule(step: int, stages: Stages, seed: int = 0) -> int:
    """How many windows a query sees at `step`, the positive included: of the last stage that has begun.

    ``{0: 2, 450_000: 64}`` changes once; ``{0: (2, 128)}`` draws one of the two at each step. Begin with 8 or fewer: with
    many from the start a model learns to ignore all of them.

    Args:
        step: 0-based.
        stages: first step to a number, or to numbers of which one is drawn.
        seed: of the draws.

    Raises:
        InputError: no stage that begins at 0, or a number below 1.
    """
    if 0 not in stages or min(stages) < 0:
        raise InputError(f"stages: got first steps {sorted(stages)}, expected one that begins at 0")
    found = stages[max(first for first in stages if first <= step)]
    choices = [found] if isinstance(found, int) else list(found)
    if not choices or min(choices) < 1:
        raise InputError(f"stages: got {found}, expected numbers of at least 1")
    if len(choices) == 1:
        return choices[0]
    draw = torch.Generator().manual_seed(1_000_003 * seed + step)
    return choices[int(torch.randint(len(choices), (1,), generator=draw))]


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the labels that count, in nats; the logits of rows without any are not computed."""
    found: Any = model
    wanted = (batch["labels"] != _IGNORED).any(1)
    hidden = found.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    logits = found.get_output_embeddings()(hidden[wanted]).float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][wanted, 1:].flatten())


def crossbatch(
    model: nn.Module,
    documents: Sequence[Tensor],
    layers: Sequence[str] | Sequence[int] = (),
    *,
    batch: int = 8,
    window: int = 512,
    pack: int = 1,
    stages: Stages | None = None,
    steps: int = 100,
    learning_rate: float = 2e-5,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    seed: int = 0,
    separator: Sequence[int] = (),
    progress: Progress | None = None,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] = next_token_loss,
    **settings: Any,
) -> MemoryHandle:
    """A trained copy of `model` whose memory layers learned to tell a document's earlier window from others.

    Args:
        model: a Llama, with or without memory layers.
        documents: ids, each ``(tokens,)``.
        layers: that get a memory, where the model has none.
        batch, window, pack, separator: see `CrossBatchLoader`.
        stages: see `focus_schedule`; 2 throughout by default. For packed batches the windows of a row, its own included.
        steps, learning_rate, weight_decay, warmup, seed, progress: of training.
        loss: ``loss(model, batch)`` in nats.
        settings: of `add_memory`.

    Raises:
        InputError: more windows than rows, a window longer than the model's, or see `CrossBatchLoader` and `add_memory`.
    """
    stages = stages or {0: 2}
    config: Any = model.config
    if window > config.max_position_embeddings:
        raise InputError(
            f"window: got {window}, expected at most {config.max_position_embeddings}, the model's longest input"
        )
    most = max(n for found in stages.values() for n in ([found] if isinstance(found, int) else found))
    if most > batch:
        raise InputError(f"stages: {most} windows for a batch of {batch} rows; use a larger batch")
    schedule = Schedule(steps, learning_rate, weight_decay, warmup, seed=seed)
    loader = CrossBatchLoader(documents, batch, window, pack, separator=separator, seed=seed)
    copied = trainable_copy(model, lambda _name, _tensor: True)
    handle = find_memory(copied) or add_memory(copied, layers, copy=False, **settings)
    handle.reset()
    current = [1]

    def set_contexts(_optimizer: Any, step: int) -> None:
        current[0] = focus_schedule(step, stages, seed)

    def loss_of(_: nn.Module, item: Mapping[str, Tensor]) -> Tensor:
        if pack == 1:
            with handle.crossing(current[0]):
                return loss(handle.model, item)
        with handle.crossing(current[0], "packed", packed_contexts(batch, pack, current[0] - 1)):
            return loss(handle.model, item)

    train_(
        handle.model,
        loader.take(steps),
        loss_of,
        schedule,
        before_step=set_contexts,
        progress=progress,
        name="crossbatch",
        distributed=False,
    )
    return handle
