"""A part of a network whose width is chosen token by token (Wojcik et al., 2023, Adaptive Computation Modules)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._adaptive_gate import (
    AdaptiveCall,
    AdaptiveCalls,
    ChoiceGate,
    empty_linear,
    gumbel_gates,
    uniform_linear_,
)
from layerwright.nn.slices import slice_linear
from layerwright.nn.treated import dtype_name, named_dtype

__all__ = ["ACTIVATIONS", "AdaptiveComputationModule", "AdaptiveLayer", "AdaptiveMode", "BiasAt", "PassOn"]

AdaptiveMode = Literal["gated", "all"] | int | float
BiasAt = Literal["hidden", "out", "both", "none"]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
}
"""What learners may do between their two layers, by name."""


class AdaptiveLayer(nn.Module):
    """What stands in a model where a part of it was made adaptive; saved under one type."""

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        raise TypeError(f"{type(self).__name__} does not say how it is written down")

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> AdaptiveLayer:
        """A layer of that form with uninitialised tensors."""
        kind = PassOn if spec["form"] == "pass_on" else AdaptiveComputationModule
        return kind.from_spec(spec)


class PassOn(AdaptiveLayer):
    """Returns what it is given: stands where a layer was whose work an adaptive module elsewhere has taken over.

    Args:
        to: path of that module, if what is passed on is its input.
    """

    def __init__(self, to: str = "") -> None:
        super().__init__()
        self.to_path = to

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """`x` itself."""
        return x

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "adaptive", "form": "pass_on", "to": self.to_path}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """A layer of that form."""
        return cls(spec["to"])


class AdaptiveComputationModule(AdaptiveLayer):
    """``h_k(x) = sum_{n <= k} W2_n act(W1_n x + b1_n)`` with ``k`` in 0 to N chosen by a gate for each token.

    ``h_0 = 0`` (an output bias, if there is one, is ``b_0 + ... + b_k``), so a module that may use no learner belongs in
    a residual branch. While learning (`train()`, or the calls say so) the gate is a straight-through Gumbel-softmax
    sample and the output ``sum_k g_k h_k``, so that the loss reaches it; all learners are computed then. Otherwise the
    gate's largest logit decides, tokens are sorted by their choice, and those with ``k`` learners go through the first
    ``k`` slices of both matrices: multiplications for a token ``k * hidden_per_learner * (dim + out_dim)``, besides the
    gate's. Memory: the hidden features of the largest group.

    Wojcik et al., 2023, Adaptive Computation Modules, arXiv 2312.10193.

    Args:
        dim: features of a token.
        hidden_per_learner: hidden features of one learner.
        num_learners: learners, N.
        activation: one of `ACTIVATIONS`.
        bias: which layers of the learners have one; that of the output is one for each choice, ``(N + 1, out_dim)``.
        min_learners: smallest choice.
        gate_hidden, gate_depth: of the gate's linear layers.
        tau: temperature of the Gumbel-softmax.
        out_dim: features that come out; None for `dim`.
        generator: of the first weights.

    Raises:
        InputError: a number outside its range, or an unknown name.
    """

    def __init__(
        self,
        dim: int,
        hidden_per_learner: int,
        num_learners: int = 4,
        activation: str = "gelu",
        bias: BiasAt = "hidden",
        min_learners: int = 0,
        gate_hidden: int = 16,
        gate_depth: int = 3,
        tau: float = 0.8,
        *,
        out_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, dim if out_dim is None else out_dim
        self.hidden_per_learner, self.num_learners, self.min_learners = hidden_per_learner, num_learners, min_learners
        self.activation, self.bias, self.tau = activation, bias, tau
        self.gate_hidden, self.gate_depth = gate_hidden, gate_depth
        self._check()
        hidden = num_learners * hidden_per_learner
        self.up = empty_linear(dim, hidden, bias in ("hidden", "both"))
        self.down = empty_linear(hidden, self.out_dim, bias=False)
        self.out_bias: nn.Parameter | None
        out_bias = nn.Parameter(torch.zeros(num_learners + 1, self.out_dim)) if bias in ("out", "both") else None
        self.register_parameter("out_bias", out_bias)
        self.gate: nn.Module = ChoiceGate(dim, self.choices, gate_hidden, gate_depth, generator)
        uniform_linear_(self.up, generator)
        uniform_linear_(self.down, generator, hidden_per_learner)
        self.calls, self.index = AdaptiveCalls(), 0
        self.last: AdaptiveCall | None = None
        self.counts: Tensor | None = None

    def _check(self) -> None:
        """Refuse settings outside their ranges."""
        sizes = ("dim", "out_dim", "hidden_per_learner", "num_learners", "gate_hidden", "gate_depth")
        for name in sizes:
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 0 <= self.min_learners <= self.num_learners:
            raise InputError(f"min_learners: got {self.min_learners}, expected 0 to num_learners ({self.num_learners})")
        if not self.tau > 0:
            raise InputError(f"tau: got {self.tau}, expected a number above 0")
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if self.bias not in get_args(BiasAt):
            raise unknown_name("bias", str(self.bias), get_args(BiasAt))

    @property
    def choices(self) -> int:
        """Numbers of learners that the gate chooses among."""
        return self.num_learners - self.min_learners + 1

    @property
    def learner_flops(self) -> int:
        """Of one learner for one token: matrix products, where a multiply-add is 2."""
        return 2 * self.hidden_per_learner * (self.dim + self.out_dim)

    @property
    def gate_flops(self) -> int:
        """Of the gate for one token."""
        sides = [self.dim, *([self.gate_hidden] * (self.gate_depth - 1)), self.choices]
        return sum(2 * a * b for a, b in pairwise(sides))

    @property
    def last_gates(self) -> Tensor | None:
        """Gates ``(..., num_learners + 1)`` of the last gated call in float32, None before it; one-hot."""
        if self.last is None:
            return None
        if self.last.gates is not None:
            return self.last.gates
        return F.one_hot(self.last.choice, self.num_learners + 1).float()

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        names = ["dim", "hidden_per_learner", "num_learners", "activation", "bias", "min_learners"]
        names += ["gate_hidden", "gate_depth", "tau", "out_dim"]
        settings = {name: getattr(self, name) for name in names}
        return {"type": "adaptive", "form": "learners", "dtype": dtype_name(self.up.weight.dtype)} | settings

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """A module of that form."""
        settings = {name: value for name, value in spec.items() if name not in ("type", "form", "dtype")}
        return cls(**settings).to(named_dtype(spec["dtype"]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # what a call left behind is not copied

    def forward(self, x: Tensor, mode: AdaptiveMode = "gated") -> Tensor:
        """``(..., out_dim)`` of tokens ``(..., dim)``.

        Args:
            x: tokens.
            mode: ``gated``: each token by its own choice; ``all``: every prefix, ``(..., num_learners + 1, out_dim)``;
                a whole number: so many learners for all; a fraction: that share of them, rounded.

        Raises:
            InputError: another mode.
        """
        if mode == "all":
            return self.prefixes(x)
        if mode == "gated" and self.calls.width is None:
            return self._learning(x) if self.training or self.calls.learning else self._gated(x)
        width = self.width(mode if self.calls.width is None or mode != "gated" else self.calls.width)
        choice = torch.full(x.shape[:-1], width, device=x.device)
        self._record(x, choice, None)
        return self._first(x, width)

    def width(self, mode: AdaptiveMode) -> int:
        """Number of learners that a whole number, or a share of them, stands for.

        Raises:
            InputError: it is neither, or outside its range.
        """
        n = self.num_learners
        if isinstance(mode, float) and 0 <= mode <= 1:
            return round(mode * n)
        if isinstance(mode, int) and not isinstance(mode, bool) and 0 <= mode <= n:
            return mode
        raise InputError(f"mode: got {mode!r}, expected 'gated', 'all', 0 to {n} learners or a share from 0.0 to 1.0")

    def logits(self, x: Tensor) -> Tensor:
        """Of the choices `min_learners` to `num_learners`, ``(..., choices)`` in float32."""
        logits: Tensor = self.gate(x)
        return logits

    def prefixes(self, x: Tensor, detach: bool = False) -> Tensor:
        """``h_0`` to ``h_N``, ``(..., num_learners + 1, out_dim)``.

        Args:
            x: tokens ``(..., dim)``.
            detach: the gradient of ``h_k`` reaches learner ``k`` alone.
        """
        hidden = self._hidden(x, self.num_learners).unflatten(-1, (self.num_learners, -1))
        down = self.down.weight.unflatten(1, (self.num_learners, -1))
        added = torch.einsum("...nm,onm->...no", hidden, down)
        start = added.new_zeros(*x.shape[:-1], 1, self.out_dim)
        own = torch.cat([start, added], -2)
        if self.out_bias is not None:
            own = own + self.out_bias
        if not detach:
            return own.cumsum(-2)
        before = torch.cat([start, own.detach().cumsum(-2)[..., :-1, :]], -2)
        return own + before

    def _hidden(self, x: Tensor, count: int) -> Tensor:
        """Hidden features of the first `count` learners."""
        weight, bias = slice_linear(self.up, rows=count * self.hidden_per_learner)
        return ACTIVATIONS[self.activation](F.linear(x, weight, bias))  # type: ignore[no-any-return, operator]

    def _first(self, x: Tensor, count: int) -> Tensor:
        """Output of the first `count` learners."""
        bias = None if self.out_bias is None else self.out_bias[: count + 1].sum(0)
        if not count:
            zeros = x.new_zeros(*x.shape[:-1], self.out_dim)
            return zeros if bias is None else zeros + bias
        weight, _ = slice_linear(self.down, columns=count * self.hidden_per_learner)
        return F.linear(self._hidden(x, count), weight, bias)

    def _gated(self, x: Tensor) -> Tensor:
        """Each token through as many learners as its gate says; the others are not computed."""
        choice = self.logits(x).argmax(-1) + self.min_learners
        rows, flat = x.reshape(-1, self.dim), choice.reshape(-1)
        sizes = torch.bincount(flat, minlength=self.num_learners + 1)
        self._record(x, choice, None, sizes)
        groups = sizes.tolist()
        if flat.numel() and max(groups) == flat.numel():
            return self._first(x, groups.index(max(groups)))
        order = flat.argsort()
        parts = rows.index_select(0, order).split(groups)
        done = torch.cat([self._first(part, count) for count, part in enumerate(parts)])
        result = done.new_empty(done.shape).index_copy_(0, order, done)
        return result.reshape(*x.shape[:-1], self.out_dim)

    def _learning(self, x: Tensor) -> Tensor:
        """``sum_k g_k h_k``, rewritten as learners weighed with ``sum_{k >= n} g_k``: one pass, no prefixes in memory."""
        chosen = gumbel_gates(self.logits(x), self.tau, self.calls.generator(self.index, x.device))
        gates = F.pad(chosen, (self.min_learners, 0))
        choice = gates.detach().argmax(-1)
        self._record(x, choice, gates)
        tail = gates.flip(-1).cumsum(-1).flip(-1).to(x.dtype)
        hidden = self._hidden(x, self.num_learners).unflatten(-1, (self.num_learners, -1))
        mixed = F.linear((hidden * tail[..., 1:, None]).flatten(-2), self.down.weight)
        return mixed if self.out_bias is None else mixed + tail @ self.out_bias

    def _record(self, x: Tensor, choice: Tensor, gates: Tensor | None, sizes: Tensor | None = None) -> None:
        real = self.calls.real(x)
        self.last = AdaptiveCall(choice, real, gates)
        if sizes is None or real is not None:
            counted = choice if real is None else choice[real]
            sizes = torch.bincount(counted.reshape(-1), minlength=self.num_learners + 1)
        self.counts = sizes if self.counts is None else self.counts.to(sizes.device) + sizes

    def extra_repr(self) -> str:
        """What `print` shows."""
        learners = f"{self.num_learners} learners of {self.hidden_per_learner}"
        return (
            f"{self.dim} -> {self.out_dim}, {learners}, {self.activation}, bias={self.bias!r}, min={self.min_learners}"
        )
