"""Attention to a store of keys and values of earlier text (Tworkowski et al., 2023, Focused Transformer)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from layerwright.core.class_swap import restore_class_, swap_class_
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._llama_attention import allowed, grouped, join_heads, project, require_llama_attention, turn
from layerwright.nn.attached import Attachment
from layerwright.nn.cross_batch import Layout, context_rows, cross_batch_attention
from layerwright.nn.kv_memory import KVMemory

__all__ = ["KVMemory", "MemoryAttention", "MemoryCalls"]

Position = Literal["none", "first"]
Temperature = Literal["sqrt", "learned"]


@dataclass
class MemoryCalls:
    """What all memory layers of a model are told about its calls.

    Attributes:
        write: the keys and values of each call go into the memory after it.
        mask: ``(batch, tokens)``, 0 for padding, of what is written.
        contexts: windows of `nn.cross_batch.cross_batch_attention`; None outside training.
        layout: of the batch.
        contexts_per_row: for packed batches.
        record: keep each layer's share of the softmax on extra windows in `shares`.
        shares: by layer index, ``(rows, heads, tokens, windows)``, positive first.
    """

    write: bool = False
    mask: Tensor | None = None
    contexts: int | None = None
    layout: Layout = "previous"
    contexts_per_row: Tensor | None = None
    record: bool = False
    shares: dict[int, Tensor] = field(default_factory=dict)


class MemoryAttention(Attachment):
    """Lets an attention module of a Llama see a memory: local causal keys and memory keys share one softmax.

    With an empty memory, ``position="first"`` and ``temperature="sqrt"`` the module computes what it did.

    Args:
        num_heads: heads of queries.
        kv_heads: heads of keys and values.
        head_dim: features of a head.
        position: ``first``: rotary positions count within the local window and memory keys stand at its first; ``none``:
            no positions in this layer at all.
        top_k: memory keys of largest score for each query and head; None for all of them.
        temperature: ``sqrt``: ``1 / sqrt(head_dim)``; ``learned``: queries and keys of unit length, divided by a learned
            temperature of each head.
        chunk: heads and queries whose scores of the memory are computed at once.
        capacity, dtype: see `KVMemory`; dtype None keeps that of the keys.

    Raises:
        InputError: a number below 1 or a name that is not known.
    """

    child = "memory"

    def __init__(
        self,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        position: Position = "first",
        top_k: int | None = None,
        temperature: Temperature = "sqrt",
        chunk: tuple[int, int] = (8, 256),
        capacity: int | None = None,
        dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("position", position, get_args(Position)),
            ("temperature", temperature, get_args(Temperature)),
        ):
            if given not in known:
                raise unknown_name(name, str(given), known)
        for name, value in (("top_k", top_k), ("chunk", min(chunk)), ("capacity", capacity)):
            if value is not None and value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        if num_heads % kv_heads:
            raise InputError(f"kv_heads: got {kv_heads} for {num_heads} heads, expected a divisor")
        self.sizes, self.position, self.top_k, self.temperature = (
            (num_heads, kv_heads, head_dim),
            position,
            top_k,
            temperature,
        )
        self.chunk, self.capacity, self.dtype = chunk, capacity, dtype
        self.log_temperature = nn.Parameter(torch.zeros(num_heads)) if temperature == "learned" else None
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, -0.5 * math.log(head_dim))
        self.calls = MemoryCalls()
        self.store: KVMemory | None = None

    def attach_(self, owner: nn.Module) -> Self:
        """Change the class of the attention module `owner`, in place.

        Raises:
            TypeError: attention that is not built as Llama's.
        """
        require_llama_attention(owner, "attention")
        super().attach_(owner)
        swap_class_(owner, _Remembering)
        return self

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form; what the memory holds is not part of it."""
        heads, kv_heads, width = self.sizes
        return {
            "type": "memory_attention",
            "num_heads": heads,
            "kv_heads": kv_heads,
            "head_dim": width,
            "position": self.position,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "chunk": list(self.chunk),
            "capacity": self.capacity,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form with an empty memory."""
        settings = {name: value for name, value in spec.items() if name not in ("type", "dtype", "chunk")}
        dtype = spec["dtype"] and getattr(torch, spec["dtype"])
        heads, queries = spec["chunk"]
        return cls(**settings, chunk=(heads, queries), dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model begins with an empty memory, and is told what to do by a handle of its own
        return {**self.__dict__, "store": None, "calls": MemoryCalls()}

    def run(
        self, attention: Any, plain: Any, hidden: Tensor, tables: Any, mask: Tensor | None, cache: Any, rest: Any
    ) -> Any:
        """The output of `attention`; `plain` is its own forward."""
        calls = self.calls
        held = self.store is not None and len(self.store) > 0
        unchanged = self.position == "first" and self.log_temperature is None
        if unchanged and not held and not calls.write and calls.contexts is None:
            return plain(hidden, position_embeddings=tables, attention_mask=mask, past_key_values=cache, **rest)
        q, k, v = project(attention, hidden)
        if self.log_temperature is not None:
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        rope = tables if self.position == "first" else None
        if calls.contexts is not None:
            return attention.o_proj(join_heads(self._cross(attention, q, k, v, mask, rope))), None
        turned, local = (q, k) if rope is None else (turn(q, *rope), turn(k, *rope))
        values = v
        if cache is not None:
            if calls.write:
                raise InputError("past_key_values: got a cache while the memory is written; pass use_cache=False")
            local, values = cache.update(local, v, attention.layer_idx)
        out = self._attend(turned * self._scale(attention).to(q.dtype), local, values, mask)
        if calls.write:
            self._write(k, v)
        return attention.o_proj(join_heads(out)), None

    def _scale(self, attention: Any) -> Tensor:
        """What scores are multiplied by, ``(heads, 1, 1)``."""
        if self.log_temperature is None:
            return torch.full((1, 1, 1), attention.scaling, device=attention.q_proj.weight.device)
        return (-self.log_temperature.float()).exp()[:, None, None]

    def _write(self, k: Tensor, v: Tensor) -> None:
        if self.store is None:
            self.store = KVMemory(k.shape[1], k.shape[3], self.dtype or k.dtype, self.capacity)
        self.store.append(k, v, self.calls.mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """One softmax over local and memory keys, some heads and queries at a time; `q` is scaled."""
        heads, tokens = q.shape[1:3]
        seen = allowed(mask, tokens, k.shape[2], q.device).expand(len(q), -1, -1, -1)
        k, v = grouped(k, heads), grouped(v, heads)
        store = self.store if self.store is not None and len(self.store) else None
        group = heads // self.sizes[1]
        at_once = max(group, self.chunk[0] // group * group)
        rows = []
        for head in range(0, heads, at_once):
            part = slice(head, head + at_once)
            view = None if store is None else store.heads(head // group, (head + at_once) // group)
            parts = [
                self._chunk(
                    q[:, part, i : i + self.chunk[1]], k[:, part], v[:, part], seen[:, :, i : i + self.chunk[1]], view
                )
                for i in range(0, tokens, self.chunk[1])
            ]
            rows.append(torch.cat(parts, 2))
        return torch.cat(rows, 1)

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, store: KVMemory | None) -> Tensor:
        local = (q @ k.transpose(-1, -2)).float().masked_fill(~seen, float("-inf"))
        if store is None or store.values is None:
            return local.softmax(-1).nan_to_num(0).to(v.dtype) @ v
        if self.top_k is not None and self.top_k < len(store):
            scores, _, values = store.search(q, self.top_k)
        else:
            scores, values = store.scores(q), store.values
        weights = torch.cat([local, scores], -1).softmax(-1).nan_to_num(0).to(v.dtype)  # a padded row has no key
        mine, theirs = weights.split([local.shape[-1], scores.shape[-1]], -1)
        if values.dim() == 5:
            far = (theirs[..., None, :] @ values.to(v.dtype)).squeeze(-2)
        else:
            far = (theirs.unflatten(1, (store.num_heads, -1)) @ values.to(v.dtype)[:, :, None]).flatten(1, 2)
        return mine @ v + far

    def _cross(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Any) -> Tensor:
        calls = self.calls
        assert calls.contexts is not None
        tokens = q.shape[2]
        if mask is not None and not bool(allowed(mask, tokens, tokens, q.device)[..., -1, :].all()):
            raise InputError(
                "attention_mask: got padding; rows of cross-batch training are filled with text to the end"
            )
        scale = self._scale(attention).flatten().expand(q.shape[1])
        if calls.record:
            calls.shares[attention.layer_idx] = _shares(q, k, scale, rope, calls)
        dropout = attention.attention_dropout if attention.training else 0.0
        return cross_batch_attention(
            q, k, v, calls.contexts, calls.layout, calls.contexts_per_row, rope, scale.to(q.dtype), dropout
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"position={self.position!r}, top_k={self.top_k}, temperature={self.temperature!r}"


def release_(owner: nn.Module) -> None:
    """Give an attention module its class back, in place."""
    restore_class_(owner)


@torch.no_grad()
def _shares(q: Tensor, k: Tensor, scale: Tensor, rope: Any, calls: MemoryCalls) -> Tensor:
    """Softmax weight of each extra window of ``previous`` batches, ``(documents, heads, tokens, windows)`` in float32."""
    if calls.layout != "previous" or calls.contexts is None:
        raise InputError("layout: shares of windows are recorded for layout='previous' alone")
    half, tokens = len(q) // 2, q.shape[2]
    seen, _ = context_rows(len(q), calls.contexts)
    q = q * scale.to(q.dtype)[:, None, None]
    k = grouped(k, q.shape[1])
    turned, local = (q, k) if rope is None else (turn(q, *rope), turn(k, *rope))
    own = (turned[half:] @ local[half:].transpose(-1, -2)).float()
    own = own.masked_fill(~allowed(None, tokens, tokens, q.device), float("-inf"))
    others = k[:half][seen.to(q.device)].transpose(1, 2).flatten(2, 3)
    scores = (turned[half:] @ others.transpose(-1, -2)).float()
    weights = torch.cat([own, scores], -1).softmax(-1)[..., tokens:]
    return weights.unflatten(-1, (calls.contexts, tokens)).sum(-1)


class _Remembering(nn.Module):
    """Goes in front of an attention module's class."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> Any:
        memory = self._modules.get(MemoryAttention.child)
        if not isinstance(memory, MemoryAttention):  # taken out of a copy: the plain module
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **rest,
            )
        return memory.run(
            self, super().forward, hidden_states, position_embeddings, attention_mask, past_key_values, rest
        )
