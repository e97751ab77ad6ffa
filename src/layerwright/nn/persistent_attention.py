"""Persistent vectors in the attention of a Llama block, in place of its feed-forward part (Sukhbaatar et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.class_swap import swap_class_
from layerwright.core.errors import InputError
from layerwright.nn._llama_attention import (
    allowed,
    grouped,
    join_heads,
    project,
    require_llama_attention,
    turn,
)
from layerwright.nn.all_attention import PersistentMemory
from layerwright.nn.attached import Attachment

__all__ = ["PersistentAttention"]

_PLACE = "_persistent"


class _Nothing(nn.Module):
    """Stands where a feed-forward part was and adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class PersistentAttention(Attachment):
    """Vectors of each key-value head that a block's attention sees beside the context; the block's feed-forward part goes.

    Args:
        num_heads: key-value heads.
        head_dim: features of a head.
        num_vectors: vectors of each of them.
        generator: of the first values.

    Raises:
        InputError: fewer than one vector.
    """

    child = "persistent"

    def __init__(
        self, num_heads: int, head_dim: int, num_vectors: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if num_vectors < 1:
            raise InputError(f"num_vectors: got {num_vectors}, expected at least 1 in place of a feed-forward part")
        self.sizes = (num_heads, head_dim, num_vectors)
        self.memory = PersistentMemory(num_heads, head_dim, num_vectors, generator=generator)

    def attach_(self, owner: nn.Module) -> Self:
        """Put the vectors into the attention of the block `owner` and take its feed-forward part out, in place.

        Raises:
            TypeError: a block that is not built as Llama's.
        """
        attention = getattr(owner, "self_attn", None)
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            if not isinstance(getattr(owner, name, None), nn.Module):
                raise TypeError(f"{type(owner).__name__} has no {name}; expected a block as Llama has it")
        assert isinstance(attention, nn.Module)
        require_llama_attention(attention, "self_attn")
        super().attach_(owner)
        swap_class_(attention, _AllAttention)
        attention.__dict__[_PLACE] = self  # not a child: its tensors belong to the block
        owner.mlp, owner.post_attention_layernorm = _Nothing(), nn.Identity()
        return self

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        heads, width, vectors = self.sizes
        return {"type": "persistent_attention", "num_heads": heads, "head_dim": width, "num_vectors": vectors}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(spec["num_heads"], spec["head_dim"], spec["num_vectors"])

    def weights(self, attention: Any, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Share of the softmax on the vectors, ``(batch, heads, tokens)`` in float32, of a causal text without a cache."""
        plain, k, _ = project(attention, hidden)
        q, k = (turn(x, *position_embeddings) for x in (plain, k))
        heads, tokens = q.shape[1], q.shape[2]
        scores = (q @ grouped(k, heads).transpose(-1, -2)).float()
        scores = scores.masked_fill(~allowed(None, tokens, tokens, q.device), float("-inf"))
        own = (plain @ grouped(self.memory()[0][None], heads).transpose(-1, -2)).float()
        joint = (torch.cat([scores, own], -1) * attention.scaling).softmax(-1)
        return joint[..., tokens:].sum(-1)

    def run(
        self, attention: Any, hidden: Tensor, position_embeddings: Any, mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, None]:
        """The output of `attention` with the vectors among its keys; queries that meet them are not rotated."""
        plain, k, v = project(attention, hidden)
        q, k = (turn(x, *position_embeddings) for x in (plain, k))
        if cache is not None:
            k, v = cache.update(k, v, attention.layer_idx)
        heads, tokens = q.shape[1:3]
        seen = allowed(mask, tokens, k.shape[2], q.device)
        keys, values = (x[None].expand(k.shape[0], -1, -1, -1).to(k.dtype) for x in self.memory())
        width = attention.head_dim  # features that only rotated pairs, or only persistent keys, have
        every_key = torch.cat([F.pad(k, (0, width)), F.pad(keys, (width, 0))], 2)
        out = F.scaled_dot_product_attention(
            torch.cat([q, plain], -1),
            grouped(every_key, heads),
            grouped(torch.cat([v, values], 2), heads),
            attn_mask=F.pad(seen, (0, keys.shape[2]), value=True),
            dropout_p=attention.attention_dropout if attention.training else 0.0,
            scale=attention.scaling,
        )
        return attention.o_proj(join_heads(out)), None


class _AllAttention(nn.Module):
    """Goes in front of an attention module's class."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        memory: PersistentAttention = self.__dict__[_PLACE]
        return memory.run(self, hidden_states, position_embeddings, attention_mask, past_key_values)
