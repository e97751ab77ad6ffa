"""What encoders of several aspect ratios cost, measured side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerwright.allocate.aspect import AspectCost
from layerwright.core.calibration import evaluating
from layerwright.core.errors import InputError
from layerwright.models.aspect_encoder import AspectBlock, AspectEncoder
from layerwright.score.costs import count_flops
from layerwright.score.turns import fixed_threads, kept_activation_bytes, milliseconds, rounds_in_turns

__all__ = ["aspect_flops", "aspect_report"]

_PROBE_BYTES = 1 << 26
_PROBE_CALLS = 1000


def aspect_report(
    models: Sequence[AspectEncoder],
    input_shape: tuple[int, int],
    threads: int = 1,
    *,
    rounds: int = 20,
    seed: int = 0,
) -> list[AspectCost]:
    """Cost of each encoder: parameters, operations, memory of activations, latency, and the two terms of its limit.

    The encoders take turns, so that a busy machine slows all of them; two rounds warm up. On one thread of a CPU the
    clock is that of the thread and stands while other programs run: they interrupt long passes more often than short
    ones, and would make the fast encoder look faster than it is. Otherwise it is the clock on the wall. `weight_ms` is for weights
    that come from memory: those that fit into a cache are faster.

    Args:
        models: of one or several families; the first is the one that `relative_latency` refers to.
        input_shape: ``(batch, tokens)``.
        threads: of torch while this runs; afterwards it has those it had.
        rounds: forward passes of each, at least 1.
        seed: of the ids, which are drawn at random.

    Raises:
        InputError: no models, or a number below 1.
    """
    if not models:
        raise InputError("models: got none, expected at least one encoder")
    for name, value in (
        ("batch", input_shape[0]),
        ("tokens", input_shape[1]),
        ("threads", threads),
        ("rounds", rounds),
    ):
        if value < 1:
            raise InputError(f"{name}: got {value}, expected at least 1")
    rows = min(model.embedding.num_embeddings for model in models)
    device = models[0].embedding.weight.device
    ids = torch.randint(rows, input_shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with fixed_threads(threads):
        times = rounds_in_turns(models, ids, rounds)
        bytes_per_ms, call_ms = _bandwidth(device), _call_ms(device)
        return [
            _cost(model, ids, taken, times[0], bytes_per_ms, call_ms)
            for model, taken in zip(models, times, strict=True)
        ]


def aspect_flops(model: AspectEncoder, tokens: int) -> float:
    """Operations of blocks of softmax attention on one sequence: ``tokens (8 d H dh + 4 T H dh + 4 d f)`` for each layer.

    A multiply-add counts 2; `T` is `tokens`, `H` the heads of a layer, ``dh`` their width, `d` and `f` those of a token and
    inside feed-forward parts. Norms, sums and the classifier are left out.
    """
    total = 0.0
    for block in model.blocks:
        assert isinstance(block, AspectBlock)
        layer, ffn = block.attention, block.ffn[0]
        assert isinstance(ffn, nn.Linear)
        inner = layer.num_heads * layer.head_dim
        total += tokens * (8 * layer.dim * inner + 4 * tokens * inner + 4 * layer.dim * ffn.out_features)
    return total


def _cost(
    model: AspectEncoder,
    ids: Tensor,
    taken: Sequence[float],
    first: Sequence[float],
    bytes_per_ms: float,
    call_ms: float,
) -> AspectCost:
    operations = _operations(model, ids)
    low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else (taken[0],) * 3
    return AspectCost(
        layers=model.layers,
        heads_per_layer=model.heads_per_layer,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        body_parameters=model.body_parameters(),
        flops=count_flops(model, lambda: model(ids))[""],
        activation_bytes=kept_activation_bytes(model, ids),
        latency_ms=statistics.median(taken),
        spread_ms=high - low,
        relative_latency=statistics.median(a / b for a, b in zip(taken, first, strict=True)),
        operations=operations,
        weight_ms=_weight_bytes(model, ids) / bytes_per_ms,
        overhead_ms=operations * call_ms,
    )


class _Counter(TorchDispatchMode):
    """Counts kernels; views call none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _operations(model: AspectEncoder, ids: Tensor) -> int:
    with evaluating(model), _Counter() as counter:
        model(ids)
    return counter.count


def _weight_bytes(model: AspectEncoder, ids: Tensor) -> int:
    """Bytes of weights that a forward pass reads: of tables the rows that are looked up."""
    tables = {id(model.embedding.weight), id(model.positions.weight)}
    size = sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values() if id(t) not in tables)
    row = model.dim * model.embedding.weight.element_size()
    return size + row * (ids.unique().numel() + ids.shape[1])


def _bandwidth(device: torch.device) -> float:
    """Bytes for each millisecond that a sum over a large tensor reads."""
    large = torch.ones(_PROBE_BYTES // 4, device=device)
    large.sum()
    return _PROBE_BYTES / min(milliseconds(large.sum, device) for _ in range(5))


def _call_ms(device: torch.device) -> float:
    """Milliseconds that a call of a kernel takes which has nothing to do."""
    one = torch.ones(1, device=device)

    def calls() -> None:
        for _ in range(_PROBE_CALLS):
            torch.add(one, one)

    calls()
    return milliseconds(calls, device) / _PROBE_CALLS
