"""Put mixtures of low-rank experts on a model's layers, switch between them, take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import list_layers
from layerwright.nn.expert_routing import ExpertRouting
from layerwright.nn.lora import linear_sides
from layerwright.nn.lora_experts import BalanceOn, LoRAExperts
from layerwright.nn.lora_mixture import ExpertUsage, LoRAMixture, MixtureCalls
from layerwright.tune._loop import trainable_copy
from layerwright.tune.lora import lora_targets

__all__ = ["MixtureHandle", "attach_lora_mixture", "find_mixture", "mixture_targets"]

_ATTENTION = ("q", "k", "v", "o", "qkv")


class MixtureHandle:
    """The mixtures of a model: their losses, their use, which of several is active, and how to take them out.

    Args:
        model: with `LoRAMixture` layers in it.
        flags: which parameters required gradients before they were put in, to be restored by `detach`.
        mask: leave padding out of losses and counts, where the model is given an ``attention_mask``.
    """

    def __init__(self, model: nn.Module, flags: Mapping[str, bool] | None = None, mask: bool = True) -> None:
        self.model, self.flags = model, dict(flags or {})
        found = self.layers
        if not found:
            raise InputError(f"{type(model).__name__} has no mixture of adapters: attach_lora_mixture puts one in")
        calls = next(iter(found.values())).calls
        if not calls.following:
            calls = MixtureCalls(mask=mask)
            calls.follow(model)
        self.calls = calls
        self._link()

    @property
    def layers(self) -> dict[str, LoRAMixture]:
        """The layers with mixtures by path, in the model's order."""
        return {path: module for path, module in self.model.named_modules() if isinstance(module, LoRAMixture)}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(dict.fromkeys(name for layer in self.layers.values() for name in layer.adapters))

    @property
    def active(self) -> str:
        """Name of the adapter that is used."""
        return next(iter(self.layers.values())).active

    def experts(self, name: str | None = None) -> dict[str, LoRAExperts]:
        """The experts of one adapter (the active one) by path of the layer.

        Raises:
            InputError: no such adapter.
        """
        chosen = self._known(name)
        found = {path: layer.adapters[chosen] for path, layer in self.layers.items() if chosen in layer.adapters}
        return {path: made for path, made in found.items() if isinstance(made, LoRAExperts)}

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """Parameters of one adapter (the active one)."""
        return [parameter for made in self.experts(name).values() for parameter in made.parameters()]

    def aux_loss(self) -> Tensor:
        """Sum of the balancing losses of the last call over layers; 0 without a graph in evaluation mode.

        Raises:
            RuntimeError: the layers learn, and the whole model has not been called since; or its blocks ran under
                reentrant gradient checkpointing, which hides the gradient of this loss.
        """
        layers = list(self.layers.values())
        if self.calls.lost:
            raise RuntimeError(
                "aux_loss: reentrant gradient checkpointing hides the gradient of the balancing loss: enable it with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        device = next(iter(self.parameters()), torch.zeros(())).device
        losses = [loss.to(device) for layer in layers for loss in layer.losses]
        learning = any(layer.training and layer.enabled and layer.experts is not None for layer in layers)
        if learning and not losses:
            raise RuntimeError("aux_loss: call the model (the whole of it, in training mode) before its loss")
        return torch.stack(losses).sum() if losses else torch.zeros((), device=device)

    @contextmanager
    def learning(self) -> Iterator[nn.Module]:
        """Context: the mixtures are in training mode (dropout, losses), whatever the mode of the model."""
        modules = [part for layer in self.layers.values() for part in (layer, *layer.adapters.modules())]
        before = [module.training for module in modules]
        for module in modules:
            module.training = True
        try:
            yield self.model
        finally:
            for module, mode in zip(modules, before, strict=True):
                module.training = mode

    @contextmanager
    def disabled(self) -> Iterator[nn.Module]:
        """Context: the model without its adapters."""
        layers = list(self.layers.values())
        before = [layer.enabled for layer in layers]
        for layer in layers:
            layer.enabled = False
        try:
            yield self.model
        finally:
            for layer, state in zip(layers, before, strict=True):
                layer.enabled = state

    def add(
        self, name: str, targets: str | Sequence[str] | None = None, *, total_rank: int = 32, seed: int = 0, **more: Any
    ) -> None:
        """Put another adapter beside those that are there, and make it the active one.

        Args:
            name: new, without dots.
            targets, total_rank, seed, more: as `attach_lora_mixture`.

        Raises:
            InputError: the name is taken, or as `attach_lora_mixture`.
        """
        if name in self.names:
            raise InputError(f"name: {name!r} is taken; expected a new one")
        settings = expert_settings(total_rank, **more)
        layers = self.layers
        for path, layer in layers.items():  # so that targets mean the model's own layers
            put_module_(self.model, path, layer.base)
        try:
            paths = mixture_targets(self.model, targets)
        finally:
            for path, layer in layers.items():
                put_module_(self.model, path, layer)
        put_(self.model, paths, name, settings, seed)
        self._link()
        self.use(name)

    def use(self, name: str, trainable: bool = True) -> None:
        """Make the adapter `name` the active one; with `trainable` it alone of all adapters can be trained.

        Raises:
            InputError: no such adapter.
        """
        chosen = self._known(name)
        for layer in self.layers.values():
            layer.active = chosen
            layer.reset()
            for key, made in layer.adapters.items():
                made.requires_grad_(trainable and key == chosen)

    def remove(self, name: str) -> None:
        """Take one of several adapters out, in place; of the rest the first is active if it was.

        Raises:
            InputError: no such adapter, or it is the only one (see `detach`).
        """
        self._known(name)
        left = [other for other in self.names if other != name]
        if not left:
            raise InputError(f"name: {name!r} is the only adapter; detach() takes the last one out")
        was_active = self.active == name
        for path, layer in self.layers.items():
            if name in layer.adapters:
                del layer.adapters[name]
            if not len(layer.adapters):
                put_module_(self.model, path, layer.base)
        if was_active:
            self.use(left[0])

    def expert_usage(self) -> dict[str, ExpertUsage]:
        """How the active experts were used since `reset_usage`, by path; padding is left out where it is known."""
        found = {path: layer.usage() for path, layer in self.layers.items()}
        return {path: usage for path, usage in found.items() if usage is not None}

    def reset_usage(self) -> None:
        """Count from zero."""
        for layer in self.layers.values():
            layer.reset()

    def merge(self, *, dequantize: bool = False) -> nn.Module:
        """Take the active adapter up into the weights, in place, and all others out; returns the model.

        Raises:
            NotMergeableError: a layer has several experts; nothing is changed.
            InputError: packed weights, and not `dequantize`; nothing is changed.
        """
        merged = {
            path: layer.merged(dequantize=dequantize).train(layer.training) for path, layer in self.layers.items()
        }
        return self._put_back(merged)

    def detach(self) -> nn.Module:
        """Put the original modules back, in place; returns the model."""
        return self._put_back({path: layer.base for path, layer in self.layers.items()})

    def _put_back(self, modules: Mapping[str, nn.Module]) -> nn.Module:
        self.calls.release()
        for path, module in modules.items():
            put_module_(self.model, path, module)
        for name, parameter in self.model.named_parameters():
            if name in self.flags:
                parameter.requires_grad_(self.flags[name])
        return self.model

    def _known(self, name: str | None) -> str:
        chosen = self.active if name is None else name
        if chosen not in self.names:
            raise unknown_name("adapter", chosen, self.names)
        return chosen

    def _link(self) -> None:
        active = self.active
        for layer in self.layers.values():
            layer.calls, layer.active = self.calls, active


def attach_lora_mixture(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    *,
    total_rank: int = 32,
    num_experts: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.05,
    routing: ExpertRouting = "adaptive",
    top_k: int | None = None,
    max_threshold: float | None = None,
    balance_on: BalanceOn = "margin",
    name: str = "default",
    mask_padding: bool = True,
    seed: int = 0,
    copy: bool = True,
) -> MixtureHandle:
    """Give layers a mixture of low-rank experts, which changes nothing yet (Liu and Luo, 2024, arXiv 2405.00361).

    Args:
        model: left as it is unless `copy` is False; its own parameters are frozen in the result.
        targets: layer paths, or their last names (``q_proj``), or ``ff``, ``attention`` as in `lora_targets`; by default
            the query, key, value and output projections, or all linear layers of the blocks where there are none.
        total_rank: of all experts of a layer together; each has ``total_rank / num_experts``.
        num_experts, alpha, dropout, routing, top_k, max_threshold, balance_on: see `LoRAExperts`.
        name: of the adapter.
        mask_padding: leave tokens that the model's ``attention_mask`` excludes out of losses and counts.
        seed: of the experts' and gates' first weights.
        copy: work on a copy that shares the tensors of the frozen weights; otherwise in place.

    Raises:
        InputError: no such layers, a rank that experts cannot share evenly, a setting outside its range, or a model with
            adapters on it (`find_mixture(model).add` puts further ones beside them).
        TypeError: a target is no linear layer.
    """
    settings = expert_settings(
        total_rank,
        num_experts=num_experts,
        alpha=alpha,
        dropout=dropout,
        routing=routing,
        top_k=top_k,
        max_threshold=max_threshold,
        balance_on=balance_on,
    )
    there = next((path for path, module in model.named_modules() if hasattr(module, "lora_A")), None)
    if there is not None:
        raise InputError(f"{there} carries an adapter already: merge or detach it first, or add() to its handle")
    paths = mixture_targets(model, targets)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    if copy:
        model = trainable_copy(model, lambda _name, _tensor: False)
    model.requires_grad_(False)
    put_(model, paths, name, settings, seed)
    return MixtureHandle(model, flags, mask_padding)


def find_mixture(model: nn.Module) -> MixtureHandle:
    """The handle of a model that has mixtures on its layers, for instance one that was loaded or copied.

    Raises:
        InputError: it has none.
    """
    return MixtureHandle(model)


def mixture_targets(model: nn.Module, targets: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Paths of the layers that `targets` names; see `attach_lora_mixture`.

    Raises:
        InputError: there are none.
        TypeError: a target is a module that is no linear layer.
    """
    plain = dict(model.named_modules())
    if targets is None:
        named = [
            ref.path
            for ref in list_layers(model)
            if ref.role in _ATTENTION and ref.block is not None and linear_sides(plain.get(ref.path, model)) is not None
        ]
        return tuple(named) or lora_targets(model)
    for target in [targets] if isinstance(targets, str) else targets:
        found = [module for path, module in plain.items() if path and (path == target or path.endswith(f".{target}"))]
        if found and all(linear_sides(module) is None for module in found):
            raise TypeError(f"targets: {target!r} is a {type(found[0]).__name__}, expected linear layers")
    return lora_targets(model, targets)


def expert_settings(total_rank: int, num_experts: int = 8, **settings: Any) -> dict[str, Any]:
    """Settings of `LoRAExperts` from a rank that all experts share.

    Raises:
        InputError: they cannot share it evenly, or a setting is outside its range.
    """
    if num_experts < 1:
        raise InputError(f"num_experts: got {num_experts}, expected at least 1")
    if total_rank < 1 or total_rank % num_experts:
        raise InputError(
            f"total_rank: got {total_rank}, expected a multiple of num_experts ({num_experts}), which share it evenly"
        )
    found = {"num_experts": num_experts, "rank": total_rank // num_experts, **settings}
    return LoRAExperts(1, 1, **found, generator=torch.Generator()).settings  # checks them all before anything is built


def put_(model: nn.Module, paths: Sequence[str], name: str, settings: Mapping[str, Any], seed: int) -> None:
    """Put experts called `name` on the layers `paths`, in place; the first weights of a layer depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, LoRAMixture):
            module.add(name, settings, generator)
        else:
            wrapped = LoRAMixture(module, **settings, name=name, generator=generator)
            put_module_(model, path, wrapped.train(module.training))


def put_module_(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, in place."""
    owner, _, last = path.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
