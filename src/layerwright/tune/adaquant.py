"""AdaQuant: fit each quantized layer to its own full-precision output."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating
from layerwright.core.errors import InputError, unknown_name
from layerwright.treat._following import follow
from layerwright.tune._fake_layers import FakeQuantized, fake_layers, full_precision, recorded_inputs

__all__ = ["PAPER_RATES", "RELATIVE_RATES", "AdaQuant", "LayerFit"]

PAPER_RATES: Mapping[str, float] = {"weight": 1e-5, "bias": 1e-3, "weight_range": 1e-3, "input_range": 1e-1}
"""The paper's absolute learning rates, tuned for convolutions on ImageNet."""

RELATIVE_RATES: Mapping[str, float] = {"weight": 2e-2, "bias": 1e-3, "weight_range": 1e-3, "input_range": 1e-3}
"""Learning rates as shares: of the weight's standard deviation, of the output's, and of the mean range."""

CHECKS = 20
"""How often a fit is judged on the samples that were kept back."""


@dataclass(frozen=True)
class LayerFit:
    """What fitting one layer did.

    Attributes:
        mse_before, mse_after: squared error of the output per element, on the samples that were kept back (on all of
            them where they were too few).
        snr: power of the full-precision output over `mse_after`, in decibels.
        trace: the lowest `mse` so far at each check.
        steps: optimiser steps that were taken.
        relu: whether outputs were compared after a ReLU.
    """

    mse_before: float
    mse_after: float
    snr: float
    trace: tuple[float, ...]
    steps: int
    relu: bool


@dataclass(frozen=True)
class AdaQuant:
    """Minimise ``|| Y - [Q(W + V; s_W, z_W) Q(X; s_X, z_X) + b'] ||^2`` over V, scales, zero points and bias, by layer.

    ``V`` starts at 0 and is continuous: rounding is decided anew at each step, so that a weight may move by more than
    one level. Adam on minibatches of cached inputs; of the states seen at the checks the best on samples that were
    kept back is taken, the start included. Source: Hubara et al. (2020), arXiv 2006.10518.

    Attributes:
        iters: optimiser steps per layer.
        batch_size: cached samples per step.
        lr: ``relative`` (`RELATIVE_RATES` times the size of each parameter, falling linearly to 0, since weights near
            the middle between two levels would go on jumping), ``paper`` (`PAPER_RATES`, constant), or a mapping that
            replaces some of the relative shares.
        mode: ``parallel`` gives each layer full-precision inputs, so that layers are independent; ``sequential`` gives
            it what comes out of the quantized layers before it. The target is full precision in both.
        through_activation: compare after the ReLU where one, and nothing else, reads the layer's output.
        early_stop: checks (20 in a fit) without a better state after which a layer ends; None never.
        holdout: share of the cached samples that is kept back to judge by; below 8 samples, or at 0, all are used for
            both.
        seed: of the minibatches; each layer draws its own numbers.
        cache_bytes: bound on the cached inputs of the layer at work (twice that in ``sequential``); further samples
            are left out.
    """

    iters: int = 1000
    batch_size: int = 50
    lr: Mapping[str, float] | Literal["relative", "paper"] = "relative"
    mode: Literal["parallel", "sequential"] = "parallel"
    through_activation: bool = True
    early_stop: int | None = None
    holdout: float = 0.125
    seed: int = 0
    cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.mode not in ("parallel", "sequential"):
            raise unknown_name("mode", str(self.mode), ("parallel", "sequential"), "AdaQuant")
        if isinstance(self.lr, str) and self.lr not in ("relative", "paper"):
            raise unknown_name("lr", self.lr, ("relative", "paper"), "AdaQuant")
        if isinstance(self.lr, Mapping):
            for name in self.lr:
                if name not in RELATIVE_RATES:
                    raise unknown_name("lr", name, RELATIVE_RATES, "AdaQuant")
        if self.iters < 0 or self.batch_size < 1 or not 0 <= self.holdout < 1:
            raise InputError(
                f"AdaQuant: got iters={self.iters}, batch_size={self.batch_size}, holdout={self.holdout}; expected "
                "iters of at least 0, batch_size of at least 1 and a holdout from 0 to below 1"
            )

    def fit(self, model: nn.Module, data: Any, layers: Sequence[str] | None = None) -> dict[str, LayerFit]:
        """Fit the fake-quantized layers of `model` in place; all of them, or those named in `layers`.

        Cost per layer: a forward of the model over the data (two if sequential) and `iters` forwards and backwards of
        the layer. Memory: one layer's cached inputs, on the CPU.

        Args:
            model: made by `quantize_layers`. Its mode is put back.
            data: a `Calibration` or batches; labels are not looked at.
            layers: paths. In ``sequential`` they are fitted in the order in which they run.

        Raises:
            InputError: an unknown layer, one that does not run on the data, or no fake-quantized layers at all.
        """
        calibration = as_calibration(data)
        chosen = fake_layers(model, layers)
        order, relu = self._survey(model, calibration, chosen)
        fits: dict[str, LayerFit] = {}
        with evaluating(model):
            for path in order if self.mode == "sequential" else chosen:
                layer = chosen[path]
                with full_precision(model):
                    clean = recorded_inputs(model, layer, calibration, self.cache_bytes)
                noisy = clean
                if self.mode == "sequential":
                    noisy = recorded_inputs(model, layer, calibration, self.cache_bytes)
                if not all(x.isfinite().all() for x in noisy):
                    raise InputError(f"{path}: its inputs on the calibration hold NaN or infinite values")
                seed = self.seed + zlib.crc32(path.encode())
                fits[path] = self._fit_layer(layer, clean, noisy, relu[path], seed)
        return {path: fits[path] for path in chosen}

    def _survey(
        self, model: nn.Module, calibration: Calibration, chosen: Mapping[str, FakeQuantized]
    ) -> tuple[list[str], dict[str, bool]]:
        """Paths in the order of their first run, and whether only a ReLU reads the output."""
        order: list[str] = []
        handles = [
            layer.register_forward_pre_hook(lambda *_, path=path: order.append(path) if path not in order else None)
            for path, layer in chosen.items()
        ]
        try:
            with evaluating(model), full_precision(model):
                batch = next(iter(calibration))
                found = follow(model, chosen, lambda: calibration.forward(model, batch))
        finally:
            for handle in handles:
                handle.remove()
        for path in chosen:
            if path not in order:
                raise InputError(f"{path}: runs zero times on the calibration, so it cannot be fitted; leave it out")
        return order, {path: self.through_activation and found[path].only_relu for path in chosen}

    def _fit_layer(
        self, layer: FakeQuantized, clean: Sequence[Tensor], noisy: Sequence[Tensor], relu: bool, seed: int
    ) -> LayerFit:
        activation: Callable[[Tensor], Tensor] = torch.relu if relu else lambda y: y
        samples = _Samples(clean, noisy, self.holdout if sum(len(x) for x in clean) >= 8 else 0.0)
        device = layer.weight.device

        @torch.no_grad()
        def target(x: Tensor) -> Tensor:
            layer.enabled = False
            y = activation(layer(x)).float()
            layer.enabled = True
            return y

        @torch.no_grad()
        def judge() -> tuple[float, float]:
            """Mean squared error and mean power of the target."""
            error = power = 0.0
            count = 0
            for x, z in samples.kept(self.batch_size):
                y = target(x.to(device))
                error += float((activation(layer(z.to(device))).float() - y).square().sum())
                power += float(y.square().sum())
                count += y.numel()
            return error / count, power / count

        before, power = judge()
        optimizer = torch.optim.Adam(self._groups(layer, math.sqrt(power)))
        generator = torch.Generator().manual_seed(seed)
        best, trace, since, steps = _state(layer), [before], 0, 0
        trained = _parameters(layer)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(self.iters):
            if self.lr != "paper":
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - step / self.iters)
            x, z = samples.draw(self.batch_size, generator)
            y = target(x.to(device))
            with torch.enable_grad():
                loss = (activation(layer(z.to(device))).float() - y).square().mean()
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            steps = step + 1
            if steps % max(1, self.iters // CHECKS) and steps < self.iters:
                continue
            error = judge()[0]
            since = since + 1 if error >= trace[-1] else 0
            if error < trace[-1]:
                best = _state(layer)
            trace.append(min(error, trace[-1]))
            if self.early_stop is not None and since >= self.early_stop:
                break
        _restore(layer, best)
        after = trace[-1]
        snr = 10 * math.log10(power / after) if after > 0 and power > 0 else math.inf
        return LayerFit(before, after, snr, tuple(trace), steps, relu)

    def _groups(self, layer: FakeQuantized, output: float) -> list[dict[str, Any]]:
        rates = dict(PAPER_RATES if self.lr == "paper" else RELATIVE_RATES)
        sizes = dict.fromkeys(rates, 1.0)
        if self.lr != "paper":
            rates |= self.lr if isinstance(self.lr, Mapping) else {}
            weight = layer.original_weight
            sizes = {
                "weight": float(weight.std(correction=0)) or float(weight.abs().mean()),
                # A bias may be all zeros; it is added to the output and shares its unit.
                "bias": output,
                "weight_range": float(layer.weight_range.detach().mean()),
                "input_range": float(layer.input_range.detach()),
            }
        members = {
            "weight": [layer.weight],
            "bias": [layer.bias],
            "weight_range": [layer.weight_range, layer.weight_low],
            "input_range": [layer.input_range, layer.input_low],
        }
        return [{"params": members[name], "lr": rates[name] * sizes[name]} for name in members]


class _Samples:
    """Cached inputs, full precision and quantized, grouped by shape, the last part of each group kept back."""

    def __init__(self, clean: Sequence[Tensor], noisy: Sequence[Tensor], holdout: float) -> None:
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for x, z in zip(clean, noisy, strict=True):
            groups.setdefault(tuple(x.shape[1:]), []).append((x, z))
        joined = [(torch.cat([x for x, _ in group]), torch.cat([z for _, z in group])) for group in groups.values()]
        self.train: list[tuple[Tensor, Tensor]] = []
        self.held: list[tuple[Tensor, Tensor]] = []
        for x, z in joined:
            kept = math.ceil(len(x) * holdout)
            if len(x) > kept:
                self.train.append((x[: len(x) - kept], z[: len(x) - kept]))
            if kept:
                self.held.append((x[len(x) - kept :], z[len(x) - kept :]))
        if not self.train:
            self.train = self.held
        if not self.held:
            self.held = self.train

    def kept(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, z in self.held:
            yield from zip(torch.split(x, size), torch.split(z, size), strict=True)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        weights = torch.tensor([float(len(x)) for x, _ in self.train])
        x, z = self.train[int(torch.multinomial(weights, 1, generator=generator))]
        rows = torch.randperm(len(x), generator=generator)[:size]
        return x[rows], z[rows]


def _parameters(layer: FakeQuantized) -> list[nn.Parameter]:
    trained = [layer.weight, layer.bias, layer.weight_range, layer.weight_low]
    return trained if layer.input_bits is None else [*trained, layer.input_range, layer.input_low]


def _state(layer: FakeQuantized) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in _parameters(layer)]


@torch.no_grad()
def _restore(layer: FakeQuantized, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(_parameters(layer), values, strict=True):
        parameter.copy_(value)
        parameter.grad = None
