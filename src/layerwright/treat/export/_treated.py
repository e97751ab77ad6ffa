"""What a model holds that a format may be unable to express, in words."""

from __future__ import annotations

from torch import nn

from layerwright.nn.activation import ActivationQuantizer, InputQuantizer
from layerwright.nn.attached import Attachment
from layerwright.nn.attention_products import AttentionProducts
from layerwright.nn.factorized import FactorizedConv
from layerwright.nn.kv import CacheBudget
from layerwright.nn.mixed_rows import MixedRowLinear
from layerwright.nn.replace import structure_of
from layerwright.nn.rounded_cache import KeyValueRounding
from layerwright.nn.routed import TokenRouting
from layerwright.nn.traversed import Traversal
from layerwright.nn.w4a8 import W4A8Linear

__all__ = ["describe", "treated_layers"]


def treated_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``(layer, module)`` of every treated layer and every attachment; an attachment comes under its owner's path."""
    found = []
    for path in structure_of(model):
        module = model.get_submodule(path)
        found.append((path.rpartition(".")[0] if isinstance(module, Attachment) else path, module))
    return found


def describe(module: nn.Module) -> str:
    """What was done to a layer that became `module`, or that `module` stands beside."""
    if isinstance(module, InputQuantizer):
        return _activations(module.quantizer)
    if isinstance(module, AttentionProducts):
        kinds = {f"{name} {_grid(q)}" for name, q in module.quantizers.items() if isinstance(q, ActivationQuantizer)}
        return f"RoundAttention: {', '.join(sorted(kinds))}"
    if isinstance(module, CacheBudget):
        return f"KVBudget: {module.budget.label()}"
    if isinstance(module, TokenRouting):
        return "TokenRouting: tokens skip its feed-forward part"
    if isinstance(module, Traversal):
        return "Traversal: it runs twice on prompts"
    if isinstance(module, KeyValueRounding):
        return f"keys and values of {module.bits} bits"
    if isinstance(module, MixedRowLinear):
        return f"MixRows: rows of {' and '.join(module.spec()['rows'])} bits"
    if isinstance(module, W4A8Linear):
        return f"W4A8Linear: int{module.quantize.bits} weights with {module.act} int8 activations"
    if isinstance(module, FactorizedConv):
        return f"FactorConv: a chain of {len(module)} convolutions"
    return type(module).__name__


def _activations(quantizer: ActivationQuantizer) -> str:
    return f"RoundActivations: {_grid(quantizer)}, {'symmetric' if quantizer.symmetric else 'asymmetric'}"


def _grid(quantizer: ActivationQuantizer) -> str:
    return f"{quantizer.bits} bits {quantizer.kind} per {quantizer.share}"
