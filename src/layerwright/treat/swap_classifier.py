"""Put a classifier of fixed vectors in the place of a linear one."""

from __future__ import annotations

import torch
from torch import nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.nn.ebv_head import EBVHead

__all__ = ["swap_classifier"]


def swap_classifier(
    model: nn.Module, name: str, head: EBVHead, *, fit: bool = True, copy: bool = True
) -> nn.Module:  # fmt: skip
    """A model in which `head` stands in place of the linear classifier `name`.

    With `fit`, the head's linear map starts as the least-squares solution of ``w_k . (A x + a) = W_k x + b_k``, where
    what all classes have in common is left out on the right. With orthonormal vectors (``dim >= num_classes``) the
    answers stay those of the old classifier; with fewer dimensions those it was sure of mostly do. The logits
    themselves differ, since cosines know no length. Train on afterwards.

    Source: Shen et al., "Equiangular Basis Vectors" (2023, arXiv 2303.11637); the start is an addition.

    Args:
        model: stays as it is; the result shares all other tensors with it.
        name: path of an ``nn.Linear``; empty if it is the model itself.
        head: with as many inputs and at least as many classes. It is used itself, on the old layer's device and in its
            dtype.
        fit: see above; otherwise the head's own weights stay.
        copy: False changes `model` itself.

    Raises:
        InputError: no such linear layer, another number of inputs, fewer classes, or a bias to fit without a bias.
    """
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if name not in linears:
        raise unknown_name("linear layer", name, linears)
    old = linears[name]
    if head.in_features != old.in_features or head.num_classes < old.out_features:
        raise InputError(
            f"head: takes {head.in_features} features and has {head.num_classes} classes, expected {old.in_features} "
            f"and at least {old.out_features}, as {name or 'the model'} has"
        )
    if fit and old.bias is not None and head.fc.bias is None:
        raise InputError(f"head: has no bias, but {name or 'the model'} has; make the head with one, or use fit=False")
    if fit:
        _fit_(head, old)
    head.to(device=old.weight.device, dtype=old.weight.dtype)
    head.train(old.training)
    if not name:
        return head
    result = structure_copy(model) if copy else model
    result.set_submodule(name, head)
    return result


@torch.no_grad()
def _fit_(head: EBVHead, old: nn.Linear) -> None:
    """Solve for the linear map in float64, where the numbers of classes and dimensions are those of the old layer."""
    rows = head.vectors[: old.out_features].double()
    inverse = torch.linalg.pinv(rows)
    # A number that is added to all logits changes no answer, but would take up one of few dimensions.
    weight = old.weight.to(rows)
    head.fc.weight.copy_(inverse @ (weight - weight.mean(0)))
    if old.bias is not None:
        bias = old.bias.to(rows)
        head.fc.bias.copy_(inverse @ (bias - bias.mean()))
    elif head.fc.bias is not None:
        head.fc.bias.zero_()
