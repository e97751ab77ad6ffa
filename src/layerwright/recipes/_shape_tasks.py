"""What shapes are compared on: next bytes, masked bytes, classes of texts, masked patches, classes of images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.allocate.equal_parameters import Shape
from layerwright.core.errors import InputError, unknown_name
from layerwright.data.byte_windows import byte_parts, even_windows, random_windows
from layerwright.data.library_groups import LENGTH, LIBRARY_GROUPS, library_pieces
from layerwright.models.aspect_encoder import AspectEncoder
from layerwright.models.masked_lm import bert_mask, masked_lm, masked_lm_loss
from layerwright.recipes._shape_images import image_task
from layerwright.recipes._shape_task import SEED_APART, ShapeTask, class_loss, digest, judge_classes, to_device

__all__ = ["TASKS", "ShapeTask", "open_task", "task_name"]

TASKS: Mapping[str, tuple[str, str]] = {
    "lm": ("text", "next"),
    "mlm": ("text", "masked"),
    "classify": ("text", "labels"),
    "mae": ("images", "masked"),
    "supervised": ("images", "labels"),
}
"""Kind of data and objective of each task."""
CONTEXT = 128
HELDOUT = {"lm": 64, "mlm": 128, "classify": 400}
"""Samples that quality is measured on."""
MASK = 256


def task_name(task: str, objective: str | None = None) -> str:
    """The task of ``lm``, ``mae`` ..., or of a kind of data (``text``, ``images``) and an objective.

    Raises:
        InputError: an unknown name, or an objective that the task does not have.
    """
    kinds = {"text": "next", "images": "masked"}
    if task not in TASKS and task not in kinds:
        raise unknown_name("task", task, [*TASKS, *kinds])
    objectives = sorted({own for _, own in TASKS.values()})
    if objective is not None and objective not in objectives:
        raise unknown_name("objective", objective, objectives)
    if task in TASKS:
        if objective not in (None, TASKS[task][1]):
            raise InputError(
                f"objective: got {objective} for {task}, whose objective is {TASKS[task][1]}; "
                f"give --task {TASKS[task][0]} --objective {objective}"
            )
        return task
    wanted = (task, objective or kinds[task])
    found = [name for name, pair in TASKS.items() if pair == wanted]
    if not found:
        raise InputError(
            f"objective: {task} has no objective {objective}, expected one of "
            f"{', '.join(own for kind, own in TASKS.values() if kind == task)}"
        )
    return found[0]


def open_task(name: str, data: Path | None = None) -> ShapeTask:
    """The task, with its data read and checked.

    Raises:
        FileNotFoundError: no such data.
        InputError: an unknown task, or data that it cannot use.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    if name in ("lm", "mlm"):
        return _text(name, data)
    if name == "classify":
        if data is not None:
            raise InputError(
                "data: the task classify takes the library's sources alone; leave --data out, or use lm or mlm"
            )
        return _classify()
    return image_task(name, data)


def _text(name: str, data: Path | None) -> ShapeTask:
    train, heldout = byte_parts(data, least=4 * CONTEXT)
    held = even_windows(heldout, HELDOUT[name], CONTEXT)
    causal = name == "lm"
    masked = bert_mask(held, MASK, vocabulary=MASK, generator=torch.Generator().manual_seed(SEED_APART))

    def items(steps: int, batch: int, seed: int) -> list[Any]:
        windows = random_windows(train, steps * batch, CONTEXT, seed=seed).split(batch)
        if causal:
            return list(windows)
        draw = torch.Generator().manual_seed(seed + SEED_APART)
        return [bert_mask(ids, MASK, vocabulary=MASK, generator=draw) for ids in windows]

    def loss(model: nn.Module, item: Any) -> Tensor:
        return _next_byte_loss(model, item) if causal else masked_lm_loss(model, item[0], item[1])

    @torch.no_grad()
    def judge(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        rows = list(held.split(16)) if causal else list(zip(*(part.split(16) for part in masked), strict=True))
        total = sum(float(loss(model, to_device(row, device))) * len(row if causal else row[0]) for row in rows) / len(
            held
        )
        return {"quality": total / math.log(2), "loss": total}

    return ShapeTask(
        name,
        "bits/byte" if causal else "bits/masked byte",
        False,
        CONTEXT,
        causal,
        causal,
        _llama if causal else _bert,
        items,
        loss,
        judge,
        lambda batch: random_windows(train, batch, CONTEXT),
        lambda model: model,
        False,
        digest(held, train[:65536]),
    )


def _next_byte_loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _llama(shape: Shape, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def _bert(shape: Shape, seed: int) -> nn.Module:
    made: nn.Module = masked_lm(
        shape.dim, shape.layers, shape.heads, vocabulary=MASK + 1, max_len=CONTEXT, ffn_dim=shape.ffn_dim, seed=seed
    )
    return made


def _classify() -> ShapeTask:
    ids, labels = library_pieces("heldout", HELDOUT["classify"], seed=SEED_APART)

    def build(shape: Shape, seed: int) -> nn.Module:
        return AspectEncoder(
            256,
            shape.dim,
            shape.dim // shape.heads,
            shape.layers,
            shape.heads,
            shape.ffn_dim,
            LENGTH,
            classes=len(LIBRARY_GROUPS),
            seed=seed,
        )

    def items(steps: int, batch: int, seed: int) -> list[Any]:
        found = library_pieces("train", steps * batch, seed=seed)
        return list(zip(found[0].split(batch), found[1].split(batch), strict=True))

    return ShapeTask(
        "classify",
        "accuracy",
        True,
        LENGTH,
        False,
        False,
        build,
        items,
        class_loss,
        partial(judge_classes, test=(ids, labels)),
        lambda batch: library_pieces("train", batch)[0],
        lambda model: model,
        False,
        digest(ids),
    )
