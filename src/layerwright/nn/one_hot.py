"""Bytes as one-hot vectors, without embedding matrices, and dropout of whole tokens (Shaham & Levy, 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.treated import dtype_name, named_dtype

__all__ = ["OneHotEmbedding", "OneHotHead", "TokenDropout"]

Scale = Literal["learned"] | float


class OneHotHead(nn.Module):
    """Logits of `num_embeddings` tokens are the first features of the hidden state, times a scale. No matrix.

    ``scale * (h I^T)`` with ``I = [identity | zeros]`` whose row of padding is zero, as in Shaham & Levy, 2021,
    arXiv 2008.09396: the logit of padding is 0.

    Args:
        num_embeddings: tokens, at most `dim`.
        dim: features of the hidden state.
        padding_idx: token of padding, if there is one.
        scale: ``learned``, beginning at ``sqrt(dim)``, or a number.

    Raises:
        InputError: fewer features than tokens, or a padding token that there is not.
    """

    scale: Tensor

    def __init__(self, num_embeddings: int, dim: int, padding_idx: int | None = None, scale: Scale = "learned") -> None:
        super().__init__()
        _check(num_embeddings, dim, padding_idx)
        self.num_embeddings, self.dim, self.padding_idx = num_embeddings, dim, padding_idx
        _set_scale(self, scale)

    def forward(self, h: Tensor) -> Tensor:
        """``(..., dim)`` to logits ``(..., num_embeddings)``.

        Raises:
            InputError: another number of features.
        """
        if h.shape[-1] != self.dim:
            raise InputError(f"h: got {h.shape[-1]} features, expected {self.dim}")
        logits = h[..., : self.num_embeddings] * self.scale
        if self.padding_idx is None:
            return logits
        padding = torch.arange(self.num_embeddings, device=h.device) == self.padding_idx
        return logits.masked_fill(padding, 0)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "one_hot_head", **_settings(self)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A module of that form."""
        module = cls(spec["num_embeddings"], spec["dim"], spec["padding_idx"], spec["scale"])
        return module.to(named_dtype(spec["dtype"]))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_embeddings}, {self.dim}, padding_idx={self.padding_idx}"


class OneHotEmbedding(nn.Module):
    """A token's vector is one at its own number, times a scale, and zero elsewhere: an embedding without a matrix.

    Equal to ``scale * nn.Embedding`` with the frozen weight ``[identity | zeros]`` whose row of padding is zero
    (Shaham & Levy, 2021, arXiv 2008.09396). One learned number, or two with the scale of `project`.

    Args:
        num_embeddings: tokens, at most `dim`.
        dim: features of a vector.
        padding_idx: token whose vector is zero.
        scale: ``learned``, beginning at ``sqrt(dim)``, or a number.
        output_scale: the same for `project`; None leaves `project` out.

    Raises:
        InputError: fewer features than tokens, or a padding token that there is not.
    """

    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        padding_idx: int | None = None,
        scale: Scale = "learned",
        output_scale: Scale | None = "learned",
    ) -> None:
        super().__init__()
        _check(num_embeddings, dim, padding_idx)
        self.num_embeddings, self.dim, self.padding_idx = num_embeddings, dim, padding_idx
        _set_scale(self, scale)
        self.head = None if output_scale is None else OneHotHead(num_embeddings, dim, padding_idx, output_scale)

    @property
    def embedding_dim(self) -> int:
        """Features of a vector."""
        return self.dim

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., dim)`` of whole numbers ``(...)``.

        Raises:
            TypeError: ids that are not whole numbers.
            InputError: ids outside the vocabulary (checked on the CPU).
        """
        _check_ids(ids, self.num_embeddings)
        ids = ids.long()[..., None]
        value = self.scale.expand(ids.shape)
        if self.padding_idx is not None:
            value = value.masked_fill(ids == self.padding_idx, 0)
        return value.new_zeros(*ids.shape[:-1], self.dim).scatter(-1, ids, value)

    def project(self, h: Tensor) -> Tensor:
        """Logits ``(..., num_embeddings)`` of hidden states ``(..., dim)``: its `OneHotHead`.

        Raises:
            InputError: it was made without one, or another number of features.
        """
        if self.head is None:
            raise InputError("output_scale: this embedding was made without one (None) and does not project")
        logits: Tensor = self.head(h)
        return logits

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        output = None if self.head is None else _settings(self.head)["scale"]
        return {"type": "one_hot_embedding", **_settings(self), "output_scale": output}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A module of that form."""
        module = cls(spec["num_embeddings"], spec["dim"], spec["padding_idx"], spec["scale"], spec["output_scale"])
        return module.to(named_dtype(spec["dtype"]))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_embeddings}, {self.dim}, padding_idx={self.padding_idx}"


class TokenDropout(nn.Module):
    """Erases whole vectors of tokens in training, each with probability `p`.

    What dropout does to a one-hot vector, for embeddings of any kind (Shaham & Levy, 2021). It goes on the token's
    part, before positions are added.

    Args:
        p: probability, at least 0 and below 1.
        rescale: multiply what stays by ``1 / (1 - p)``, as dropout does.
        protect: tokens that are never erased; needs the ids.
        generator: of the draws; the device's own if left out.

    Raises:
        InputError: a probability out of range.
    """

    def __init__(
        self, p: float, rescale: bool = True, protect: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise InputError(f"p: got {p}, expected at least 0 and below 1")
        self.p, self.rescale, self.protect, self.generator = p, rescale, tuple(protect), generator

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """`x` ``(..., dim)`` of tokens `ids` ``(...)``.

        Raises:
            InputError: protected tokens and no ids, or ids of another shape.
        """
        if ids is not None and ids.shape != x.shape[:-1]:
            raise InputError(f"ids: got shape {tuple(ids.shape)}, expected {tuple(x.shape[:-1])}")
        if ids is None and self.protect:
            raise InputError("ids: protected tokens are known by their ids; pass them")
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[:-1], device=x.device, generator=self.generator) >= self.p
        if ids is not None and self.protect:
            kept |= torch.isin(ids, torch.tensor(self.protect, device=ids.device))
        factor = kept.to(x.dtype)
        return x * (factor / (1 - self.p) if self.rescale else factor)[..., None]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"p={self.p}, rescale={self.rescale}, protect={self.protect}"


def _set_scale(module: nn.Module, scale: Scale) -> None:
    if scale == "learned":
        module.scale = nn.Parameter(torch.tensor(math.sqrt(module.dim)))  # type: ignore[arg-type]
    elif isinstance(scale, str) or not math.isfinite(scale):
        raise InputError(f"scale: got {scale!r}, expected 'learned' or a number")
    else:
        number = torch.tensor(float(scale), dtype=torch.get_default_dtype(), device="cpu")
        module.register_buffer("scale", number, persistent=False)


def _settings(module: OneHotEmbedding | OneHotHead) -> dict[str, Any]:
    learned = isinstance(module.scale, nn.Parameter)
    return {
        "num_embeddings": module.num_embeddings,
        "dim": module.dim,
        "padding_idx": module.padding_idx,
        "scale": "learned" if learned else float(module.scale),
        "dtype": dtype_name(module.scale.dtype),
    }


def _check(num_embeddings: int, dim: int, padding_idx: int | None) -> None:
    if num_embeddings < 1:
        raise InputError(f"num_embeddings: got {num_embeddings}, expected at least 1")
    if dim < num_embeddings:
        raise InputError(
            f"dim: got {dim} for num_embeddings {num_embeddings}; a one-hot vector needs a feature for each token"
        )
    if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
        raise InputError(f"padding_idx: got {padding_idx}, expected 0 to {num_embeddings - 1}")


def _check_ids(ids: Tensor, count: int) -> None:
    if ids.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"ids: got {ids.dtype}, expected whole numbers (torch.long)")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise InputError(f"ids: got {int(ids.min())} to {int(ids.max())}, expected 0 to {count - 1}")
