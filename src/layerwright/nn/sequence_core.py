"""The layer of a text model that mixes positions, exchangeable: LSTM, GRU or causal transformer behind one step interface."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._attention_kinds import softmax_attention

__all__ = ["CoreKind", "CoreState", "SequenceCore", "parameter_count"]

CoreKind = Literal["lstm", "gru", "transformer"]
CoreNorm = Literal["post", "pre"]
CoreState = tuple[Tensor, ...]
"""What a core remembers: ``(h, c)`` of an LSTM, ``(h,)`` of a GRU, each ``(layers, batch, hidden)``; keys and values of a
transformer, each ``(layers, batch, heads, tokens so far, head_dim)``."""


class _Block(nn.Module):
    """Causal self-attention and a feed-forward part, normalized after each residual sum (``post``) or before each part."""

    def __init__(self, hidden: int, heads: int, ffn: int, norm: CoreNorm) -> None:
        super().__init__()
        self.heads, self.norm = heads, norm
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        nn.init.xavier_uniform_(self.qkv.weight)  # as torch's own encoder layer starts
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output ``(batch, tokens, hidden)``, and all keys and values so far."""
        pre = self.norm == "pre"
        mixed, keys, values = self._attend(self.attention_norm(x) if pre else x, keys, values)
        x = x + mixed if pre else self.attention_norm(x + mixed)
        inner = self.down(F.relu(self.up(self.ffn_norm(x) if pre else x)))
        return (x + inner if pre else self.ffn_norm(x + inner)), keys, values

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, past = x.shape[1], keys.shape[2]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        if tokens == 1 or past == 0:
            mixed = softmax_attention(q, keys, values, None, causal=tokens > 1)
        else:
            seen = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return self.out(mixed.transpose(1, 2).flatten(2)), keys, values


class SequenceCore(nn.Module):
    """``(outputs, state) = core(inputs, state)``: the same call for recurrent layers and for attention with a cache.

    A step of one token costs ``O(hidden^2)`` for an LSTM or GRU and ``O(hidden^2 + tokens hidden)`` for a transformer, whose
    state is its keys and values: sampling never computes a position twice.

    The transformer is the encoder layer of Vaswani et al., 2017 (ReLU, sinusoidal positions, inputs times
    ``sqrt(hidden)``) with a causal mask; ``norm="pre"`` normalizes before each part and once at the end (Xiong et al.,
    2020, arXiv 2002.04745). As the drop-in for an LSTM: Blin and Kucharavy, 2021, arXiv 2108.12275.

    Args:
        kind: ``lstm``, ``gru`` or ``transformer``.
        dim: features of an input; a transformer of another width than `hidden` projects them first.
        hidden: features of an output.
        layers: how many.
        heads, norm, ffn, max_len: of the transformer alone: heads, place of the norms, width of the feed-forward part (None
            for `hidden`), and the longest sequence.
        seed: of the weights; the global generator is left alone.

    Raises:
        InputError: a number outside its range, heads that do not divide `hidden`, an unknown name.
    """

    positions: Tensor

    def __init__(
        self,
        kind: CoreKind = "lstm",
        dim: int = 32,
        hidden: int = 32,
        layers: int = 1,
        heads: int = 2,
        norm: CoreNorm = "post",
        *,
        ffn: int | None = None,
        max_len: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        ffn = hidden if ffn is None else ffn
        _check(
            kind, norm, {"dim": dim, "hidden": hidden, "layers": layers, "heads": heads, "ffn": ffn, "max_len": max_len}
        )
        if kind == "transformer" and hidden % heads:
            raise InputError(f"heads: got {heads}, which does not divide hidden={hidden}; take a divisor of it")
        self.kind, self.dim, self.hidden, self.layers = kind, dim, hidden, layers
        self.heads, self.norm, self.ffn, self.max_len = heads, norm, ffn, max_len
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind != "transformer":
                cell = nn.LSTM if kind == "lstm" else nn.GRU
                self.cell: nn.LSTM | nn.GRU = cell(dim, hidden, layers, batch_first=True)
                return
            self.enter = nn.Identity() if dim == hidden else nn.Linear(dim, hidden)
            self.blocks = nn.ModuleList(_Block(hidden, heads, ffn, norm) for _ in range(layers))
            self.leave = nn.LayerNorm(hidden) if norm == "pre" else nn.Identity()
            self.register_buffer("positions", _sinusoids(max_len, hidden), persistent=False)

    @classmethod
    def matching(cls, reference: Self, *, tolerance: float = 0.03, **settings: Any) -> Self:
        """A transformer with as many parameters as `reference`, by the width of its feed-forward parts.

        Args:
            reference: a core whose `dim` and `hidden` are taken over unless `settings` say otherwise.
            tolerance: the largest difference, as a share of the parameters of `reference`.
            settings: further arguments of the class but for `kind` and `ffn`.

        Raises:
            InputError: no width meets the tolerance.
        """
        settings = {"dim": reference.dim, "hidden": reference.hidden} | settings
        wanted, narrow = parameter_count(reference), cls("transformer", ffn=1, **settings)
        each = narrow.layers * (2 * narrow.hidden + 1)
        ffn = max(1, 1 + round((wanted - parameter_count(narrow)) / each))
        core = cls("transformer", ffn=ffn, **settings)
        if abs(parameter_count(core) - wanted) > tolerance * wanted:
            raise InputError(
                f"no transformer of {core.layers} layers and hidden={core.hidden} has {wanted} parameters within {tolerance:.0%}: "
                f"the nearest has {parameter_count(core)}; take fewer layers or a larger tolerance"
            )
        return core

    def init_state(self, batch: int) -> CoreState:
        """The state before the first token of `batch` sequences."""
        like = next(self.parameters())
        if self.kind == "transformer":
            empty = like.new_zeros(self.layers, batch, self.heads, 0, self.hidden // self.heads)
            return empty, empty
        zeros = like.new_zeros(self.layers, batch, self.hidden)
        return (zeros, zeros) if self.kind == "lstm" else (zeros,)

    def forward(self, x: Tensor, state: CoreState | None = None) -> tuple[Tensor, CoreState]:
        """Outputs ``(batch, tokens, hidden)`` of `x` ``(batch, tokens, dim)``, read after `state`, and the state after them.

        Raises:
            InputError: inputs of another shape, or more than `max_len` tokens in all.
        """
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, tokens, {self.dim})")
        state = self.init_state(x.shape[0]) if state is None else state
        if self.kind == "transformer":
            return self._transform(x, state[0], state[1])
        if self.kind == "lstm":
            out, after = self.cell(x, (state[0], state[1]))
            return out, tuple(after)
        out, after = self.cell(x, state[0])
        return out, (after,)

    def _transform(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, CoreState]:
        past, tokens = keys.shape[3], x.shape[1]
        if past + tokens > self.max_len:
            raise InputError(f"x: got {past + tokens} tokens, expected at most max_len={self.max_len} of this core")
        x = self.enter(x) * math.sqrt(self.hidden) + self.positions[past : past + tokens].to(x.dtype)
        after = []
        for number, block in enumerate(self.blocks):
            x, *own = block(x, keys[number], values[number])
            after.append(own)
        return self.leave(x), (torch.stack([k for k, _ in after]), torch.stack([v for _, v in after]))

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        names = ("kind", "dim", "hidden", "layers", "heads", "norm", "ffn", "max_len")
        return {"type": "sequence_core"} | {name: getattr(self, name) for name in names}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A core of that form."""
        return cls(**{name: value for name, value in spec.items() if name != "type"})

    def extra_repr(self) -> str:
        """What `print` shows."""
        own = f", heads={self.heads}, ffn={self.ffn}, norm={self.norm!r}" if self.kind == "transformer" else ""
        return f"{self.kind!r}, {self.dim}, {self.hidden}, layers={self.layers}{own}"


def parameter_count(module: nn.Module) -> int:
    """Numbers that training can change."""
    return sum(p.numel() for p in module.parameters())


def _check(kind: str, norm: str, sizes: Mapping[str, int]) -> None:
    if kind not in get_args(CoreKind):
        raise unknown_name("kind of sequence core", kind, get_args(CoreKind))
    if norm not in get_args(CoreNorm):
        raise unknown_name("norm", norm, get_args(CoreNorm))
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, expected at least 1")


def _sinusoids(length: int, width: int) -> Tensor:
    """``(length, width)``: sines in even columns, cosines in odd ones, wavelengths from 2 pi to 10000 * 2 pi."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width]
