"""Calibrate activation quantizers block by block and put them into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.capture import watch_inputs
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, read_matrix
from layerwright.core.lockstep import Lockstep
from layerwright.core.treatment import RoundActivations, RoundAttention, Treatments
from layerwright.nn.activation import ActivationQuantizer, InputQuantizer
from layerwright.nn.attached import Attachment
from layerwright.nn.attention_products import OPERANDS, AttentionProducts
from layerwright.score.gradients import output_gradients
from layerwright.score.inputs import forwards
from layerwright.treat.activations._samples import Samples
from layerwright.treat.activations.ranges import fit_quantizer

__all__ = ["norm_channels", "round_activations_"]


@dataclass(frozen=True)
class _Site:
    """A layer or an attention module whose activations are rounded."""

    path: str
    ref: LayerRef
    linear: RoundActivations | None
    attention: RoundAttention | None


def round_activations_(
    model: nn.Module,
    refs: Sequence[LayerRef],
    layers: Mapping[str, Treatments],
    calibration: Calibration,
    *,
    seed: int = 0,
) -> dict[str, str]:
    """Put activation quantizers into `model`, in place, with ranges from what the layers before them give.

    Each block is run twice on the calibration: to sample what its layers read, and, with its quantizers in place, to
    go on. Memory: one block's samples (4 MiB for each layer at most) and one set of activations.

    Args:
        model: changed in place; its weights are left alone.
        refs: `list_layers` of it.
        layers: treatments by path; only `RoundActivations` and `RoundAttention` are carried out.
        calibration: what to run.
        seed: of the sample.

    Returns:
        By path, what was put there.

    Raises:
        InputError: a layer that the calibration never reaches, values that are not finite, or an attention module
            without products (named).
    """
    sites = [site for ref in refs if (site := _site(ref, layers.get(ref.path, ()))) is not None]
    done: dict[str, str] = {}
    if not sites:
        return done
    units = _units(model, sites)
    guided = [site.ref for site in sites if site.linear is not None and site.linear.observer == "hessian"]
    moments = {p: g.moment for p, g in output_gradients(model, calibration, guided).items()} if guided else {}
    with torch.no_grad(), evaluating(model):
        for stop in Lockstep(model, list(units), forwards(model, calibration)):
            if stop.visit:
                continue
            samples = {site.path: _new_samples(site, seed) for site in units[stop.path]}
            with _Watching(model, units[stop.path], samples):
                for call in stop.calls:
                    stop.run(call)
            for site in units[stop.path]:
                quantizer = _fit(model, site, samples[site.path], moments.get(site.path))
                quantizer.attach_(model.get_submodule(site.path))
                device = next((t.device for t in model.get_submodule(site.path).parameters()), torch.device("cpu"))
                quantizer.to(device).train(model.training)
                done[site.path] = (site.linear or site.attention or RoundActivations()).label()
    missing = [site.path for site in sites if site.path not in done]
    if missing:
        raise InputError(f"{missing[0]}: the calibration data never reached it; its activations have no range")
    return done


def norm_channels(module: nn.Module) -> int:
    """Size of the last dimension of what a norm reads, 0 where its channels are another one or `module` is no norm."""
    if getattr(module, "data_format", "") == "channels_first":  # a LayerNorm over images, as ConvNeXt has it
        return 0
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm) or "norm" not in type(module).__name__.lower():
        return 0
    weight = module._parameters.get("weight")
    return weight.numel() if weight is not None and weight.dim() == 1 else 0


def _site(ref: LayerRef, treatments: Treatments) -> _Site | None:
    linear = next((t for t in treatments if isinstance(t, RoundActivations)), None)
    attention = next((t for t in treatments if isinstance(t, RoundAttention)), None)
    if linear is None and attention is None:
        return None
    if attention is not None and ref.kind != "attention":
        raise InputError(f"{ref.path}: {attention.label()} is for attention modules, this is a {ref.kind}")
    if linear is not None and ref.layout not in ("linear", "conv1d", "conv") and ref.kind != "norm":
        raise InputError(f"{ref.path}: the activations of a {ref.kind} cannot be rounded; leave it out")
    if linear is not None and linear.share != "tensor" and ref.layout == "conv":
        raise InputError(f"{ref.path}: a convolution's input has one range; got share: {linear.share}, use tensor")
    return _Site(ref.path, ref, linear, attention)


def _units(model: nn.Module, sites: Sequence[_Site]) -> dict[str, list[_Site]]:
    """Where to stop: the blocks that hold the sites, or the sites themselves."""
    try:
        blocks = [name for stack in find_blocks(model) for name in stack.names]
    except InputError:
        blocks = []
    units: dict[str, list[_Site]] = {}
    for site in sites:
        inside = next((name for name in blocks if site.path == name or site.path.startswith(name + ".")), None)
        units.setdefault(inside or site.path, []).append(site)
    return units


def _new_samples(site: _Site, seed: int) -> dict[str, Samples]:
    names = OPERANDS if site.attention is not None else ("input",)
    return {name: Samples(seed=seed) for name in names}


class _Watching(ExitStack):
    """Context: samples of every site are filled while its block runs."""

    def __init__(self, model: nn.Module, sites: Sequence[_Site], samples: Mapping[str, dict[str, Samples]]) -> None:
        super().__init__()
        linear = [site for site in sites if site.linear is not None]

        def see(ref: LayerRef, x: Tensor, _expert: int | None) -> None:
            # A convolution's channels come second; they are features here.
            samples[ref.path]["input"].update(x.movedim(1, -1) if ref.layout == "conv" else x)

        self.enter_context(watch_inputs(model, [site.ref for site in linear], see))
        for site in sites:
            if site.attention is not None:
                _Watcher(samples[site.path], self).attach_(model.get_submodule(site.path))


class _Watcher(AttentionProducts):
    """Samples the operands of an attention module's products, and takes itself out at the end."""

    def __init__(self, samples: Mapping[str, Samples], until: ExitStack) -> None:
        super().__init__({})
        self._samples, self._until = samples, until

    def attach_(self, owner: nn.Module) -> _Watcher:
        from layerwright.nn.attached import detach_

        super().attach_(owner)
        self._until.callback(detach_, owner, self.child)
        return self

    def round(self, operand: str, x: Tensor) -> Tensor:
        self._samples[operand].update(x)
        return x


def _fit(model: nn.Module, site: _Site, samples: Mapping[str, Samples], moment: Tensor | None) -> Attachment:
    if site.linear is not None:
        t = site.linear
        if site.ref.kind == "norm" and t.share == "channel" and not norm_channels(model.get_submodule(site.path)):
            raise InputError(
                f"{site.path}: its channels are not the last dimension of what it reads; use share: tensor"
            )
        reads = t.observer in ("output", "hessian") and site.ref.layout in ("linear", "conv1d")
        weight = read_matrix(model, site.ref)[0] if reads else None
        quantizer = fit_quantizer(
            samples["input"],
            t.bits,
            site.path,
            kind=t.grid,
            share=t.share,
            symmetric=t.symmetric,
            observer=t.observer,
            weight=weight,
            moment=moment,
        )
        return InputQuantizer(quantizer)
    a = site.attention
    assert a is not None
    found: dict[str, ActivationQuantizer] = {}
    for operand, seen in samples.items():
        bits = a.key_bits if a.key_bits is not None and operand in ("query", "key") else a.bits
        kind = a.probabilities if operand == "probabilities" else "uniform"
        name = f"{site.path} ({operand})"
        found[operand] = fit_quantizer(seen, bits, name, kind=kind, observer=a.observer)
    return AttentionProducts(found)
