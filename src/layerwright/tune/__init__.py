"""Recover quality after treatment: `TUNERS` by name, each ``tuner(model, calibration, *, teacher, seed, ...) -> model``.
- `TDASS`, `train_target_domain_`: speech of a voice with few samples, taught by others (TDASS).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from layerwright.core.registry import Registry
from layerwright.tune.adaquant import AdaQuant
from layerwright.tune.alpha_divergence import alpha_divergence
from layerwright.tune.bias_tune import bias_tune
from layerwright.tune.crossbatch import CrossBatchLoader, focus_schedule
from layerwright.tune.distill import distill, distill_layers
from layerwright.tune.evolq import EvolQ
from layerwright.tune.feature_cache import FeatureCache
from layerwright.tune.full import full
from layerwright.tune.lora import lora
from layerwright.tune.mixture import MixtureHandle, attach_lora_mixture, find_mixture
from layerwright.tune.mixture_files import load_adapter, save_adapter
from layerwright.tune.multi_exit import MultiExitDistillation
from layerwright.tune.renormalize import renormalize
from layerwright.tune.subtune import subtune
from layerwright.tune.supernet import Supernet, sandwich_step
from layerwright.tune.target_domain import TDASS, train_target_domain_

__all__ = [
    "TDASS",
    "TUNERS",
    "AdaQuant",
    "CrossBatchLoader",
    "EvolQ",
    "FeatureCache",
    "MixtureHandle",
    "MultiExitDistillation",
    "Supernet",
    "alpha_divergence",
    "attach_lora_mixture",
    "bias_tune",
    "distill",
    "distill_layers",
    "find_mixture",
    "focus_schedule",
    "full",
    "load_adapter",
    "lora",
    "renormalize",
    "sandwich_step",
    "save_adapter",
    "subtune",
    "train_target_domain_",
]

TUNERS: Registry[Callable[..., nn.Module]] = Registry("tuner")
"""Tuners by name; targets are imported when first used."""

for _name, _target in {
    "adamole": "layerwright.tune.adamole:adamole",
    "cost_eff": "layerwright.tune.cost_eff:cost_eff",
    "acm": "layerwright.tune.acm:acm",
    "peer": "layerwright.tune.peer:peer",
    "adaquant": "layerwright.tune.recover:adaquant_tuner",
    "bias_tune": "layerwright.tune.recover:bias_tuner",
    "distill": "layerwright.tune.distill:distill",
    "dlo": "layerwright.tune.dlo:dlo",
    "evolq": "layerwright.tune.evolq:evolq_tuner",
    "distill_layers": "layerwright.tune.distill:distill_layers",
    "full": "layerwright.tune.full:full",
    "lora": "layerwright.tune.lora:lora",
    "renormalize": "layerwright.tune.recover:renormalize_tuner",
    "subtuning": "layerwright.tune.subtuning:subtuning",
    "tdass": "layerwright.tune.target_domain:tdass",
    "window": "layerwright.tune.window:window",
}.items():
    TUNERS.add(_name, _target)
