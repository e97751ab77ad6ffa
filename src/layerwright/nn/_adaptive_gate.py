"""How many learners a token gets: the gate, its sampling, and what all gates of a model know about a call (ACM)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwright.core.errors import InputError
from layerwright.nn.routed import RoutedTokens

__all__ = [
    "AdaptiveCall",
    "AdaptiveCalls",
    "ChoiceGate",
    "empty_linear",
    "gumbel_gates",
    "straight_through",
    "uniform_linear_",
]

_STRIDE = 1_000_003


@dataclass(frozen=True)
class AdaptiveCall:
    """What a gate decided in a call.

    Attributes:
        choice: learners of each token, ``(...)``, whole numbers.
        real: tokens that are no padding, ``(...)``; None where nothing is known about padding.
        gates: ``(..., num_learners + 1)`` with gradients where the gate was learning, None elsewhere.
    """

    choice: Tensor
    real: Tensor | None
    gates: Tensor | None


@dataclass
class AdaptiveCalls:
    """What all gates of a model know about the present call.

    Attributes:
        tokens: which tokens are padding.
        learning: gates are sampled and pass gradients on, also in evaluation mode.
        width: so many learners for all tokens, or that share of them, instead of the gates' choice.
        seed: of the samples; None draws from torch's own generator.
        number: of the call, so that what is computed twice in one call (gradient checkpointing) is sampled alike.
        hook: on the model.
    """

    tokens: RoutedTokens = field(default_factory=RoutedTokens)
    learning: bool = False
    width: int | float | None = None
    seed: int | None = None
    number: int = 0
    hook: RemovableHandle | None = None

    def follow(self, model: nn.Module) -> None:
        """Be told about the calls of `model`."""
        self.hook = model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hook before the model's forward."""
        self.tokens.see(model, args, kwargs)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            self.tokens.attention_mask = None  # it is the encoder's, and would be taken for the decoder's
        self.number += 1

    def real(self, x: Tensor) -> Tensor | None:
        """Which tokens of `x` ``(..., features)`` are no padding; None where nothing is known."""
        mask = self.tokens.attention_mask
        if mask is None:
            return None
        if x.dim() == 3:
            return self.tokens.real(x[..., 0])
        return mask.reshape(-1).to(x.device) if x.dim() == 2 and mask.numel() == x.shape[0] else None

    def generator(self, index: int, device: torch.device) -> torch.Generator | None:
        """Of the samples of the gate number `index` in this call."""
        if self.seed is None:
            return None
        return torch.Generator(device).manual_seed((self.seed * _STRIDE + self.number) * _STRIDE + index)


class ChoiceGate(nn.Sequential):
    """Logits of choices: `depth` linear layers with nothing in between, as in the released code.

    Args:
        dim: features of a token.
        choices: number of choices.
        hidden: width between the layers.
        depth: number of layers, at least 1.
        generator: of the first weights.
    """

    def __init__(
        self, dim: int, choices: int, hidden: int = 16, depth: int = 3, generator: torch.Generator | None = None
    ) -> None:
        sides = [dim, *([hidden] * (depth - 1)), choices]
        super().__init__(*(empty_linear(a, b) for a, b in pairwise(sides)))
        for layer in self:
            assert isinstance(layer, nn.Linear)
            uniform_linear_(layer, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(..., choices)`` in float32 of tokens ``(..., dim)``."""
        logits: Tensor = super().forward(x)
        return logits.float()


def gumbel_gates(logits: Tensor, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """One-hot samples of ``softmax(logits)`` whose gradient is that of ``softmax((logits + Gumbel) / tau)``.

    The Gumbel-softmax with the straight-through estimator (Jang et al., 2017, arXiv 1611.01144): exactly one-hot.

    Args:
        logits: ``(..., choices)``.
        tau: temperature, above 0.
        generator: of the noise.

    Raises:
        InputError: `tau` is not above 0.
    """
    if not tau > 0:
        raise InputError(f"tau: got {tau}, expected a number above 0")
    drawn = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    tiny = torch.finfo(logits.dtype).tiny
    noise = -(-drawn.clamp(min=tiny).log()).clamp(min=tiny).log()
    soft = ((logits + noise) / tau).softmax(-1)
    return straight_through(soft)


def straight_through(soft: Tensor) -> Tensor:
    """The one-hot of the largest entry, with the gradient of `soft` ``(..., choices)``."""
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the bracket is exactly 0


def empty_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer on the present default device, with uninitialised tensors."""
    device = torch.get_default_device()
    return nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, device=device)  # type: ignore[no-any-return]


@torch.no_grad()
def uniform_linear_(layer: nn.Linear, generator: torch.Generator | None, fan_in: int | None = None) -> None:
    """Kaiming's uniform first weights with ``a = sqrt(5)``, the default of torch, in place: ``U(-1/sqrt(fan_in), ...)``."""
    bound = 1 / math.sqrt(layer.in_features if fan_in is None else fan_in)
    for parameter in (layer.weight, layer.bias):
        if parameter is not None and not parameter.is_meta:
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * drawn - 1) * bound)
