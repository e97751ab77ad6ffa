"""A linear layer with a mixture of low-rank experts, chosen token by token (AdaMoLE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwright.core.errors import InputError
from layerwright.nn.expert_routing import ExpertRouting
from layerwright.nn.lora import LoraLinear, base_from_spec, base_spec, linear_sides
from layerwright.nn.lora_experts import BalanceOn, LoRAExperts, experts_from
from layerwright.nn.routed import RoutedTokens

__all__ = ["ExpertUsage", "LoRAMixture", "MixtureCalls", "NotMergeableError"]


class NotMergeableError(InputError, NotImplementedError):
    """A change that depends on the input cannot be taken up into a weight."""


@dataclass(frozen=True)
class ExpertUsage:
    """How the experts of one layer were used.

    Attributes:
        tokens: that were counted.
        shares: of the tokens that each expert served, ``(experts,)``.
        weights: mean weight of each expert over all tokens.
        active: share of the tokens that 0, 1, ... experts served, ``(experts + 1,)``.
    """

    tokens: int
    shares: tuple[float, ...]
    weights: tuple[float, ...]
    active: tuple[float, ...]

    @property
    def mean_active(self) -> float:
        """Experts of a token on average."""
        return sum(number * share for number, share in enumerate(self.active))

    @property
    def std_active(self) -> float:
        """Standard deviation of the number of experts over the tokens."""
        mean = self.mean_active
        return float(sum(share * (number - mean) ** 2 for number, share in enumerate(self.active))) ** 0.5


@dataclass
class MixtureCalls:
    """What the mixtures of one model know about the present call.

    A layer's losses belong to the call of the whole model in which they arise. What runs outside such a call, as
    gradient checkpointing does when it computes a block again for the backward pass, is neither recorded nor counted.

    Attributes:
        tokens: which tokens are padding.
        mask: leave padding out of losses and counts.
        following: whether a model tells when it is called; a layer by itself keeps its last call.
        inside: a call is going on.
        number: of the call.
        gradients: whether they were enabled when it began.
        lost: a layer ran without gradients although they were enabled: reentrant checkpointing.
        hooks: on the model.
    """

    tokens: RoutedTokens = field(default_factory=RoutedTokens)
    mask: bool = True
    following: bool = False
    inside: bool = False
    number: int = 0
    gradients: bool = False
    lost: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)

    def follow(self, model: nn.Module) -> None:
        """Be told about the calls of `model`."""
        self.following = True
        self.hooks = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def release(self) -> None:
        """Take the hooks out."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.following, self.inside = [], False, False

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hook before the model's forward."""
        self.tokens.see(model, args, kwargs)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            self.tokens.attention_mask = None  # it is the encoder's, and would be taken for the decoder's
        self.inside, self.gradients, self.lost = True, torch.is_grad_enabled(), False
        self.number += 1

    def after(self, *_: Any) -> None:
        """Hook after the model's forward, also when it failed."""
        self.inside = False

    def real(self, x: Tensor) -> Tensor | None:
        """Which rows of `x` ``(..., features)`` are no padding; None where nothing is known."""
        mask = self.tokens.attention_mask
        if not self.mask or mask is None:
            return None
        if x.dim() == 3:
            return self.tokens.real(x[..., 0]).reshape(-1)
        rows = x.shape[:-1].numel()
        return mask.reshape(-1).to(x.device) if mask.numel() == rows else None


class LoRAMixture(nn.Module):
    """``y = base(x) + sum_i w_i(x) E_i(x)`` with `base` frozen and low-rank experts `E_i` (Liu and Luo, 2024, AdaMoLE,
    arXiv 2405.00361).

    See `LoRAExperts` for the experts and the arguments. Routing is by token, all leading axes flattened. Several named
    sets of experts can stand beside one layer; one is active. A new one changes nothing: its `B` is zero.

    Args:
        base: a linear layer, GPT-2's ``Conv1D``, or a layer with a treated weight.
        name: of this set of experts.
        dispatch: compute each expert for its own tokens instead of all in two stacked products.

    Raises:
        InputError: no linear layer, or a setting outside its range.
    """

    def __init__(
        self,
        base: nn.Module,
        num_experts: int = 8,
        rank: int = 4,
        alpha: float = 16.0,
        dropout: float = 0.05,
        routing: ExpertRouting = "adaptive",
        top_k: int | None = None,
        max_threshold: float | None = None,
        balance_on: BalanceOn = "margin",
        *,
        name: str = "default",
        dispatch: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if linear_sides(base) is None:
            raise InputError(f"base: got {type(base).__name__}, expected a linear layer")
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str = name
        self.enabled, self.dispatch = True, dispatch
        self.calls = MixtureCalls()
        self._forget()
        settings: dict[str, Any] = {"num_experts": num_experts, "rank": rank, "alpha": alpha, "dropout": dropout}
        settings["routing"] = routing
        settings |= {"top_k": top_k, "max_threshold": max_threshold, "balance_on": balance_on}
        self.add(name, settings, generator)

    def add(
        self, name: str, settings: Mapping[str, Any] | None = None, generator: torch.Generator | None = None
    ) -> LoRAExperts:
        """Put another set of experts called `name` beside the layer; `settings` as the constructor's.

        Raises:
            InputError: the name is taken or no name, or a setting outside its range.
        """
        if not name or "." in name or hasattr(self.adapters, name):
            raise InputError(f"name: got {name!r}, expected a new name without dots")
        out_features, in_features = linear_sides(self.base) or (0, 0)
        device = next((t.device for t in (*self.base.parameters(), *self.base.buffers())), torch.device("cpu"))
        made = experts_from(settings or {}, in_features, out_features, generator=generator, device=device)
        self.adapters[name] = made.train(self.training)
        return made

    @property
    def experts(self) -> LoRAExperts | None:
        """The active experts, None if this layer has none of that name."""
        if self.active not in self.adapters:
            return None
        found = self.adapters[self.active]
        assert isinstance(found, LoRAExperts)
        return found

    @property
    def lora_A(self) -> nn.Parameter | None:  # noqa: N802 - by this name adapters are recognised
        """Of the active experts."""
        return None if self.experts is None else self.experts.lora_A

    @property
    def lora_B(self) -> nn.Parameter | None:  # noqa: N802
        """Of the active experts."""
        return None if self.experts is None else self.experts.lora_B

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return (linear_sides(self.base) or (0, 0))[1]

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return (linear_sides(self.base) or (0, 0))[0]

    @property
    def losses(self) -> tuple[Tensor, ...]:
        """Balancing losses of the last call, one for each time that the layer ran; none in evaluation mode."""
        stale = self.calls.following and self._seen != self.calls.number
        return tuple(self._losses) if self.training and not stale else ()

    @property
    def aux_loss(self) -> Tensor:
        """Sum of `losses`; 0 without a graph in evaluation mode and before any call."""
        weight = next(iter(self.parameters()), torch.zeros(()))
        return torch.stack(self.losses).sum() if self.losses else torch.zeros((), device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """`x` ``(..., in)`` to ``(..., out)``, in the base's output dtype."""
        y: Tensor = self.base(x)
        experts = self.experts
        if experts is None or not self.enabled:
            return y
        rows = x.reshape(-1, x.shape[-1]).to(experts.lora_A.dtype)
        choice = experts.choose(rows)
        # Checkpointing computes a block again, and must find the same graph: the loss is computed there too, not kept.
        loss = experts.balance(choice, self.calls.real(x)) if self.training else None
        if not self.calls.following or self.calls.inside:
            self._record(experts, x, choice.weights.detach(), choice.selected)
            if loss is not None:
                self._losses.append(loss)
                if self.calls.gradients and not torch.is_grad_enabled():
                    self.calls.lost = True
        change = experts.change(rows, choice, dispatch=self.dispatch)
        return y + change.reshape(y.shape).to(y.dtype)

    def usage(self) -> ExpertUsage | None:
        """How the active experts were used since `reset`; None before any token."""
        if self._counts is None:
            return None
        sums, weights, histogram = (value.double().cpu() for value in self._counts)
        tokens = float(histogram.sum())
        if not tokens:
            return None
        shares = (tuple((value / tokens).tolist()) for value in (sums, weights, histogram))
        return ExpertUsage(int(tokens), *shares)

    def reset(self) -> None:
        """Count from zero."""
        self._counts: tuple[Tensor, Tensor, Tensor] | None = None

    def merged(self, *, dequantize: bool = False) -> nn.Module:
        """A plain layer that computes the same: with one expert, whose weight is 1 for every token.

        Raises:
            NotMergeableError: several experts; their weights depend on the input.
            InputError: a packed base, and not `dequantize`.
        """
        experts = self.experts
        if experts is None:
            return self.base
        if experts.num_experts > 1:
            raise NotMergeableError(
                f"merge: {experts.num_experts} experts are mixed by weights that depend on the input, which no single "
                "weight can stand for: keep the adapter"
            )
        own = torch.Generator(experts.lora_A.device)  # what it draws is overwritten
        plain = LoraLinear(self.base, experts.rank, experts.alpha, own)
        with torch.no_grad():
            plain.lora_A.copy_(experts.lora_A)
            plain.lora_B.copy_(experts.lora_B)
        return plain.merged(dequantize=dequantize)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        adapters = {name: made.settings for name, made in self.adapters.items() if isinstance(made, LoRAExperts)}
        return {"type": "lora_mixture", "active": self.active, "adapters": adapters, "base": base_spec(self.base)}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> LoRAMixture:
        """A layer of that form with uninitialised weights, for a state dict to fill."""
        (first, settings), *others = spec["adapters"].items()
        own = torch.Generator()  # what it draws is overwritten
        made = cls(base_from_spec(spec["base"]), **settings, name=first, generator=own)
        for name, more in others:
            made.add(name, more, own)
        made.active = spec["active"]
        return made

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"active={self.active!r}{'' if self.enabled else ', disabled'}"

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"_losses": [], "last_weights": None, "last_selected": None}  # graphs cannot be copied
        return {**self.__dict__, **kept}

    def _forget(self) -> None:
        self._losses: list[Tensor] = []
        self._seen = -1
        self.last_weights: Tensor | None = None
        self.last_selected: Tensor | None = None
        self.reset()

    @torch.no_grad()
    def _record(self, experts: LoRAExperts, x: Tensor, weights: Tensor, selected: Tensor) -> None:
        if not self.calls.following or self._seen != self.calls.number:
            self._losses = []
        self._seen = self.calls.number
        self.last_weights, self.last_selected = weights, selected
        real = self.calls.real(x)
        counted = weights.new_ones(len(weights)) if real is None else real.to(weights.dtype)
        active = selected.sum(-1)
        histogram = weights.new_zeros(experts.num_experts + 1).scatter_add_(0, active, counted)
        new = ((selected * counted[:, None]).sum(0), (weights * counted[:, None]).sum(0), histogram)
        if self._counts is not None and self._counts[0].shape == new[0].shape:
            new = (self._counts[0] + new[0], self._counts[1] + new[1], self._counts[2] + new[2])
        self._counts = new
