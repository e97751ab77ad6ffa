"""A transformer block whose norms stand where one likes: before, after, around, or scaled by depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError, unknown_name

__all__ = ["NormPlacement", "ResidualBlock"]

NormPlacement = Literal["pre", "post", "mix", "sandwich", "deepnorm", "lns"]


class ResidualBlock(nn.Module):
    """Attention and feed-forward part on a residual stream ``(batch, tokens, dim)``.

    With ``N`` a norm and ``f`` a part, for block ``l`` of ``L``, counted from 1:

    - ``pre``: ``x + f(N(x))``;  ``post``: ``N(x + f(x))``;  ``sandwich``: ``x + N(f(N(x)))``
    - ``lns``: ``x + f(N(x) / sqrt(l))`` (LayerNorm Scaling; Sun et al., 2025, arXiv 2502.05795)
    - ``mix``: post in the first ``ceil(mix L)`` blocks, pre after (Mix-LN; Li et al., 2024, arXiv 2412.13795)
    - ``deepnorm``: ``N(alpha x + f(x))`` with ``alpha = (2 L)**(1/4)`` (Wang et al., 2022, arXiv 2203.00555); the
      projections of values, output and feed-forward part are to start ``beta = (8 L)**(-1/4)`` times as large

    Args:
        dim: features of the stream.
        attn, ffn: the parts; the first tensor of what they return counts. Keyword arguments of a call go to `attn`.
        norm_placement: see above.
        layer_index: of this block, from 1.
        num_layers: of the model.
        norm: ``norm(dim)`` makes one; by default a root-mean-square norm with ``eps=1e-6``.
        mix: share of blocks with norms after their parts, for ``mix``.

    Raises:
        InputError: an unknown placement, an index outside 1 to `num_layers`, or a share outside 0 to 1.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        ffn: nn.Module,
        norm_placement: NormPlacement = "pre",
        layer_index: int = 1,
        num_layers: int = 1,
        *,
        norm: Callable[[int], nn.Module] | None = None,
        mix: float = 0.25,
    ) -> None:
        super().__init__()
        if norm_placement not in get_args(NormPlacement):
            raise unknown_name("norm_placement", str(norm_placement), get_args(NormPlacement))
        if not 1 <= layer_index <= num_layers:
            raise InputError(f"layer_index: got {layer_index}, expected 1 to num_layers = {num_layers}")
        if not 0 <= mix <= 1:
            raise InputError(f"mix: got {mix}, expected a share of the blocks, 0 to 1")
        self.self_attn, self.mlp = attn, ffn
        self.norm_placement = norm_placement
        after = layer_index <= math.ceil(mix * num_layers)
        self.form = ("post" if after else "pre") if norm_placement == "mix" else norm_placement
        self.factor = layer_index**-0.5 if norm_placement == "lns" else 1.0
        self.alpha = (2 * num_layers) ** 0.25 if norm_placement == "deepnorm" else 1.0
        norm = partial(nn.RMSNorm, eps=1e-6) if norm is None else norm
        self.input_layernorm, self.post_attention_layernorm = norm(dim), norm(dim)
        sandwiched = norm_placement == "sandwich"
        self.attention_output_norm = norm(dim) if sandwiched else None
        self.ffn_output_norm = norm(dim) if sandwiched else None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The stream ``(batch, tokens, dim)`` after both parts."""
        x = self._part(
            hidden_states,
            lambda inner: first_tensor(
                self.self_attn(hidden_states=inner, **kwargs) if kwargs else self.self_attn(inner)
            ),
            self.input_layernorm,
            self.attention_output_norm,
        )
        return self._part(
            x, lambda inner: first_tensor(self.mlp(inner)), self.post_attention_layernorm, self.ffn_output_norm
        )

    def _part(
        self, x: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module, output_norm: nn.Module | None
    ) -> Tensor:
        if self.form in ("post", "deepnorm"):
            result: Tensor = norm(self.alpha * x + part(x))
            return result
        inner = norm(x) if self.factor == 1 else norm(x) * self.factor
        change = part(inner)
        return x + (change if output_norm is None else output_norm(change))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"norm_placement={self.norm_placement!r}"
