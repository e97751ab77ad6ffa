"""Low-rank adapters on every linear layer of the blocks, through peft where peft knows the layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from layerwright.core.calibration import Calibration, LossFunction
from layerwright.core.errors import InputError, require_extra, unknown_name
from layerwright.core.layers import list_layers
from layerwright.core.option import Scores
from layerwright.nn.lora import LoraLinear, linear_sides
from layerwright.nn.treated import TreatedLinear
from layerwright.tune._loop import Progress, opening, restore_flags_, train_, trainable_copy

__all__ = ["Adapted", "attach_lora", "lora", "lora_targets", "ranks_for"]


@dataclass(frozen=True)
class Adapted:
    """A frozen copy of a model with adapters.

    Attributes:
        model: what is called and trained: a ``PeftModel``, or the copy itself where peft does not know its layers.
        copy: the copy inside, with the block paths of the original.
        peft: whether peft holds the adapters.
    """

    model: nn.Module
    copy: nn.Module
    peft: bool

    def merged(self, *, dequantize: bool = False) -> nn.Module:
        """The copy with the adapters taken up into its weights; `model` must not be used afterwards.

        Raises:
            InputError: a packed weight, and not `dequantize`.
        """
        if self.peft:
            merged: nn.Module = self.model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
            for name in ("peft_config", "active_adapter"):
                merged.__dict__.pop(name, None)
            return merged
        for path, module in list(self.copy.named_modules()):
            if isinstance(module, LoraLinear):
                _put_(self.copy, path, module.merged(dequantize=dequantize).train(module.training))
        return self.copy

    def handed_back(self, original: nn.Module, *, merge: bool, dequantize: bool) -> nn.Module:
        """What a tuner returns: `model`, or with `merge` the merged copy with the flags of `original`."""
        if not merge:
            return self.model
        merged = self.merged(dequantize=dequantize)
        restore_flags_(merged, original)
        return merged


def lora(
    model: nn.Module,
    calibration: Calibration | Any,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    rank: int = 8,
    alpha: float = 16.0,
    steps: int = 100,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    batches_per_step: int = 1,
    clip: float = 1.0,
    merge: bool = True,
    dequantize: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    sensitivities: Scores | Mapping[str, float] | None = None,
    targets: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    bias: Literal["none", "lora_only"] = "none",
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model` recovered by low-rank adapters (Hu et al., 2021, arXiv 2106.09685), trained on its labels.

    Args:
        model: left untouched; the copy shares the tensors of the frozen weights until they are merged.
        calibration: batches with labels, or with a loss function.
        teacher: not used; every tuner takes one.
        loss_fn: ``loss_fn(model, batch) -> scalar``, where batches have no labels.
        rank, alpha: of the adapters; the change is scaled by ``alpha / rank``.
        merge: take the adapters up into the weights. False returns the ``PeftModel`` (``save_pretrained`` writes the
            adapter alone), or, over packed weights, the model with `LoraLinear` layers.
        dequantize: with `merge`, make packed weights dense so that they can be merged.
        rank_pattern: rank by layer path, for some layers.
        sensitivities: by layer or block path; ranks are then shared out in proportion (see `ranks_for`).
        targets: layer paths, or their last names (``q_proj``); ``ff`` for the feed-forward layers, ``attention`` for
            the query and value projections; by default every linear layer in the blocks.
        dropout: share of an adapter's inputs that are zeroed in training, 0 to below 1; not over packed weights.
        bias: ``lora_only`` trains the biases of the layers with adapters too; not over packed weights.
        seed, steps, learning_rate, weight_decay, warmup, batches_per_step, clip: see `Schedule`.
        progress: ``progress(name, done, total)``.

    Raises:
        InputError: no such layer, packed weights that cannot be merged, a setting outside its range, a loss that is
            not finite.
        MissingExtraError: peft is not installed and the model has no packed layers.
    """
    del teacher
    data, schedule = opening(
        calibration, loss_fn, steps, learning_rate, weight_decay, warmup, batches_per_step, clip, seed
    )
    adapted = attach_lora(
        model,
        rank=rank,
        alpha=alpha,
        seed=seed,
        rank_pattern=rank_pattern,
        sensitivities=sensitivities,
        targets=targets,
        dropout=dropout,
        bias=bias,
        merge=merge and not dequantize,
    )
    train_(adapted.model, list(data), data.loss, schedule, progress=progress, name="LoRA")
    return adapted.handed_back(model, merge=merge, dequantize=dequantize)


def attach_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    rank_pattern: Mapping[str, int] | None = None,
    sensitivities: Scores | Mapping[str, float] | None = None,
    targets: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    bias: Literal["none", "lora_only"] = "none",
    merge: bool = False,
) -> Adapted:
    """A frozen copy of `model` with fresh adapters, which change nothing yet; see `lora` for the arguments.

    Raises:
        InputError: as `lora`; with `merge`, packed weights are refused here, before any training.
    """
    if not 0 <= dropout < 1:
        raise InputError(f"dropout: got {dropout}, expected a share from 0 to below 1")
    if bias not in ("none", "lora_only"):
        raise unknown_name("bias", bias, ("none", "lora_only"))
    paths = lora_targets(model, targets)
    ranks = dict.fromkeys(paths, rank)
    if sensitivities is not None:
        ranks = ranks_for(model, paths, sensitivities, rank)
    for path, value in (rank_pattern or {}).items():
        if path not in ranks:
            raise unknown_name("layer", path, paths, "rank_pattern")
        ranks[path] = value
    low = [path for path, value in ranks.items() if value < 1]
    if low:
        raise InputError(f"rank: got {ranks[low[0]]} for {low[0]}, expected at least 1")
    packed = [path for path in paths if isinstance(model.get_submodule(path), TreatedLinear)]
    if packed and merge:
        raise InputError(
            f"merge: {packed[0]} and {len(packed) - 1} more layers hold packed weights that cannot take up an adapter: "
            "keep the adapter (merge=False), or make the weights dense (dequantize=True)"
        )
    if packed and (dropout or bias != "none"):
        raise InputError(f"dropout, bias: {packed[0]} holds packed weights; leave both settings out there")
    biases = {f"{path}.bias" for path in paths} if bias == "lora_only" else set()
    copy = trainable_copy(model, lambda name, _tensor: name in biases)
    if packed:
        return _attach_own(copy, ranks, alpha / rank, seed)
    return _attach_peft(copy, ranks, rank, alpha, seed, dropout, bias)


GROUPS = {"ff": ("up", "gate", "gate_up", "down"), "attention": ("q", "v", "qkv")}
"""Names for `targets`, and the roles of the layers that they stand for."""


def lora_targets(model: nn.Module, targets: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Paths of the layers that get adapters: the linear layers of the blocks (all linear layers but the head where
    there are no blocks), or those among them that `targets` names by path, by last name or by one of `GROUPS`.

    Raises:
        InputError: there are none, or a target is no such layer.
    """
    refs = list_layers(model)
    modules = dict(model.named_modules())
    kinds = ("linear", "head") if targets is not None else ("linear",)
    linear = [
        ref
        for ref in refs
        if ref.kind in kinds and ref.role != "router" and ref.path in modules and linear_sides(modules[ref.path])
    ]
    inside = [ref.path for ref in linear if ref.block is not None] or [ref.path for ref in linear]
    if not inside:
        raise InputError(f"{type(model).__name__} has no linear layer in its blocks to put an adapter on")
    if targets is None:
        return tuple(inside)
    known = [ref.path for ref in linear]
    chosen: list[str] = []
    for target in [targets] if isinstance(targets, str) else targets:
        roles = GROUPS.get(target, ())
        found = [
            ref.path for ref in linear if ref.role in roles or ref.path == target or ref.path.endswith(f".{target}")
        ]
        if not found:
            raise unknown_name(
                "layer", target, {*known, *(path.rpartition(".")[2] for path in known), *GROUPS}, "targets"
            )
        chosen += found
    return tuple(dict.fromkeys(chosen))


def ranks_for(
    model: nn.Module, paths: Sequence[str], sensitivities: Scores | Mapping[str, float], rank: int
) -> dict[str, int]:
    """Ranks by layer in proportion to sensitivity, `rank` on average, from 1 to four times `rank`.

    A layer without a number of its own takes that of the module around it; without any, the mean.

    Raises:
        InputError: no number belongs to any of `paths`, or one is negative or not finite.
    """
    numbers = sensitivities.sensitivities if isinstance(sensitivities, Scores) else sensitivities
    found = {path: _nearest(path, numbers) for path in paths}
    known = [value for value in found.values() if value is not None]
    if not known or any(not 0 <= value < float("inf") for value in known):
        raise InputError("sensitivities: expected numbers >= 0 by the path of layers or blocks of this model")
    mean = sum(known) / len(known)
    ranks: dict[str, int] = {}
    for path, value in found.items():
        share = 1.0 if value is None or mean == 0 else value / mean
        sides = linear_sides(model.get_submodule(path))
        assert sides is not None
        ranks[path] = max(1, min(round(rank * share), 4 * rank, *sides))
    return ranks


def _nearest(path: str, numbers: Mapping[str, float]) -> float | None:
    while path:
        if path in numbers:
            return float(numbers[path])
        path = path.rpartition(".")[0]
    return None


def _attach_own(copy: nn.Module, ranks: Mapping[str, int], scaling: float, seed: int) -> Adapted:
    generator = torch.Generator().manual_seed(seed)
    for path, rank in ranks.items():
        base = copy.get_submodule(path)
        _put_(copy, path, LoraLinear(base, rank, scaling * rank, generator).train(base.training))
    return Adapted(copy, copy, False)


def _attach_peft(
    copy: nn.Module, ranks: Mapping[str, int], rank: int, alpha: float, seed: int, dropout: float, bias: str
) -> Adapted:
    peft = require_extra("peft", "tune")
    other = {path: value for path, value in ranks.items() if value != rank}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern={path: alpha * value / rank for path, value in other.items()},
        lora_dropout=dropout,
        bias=bias,
        task_type=_task(copy),
    )
    training = copy.training
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Conv1D's orientation, which peft then sets itself
        torch.manual_seed(seed)  # within the fork: the caller's generator goes on undisturbed
        wrapped: nn.Module = peft.get_peft_model(copy, config)
    return Adapted(wrapped.train(training), copy, True)


def _task(model: nn.Module) -> str | None:
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"  # type: ignore[union-attr]


def _put_(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
