"""Give chosen layers of a Llama a memory of earlier text (Tworkowski et al., 2023, Focused Transformer)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.class_swap import swapped
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn._llama_attention import require_llama_attention
from layerwright.nn.attached import detach_
from layerwright.nn.cross_batch import Layout
from layerwright.nn.memory_attention import MemoryAttention, MemoryCalls, Position, Temperature, release_
from layerwright.treat._chosen_blocks import chosen_blocks

__all__ = ["MemoryHandle", "add_memory", "find_memory"]


class MemoryHandle:
    """The memory of a model.

    Args:
        model: with memory layers.
        layers: paths of their blocks.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, tuple(layers)
        told = {id(memory.calls): memory.calls for memory in self.memories}
        self.calls = next(iter(told.values())) if len(told) == 1 else MemoryCalls()  # another handle keeps its say
        for memory in self.memories:
            memory.calls = self.calls

    @property
    def memories(self) -> tuple[MemoryAttention, ...]:
        """What stands in each attention module, in order."""
        found = (self.model.get_submodule(f"{path}.self_attn.{MemoryAttention.child}") for path in self.layers)
        return tuple(memory for memory in found if isinstance(memory, MemoryAttention))

    @property
    def held(self) -> int:
        """Positions that the memory holds."""
        store = self.memories[0].store
        return 0 if store is None else len(store)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget what these rows of the batch hold, or everything.

        Raises:
            InputError: a row that the memory does not have.
        """
        for memory in self.memories:
            if memory.store is not None:
                memory.store.reset(rows)
            elif rows is not None:
                raise InputError(f"rows: got {list(rows)}, the memory is empty")

    @contextmanager
    def writing(self, mask: Tensor | None = None) -> Iterator[MemoryCalls]:
        """Within it each call's keys and values go into the memory once they were used; `mask` marks padding with 0."""
        old = (self.calls.write, self.calls.mask)
        self.calls.write, self.calls.mask = True, mask
        try:
            yield self.calls
        finally:
            self.calls.write, self.calls.mask = old

    @contextmanager
    def crossing(
        self,
        num_contexts: int,
        layout: Layout = "previous",
        contexts_per_row: Tensor | None = None,
        *,
        record: bool = False,
    ) -> Iterator[MemoryCalls]:
        """Within it memory layers see windows of other rows of the batch, with gradients: see `cross_batch_attention`."""
        calls = self.calls
        old = (calls.contexts, calls.layout, calls.contexts_per_row, calls.record)
        calls.contexts, calls.layout, calls.contexts_per_row, calls.record = (
            num_contexts,
            layout,
            contexts_per_row,
            record,
        )
        try:
            yield calls
        finally:
            calls.contexts, calls.layout, calls.contexts_per_row, calls.record = old

    @torch.no_grad()
    def read(self, input_ids: Tensor, window: int | None = None, attention_mask: Tensor | None = None) -> None:
        """Put text into the memory, window by window; each window attends to those before it.

        Args:
            input_ids: ``(batch, tokens)``.
            window: tokens at once, the model's longest input by default.
            attention_mask: ``(batch, tokens)``, 0 for padding.

        Raises:
            InputError: a window longer than the model's.
        """
        window = self._window(window)
        for start in range(0, input_ids.shape[1], window):
            part = input_ids[:, start : start + window]
            mask = None if attention_mask is None else attention_mask[:, start : start + window]
            extra = {} if mask is None else {"attention_mask": mask}
            with self.writing(mask):
                self.model(input_ids=part, use_cache=False, **extra)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, window: int | None = None) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)`` of text of any length, read after what the memory holds, which it joins."""
        window = self._window(window)
        parts = []
        for part in input_ids.split(window, 1):
            with self.writing():
                parts.append(self.model(input_ids=part, use_cache=False).logits)
        return torch.cat(parts, 1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        last_context_length: int = 1024,
        window: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Generate after a text of any length: its last part is local, what is before it goes into the memory.

        Once the local part is as long as a window, all but its last `last_context_length` tokens go into the memory too.
        What the memory holds already is kept.

        Args:
            input_ids: ``(batch, tokens)`` without padding.
            max_new_tokens: at most.
            last_context_length: tokens that stay local, fewer than a window.
            window: tokens at once, the model's longest input by default.
            settings: further arguments of ``model.generate``.

        Returns:
            ``(batch, tokens and the new ones)``; rows that ended are filled with the end token.

        Raises:
            InputError: a window longer than the model's, or no room in it.
        """
        window = self._window(window)
        if not 1 <= last_context_length < window:
            raise InputError(
                f"last_context_length: got {last_context_length}, expected 1 to {window - 1}, less than a window"
            )
        model: Any = self.model
        ends = settings.get("eos_token_id", model.generation_config.eos_token_id)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ids, stop = input_ids, input_ids.shape[1] + max_new_tokens
        kept = max(0, ids.shape[1] - last_context_length)
        self.read(ids[:, :kept], window)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        while ids.shape[1] < stop and not bool(ended.all()):
            if ids.shape[1] - kept >= window:
                self.read(ids[:, kept : ids.shape[1] - last_context_length], window)
                kept = ids.shape[1] - last_context_length
            local = ids[:, kept:]
            count = min(stop - ids.shape[1], window - local.shape[1])
            given = {"attention_mask": torch.ones_like(local), "max_new_tokens": count} | settings
            new = model.generate(local, **given)[:, local.shape[1] :]
            if ends:
                new = torch.where(ended[:, None], ends[0], new)
                ended |= torch.isin(new, torch.tensor(ends, device=new.device)).any(1)
            ids = torch.cat([ids, new], 1)
        return ids

    def remove(self) -> nn.Module:
        """Take the memory out of the model, in place. Returns the model."""
        for path in self.layers:
            attention = self.model.get_submodule(f"{path}.self_attn")
            release_(attention)
            detach_(attention, MemoryAttention.child)
        return self.model

    def _window(self, window: int | None) -> int:
        config: Any = self.model.config
        longest = int(config.max_position_embeddings)
        if window is None:
            return longest
        if not 1 <= window <= longest:
            raise InputError(f"window: got {window}, expected 1 to {longest}, the model's longest input")
        return window


def add_memory(
    model: nn.Module,
    layers: str | Sequence[str] | Sequence[int],
    *,
    position: Position = "first",
    top_k: int | None = None,
    temperature: Temperature = "sqrt",
    chunk: tuple[int, int] = (8, 256),
    capacity: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    copy: bool = True,
) -> MemoryHandle:
    """Let chosen layers of a Llama see a memory of earlier text (Tworkowski et al., 2023, arXiv 2307.03170).

    With an empty memory, ``position="first"`` and ``temperature="sqrt"`` the model is what it was; it must be tuned
    (`tune.crossbatch`) to make good use of more than its window. Memory of ``M`` positions: ``2 M kv_heads head_dim``
    numbers a layer, read whole for each call; `top_k` reads fewer values, and all keys.

    Args:
        model: a Llama of transformers, or one whose attention is built alike.
        layers: blocks, by path or index: the 8th of 12, the 6th, 12th and 18th of 26 in the paper (7; 5, 11, 17).
        position, top_k, temperature, chunk, capacity, dtype: see `MemoryAttention`.
        copy: leave `model` alone; the result shares its tensors. False changes it.

    Raises:
        InputError: an unknown block, a wrong setting, or a layer that is changed already.
        TypeError: no blocks, or attention of another kind (sliding windows, linear attention).
    """
    chosen = chosen_blocks(model, None if layers == "all" else layers)
    made = {}
    for path in chosen:
        attention: Any = getattr(model.get_submodule(path), "self_attn", None)
        if attention is None:
            raise TypeError(f"layers: {path} has no self_attn; expected a block as Llama has it")
        require_llama_attention(attention, f"{path}.self_attn")
        if swapped(attention):
            raise InputError(f"layers: the attention of {path} was changed already; undo that first")
        width = attention.head_dim
        heads, kv_heads = attention.q_proj.out_features // width, attention.k_proj.out_features // width
        made[path] = MemoryAttention(heads, kv_heads, width, position, top_k, temperature, chunk, capacity, dtype)
    result = structure_copy(model) if copy else model
    for path, memory in made.items():
        owner: Any = result.get_submodule(f"{path}.self_attn")
        memory.to(owner.q_proj.weight.device).attach_(owner).train(owner.training)
    return MemoryHandle(result, chosen)


def find_memory(model: nn.Module) -> MemoryHandle | None:
    """The handle of a model with memory layers (a loaded or copied one), None if it has none."""
    ending = f".self_attn.{MemoryAttention.child}"
    paths = [path.removesuffix(ending) for path, module in model.named_modules() if isinstance(module, MemoryAttention)]
    return MemoryHandle(model, paths) if paths else None
