"""Operations and bytes of every layer of a language model in one stage of serving.

Op/B is operations per byte of memory traffic, a multiply-add being two operations. In 16 bits a weight matrix that
n tokens use has about n Op/B; decode attention has as many as query heads share a key-value head, whatever the
batch, because every request has a cache of its own; prefill attention has about the length of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwright.core.errors import InputError
from layerwright.score.device.shapes import LMShape

__all__ = ["CostRow", "CostTable", "Stage", "Work", "block_work", "expert_work", "head_work", "layer_costs", "spread"]

# Operations per element that are no matrix products: scale, exponent, sum, division and mask of a softmax; the
# activation and the product with the gate.
_SOFTMAX_OPS = 5
_ACTIVATION_OPS = 5

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


class Work(NamedTuple):
    """Operations and bytes; numbers, or arrays of one shape."""

    flops: Any
    bytes: Any


@dataclass(frozen=True)
class Stage:
    """What one step of continuous batching computes.

    Attributes:
        decode: tokens in the cache of each decoding request, the new one included; every one makes one token.
        prefill: length of each prompt that is read whole.
    """

    decode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("decode", "prefill"):
            lengths = tuple(int(length) for length in getattr(self, name))
            object.__setattr__(self, name, lengths)
            if any(length < 1 for length in lengths):
                raise InputError(f"stage: {name}: got {min(lengths)}, expected lengths of at least 1")

    @property
    def tokens(self) -> int:
        """Tokens that pass through the weights."""
        return len(self.decode) + sum(self.prefill)

    @property
    def kind(self) -> str:
        """`decode`, `prefill` or `mixed`; `idle` without tokens."""
        if self.decode and self.prefill:
            return "mixed"
        return "decode" if self.decode else "prefill" if self.prefill else "idle"


class CostRow(NamedTuple):
    """One line of a `CostTable`."""

    name: str
    kind: str
    flops: float
    bytes: float
    op_per_byte: float


@dataclass(frozen=True)
class CostTable:
    """Operations and bytes by layer.

    Attributes:
        names: ``layers.3.experts`` and its like, in order of execution.
        kinds: of each: `qkv`, `attention.prefill`, `attention.decode`, `projection`, `gate`, `experts`, `shared`,
            `ffn`, `head`.
        flops, bytes: arrays over the layers.
        stage: what was computed.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    flops: Floats
    bytes: Floats
    stage: Stage

    @property
    def op_per_byte(self) -> Floats:
        """Operations per byte; 0 where nothing moves."""
        return np.divide(self.flops, self.bytes, out=np.zeros_like(self.flops), where=self.bytes > 0)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[CostRow]:
        columns = zip(self.names, self.kinds, self.flops, self.bytes, self.op_per_byte, strict=True)
        return (CostRow(name, kind, float(f), float(b), float(o)) for name, kind, f, b, o in columns)


def block_work(shape: LMShape, stage: Stage, *, moe: bool, windowed: bool = False, shards: int = 1) -> dict[str, Work]:
    """Work of one decoder block but for its routed experts, on one of `shards` devices that split every matrix.

    Bytes are weights once, inputs and outputs (keys and values that are stored are outputs); what a layer makes and
    uses itself goes to memory and back. Heads, and the columns or rows of a matrix, are split; the residual stream is
    not. Norms are left out.

    Args:
        shape, stage: model and step.
        moe: the block has experts: a gate and perhaps a shared expert, and no dense feed-forward layer.
        windowed: its attention has the window of `shape`.
        shards: at least 1.

    Returns:
        Work by kind of layer, without kinds that have nothing to do.
    """
    size, h, tokens = shape.bytes_per_element, shape.hidden_size, stage.tokens
    q = shape.query_size / shards
    kv = max(shape.kv_size / shards, shape.head_dim if shape.num_kv_heads < shards else 0)
    window = shape.window if windowed else 0
    work = {"qkv": _linear(tokens, h, q + 2 * kv, size)}
    if stage.prefill:
        work["attention.prefill"] = _prefill(stage.prefill, window, q, kv, shape.num_heads / shards, size)
    if stage.decode:
        work["attention.decode"] = _decode(stage.decode, window, q, kv, shape.num_heads / shards, size)
    work["projection"] = _linear(tokens, q, h, size)
    if moe:
        work["gate"] = _linear(tokens, h, shape.num_experts, size)
        if shape.shared_size:
            work["shared"] = feed_forward(tokens, shape, shape.shared_size / shards)
    else:
        work["ffn"] = feed_forward(tokens, shape, shape.intermediate_size / shards)
    return work if tokens else {}


def head_work(shape: LMShape, stage: Stage, *, shards: int = 1) -> Work:
    """Work of the output layer: one token for every request."""
    requests = len(stage.decode) + len(stage.prefill)
    return _linear(requests, shape.hidden_size, shape.vocab_size / shards, shape.bytes_per_element)


def expert_work(shape: LMShape, tokens: Any, *, shards: int = 1) -> Work:
    """Work of routed experts with `tokens` tokens each (an array of any shape); an expert without tokens has none."""
    tokens = np.asarray(tokens, dtype=np.float64)
    found = feed_forward(tokens, shape, shape.expert_size / shards)
    return Work(found.flops, np.where(tokens > 0, found.bytes, 0.0))


def feed_forward(tokens: Any, shape: LMShape, width: float) -> Work:
    """A feed-forward layer of inner `width`: its matrices, its activation, one trip of the inner values to memory."""
    size, h, matrices = shape.bytes_per_element, shape.hidden_size, shape.matrices
    flops = tokens * (2 * matrices * h * width + _ACTIVATION_OPS * width)
    return Work(flops, size * (matrices * h * width + tokens * (2 * h + 2 * width)))


def spread(tokens: int, shape: LMShape) -> Counts:
    """Tokens of every expert in every block with experts, as even as possible: ``(moe blocks, experts)``."""
    if not shape.num_experts:
        return np.zeros((0, 0), dtype=np.int64)
    each, rest = divmod(tokens * shape.top_k, shape.num_experts)
    row = each + (np.arange(shape.num_experts) < rest)
    return np.broadcast_to(row.astype(np.int64), (len(shape.moe_layers), shape.num_experts))


def layer_costs(shape: LMShape, stage: Stage, counts: Counts | None = None, *, shards: int = 1) -> CostTable:
    """Operations and bytes of every layer in one stage.

    Args:
        shape: the model.
        stage: decoding and prefilling requests.
        counts: tokens of every expert, ``(blocks with experts, experts)``, each row summing to tokens times `top_k`;
            None spreads them evenly. Experts without tokens cost nothing.
        shards: devices that split every matrix; the table is that of one of them.

    Raises:
        InputError: counts of another shape or another sum.
    """
    counts = spread(stage.tokens, shape) if counts is None else check_counts(counts, shape, stage.tokens)
    experts = expert_work(shape, counts, shards=shards)
    blocks = {
        (moe, windowed): block_work(shape, stage, moe=moe, windowed=windowed, shards=shards)
        for moe in (False, True)
        for windowed in (False, True)
    }
    rows: list[tuple[str, str, Work]] = []
    place_of = {layer: place for place, layer in enumerate(shape.moe_layers)}
    windowed_layers = frozenset(shape.windowed_layers)
    for layer in range(shape.layers):
        place = place_of.get(layer)
        for kind, work in blocks[place is not None, layer in windowed_layers].items():
            rows.append((f"layers.{layer}.{kind}", kind, work))
        if place is not None and stage.tokens:
            total = Work(experts.flops[place].sum(), experts.bytes[place].sum())
            rows.append((f"layers.{layer}.experts", "experts", total))
    if shape.vocab_size and stage.tokens:
        rows.append(("head", "head", head_work(shape, stage, shards=shards)))
    return CostTable(
        tuple(name for name, _, _ in rows),
        tuple(kind for _, kind, _ in rows),
        np.array([work.flops for _, _, work in rows], dtype=np.float64),
        np.array([work.bytes for _, _, work in rows], dtype=np.float64),
        stage,
    )


def check_counts(counts: Counts, shape: LMShape, tokens: int) -> Counts:
    """`counts` as an array, if they are those of `tokens` tokens."""
    found = np.asarray(counts)
    wanted = (len(shape.moe_layers), shape.num_experts)
    if found.shape != wanted:
        raise InputError(f"counts: got shape {found.shape}, expected (blocks with experts, experts) {wanted}")
    if found.size and ((found < 0).any() or (found.sum(1) != tokens * shape.top_k).any()):
        raise InputError(f"counts: each row must sum to {tokens} tokens times top_k {shape.top_k}")
    return found


def _linear(tokens: int, inputs: float, outputs: float, size: float) -> Work:
    return Work(
        2.0 * tokens * inputs * outputs, size * (inputs * outputs + tokens * (inputs + outputs)) if tokens else 0.0
    )


def _decode(contexts: Sequence[int], window: int, q: float, kv: float, heads: float, size: float) -> Work:
    """One query against each cache: products with keys and with values."""
    seen = np.minimum(contexts, window or np.inf).sum()
    flops = seen * (4 * q + _SOFTMAX_OPS * heads)
    return Work(float(flops), float(size * (2 * kv * seen + 2 * q * len(contexts))))


def _prefill(lengths: Sequence[int], window: int, q: float, kv: float, heads: float, size: float) -> Work:
    """Causal attention within each prompt: a token sees itself and those before it, at most `window`; scores stay
    on the chip, as in FlashAttention (Dao et al., 2022).
    """
    n = np.asarray(lengths, dtype=np.float64)
    seen = np.minimum(n, window or np.inf)
    pairs = (seen * (seen + 1) / 2 + (n - seen) * seen).sum()
    return Work(float(pairs * (4 * q + _SOFTMAX_OPS * heads)), float(size * n.sum() * (2 * q + 2 * kv)))
