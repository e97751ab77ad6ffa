"""How much each layer's attention changes the residual stream of one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import evaluating
from layerwright.core.capture import first_tensor, watch_outputs
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers

__all__ = ["PromptSimilarity", "attention_prompt_similarity", "attention_sites", "watch_attention_steps"]

SeeStep = Callable[[str, Tensor, Tensor], None]
"""``see(block, stream before, stream after)``, both ``(batch, tokens, hidden)``."""


def attention_sites(model: nn.Module, blocks: tuple[str, ...] | list[str]) -> dict[str, str]:
    """Path of each attention module inside `blocks` to the path of its block, in order."""
    found = {}
    for ref in list_layers(model):
        inside = [path for path in blocks if ref.path.startswith(path + ".")]
        if ref.kind == "attention" and inside:
            found[ref.path] = inside[0]
    return found


@contextmanager
def watch_attention_steps(model: nn.Module, sites: dict[str, str], see: SeeStep) -> Iterator[None]:
    """Context: `see` is called with the stream before and after each attention of `sites` (see `attention_sites`).

    The attention's share is its output added to the block's input.
    """
    streams: dict[str, Tensor] = {}

    def before(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            streams[path] = first_tensor(args or kwargs)

        return hook

    def after(path: str, _args: Any, output: Any) -> None:
        stream, change = streams.get(sites[path]), first_tensor(output)
        if stream is not None and stream.shape == change.shape:
            see(sites[path], stream, stream + change)

    handles = [
        model.get_submodule(path).register_forward_pre_hook(before(path), with_kwargs=True)
        for path in dict.fromkeys(sites.values())
    ]
    try:
        with watch_outputs(model, list(sites), after):
            yield
    finally:
        for handle in handles:
            handle.remove()


class PromptSimilarity:
    """Collects the similarity of a prompt while the model reads it: use `watch` around the forward.

    Args:
        model: a decoder.
        attention_mask: ``(batch, tokens)``, 0 for padding, which does not count; None counts everything.
        row: the one row of the batch that counts, as in the published code; None takes the mean over rows.
    """

    def __init__(self, model: nn.Module, attention_mask: Tensor | None = None, row: int | None = None) -> None:
        stacks = [stack for stack in find_blocks(model) if stack.role == "decoder"]
        if not stacks:
            raise InputError(f"{type(model).__name__} has no decoder whose attention keeps a cache")
        self.model, self.row, self.mask = model, row, attention_mask
        self.blocks = [name for stack in stacks for name in stack.names]
        self._found: dict[str, float] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context of the forward."""
        with watch_attention_steps(self.model, attention_sites(self.model, self.blocks), self._see):
            yield

    def _see(self, block: str, before: Tensor, after: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        mask = torch.ones_like(cosine) if self.mask is None else self.mask.to(cosine)
        if mask.shape != cosine.shape:
            raise InputError(f"attention_mask: got {tuple(mask.shape)}, expected {tuple(cosine.shape)}")
        rows = (cosine * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        self._found[block] = float(rows.mean() if self.row is None else rows[self.row])

    def values(self) -> Tensor:
        """``(layers,)`` float64, in the order of the layers.

        Raises:
            InputError: the model was not run, or its attention is not seen.
        """
        missing = [block for block in self.blocks if block not in self._found]
        if missing:
            raise InputError(f"similarity: no attention seen in {', '.join(missing[:3])}; run the model inside watch()")
        return torch.tensor([self._found[block] for block in self.blocks], dtype=torch.float64)


@torch.no_grad()
def attention_prompt_similarity(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, row: int | None = None
) -> Tensor:
    """Cosine of the residual stream before and after each layer's attention on a prompt: ``(layers,)``, higher where
    attention does less.

    The mean over the tokens that are no padding, then over the batch. Source: SqueezeAttention (Wang et al., 2024,
    arXiv 2404.04793).

    Args:
        model: left as it is.
        input_ids: ``(batch, tokens)``.
        attention_mask: ``(batch, tokens)``, 0 for padding.
        row: the one row that counts (0 in the published code); None for all.

    Raises:
        InputError: no decoder.
    """
    found = PromptSimilarity(model, attention_mask, row)
    with evaluating(model), found.watch():
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return found.values()
