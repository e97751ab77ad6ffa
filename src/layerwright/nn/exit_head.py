"""The classifier of an early exit: it stands beside a block and reads what the block gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import unknown_name
from layerwright.nn.attached import Attachment, detach_

__all__ = ["ExitHead", "ExitPooling", "mean_over_tokens", "prediction_entropy"]

ExitPooling = Literal["cls", "mean"]


def prediction_entropy(logits: Tensor) -> Tensor:
    """Entropy ``(...)`` of ``softmax(logits)`` for logits ``(..., classes)``, in nats, float32."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def mean_over_tokens(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean ``(batch, hidden)`` of states ``(batch, tokens, hidden)`` over the tokens that `mask` ``(batch, tokens)`` keeps.

    Sums are taken in float32.
    """
    if mask is None:
        return states.float().mean(1).to(states.dtype)
    kept = mask.to(states.device).bool()[..., None]
    total = states.float().masked_fill(~kept, 0.0).sum(1)
    return (total / kept.sum(1).clamp(min=1)).to(states.dtype)


class ExitHead(Attachment):
    """Classes from the states of a block: pooling, tanh, dropout, a linear map (Shen et al., 2022, COST-EFF).

    The model's own forward passes it by: `layerwright.nn.encoder_exits.MultiExit` calls it.

    Args:
        hidden_size: features of a state.
        classes: number of logits.
        pooling: ``cls`` reads the first token, ``mean`` the mean over tokens without padding.
        dense: a linear map of the pooled state before the tanh.
        dropout: probability, in training mode.
        equalize: whether gradients of several exits are averaged where they meet.
    """

    child = "exit_head"

    def __init__(
        self,
        hidden_size: int,
        classes: int,
        pooling: ExitPooling = "cls",
        dense: bool = False,
        dropout: float = 0.0,
        equalize: bool = True,
    ) -> None:
        super().__init__()
        if pooling not in get_args(ExitPooling):
            raise unknown_name("pooling", str(pooling), get_args(ExitPooling))
        self.pooling, self.equalize = pooling, equalize
        self.dense = nn.Linear(hidden_size, hidden_size) if dense else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, classes)

    @torch.no_grad()
    def initialize_(self, std: float, generator: torch.Generator) -> None:
        """Draw weights from a normal distribution of deviation `std`; biases are zero."""
        for layer in (self.dense, self.classifier):
            if layer is not None:
                layer.weight.copy_(std * torch.randn(layer.weight.shape, generator=generator))
                layer.bias.zero_()

    def attach_(self, owner: nn.Module) -> Self:
        """Make this the child of the block `owner`, in place; its calls stay as they are."""
        detach_(owner, self.child)
        owner.add_module(self.child, self)
        return self

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``(batch, classes)`` of states ``(batch, tokens, hidden)``.

        Args:
            states: what the block gives.
            mask: ``(batch, tokens)``, 0 for padding; looked at for ``mean``.
        """
        pooled = states[:, 0] if self.pooling == "cls" else mean_over_tokens(states, mask)
        if self.dense is not None:
            pooled = self.dense(pooled)
        logits: Tensor = self.classifier(self.dropout(pooled.tanh()))
        return logits

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "exit_head",
            "hidden_size": self.classifier.in_features,
            "classes": self.classifier.out_features,
            "pooling": self.pooling,
            "dense": self.dense is not None,
            "dropout": self.dropout.p,
            "equalize": self.equalize,
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A head of that form with uninitialised tensors."""
        names = ("hidden_size", "classes", "pooling", "dense", "dropout", "equalize")
        return cls(**{name: spec[name] for name in names})

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"pooling={self.pooling!r}, equalize={self.equalize}"
