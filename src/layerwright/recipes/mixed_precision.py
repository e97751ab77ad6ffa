"""A model whose weights and activations can each be put to any of several widths, and measured at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating, logits_of
from layerwright.core.capture import watch_inputs
from layerwright.core.errors import InputError
from layerwright.core.kept_blocks import KeptBlocks
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, structure_copy
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Quantize, RoundActivations, RoundAttention, Treatments
from layerwright.nn.activation import InputQuantizer
from layerwright.nn.attached import attached
from layerwright.nn.attention_products import AttentionProducts
from layerwright.score.costs import find_blocks_or_none
from layerwright.treat.activations import norm_channels
from layerwright.treat.apply import apply_plan
from layerwright.treat.migrate import find_norm_readers
from layerwright.tune.losses import output_loss

__all__ = ["Forms", "MixedPrecision", "Variable", "find_variables"]

GELU_LOWEST = -0.2
"""Below the least value of GELU (-0.17): an input that goes below it is not GELU's output."""

Choice = Mapping[str, int]
Metric = Literal["kl", "mse", "cosine", "infonce", "accuracy"]


@dataclass(frozen=True)
class Variable:
    """One tensor whose width is chosen.

    Attributes:
        name: ``<path> weight``, ``<path> input``, ``<path> products`` or ``<path> norm``.
        kind: what it is.
        paths: layers that it concerns (those that read one norm's output share their input), an attention module, or a norm.
        numel: values: weights, or activations in one forward of the first batch.
        gelu: an input that is what GELU gives.
        channels: of what a norm reads, each of which has a range of its own; 1 elsewhere.
    """

    name: str
    kind: Literal["weight", "input", "products", "norm"]
    paths: tuple[str, ...]
    numel: int
    gelu: bool = False
    channels: int = 1


@dataclass(frozen=True)
class Forms:
    """How a width is carried out.

    Attributes:
        symmetric: weights have no zero points.
        method: range of a weight.
        observer: of uniform activation ranges.
        two_regions: two-region grids for what GELU gives and for probabilities, from 3 bits on.
    """

    symmetric: bool = True
    method: Literal["rtn", "mse"] = "mse"
    observer: Literal["minmax", "mse"] = "mse"
    two_regions: bool = False

    def weight(self, bits: int) -> Quantize:
        """The treatment of a weight."""
        return Quantize(bits, symmetric=self.symmetric, method=self.method)

    def input(self, bits: int, gelu: bool) -> RoundActivations:
        """The treatment of a layer's input."""
        if gelu and self.two_regions and bits >= 3:
            return RoundActivations(bits, "two_region", observer="output")
        return RoundActivations(bits, observer=self.observer)

    def products(self, bits: int) -> RoundAttention:
        """The treatment of an attention module's operands."""
        regions = self.two_regions and bits >= 3
        return RoundAttention(bits, "two_region" if regions else "uniform", observer=self.observer)

    def norm(self, bits: int) -> RoundActivations:
        """The treatment of what a norm reads (FQ-ViT's power-of-two factors)."""
        return RoundActivations(bits, share="channel", observer="power_of_two")


def find_variables(
    model: nn.Module,
    refs: Sequence[LayerRef],
    calibration: Calibration,
    *,
    attention: bool = True,
    norms: bool = False,
) -> tuple[Variable, ...]:
    """The weights of `refs` and their inputs, in the model's order, then the operands of the attention modules, and with
    `norms` what norms over the last dimension read.

    Raises:
        InputError: no layer has a weight, or the calibration is empty.
    """
    refs = [ref for ref in refs if ref.layout in ("linear", "conv1d", "conv")]
    batch = next(iter(calibration), None)
    if batch is None or not refs:
        raise InputError("calibration: it is empty" if batch is None else "no linear layer or convolution to quantize")
    everything = list_layers(model)
    modules = [ref.path for ref in everything if ref.kind == "attention"] if attention else []
    channels = {
        ref.path: count
        for ref in everything
        if norms and ref.kind == "norm" and (count := norm_channels(model.get_submodule(ref.path)))
    }
    watched = [*refs, *(ref for ref in everything if ref.path in channels)]
    seen: dict[str, int] = dict.fromkeys([*(ref.path for ref in watched), *modules], 0)
    lowest: dict[str, float] = {}

    def see(ref: LayerRef, x: Tensor, _expert: int | None) -> None:
        seen[ref.path] += x.numel()
        lowest[ref.path] = min(lowest.get(ref.path, 0.0), float(x.min()))

    copy = structure_copy(model)
    for path in modules:
        _Counter(path, seen).attach_(copy.get_submodule(path))
    with torch.no_grad(), evaluating(copy), watch_inputs(copy, watched, see):
        calibration.forward(copy, batch)
    shared = {path: group.readers for group in find_norm_readers(model, calibration) for path in group.readers}
    paths = {ref.path for ref in refs}
    found, done = [], set[str]()
    for ref in refs:
        found.append(Variable(f"{ref.path} weight", "weight", (ref.path,), ref.numel))
        if ref.path not in done and seen[ref.path]:
            readers = tuple(path for path in shared.get(ref.path, (ref.path,)) if path in paths)
            done |= set(readers)
            gelu = ref.role == "down" and GELU_LOWEST <= lowest[ref.path] < 0
            found.append(Variable(f"{readers[0]} input", "input", readers, seen[ref.path], gelu))
    found += [Variable(f"{path} products", "products", (path,), seen[path]) for path in modules if seen[path]]
    found += [Variable(f"{p} norm", "norm", (p,), seen[p], channels=n) for p, n in channels.items() if seen[p]]
    return tuple(found)


class _Counter(AttentionProducts):
    """Counts the values that an attention module's products read."""

    def __init__(self, path: str, seen: dict[str, int]) -> None:
        super().__init__({})
        self._path, self._seen = path, seen

    def round(self, operand: str, x: Tensor) -> Tensor:
        self._seen[self._path] += x.numel()
        return x


class MixedPrecision:
    """A model at mixed precision: `choice` gives the bits of each variable.

    For every width the whole model is treated once at that width, block by block, so that rounded weights and ranges
    (OPT-m's ratios too) are there before anything is measured; a choice takes each tensor from the model of its width.
    Blocks before the first changed one are not run again. Memory: a dense model for each width, and what
    `KeptBlocks` keeps.

    Args:
        model: in full precision, prepared; left as it is.
        refs: `list_layers` of those that may be treated.
        calibration: ranges are fitted on it.
        widths: bits, from high to low.
        forms: how a width is carried out.
        samples: of the calibration that choices are measured on.
        metric: `kl` to the full-precision outputs, another of the output losses, or `accuracy` (share of wrong labels).
        attention: whether operands of attention's products are variables.
        norms: whether what norms read is.
        fixed: variables (by kind) with one width of their own.
        progress: ``progress("width 4", done, total)``.
        build: False only finds the variables, for `layers`, `average` and `stored`.
    """

    def __init__(
        self,
        model: nn.Module,
        refs: Sequence[LayerRef],
        calibration: Calibration,
        widths: Sequence[int],
        forms: Forms = Forms(),
        *,
        samples: int = 64,
        metric: Metric = "kl",
        attention: bool = True,
        norms: bool = False,
        fixed: Mapping[str, int] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        build: bool = True,
    ) -> None:
        self.refs = {ref.path: ref for ref in refs}
        self.forms, self.metric = forms, metric
        found = find_variables(model, refs, calibration, attention=attention, norms=norms)
        self.variables = {v.name: v for v in found}
        fixed = fixed or {}
        self.options = {
            name: (fixed[v.kind],) if v.kind in fixed else tuple(widths) for name, v in self.variables.items()
        }
        self._set: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        if build:
            self._build(model, calibration, samples, sorted({*widths, *fixed.values()}, reverse=True), progress)

    def _build(
        self,
        model: nn.Module,
        calibration: Calibration,
        samples: int,
        needed: Sequence[int],
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._variants: dict[int, nn.Module] = {}
        for number, bits in enumerate(needed):
            plan = self.layers(dict.fromkeys(self.variables, bits))
            self._variants[bits] = apply_plan(model, plan, calibration, simulate=True)[0]
            if progress:
                progress(f"width {bits}", number + 1, len(needed))
        self.model = structure_copy(self._variants[needed[0]])
        data = calibration.head(samples)
        units = [path for stack in find_blocks_or_none(model) for path in stack.names]
        self._runs = KeptBlocks(self.model, data, units)
        with torch.no_grad(), evaluating(model):
            self._wanted = [logits_of(data.forward(model, b)).float().flatten(0, -2) for b in self._runs.batches]
        self.keep({name: levels[0] for name, levels in self.options.items()})

    def keep(self, choice: Choice) -> float:
        """The metric of `choice`, from which later ones are measured by running what changed."""
        changed = self._first(choice, self.kept)
        self._apply(choice)
        logits = self._runs.keep(changed if self.kept else "")
        self.kept = dict(choice)
        return self._measure(logits)

    def evaluate(self, choice: Choice) -> float:
        """The metric of `choice`; lower is better."""
        self._apply(choice)
        return self._measure(self._runs.logits(self._first(choice, self.kept)))

    def average(self, choice: Choice, kind: Literal["weight", "activation"]) -> float:
        """Average bits over all weights, or over all activation values of a forward."""
        chosen = [v for v in self.variables.values() if (v.kind == "weight") == (kind == "weight")]
        values = sum(v.numel for v in chosen)
        return sum(v.numel * choice[v.name] for v in chosen) / values if values else 0.0

    def stored(self, choice: Choice, element_bytes: int) -> float:
        """Bytes of the treated layers' weights and of all ranges."""
        total = 0.0
        channels = {path: v.channels for v in self.variables.values() for path in v.paths if v.kind == "norm"}
        for path, treatments in self.layers(choice).items():
            ref = self.refs.get(path)
            shape, count = (ref.shape, ref.count) if ref is not None else ((0, channels.get(path, 1)), 0)
            total += stored_bytes(treatments, *shape, count, element_bytes)
        return total

    def layers(self, choice: Choice) -> dict[str, Treatments]:
        """Treatments by path."""
        found: dict[str, Treatments] = {}
        for name, bits in choice.items():
            variable = self.variables[name]
            for path in variable.paths:
                if variable.kind == "weight":
                    t: Any = self.forms.weight(bits)
                elif variable.kind == "input":
                    t = self.forms.input(bits, variable.gelu)
                elif variable.kind == "norm":
                    t = self.forms.norm(bits)
                else:
                    t = self.forms.products(bits)
                found[path] = tuple(sorted((*found.get(path, ()), t), key=lambda item: item.rank))
        return found

    # -- the model ----------------------------------------------------------------------------------------------

    def _measure(self, logits: Sequence[Tensor]) -> float:
        total = rows = 0.0
        for got, wanted, batch in zip(logits, self._wanted, self._runs.batches, strict=True):
            if self.metric == "accuracy":
                labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
                found = float((got.argmax(-1) != labels.flatten()).float().mean())
            else:
                found = float(output_loss(self.metric)(got, wanted))
            total, rows = total + found * len(got), rows + len(got)
        return total / rows

    def _first(self, choice: Choice, than: Choice) -> str:
        """Path in the earliest block where `choice` differs; empty where something outside the blocks does."""
        paths = [self.variables[name].paths[0] for name, bits in choice.items() if than.get(name) != bits]
        places = {path: self._runs.position(path) for path in paths}
        if not paths:
            last = list(self._runs.units)
            return last[-1] if last else ""
        first = min(paths, key=lambda path: places[path])
        return first if places[first] >= 0 else ""

    def _apply(self, choice: Choice) -> None:
        for name, bits in choice.items():
            if self._set.get(name) != bits:
                _take_over_(self.model, self._variants[bits], self.variables[name], self.refs)
                self._set[name] = bits


def _take_over_(model: nn.Module, source: nn.Module, variable: Variable, refs: Mapping[str, LayerRef]) -> None:
    """Give `variable` of `model` the form that it has in `source`."""
    for path in variable.paths:
        if variable.kind == "weight":
            owner, _, name = refs[path].parameter.rpartition(".")
            model.get_submodule(owner)._parameters[name] = source.get_submodule(owner)._parameters[name]
            continue
        child = "products" if variable.kind == "products" else "input_quantizer"
        mine, other = (attached(m.get_submodule(path), child) for m in (model, source))
        if isinstance(mine, InputQuantizer) and isinstance(other, InputQuantizer):
            mine.quantizer = other.quantizer
        elif isinstance(mine, AttentionProducts) and isinstance(other, AttentionProducts):
            mine.quantizers = other.quantizers
