"""The shape of a language model: all that its cost depends on, and no weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from layerwright.core.errors import InputError, unknown_name

__all__ = ["LMShape", "preset_shape", "preset_shapes"]


@dataclass(frozen=True)
class LMShape:
    """A decoder-only transformer.

    Attributes:
        name: for tables.
        layers: number of decoder blocks.
        hidden_size, intermediate_size: widths of the residual stream and inside a dense feed-forward layer.
        num_heads, num_kv_heads: attention heads, and heads that have keys and values (a divisor).
        head_dim: width of a head; 0 takes ``hidden_size / num_heads``.
        num_experts, top_k: experts of a mixture layer and those that a token takes; 0 is a dense model.
        expert_size: width inside an expert; 0 takes `intermediate_size`.
        shared_size: width inside the expert that every token takes; 0 is none.
        moe_layers: blocks with experts; empty takes every `moe_every`-th, the last of each group.
        moe_every: as above.
        gated: feed-forward layers have three matrices (gate, up, down) instead of two.
        window: tokens that the blocks in `windowed_layers` look back at.
        windowed_layers: blocks with a sliding window.
        vocab_size: 0 leaves out the output layer.
        tied_embeddings: input and output embeddings are one matrix.
        bytes_per_element: of weights, activations and cache; 2 for 16-bit floats.
        devices, nodes: how many the model is usually served on; only a default.

    Raises:
        InputError: `top_k` above `num_experts`, heads that are no multiple of the key-value heads, sizes below 1.
    """

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    num_experts: int = 0
    top_k: int = 0
    expert_size: int = 0
    shared_size: int = 0
    moe_layers: tuple[int, ...] = ()
    moe_every: int = 1
    gated: bool = True
    window: int = 0
    windowed_layers: tuple[int, ...] = ()
    vocab_size: int = 0
    tied_embeddings: bool = False
    bytes_per_element: float = 2
    devices: int = field(default=1, compare=False)
    nodes: int = field(default=1, compare=False)

    def __post_init__(self) -> None:
        needed = ("layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "moe_every", "devices")
        for name in (*needed, "nodes", "bytes_per_element"):
            if isinstance(getattr(self, name), bool) or not getattr(self, name) > 0:
                raise InputError(f"{self.name}: {name}: got {getattr(self, name)}, expected at least 1")
        for name in ("head_dim", "num_experts", "top_k", "expert_size", "shared_size", "window", "vocab_size"):
            if getattr(self, name) < 0:
                raise InputError(f"{self.name}: {name}: got {getattr(self, name)}, expected 0 or more")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.name}: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.top_k > self.num_experts:
            raise InputError(f"{self.name}: top_k {self.top_k} is more than num_experts {self.num_experts}")
        if self.num_experts and not self.top_k:
            raise InputError(f"{self.name}: top_k: got 0, expected 1 to num_experts {self.num_experts}")
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise InputError(
                    f"{self.name}: hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}: "
                    "give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_experts and not self.expert_size:
            object.__setattr__(self, "expert_size", self.intermediate_size)
        if self.num_experts and not self.moe_layers:
            chosen = tuple(range(self.moe_every - 1, self.layers, self.moe_every))
            object.__setattr__(self, "moe_layers", chosen)
        for name in ("moe_layers", "windowed_layers"):
            places = tuple(getattr(self, name))
            object.__setattr__(self, name, places)
            if any(not 0 <= place < self.layers for place in places):
                raise InputError(f"{self.name}: {name}: got {places}, expected block numbers below {self.layers}")
        if self.windowed_layers and not self.window:
            raise InputError(f"{self.name}: window: got 0, expected the tokens that {self.windowed_layers} look back")

    @classmethod
    def from_config(cls, config: Any, name: str = "") -> LMShape:
        """The shape in a transformers configuration; see `layerwright.score.device.configs`."""
        from layerwright.score.device.configs import shape_from_config

        return shape_from_config(config, name)

    @property
    def query_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share a key-value head: the Op/B of decode attention in 16 bits."""
        return self.num_heads // self.num_kv_heads

    @property
    def matrices(self) -> int:
        """Weight matrices of a feed-forward layer."""
        return 3 if self.gated else 2

    @property
    def expert_params(self) -> int:
        """Parameters of all routed experts."""
        return len(self.moe_layers) * self.num_experts * self.matrices * self.hidden_size * self.expert_size

    @property
    def params(self) -> int:
        """Parameters of all weight matrices (norms and biases are left out: under a thousandth of a large model)."""
        h, moe = self.hidden_size, len(self.moe_layers)
        attention = 2 * h * (self.query_size + self.kv_size)
        dense = (self.layers - moe) * self.matrices * h * self.intermediate_size
        beside = moe * h * (self.num_experts + self.matrices * self.shared_size)
        embeddings = self.vocab_size * h * (1 if self.tied_embeddings else 2)
        return self.layers * attention + dense + beside + self.expert_params + embeddings

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return self.params * self.bytes_per_element

    def kv_bytes(self, tokens: int) -> float:
        """Bytes of the keys and values of one sequence of `tokens`; blocks with a window keep that much."""
        windowed = len(self.windowed_layers)
        kept = (self.layers - windowed) * tokens + windowed * min(tokens, self.window or tokens)
        return 2 * self.kv_size * self.bytes_per_element * kept

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


@cache
def preset_shapes() -> dict[str, LMShape]:
    """The published models that ship with the package, by name."""
    text = resources.files("layerwright.score.device").joinpath("models", "presets.yaml").read_text(encoding="utf-8")
    return {name: LMShape(name=name, **fields) for name, fields in yaml.safe_load(text).items()}


def preset_shape(name: str) -> LMShape:
    """The preset of that name.

    Raises:
        InputError: unknown; close names are listed.
    """
    if name not in preset_shapes():
        raise unknown_name("model shape", name, preset_shapes())
    return preset_shapes()[name]
