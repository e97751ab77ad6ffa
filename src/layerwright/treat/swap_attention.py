"""Put additive attention, whose cost is linear in the tokens, in the place of a model's self-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.nn.additive_attention import EfficientAdditiveAttention

__all__ = ["SwappedAttention", "swap_attention"]

Make = Callable[[int], nn.Module]


class SwappedAttention(nn.Module):
    """A layer of tokens behind the call of the attention module that stood there.

    Takes what that module took, reads the first tensor and gives back as many values, None after the first.

    Args:
        layer: from ``(batch, tokens, dim)`` to the same.
        outputs: length of the tuple that comes back; 0 for a tensor.
        batch_first: False for ``(tokens, batch, dim)``.
    """

    in_proj_bias: Tensor | None = None
    """nn.TransformerEncoderLayer reads it, and without it does not go past this module by its fused path."""

    def __init__(self, layer: nn.Module, outputs: int = 0, batch_first: bool = True) -> None:
        super().__init__()
        self.layer, self.outputs, self.batch_first = layer, outputs, batch_first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output for the first tensor, alone or first of a tuple.

        Raises:
            InputError: a mask, or keys from elsewhere.
        """
        if found := _refused(args, kwargs):
            raise InputError(f"{found}; additive attention sums over all tokens of one sequence")
        x = _first(args, kwargs)
        out = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return (out, *(None,) * (self.outputs - 1)) if self.outputs else out


def swap_attention(
    model: nn.Module, names: str | Sequence[str], data: Any, layer: Make = EfficientAdditiveAttention, *, copy: bool = True
) -> nn.Module:  # fmt: skip
    """A model in which new layers stand in place of the self-attention modules `names`. Train on afterwards.

    Nothing of the old weights is used: the two kinds of attention compute different things.

    Source: Shaker et al., "SwiftFormer" (2023, arXiv 2303.15446).

    Args:
        model: stays as it is; the result shares all other tensors with it.
        names: paths of modules that map ``(batch, tokens, dim)`` to itself, such as an ``nn.MultiheadAttention`` or the
            attention of a vision transformer; its projections must be inside.
        data: one batch is run to see how the modules are called.
        layer: ``layer(dim)`` makes what comes there.
        copy: False changes `model` itself.

    Raises:
        InputError: no such module, one that does not run, that is called with a mask, is causal, attends to another
            sequence, or does not map three axes to themselves. A causal mask would be lost without a word otherwise.
    """
    paths = [names] if isinstance(names, str) else list(names)
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules or not path:
            raise unknown_name("module", path, [name for name in modules if name])
    found = _run(model, data, paths)
    result = structure_copy(model) if copy else model
    for path in paths:
        old = modules[path]
        shape, outputs = found[path]
        batch_first = getattr(old, "batch_first", True) if isinstance(old, nn.MultiheadAttention) else True
        new = SwappedAttention(layer(shape[-1]), outputs, batch_first)
        like = next((p for p in old.parameters() if p.is_floating_point()), None)
        if like is not None:
            new.to(device=like.device, dtype=like.dtype)
        new.train(old.training)
        result.set_submodule(path, new)
    return result


def _run(model: nn.Module, data: Any, paths: Sequence[str]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape of what each module takes, and the length of the tuple it gives."""
    seen: dict[str, tuple[tuple[int, ...], int]] = {}

    def hook(path: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            refused = _refused(args, kwargs)
            if not refused and getattr(module, "is_causal", False):
                refused = "it is causal"
            if refused:
                raise InputError(f"{path}: {refused}; additive attention sums over all tokens of one sequence")
            x = _first(args, kwargs)
            first = output[0] if isinstance(output, tuple) else output
            if x.dim() != 3 or not isinstance(first, Tensor) or first.shape != x.shape:
                raise InputError(f"{path}: takes {tuple(x.shape)}, expected (batch, tokens, dim) to the same shape")
            seen[path] = tuple(x.shape), len(output) if isinstance(output, tuple) else 0

        return see

    # Fused paths of nn.TransformerEncoderLayer go past its attention, unless something listens to it.
    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    batches = as_calibration(data)
    try:
        with torch.no_grad(), evaluating(model):
            batches.forward(model, next(iter(batches)))
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in paths if path not in seen]:
        raise InputError(f"names: {missing[0]} does not run when the data passes")
    return seen


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()]
    if not tensors:
        raise InputError("attention: called without a tensor of tokens")
    return tensors[0]


def _refused(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What in a call asks for more than additive attention can do; empty if nothing."""
    for name, value in kwargs.items():
        if ("mask" in name or name == "is_causal") and value is not None and value is not False:
            return f"it is called with {name}"
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    x = _first(args, kwargs)
    for other in tensors:
        if other is x or (other.shape == x.shape and other.data_ptr() == x.data_ptr()):
            continue
        if other.dim() >= 2 and (not other.is_floating_point() or other.shape[-1] == other.shape[-2] == x.shape[-2]):
            return f"it is called with a mask of shape {tuple(other.shape)}"
        if other.dim() == 3:
            return "it attends to another sequence"
    return ""
