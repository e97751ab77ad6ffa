"""What shapes cost, measured side by side: time, throughput, memory of activations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from layerwright.allocate.equal_parameters import Shape
from layerwright.recipes._shape_task import ShapeTask
from layerwright.score.turns import fixed_threads, kept_activation_bytes, rounds_in_turns

__all__ = ["shape_costs"]


class _Loss(nn.Module):
    """The loss of a training batch as a module's output."""

    def __init__(self, task: ShapeTask, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, item: Any) -> Tensor:
        return self.task.loss(self.model, item)


def shape_costs(task: ShapeTask, shapes: Sequence[Shape], *, batch: int, rounds: int = 10) -> list[dict[str, Any]]:
    """For each shape: parameters, latency of one sample, tokens for each second, bytes that a training step keeps.

    Shapes take turns on one thread, and on a CPU the clock is that of the thread (see
    `layerwright.models.aspect_report.aspect_report`). Weights are those of the start: time does not depend on them.

    Args:
        task: what they are built for.
        shapes: the first is the one that `relative_latency` refers to.
        batch: samples of a training step.
        rounds: forward passes of each at either batch size.
    """
    models = [task.build(shape, 0) for shape in shapes]
    trunks = [task.trunk(model) for model in models]
    (item,) = task.items(1, batch, 0)
    with fixed_threads(1):
        single = rounds_in_turns(trunks, task.example(1), rounds)
        many = rounds_in_turns(trunks, task.example(batch), max(2, rounds // 4))
        kept = [kept_activation_bytes(_Loss(task, model), item) for model in models]
    rows = []
    for number, (shape, model) in enumerate(zip(shapes, models, strict=True)):
        times = single[number]
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        rows.append(
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "block_parameters": shape.params,
                "flops_per_token": shape.flops_per_token(task.tokens, causal=task.causal),
                "latency_ms": statistics.median(times),
                "latency_spread_ms": high - low,
                "relative_latency": statistics.median(a / b for a, b in zip(times, single[0], strict=True)),
                "tokens_per_second": 1000 * batch * task.tokens / statistics.median(many[number]),
                "activation_bytes": kept[number],
            }
        )
    return rows
