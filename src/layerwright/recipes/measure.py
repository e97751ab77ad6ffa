"""Measure models side by side: quality with a confidence interval, bytes, FLOPs, time, memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration, evaluating, logits_of
from layerwright.core.memory import peak_memory_bytes
from layerwright.nn.treated import logical_parameters
from layerwright.score.costs import count_flops, find_blocks_or_none, stored_bytes_of

__all__ = ["Measurement", "measure", "sample_losses"]


@dataclass(frozen=True)
class Measurement:
    """One model's figures.

    Attributes:
        name: as given.
        loss: mean loss over the held-out samples, in `unit`.
        loss_interval: 95 % interval of the loss (bootstrap over samples).
        difference: loss minus the first model's, None for the first.
        difference_interval: 95 % interval of that difference, paired by sample.
        accuracy: share of right labels for classifiers, else None.
        perplexity, bits_per_byte: for text; bits per byte only where a token is a byte.
        bytes: stored bytes of the model.
        params: parameters that are computed with, whatever form they are stored in, see
            `layerwright.nn.treated.logical_parameters`.
        flops: of one forward over one sample.
        ms: median milliseconds of one forward over one sample.
        speed: tokens (or images) per second by batch size; decoding one token at a time where the model decodes.
        memory_bytes: largest resident size of this process after this model ran.
        kv_bytes_per_token: bytes that the cache holds after one sample, over its tokens; 0 for what does not decode.
    """

    name: str
    loss: float
    loss_interval: tuple[float, float]
    unit: str
    samples: int
    bytes: int
    params: int
    flops: float
    ms: float
    speed: Mapping[int, float]
    speed_unit: str
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    memory_bytes: int = 0
    kv_bytes_per_token: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON; speeds as ``tokens_per_second`` and ``tokens_per_second_batch_16``."""
        data = {key: value for key, value in self.__dict__.items() if key not in ("speed", "meta")}
        for batch, value in self.speed.items():
            data[self.speed_unit + ("" if batch == 1 else f"_batch_{batch}")] = value
        return data


def measure(
    models: Mapping[str, nn.Module],
    data: Calibration | Any,
    *,
    batch_sizes: tuple[int, ...] = (1, 16),
    seconds: float = 1.0,
    timing: bool = True,
    byte_tokens: bool = False,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Measure `models` on the same held-out data.

    Quality: every model sees the same samples; differences to the first model are resampled in pairs. Time: the
    models take turns within one process, so that a busy machine slows all of them; medians are reported.

    Args:
        models: name to model; the first is the reference.
        data: held-out batches with labels.
        batch_sizes: for the speeds; samples are repeated where there are fewer.
        seconds: time spent on each model and batch size.
        timing: False leaves times and speeds 0.
        byte_tokens: tokens are bytes, so bits per byte make sense.
    """
    calibration = as_calibration(data)
    quality: dict[str, tuple[Tensor, Tensor | None]] = {}
    memory: dict[str, int] = {}
    for name, model in models.items():
        quality[name] = sample_losses(model, calibration)
        memory[name] = peak_memory_bytes()
    batch = next(iter(calibration))
    times = _forward_times(models, calibration, batch, seconds) if timing else dict.fromkeys(models, 0.0)
    unit, speeds = _speeds(models, calibration, batch, batch_sizes, seconds) if timing else ("", {})
    first = next(iter(models))
    results = {}
    for name, model in models.items():
        losses, right = quality[name]
        mean = float(losses.mean())
        difference = losses - quality[first][0] if name != first else None
        text = calibration.unit == "nats/token"
        single = _resize(batch, 1)
        results[name] = Measurement(
            name=name,
            loss=mean,
            loss_interval=_interval(losses, seed),
            unit=calibration.unit,
            samples=len(losses),
            bytes=stored_bytes_of(model),
            params=logical_parameters(model),
            flops=count_flops(model, partial(calibration.forward, model, single)).get("", 0.0),
            ms=times[name],
            speed=speeds.get(name, {}),
            speed_unit=unit,
            difference=None if difference is None else float(difference.mean()),
            difference_interval=None if difference is None else _interval(difference, seed),
            accuracy=None if right is None else float(right.double().mean()),
            perplexity=float(torch.tensor(mean).exp()) if text else None,
            bits_per_byte=mean / 0.6931471805599453 if text and byte_tokens else None,
            memory_bytes=memory[name],
            kv_bytes_per_token=_cache_bytes(model, single),
        )
    return results


@torch.no_grad()
def _cache_bytes(model: nn.Module, batch: Any) -> float:
    """Bytes of keys and values that `model` holds after reading `batch`, over its tokens; 0 for what does not decode."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encodes or not isinstance(batch, Mapping) or "input_ids" not in batch or not _decodes(model):
        return 0.0
    from layerwright.nn.kv.cache import held_bytes

    ids = batch["input_ids"]
    with evaluating(model):
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    return held_bytes(cache) / ids.numel() if hasattr(cache, "layers") else 0.0


@torch.no_grad()
def sample_losses(model: nn.Module, calibration: Calibration) -> tuple[Tensor, Tensor | None]:
    """``(losses (samples,), right (samples,) | None)`` in float64.

    Per sequence for token models, per sample for classifiers; with a loss function of the user's, per batch.
    """
    losses: list[Tensor] = []
    right: list[Tensor] = []
    with evaluating(model):
        for batch in calibration:
            found = None if calibration.loss_fn is not None else _split_losses(model, calibration, batch)
            if found is None:
                losses.append(calibration.loss(model, batch).reshape(1).double().cpu())
            else:
                losses.append(found[0].double().cpu())
                if found[1] is not None:
                    right.append(found[1].cpu())
    return torch.cat(losses), torch.cat(right) if right else None


def _split_losses(model: nn.Module, calibration: Calibration, batch: Any) -> tuple[Tensor, Tensor | None] | None:
    labels = (
        batch.get("labels") if isinstance(batch, Mapping) else batch[1] if isinstance(batch, tuple | list) else None
    )
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    output = calibration.forward(model, batch)
    try:
        logits = logits_of(output)
    except TypeError:
        return None
    if logits.dim() == 2 and labels.dim() == 1 and logits.shape[0] == labels.shape[0]:
        losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        return losses, logits.argmax(-1) == labels
    decodes = any(stack.role == "decoder" for stack in find_blocks_or_none(model))
    if logits.dim() != 3 or logits.shape[:2] != labels.shape or not decodes:
        return None
    shifted = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    rows = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    token = nn.functional.cross_entropy(rows[0].float().transpose(1, 2), rows[1], reduction="none", ignore_index=-100)
    return token.sum(1) / (rows[1] != -100).sum(1).clamp(min=1), None


def _interval(values: Tensor, seed: int, draws: int = 2000) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values[chosen].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


# -- time ---------------------------------------------------------------------------------------------------------


def _resize(batch: Any, rows: int) -> Any:
    if isinstance(batch, Tensor):
        return batch.repeat(-(-rows // len(batch)), *[1] * (batch.dim() - 1))[:rows] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _resize(value, rows) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_resize(value, rows) for value in batch)
    return batch


def _interleaved(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each of `runs`, taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds * len(runs)
    while len(next(iter(samples.values()))) < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in samples.items()}


@torch.no_grad()
def _forward_times(models: Mapping[str, nn.Module], data: Calibration, batch: Any, seconds: float) -> dict[str, float]:
    single = _resize(batch, 1)
    runs = {name: partial(data.forward, model, single) for name, model in models.items()}
    return {name: 1000 * value for name, value in _interleaved(runs, seconds).items()}


@torch.no_grad()
def _speeds(
    models: Mapping[str, nn.Module], data: Calibration, batch: Any, sizes: tuple[int, ...], seconds: float
) -> tuple[str, dict[str, dict[int, float]]]:
    decodes = all(_decodes(model) for model in models.values()) and isinstance(batch, Mapping) and "input_ids" in batch
    text = isinstance(batch, Mapping) and "input_ids" in batch
    speeds: dict[str, dict[int, float]] = {name: {} for name in models}
    for size in sizes:
        sized = _resize(batch, size)
        if decodes:
            runs = {name: _decoder(model, sized["input_ids"][:, :32]) for name, model in models.items()}
            items = size * DECODED
        else:
            runs = {name: partial(data.forward, model, sized) for name, model in models.items()}
            items = sized["input_ids"].numel() if text else size
        for name, value in _interleaved(runs, seconds).items():
            speeds[name][size] = items / value
    return ("tokens_per_second" if text else "images_per_second"), speeds


DECODED = 8
"""Tokens decoded in one timed run."""


def _decodes(model: nn.Module) -> bool:
    return hasattr(model, "generate") and any(stack.role == "decoder" for stack in find_blocks_or_none(model))


def _decoder(model: nn.Module, prompt: Tensor) -> Callable[[], object]:
    """Decode `DECODED` tokens one by one after `prompt`, whose cache is made outside the timed run."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return lambda: model.generate(prompt, max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False)  # type: ignore[operator]
    start = model(input_ids=prompt, use_cache=True)

    def run() -> None:
        cache, logits = start.past_key_values, start.logits
        whole = cache.is_croppable
        cache = cache if whole else copy.deepcopy(cache)  # evicted tokens cannot be taken back
        for _ in range(DECODED):
            token = logits[:, -1:].argmax(-1)
            step = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, logits = step.past_key_values, step.logits
        if whole:
            cache.crop(-DECODED)

    return run
