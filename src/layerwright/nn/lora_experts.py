"""Low-rank experts beside one linear layer, and the gate that mixes them by token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn.expert_routing import (
    ExpertChoice,
    ExpertRouting,
    balance_loss,
    choose_above,
    choose_adaptive,
    choose_top,
)

__all__ = ["BalanceOn", "LoRAExperts"]

BalanceOn = Literal["margin", "probability"]
_SETTINGS = ("num_experts", "rank", "alpha", "dropout", "routing", "top_k", "max_threshold", "balance_on")


class LoRAExperts(nn.Module):
    """``sum_i w_i(x) (alpha / rank) B_i A_i x``, the change that a mixture of low-rank adapters makes.

    The experts are stacked: rows ``i rank .. (i + 1) rank`` of `lora_A` ``(experts * rank, in)`` and the same columns of
    `lora_B` ``(out, experts * rank)`` are expert `i`. `A` is drawn as `nn.Linear` draws its weight, `B` is zero. The
    gate `lora_gate` ``(experts, in)`` and the threshold network `lora_threshold` ``(1, in)``, `lora_offset` ``(1,)`` are
    drawn likewise. All are float32; routing is computed in float32 at least.

    Args:
        in_features, out_features: of the layer.
        num_experts: at least 1.
        rank: of each expert, at least 1.
        alpha: an expert is scaled by ``alpha / rank``.
        dropout: share of the inputs that are zeroed in training, from 0 to below 1; one draw for all experts of a token
            on the stacked path, one for each expert with `dispatch`.
        routing: ``adaptive``: threshold ``max_threshold * sigmoid(x w + b)`` of each token, weights by margins.
            ``threshold``: the same for all tokens, weights by probabilities. ``top-k``. ``none``: plain LoRA, one expert.
        top_k: experts of a token with ``top-k``, 2 by default.
        max_threshold: above 0, at most 1; by default ``1 / num_experts``: then a token always has an expert.
        balance_on: mean margins (so the released code) or mean probabilities in the balancing loss; margins are only
            known to ``adaptive``.
        generator: draws the parameters.

    Raises:
        InputError: a setting outside its range, or two that exclude each other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int = 8,
        rank: int = 4,
        alpha: float = 16.0,
        dropout: float = 0.05,
        routing: ExpertRouting = "adaptive",
        top_k: int | None = None,
        max_threshold: float | None = None,
        balance_on: BalanceOn = "margin",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check(num_experts, rank, alpha, dropout, routing, top_k, max_threshold, balance_on)
        self.num_experts, self.rank, self.alpha, self.dropout = num_experts, rank, float(alpha), float(dropout)
        self.routing, self.balance_on = routing, balance_on
        self.top_k = (top_k or min(2, num_experts)) if routing == "top-k" else None
        takes = routing in ("adaptive", "threshold")
        self.max_threshold = (max_threshold or 1 / num_experts) if takes else None
        self.lora_A = nn.Parameter(torch.empty(num_experts * rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, num_experts * rank, device=device))
        drawn = [self.lora_A]
        self.lora_gate = self.lora_threshold = self.lora_offset = None
        if routing != "none":
            self.lora_gate = nn.Parameter(torch.empty(num_experts, in_features, device=device))
            drawn.append(self.lora_gate)
        if routing == "adaptive":
            self.lora_threshold = nn.Parameter(torch.empty(1, in_features, device=device))
            self.lora_offset = nn.Parameter(torch.empty(1, device=device))
            drawn += [self.lora_threshold, self.lora_offset]
        if self.lora_A.device.type != "meta":
            bound = 1 / math.sqrt(in_features)
            with torch.no_grad():
                for parameter in drawn:
                    values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(values)

    @property
    def scaling(self) -> float:
        """Factor of every expert."""
        return self.alpha / self.rank

    @property
    def settings(self) -> dict[str, Any]:
        """What the constructor takes beside the sizes, as plain data."""
        return {name: getattr(self, name) for name in _SETTINGS}

    def choose(self, rows: Tensor) -> ExpertChoice:
        """The gate's decision for `rows` ``(tokens, in)``, in the adapters' dtype, float32 at least.

        The sigmoid is kept a few units in the last place below 1, as it is in exact arithmetic: with the default
        `max_threshold` every token has an expert, also where rounding would give a threshold above all probabilities.
        """
        if self.lora_gate is None:
            weights = torch.ones(rows.shape[0], 1, dtype=self.lora_A.dtype, device=rows.device)
            return ExpertChoice(weights, weights > 0, weights, weights)
        logits = F.linear(rows, self.lora_gate)
        probabilities = F.softmax(_wide(logits), dim=-1)
        if self.routing == "top-k":
            return choose_top(probabilities, self.top_k or 1)
        assert self.max_threshold is not None
        if self.routing == "threshold":
            return choose_above(probabilities, self.max_threshold)
        assert self.lora_threshold is not None
        heights = torch.sigmoid(_wide(F.linear(rows, self.lora_threshold, self.lora_offset)))
        heights = heights.clamp(max=1 - 16 * torch.finfo(heights.dtype).eps)
        return choose_adaptive(probabilities, self.max_threshold * heights)

    def change(self, rows: Tensor, choice: ExpertChoice, *, dispatch: bool = False) -> Tensor:
        """What the chosen experts add, ``(tokens, out)``, for `rows` ``(tokens, in)`` in the adapters' dtype.

        All experts in two stacked products, ``experts * rank * (in + out)`` multiply-adds a token; with `dispatch` each
        expert by itself for its own tokens, which pays where experts are large and few serve a token.
        """
        weights = (self.scaling * choice.weights).to(rows.dtype)
        if dispatch:
            return self._dispatched(rows, weights, choice.selected)
        inner = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A)
        inner = inner.unflatten(-1, (self.num_experts, self.rank)) * weights[..., None]
        return F.linear(inner.flatten(-2), self.lora_B)

    def _dispatched(self, rows: Tensor, weights: Tensor, selected: Tensor) -> Tensor:
        result = rows.new_zeros(rows.shape[0], self.lora_B.shape[0])
        thin, wide = self.lora_A.split(self.rank), self.lora_B.split(self.rank, dim=1)
        for number in range(self.num_experts):
            chosen = selected[:, number].nonzero().squeeze(1)
            own = F.dropout(rows.index_select(0, chosen), self.dropout, self.training)
            added = F.linear(F.linear(own, thin[number]), wide[number])
            result = result.index_add(0, chosen, added * weights[chosen, number, None])
        return result

    def balance(self, choice: ExpertChoice, real: Tensor | None = None) -> Tensor:
        """`balance_loss` of a decision, over the tokens that are `real` ``(tokens,)``; 0 for plain LoRA."""
        if self.routing == "none":
            return choice.weights.new_zeros(())
        scores = choice.scores if self.balance_on == "margin" else choice.probabilities
        return balance_loss(choice.selected, scores, real)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check(
    num_experts: int,
    rank: int,
    alpha: float,
    dropout: float,
    routing: str,
    top_k: int | None,
    max_threshold: float | None,
    balance_on: str,
) -> None:
    if num_experts < 1:
        raise InputError(f"num_experts: got {num_experts}, expected at least 1")
    if rank < 1:
        raise InputError(f"rank: got {rank}, expected at least 1")
    if not 0 < alpha < math.inf:
        raise InputError(f"alpha: got {alpha}, expected a positive number")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout: got {dropout}, expected a share from 0 to below 1")
    for name, given, known in (
        ("routing", routing, get_args(ExpertRouting)),
        ("balance_on", balance_on, get_args(BalanceOn)),
    ):
        if given not in known:
            raise unknown_name(name, str(given), known)
    if top_k is not None and max_threshold is not None:
        raise InputError("top_k and max_threshold exclude each other: give the one that belongs to the routing")
    if top_k is not None and routing != "top-k":
        raise InputError(f"top_k: got {top_k} with routing={routing!r}, expected routing='top-k'")
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise InputError(f"top_k: got {top_k}, expected 1 to num_experts ({num_experts})")
    if max_threshold is not None and routing not in ("adaptive", "threshold"):
        raise InputError(f"max_threshold: got {max_threshold} with routing={routing!r}, which has no threshold")
    if max_threshold is not None and not 0 < max_threshold <= 1:
        raise InputError(f"max_threshold: got {max_threshold}, expected above 0 and at most 1")
    if routing == "none" and num_experts != 1:
        raise InputError(f"num_experts: got {num_experts} with routing='none', which is plain LoRA: expected 1")


def experts_from(settings: Mapping[str, Any], in_features: int, out_features: int, **more: Any) -> LoRAExperts:
    """Experts of those `settings`, as `LoRAExperts.settings` gives them."""
    return LoRAExperts(in_features, out_features, **dict(settings), **more)
