"""Small models that must find something again, and how they are trained: shared by two tasks of one study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.studies.sequence import tiny_llama
from layerwright.treat.memory import MemoryHandle, add_memory
from layerwright.tune._loop import Schedule, train_
from layerwright.tune.crossbatch import next_token_loss

__all__ = ["Stage", "recall_llama", "recall_memory", "train_answers"]

DIM, LAYERS, HEADS = 64, 3, 4
SPREAD, SHARPNESS, BACK, NEAR, BASE, QUIET = 0.1, 10.0, 2, 1.5, 100.0, 0.2
Batch = Mapping[str, Tensor]
Stage = tuple[Callable[[int], Batch], int]
"""Batches by number, and windows that a query sees in it (without a memory the number means nothing)."""
Progress = Callable[[str, int, int], None]


def recall_llama(seed: int, vocabulary: int, context: int) -> Any:
    """A Llama of three layers whose first weights let a key of several tokens be found.

    In the first two layers biases of queries and keys let attention begin near the token `BACK` places before, and the
    feed-forward parts begin small, so that a token's state begins as that of its neighbourhood; the third begins by
    matching like with like (keys as queries are) and by copying (output as values are, transposed).
    """
    settings: dict[str, Any] = {
        "initializer_range": SPREAD,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
    }
    model = tiny_llama(DIM, LAYERS, HEADS, seed=seed, context=context, vocabulary=vocabulary, **settings)
    with torch.no_grad():
        for block in model.model.layers[:-1]:
            query, key = _biases(DIM // HEADS)
            block.self_attn.q_proj.bias.copy_(query.repeat(HEADS))
            block.self_attn.k_proj.bias.copy_(key.repeat(HEADS))
            block.mlp.down_proj.weight.mul_(QUIET)
        last = model.model.layers[-1].self_attn
        last.k_proj.weight.copy_(last.q_proj.weight)
        last.o_proj.weight.copy_(last.v_proj.weight.T)
    return model


def _biases(width: int) -> tuple[Tensor, Tensor]:
    """Biases of a head whose products, once rotated, are largest for the key `BACK` places before the query."""
    half = torch.full((width // 2,), NEAR)
    angles = BACK * BASE ** (-torch.arange(width // 2) / (width // 2))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([half, half]), torch.cat([half * (cos - sin), half * (cos + sin)])


def recall_memory(model: Any) -> MemoryHandle:
    """A memory in the last layer of `recall_llama`, in place: no positions there, a learned temperature of a tenth."""
    handle = add_memory(model, [LAYERS - 1], position="none", temperature="learned", dtype=None, copy=False)
    for memory in handle.memories:
        assert memory.log_temperature is not None
        nn.init.constant_(memory.log_temperature, -math.log(SHARPNESS))
    return handle


def train_answers(
    model: nn.Module,
    handle: MemoryHandle | None,
    stages: Sequence[Stage],
    schedule: Schedule,
    known: float,
    recent: int,
    progress: Progress | None = None,
) -> tuple[list[float], list[int]]:
    """Train on the answers of fresh batches; a stage ends when `known` of the answers of `recent` steps were right.

    Returns:
        The share of right answers of each step, and the steps at which each stage after the first began.
    """
    shares: list[float] = []
    begun: list[int] = []

    def choose(_optimizer: Any, step: int) -> None:
        since = shares[begun[-1] if begun else 0 :][-recent:]
        if len(begun) < len(stages) - 1 and len(since) == recent and sum(since) / recent >= known:
            begun.append(step)

    def loss_of(_: nn.Module, item: int) -> Tensor:
        make, contexts = stages[len(begun)]
        batch = make(item)
        seen: list[Tensor] = []
        head: Any = model.get_submodule("lm_head")
        hook = head.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
        try:
            if handle is None:
                loss = next_token_loss(model, batch)
            else:
                with handle.crossing(contexts):
                    loss = next_token_loss(model, batch)
        finally:
            hook.remove()
        labels = batch["labels"][(batch["labels"] >= 0).any(1), 1:]
        right = seen[0][:, :-1].argmax(-1) == labels
        shares.append(right[labels >= 0].float().mean().item())
        return loss

    items = [schedule.seed * 1_000_000 + step for step in range(schedule.steps)]
    train_(model, items, loss_of, schedule, before_step=choose, progress=progress, name="recall", distributed=False)
    return shares, begun
