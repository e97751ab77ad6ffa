"""One decoding step as a list of operations on planned memory (Li et al., 2021, EET, sections 3.1 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.treat.engine._attention import attend_one, attend_one_half
from layerwright.treat.engine._cache import StaticKVCache
from layerwright.treat.engine._weights import Block, Decoder, Norm
from layerwright.treat.engine._workspace import Interval, Workspace

__all__ = ["DecodeStep", "Now", "activation_into", "block_trace", "buffer_shapes", "plan_workspace"]

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Now:
    """Where a step stands; the same object for all of its operations.

    Attributes:
        length: keys that are attended to, the new one among them.
        place: where new keys and values go: one place for all rows, or one for each ``(n,)``.
        bias: see `attend_one`.
        scores: room for them at this length.
    """

    length: int = 0
    place: int | Tensor = 0
    bias: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Operation:
    """What runs, and the names of the tensors that it reads and writes."""

    run: Callable[[], object]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass
class _Tape:
    """Collects operations in order."""

    operations: list[Operation] = field(default_factory=list)

    def add(self, run: Callable[[], object], reads: str, writes: str) -> None:
        self.operations.append(Operation(run, tuple(reads.split()), tuple(writes.split())))


def buffer_shapes(decoder: Decoder, block: Block, rows: int, max_length: int) -> Shapes:
    """Intermediate results of a block: name to shape and dtype."""
    shape, dtype, wide = decoder.shape, decoder.dtype, torch.float32
    half = dtype != wide
    heads = shape.heads + shape.kv_heads
    found: Shapes = {
        "h1": ((rows, shape.hidden), dtype),
        "h2": ((rows, shape.hidden), dtype),
        "qkv": ((rows, block.qkv.rows), dtype),
        "attended": ((rows, shape.heads * shape.head_dim), dtype),
        "up": ((rows, block.up.rows), dtype),
    }
    if shape.gated:
        found["act"] = ((rows, block.width), dtype)
    if shape.norm == "rms":
        for part in "12":
            found["size" + part] = ((rows, 1), wide)
            if half:
                found["wide" + part] = ((rows, shape.hidden), wide)
    if half and decoder.turns is not None:
        found["turned"] = ((rows, heads * shape.head_dim), wide)
    if block.qk_gain is not None:
        found["sizes"] = ((rows, heads, 1), wide)
    if not half:
        found["q"] = ((rows, shape.heads, shape.head_dim), dtype)
        found["scores"] = ((rows * shape.heads, max_length), dtype)
    return found


def block_trace(decoder: Decoder, block: Block, cache: StaticKVCache, rows: int) -> list[Interval]:
    """Each intermediate result with its size and the operations that it must live through, from the program itself."""
    shapes = buffer_shapes(decoder, block, rows, cache.max_length)
    blank = {name: torch.empty(extent, dtype=dtype, device="meta") for name, (extent, dtype) in shapes.items()}
    hidden = torch.empty(rows, decoder.shape.hidden, dtype=decoder.dtype, device="meta")
    blank |= {
        "x": hidden,
        "turns": torch.empty(rows, 1, decoder.shape.head_dim // 2, dtype=torch.complex64, device="meta"),
    }
    operations = _block_operations(decoder, block, cache, 0, rows, blank, Now())
    used: dict[str, list[int]] = {}
    for number, operation in enumerate(operations):
        for name in (*operation.reads, *operation.writes):
            if name in shapes:
                used.setdefault(name, []).append(number)
    sizes = {name: blank[name].numel() * blank[name].element_size() for name in used}
    return [Interval(name, sizes[name], places[0], places[-1]) for name, places in used.items()]


def plan_workspace(decoder: Decoder, cache: StaticKVCache, rows: int) -> Workspace:
    """One buffer in which the results of every block find room, for `rows` rows or fewer.

    Blocks share it; its size is that of the block that needs most.
    """
    plans = {}
    for block in decoder.blocks:
        key = (block.qkv.rows, block.up.rows, block.width, block.qk_gain is None)
        if key not in plans:
            plans[key] = Workspace.plan(block_trace(decoder, block, cache, rows))
    return Workspace(max(plans.values(), key=lambda plan: plan.size), decoder.embedding.device)


class DecodeStep:
    """A step for a fixed number of rows: views of all buffers are made once, a step only runs operations.

    Args:
        decoder: the weights.
        cache: keys and values.
        arena: byte buffer of the workspace; each block lays its results out in it by its own plan.
        rows: sequences.
        logits: ``(rows, vocabulary)``, where each step writes.
    """

    def __init__(self, decoder: Decoder, cache: StaticKVCache, arena: Tensor, rows: int, logits: Tensor) -> None:
        self.decoder, self.rows, self.logits, self.now = decoder, rows, logits, Now()
        shape, device = decoder.shape, decoder.embedding.device
        self.x = torch.zeros(rows, shape.hidden, dtype=decoder.dtype, device=device)
        self.turns = torch.zeros(rows, shape.head_dim // 2, dtype=torch.complex64, device=device)
        self.operations: list[Callable[[], object]] = []
        plans: dict[tuple[int, ...], Workspace] = {}
        for number, block in enumerate(decoder.blocks):
            key = (block.qkv.rows, block.up.rows, block.width, int(block.qk_gain is None))
            if key not in plans:
                plans[key] = Workspace(Workspace.plan(block_trace(decoder, block, cache, rows)), "meta")
                if plans[key].layout.size > arena.nbytes:
                    raise InputError(f"workspace: {plans[key].layout.size} bytes are needed, it has {arena.nbytes}")
                plans[key].buffer = arena
            shapes = buffer_shapes(decoder, block, rows, cache.max_length)
            tensors = {name: plans[key].tensor(name, *form) for name, form in shapes.items()}
            if "scores" in tensors:
                self._room = tensors["scores"].view(-1)
            tensors |= {"x": self.x, "turns": self.turns[:, None]}
            made = _block_operations(decoder, block, cache, number, rows, tensors, self.now)
            self.operations += [operation.run for operation in made]
        tape = _Tape()
        _norm_into(tape, decoder.norm, self.x, tensors, "1")
        tape.add(lambda: decoder.head.into(tensors["h1"], logits), "h1", "")
        self.operations += [operation.run for operation in tape.operations]

    def __call__(
        self, tokens: Tensor, positions: Tensor, length: int, place: int | Tensor, bias: Tensor | None
    ) -> Tensor:
        """Logits ``(rows, vocabulary)`` after `tokens` ``(rows,)`` at `positions` ``(rows,)``; see `Now` for the rest."""
        decoder, now, shape = self.decoder, self.now, self.decoder.shape
        now.length, now.place, now.bias = length, place, bias
        if decoder.dtype == torch.float32:
            extent = (self.rows * shape.kv_heads, shape.heads // shape.kv_heads, length)
            now.scores = self._room[: math.prod(extent)].view(extent)
        torch.index_select(decoder.embedding, 0, tokens, out=self.x)
        if decoder.turns is not None:
            torch.index_select(decoder.turns, 0, positions, out=self.turns)
        else:
            assert decoder.positions is not None
            self.x.add_(decoder.positions[positions])
        for run in self.operations:
            run()
        return self.logits


def _block_operations(
    decoder: Decoder,
    block: Block,
    cache: StaticKVCache,
    number: int,
    rows: int,
    tensors: Mapping[str, Tensor],
    now: Now,
) -> list[Operation]:
    """The operations of one block, in order."""
    tape, x, qkv, up = _Tape(), tensors["x"], tensors["qkv"], tensors["up"]
    _norm_into(tape, block.norm1, x, tensors, "1")
    tape.add(lambda: block.qkv.into(tensors["h1"], qkv), "h1", "qkv")
    if decoder.turns is not None:
        _turn(tape, decoder, block, tensors)
    _append(tape, decoder, cache, number, rows, tensors, now)
    _attend(tape, decoder, block, cache, number, rows, tensors, now)
    attended = tensors["attended"]
    tape.add(lambda: block.out.add_to_(attended, x), "attended x", "x")
    _norm_into(tape, block.norm2, x, tensors, "2")
    tape.add(lambda: block.up.into(tensors["h2"], up), "h2", "up")
    inner, gate = up, up
    if decoder.shape.gated:
        inner, gate, rest = tensors["act"], up[:, : block.width], up[:, block.width :]
        tape.add(lambda: activation_into(decoder.shape.activation, gate, gate), "up", "up")
        tape.add(lambda: torch.mul(gate, rest, out=inner), "up", "act")
    else:
        tape.add(lambda: activation_into(decoder.shape.activation, up, up), "up", "up")
    tape.add(lambda: block.down.add_to_(inner, x), ("act" if decoder.shape.gated else "up") + " x", "x")
    return tape.operations


def _norm_into(tape: _Tape, norm: Norm, x: Tensor, tensors: Mapping[str, Tensor], part: str) -> None:
    """``h = norm(x)``. The root of the sum of squares with eps is a hypotenuse, so that a norm takes three operations."""
    name, h = "h" + part, tensors["h" + part]
    if norm.kind == "layer":
        tape.add(lambda: h.copy_(norm(x)), "x", name)
        return
    half = x.dtype != torch.float32
    size, wide = tensors["size" + part], tensors["wide" + part] if half else x
    result, reads, writes = (wide, "wide" + part, "wide" + part) if half else (h, "x", name)
    least = torch.tensor(math.sqrt(norm.eps * x.shape[-1]), device=size.device)
    if half:
        tape.add(lambda: wide.copy_(x), "x", writes)
    tape.add(lambda: torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=size), reads, "size" + part)
    tape.add(lambda: torch.hypot(size, least, out=size), "size" + part, "size" + part)
    tape.add(lambda: torch.div(wide, size, out=result), f"{reads} size{part}", writes)
    if norm.gain is not None:
        gain = norm.gain * math.sqrt(x.shape[-1])
        tape.add(lambda: torch.mul(result, gain, out=result), writes, writes)
    if half:
        tape.add(lambda: h.copy_(wide), writes, name)


def _turn(tape: _Tape, decoder: Decoder, block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Rotary positions: neighbours are a complex number, which one product turns. With it, norms of queries and keys."""
    shape = decoder.shape
    heads = shape.heads + shape.kv_heads
    both = tensors["qkv"][:, : heads * shape.head_dim]
    half = decoder.dtype != torch.float32
    name = "turned" if half else "qkv"
    wide = (tensors["turned"] if half else both).unflatten(-1, (heads, shape.head_dim))
    if half:
        tape.add(lambda: tensors["turned"].copy_(both), "qkv", "turned")
    if block.qk_gain is not None:
        sizes = tensors["sizes"]
        least = torch.tensor(math.sqrt(shape.eps * shape.head_dim), device=wide.device)
        gain = block.qk_gain * math.sqrt(shape.head_dim)
        tape.add(lambda: torch.linalg.vector_norm(wide, dim=-1, keepdim=True, out=sizes), name, "sizes")
        tape.add(lambda: torch.hypot(sizes, least, out=sizes), "sizes", "sizes")
        tape.add(lambda: torch.div(wide, sizes, out=wide), f"{name} sizes", name)
        tape.add(lambda: torch.mul(wide, gain, out=wide), name, name)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    turns = tensors["turns"]
    tape.add(lambda: torch.mul(pairs, turns, out=pairs), f"{name} turns", name)
    if half:
        tape.add(lambda: both.copy_(tensors["turned"]), "turned", "qkv")


def _append(
    tape: _Tape,
    decoder: Decoder,
    cache: StaticKVCache,
    number: int,
    rows: int,
    tensors: Mapping[str, Tensor],
    now: Now,
) -> None:
    """Keys and values of the new token enter the cache."""
    shape = decoder.shape
    first = shape.heads * shape.head_dim
    new = tensors["qkv"][:, first:].unflatten(-1, (2, shape.kv_heads, shape.head_dim))
    held, numbers = cache.layers[number][:, :rows], torch.arange(rows, device=cache.layers[number].device)

    def append() -> None:
        if isinstance(now.place, int):
            held.select(3, now.place).copy_(new.transpose(0, 1))
        else:
            held[:, numbers, :, now.place] = new

    tape.add(append, "qkv", "")


def _attend(
    tape: _Tape,
    decoder: Decoder,
    block: Block,
    cache: StaticKVCache,
    number: int,
    rows: int,
    tensors: Mapping[str, Tensor],
    now: Now,
) -> None:
    """One query a row over the cache."""
    shape = decoder.shape
    groups, inner = shape.heads // shape.kv_heads, shape.heads * shape.head_dim
    flat = (rows * shape.kv_heads, groups, shape.head_dim)
    queries = tensors["qkv"][:, :inner]
    keys, values = cache.layers[number][0, :rows], cache.layers[number][1, :rows]
    out = tensors["attended"]
    if decoder.dtype != torch.float32:
        grouped, result = (t.unflatten(-1, (shape.kv_heads, groups, shape.head_dim)) for t in (queries, out))

        def attend_half() -> None:
            k, v = keys.narrow(2, 0, now.length), values.narrow(2, 0, now.length)
            attend_one_half(grouped, k, v, now.bias, block.scale, result)

        tape.add(attend_half, "qkv", "attended")
        return
    q = tensors["q"].view(rows, inner)
    keys_t, held = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
    apart, result = q.view(flat), out.view(flat)

    def attend() -> None:
        k, v = keys_t.narrow(2, 0, now.length), held.narrow(1, 0, now.length)
        assert now.scores is not None
        attend_one(apart, k, v, now.bias, block.scale, now.scores, result)

    tape.add(lambda: q.copy_(queries), "qkv", "q")
    tape.add(attend, "q", "scores attended")


def activation_into(name: str, x: Tensor, out: Tensor) -> None:
    """The activation of a configuration, written to `out`, which may be `x`.

    Raises:
        InputError: one that the engine does not know.
    """
    if name in ("silu", "swish"):
        torch.ops.aten.silu.out(x, out=out)
    elif name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    elif name == "gelu":
        torch.ops.aten.gelu.out(x, out=out)
    elif name == "relu":
        torch.clamp(x, min=0, out=out)
    else:
        raise InputError(f"activation: got {name!r}, the engine knows silu, gelu, gelu_new, gelu_pytorch_tanh, relu")
