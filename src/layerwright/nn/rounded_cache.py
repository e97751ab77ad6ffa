"""Keys and values rounded where they enter the cache (LLM-QAT, Liu et al., 2023; used by EDGE-LLM, Yu et al., 2024)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.nn.attached import Attachment
from layerwright.nn.quantizer import fake_quantize, find_scale, grid

__all__ = ["KeyValueRounding", "round_cache_", "round_tokens", "takes_cache"]

CACHE_ARGUMENTS = ("past_key_values", "layer_past")
"""What attention modules call their cache."""


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """`x` ``(..., features)`` rounded symmetrically, one scale ``max|x| / (2**(bits-1) - 1)`` for each token.

    Computed in float32; gradients pass straight through (Bengio et al., 2013).
    """
    if not x.numel():
        return x
    wide = x.float()
    scale, _ = find_scale(wide.detach(), bits, full_range=True)
    return fake_quantize(wide, scale, None, bits).to(x.dtype)


class KeyValueRounding(Attachment):
    """Rounds the keys and values that an attention module hands to its cache, for each token and head.

    With a cache, the rounded values are what it keeps; without one, they are what attention reads, so that a model in
    training sees what it will meet in generation. Nothing is stored.

    Args:
        bits: 2 to 8.
    """

    child = "key_value_rounding"

    def __init__(self, bits: int) -> None:
        super().__init__()
        grid(bits)  # refuses what is no width
        self.bits = bits

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same arguments with a cache that rounds."""
        name = next((name for name in CACHE_ARGUMENTS if name in kwargs), None)
        if name is None:
            raise InputError(
                f"{type(owner).__name__} is called without {' or '.join(CACHE_ARGUMENTS)}; its keys cannot be rounded"
            )
        return args, {**kwargs, name: _Rounding(kwargs[name], self.bits)}

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "key_value_rounding", "bits": self.bits}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(spec["bits"])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"bits={self.bits}"


class _Rounding:
    """Stands for a cache (or none) during one call of an attention module."""

    def __init__(self, cache: Any, bits: int) -> None:
        self._cache, self._bits = cache, bits

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = round_tokens(keys, self._bits), round_tokens(values, self._bits)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        return 0 if self._cache is None else self._cache.get_seq_length(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._cache, name)


def takes_cache(module: nn.Module) -> bool:
    """Whether the forward of an attention module is handed a cache by a name that is known: `CACHE_ARGUMENTS`."""
    return any(name in CACHE_ARGUMENTS for name in inspect.signature(module.forward).parameters)


def round_cache_(model: nn.Module, bits: Mapping[str, int]) -> list[str]:
    """Round keys and values of the blocks named in `bits` to so many bits, in place; 16 leaves a block alone.

    Args:
        model: a decoder whose attention modules are handed a cache by one of these names: `CACHE_ARGUMENTS`.
        bits: path of a block, or of an attention module, to 2..8 or 16.

    Returns:
        Paths of the attention modules that round now.

    Raises:
        InputError: an encoder-decoder model, a block without an attention module or with one that keeps nothing, or
            bits outside their range.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} is an encoder-decoder model; keys and values are rounded in decoders")
    modules = [ref.path for ref in list_layers(model) if ref.kind == "attention"]
    done: list[str] = []
    for block, width in bits.items():
        inside = [path for path in modules if path == block or path.startswith(block + ".")]
        if not inside:
            raise InputError(f"{block}: no attention module in it whose keys and values could be rounded")
        for path in inside if width != 16 else ():
            owner = model.get_submodule(path)
            if not takes_cache(owner):
                raise InputError(f"{path}: {type(owner).__name__} keeps no keys and values that could be rounded")
            KeyValueRounding(width).attach_(owner)
            done.append(path)
    return done
