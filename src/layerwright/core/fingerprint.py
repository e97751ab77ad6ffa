"""Short names for exactly this model and exactly this data, so that saved scores and plans are not mixed up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layers import saved_tensors

__all__ = ["fingerprint_batches", "fingerprint_model", "fingerprint_structure", "fingerprint_tensors"]

_SAMPLE = 8


@torch.no_grad()
def fingerprint_model(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) over names, shapes and at most 8 evenly spaced values of every saved tensor of `model`.

    Tied tensors count once; buffers count where they are saved. The values are taken as float32, so that the result
    does not depend on the device, but does depend on the dtype in which the weights were rounded. A training step
    changes it; a change of single weights between the 8 stays unseen.

    Raises:
        InputError: the model is on the meta device; `fingerprint_structure` works there.
    """
    return fingerprint_tensors(sorted(saved_tensors(model), key=lambda item: item[0]))


@torch.no_grad()
def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`fingerprint_model` from ``(name, tensor)`` pairs in the order of their names, one at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor.is_meta:
            raise InputError(f"fingerprint: {name} is on the meta device and has no values; use fingerprint_structure")
        digest.update(_heading(name, tensor))
        digest.update(_sample(tensor).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_structure(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) over names and shapes of every saved tensor; works on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(saved_tensors(model), key=lambda item: item[0]):
        digest.update(_heading(name, tensor))
    return digest.hexdigest()


def fingerprint_batches(batches: Iterable[Any]) -> str:
    """SHA-256 (hexadecimal) over the whole content of `batches`, in order.

    A batch is a tensor, a number, a text, None, or a mapping, list or tuple of such. The order of the keys of a
    mapping does not matter; dtype, shape and every value do. `batches` is read once.

    Raises:
        InputError: a batch holds something else.
    """
    digest = hashlib.sha256()
    for batch in batches:
        _update(digest, batch)
    return digest.hexdigest()


def _heading(name: str, tensor: Tensor) -> bytes:
    return f"{name}:{tuple(tensor.shape)};".encode()


def _sample(tensor: Tensor) -> Tensor:
    """At most 8 values, evenly spaced over the tensor in its logical order, as float32 on the CPU."""
    count = min(tensor.numel(), _SAMPLE)
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    flat = torch.arange(count, device=tensor.device) * max(tensor.numel() // max(count, 1), 1)
    picked = tensor[torch.unravel_index(flat, tensor.shape)] if tensor.dim() else tensor[None]
    return picked.to(device="cpu", dtype=torch.float32)


def _update(digest: Any, value: Any) -> None:
    """Feed `value` with its type and length, so that no two different batches read alike."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"tensor:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        digest.update(f"mapping:{len(value)};".encode())
        for key in sorted(value, key=str):
            _update(digest, str(key))
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence:{len(value)};".encode())
        for item in value:
            _update(digest, item)
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        text = repr(value).encode()
        digest.update(f"{type(value).__name__}:{len(text)};".encode() + text)
    else:
        raise InputError(
            f"fingerprint: a batch holds a {type(value).__name__}; expected tensors, numbers and texts, "
            "or mappings and sequences of them"
        )
