"""Calibration: batches, how to feed them to a model, and a loss."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.corpus import read_arrays, read_image_folder, read_texts
from layerwright.core.errors import InputError

__all__ = ["Calibration", "LossFunction", "as_calibration"]

LossFunction = Callable[[nn.Module, Any], Tensor]


class Calibration:
    """Batches that can be walked again and again, the way to feed them, and the loss that counts.

    Args:
        batches: a list or any re-iterable of batches: mappings (fed as keywords), tensors, or ``(inputs, labels)``.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``. Without it, a mapping with ``labels`` uses the model's own
            loss and ``(inputs, labels)`` uses cross-entropy.
        name: shown in reports.
        unit: unit of the loss, such as ``nats/token``.

    Raises:
        InputError: no batches, or one that is not finite.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        loss_fn: LossFunction | None = None,
        *,
        name: str = "data",
        unit: str = "loss",
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(batches, Iterator):
            batches = list(batches)
        self.batches = batches
        self.loss_fn = loss_fn
        self.name = name
        self.unit = unit
        self.device = device
        first = next(iter(batches), None)
        if first is None:
            raise InputError(f"calibration {name!r} is empty: expected at least one batch")
        for number, batch in enumerate(batches):
            if not all(torch.isfinite(t).all() for t in _tensors(batch) if t.is_floating_point()):
                raise InputError(f"calibration {name!r}: batch {number} holds NaN or infinite values; clean the data")
            if not any(t.numel() for t in _tensors(batch)):
                raise InputError(f"calibration {name!r}: batch {number} holds no values")

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield batch if self.device is None else to_device(batch, self.device)

    def __len__(self) -> int:
        return len(self.batches) if isinstance(self.batches, Sequence) else sum(1 for _ in self.batches)

    def __repr__(self) -> str:
        return f"Calibration({self.name!r}, {len(self)} batches, {self.samples} samples)"

    @property
    def samples(self) -> int:
        """Number of samples (rows of the first tensor of each batch)."""
        return sum(_rows(batch) for batch in self.batches)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run `model` on the inputs of `batch` (labels left out where they are not needed)."""
        if isinstance(batch, Mapping):
            inputs = {k: v for k, v in batch.items() if k != "labels" or _needs_labels(model)}
            if "use_cache" not in inputs and _takes(model, "use_cache"):
                inputs["use_cache"] = False
            return model(**inputs)
        if isinstance(batch, Tensor):
            return model(batch)
        if _custom(batch) and self.loss_fn is not None:
            return self.loss_fn(model, batch)
        return model(batch[0])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar loss of `model` on `batch`, with gradients where they are enabled.

        Raises:
            TypeError: the batch has no labels and no `loss_fn` was given.
        """
        if self.loss_fn is not None:
            return self.loss_fn(model, batch)
        if isinstance(batch, Mapping) and ("labels" in batch or batch.get("return_loss")):
            extra = {"use_cache": False} if _takes(model, "use_cache") and "use_cache" not in batch else {}
            output = model(**batch, **extra)
            loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
            if isinstance(loss, Tensor):
                return loss
        elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
            logits = logits_of(model(batch[0]))
            return nn.functional.cross_entropy(logits.flatten(0, -2).float(), batch[1].flatten())
        raise TypeError(
            "no loss for this model and data: give batches with labels, (inputs, labels) pairs, or pass "
            "loss_fn(model, batch) -> scalar tensor"
        )

    @torch.no_grad()
    def mean_loss(self, model: nn.Module) -> float:
        """The loss averaged over batches, each weighted by its samples; `model` is left in the mode it was in."""
        total = weight = 0.0
        with evaluating(model):
            for batch in self:
                rows = _rows(batch)
                total += float(self.loss(model, batch).detach()) * rows
                weight += rows
        return total / weight

    def fingerprint(self) -> str:
        """A hash of the data: the same batches give the same 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for tensor in _tensors(batch):
                digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def head(self, samples: int) -> Calibration:
        """The first batches that together hold at least `samples` samples."""
        taken: list[Any] = []
        count = 0
        for batch in self.batches:
            if count >= samples:
                break
            taken.append(batch)
            count += _rows(batch)
        return Calibration(taken, self.loss_fn, name=self.name, unit=self.unit, device=self.device)

    def to(self, device: torch.device | str) -> Calibration:
        """The same data, moved to `device` batch by batch as it is walked."""
        return Calibration(self.batches, self.loss_fn, name=self.name, unit=self.unit, device=device)

    # -- from files ---------------------------------------------------------------------------------------------

    @classmethod
    def from_text(
        cls,
        source: str | Path | Sequence[str],
        tokenizer: Any,
        samples: int = 128,
        length: int = 512,
        batch_size: int = 8,
        name: str | None = None,
    ) -> Calibration:
        """Windows of `length` tokens, evenly spread over the text.

        Args:
            source: a ``.txt``, ``.jsonl`` or ``.parquet`` file, or the texts themselves.
            tokenizer: callable as ``tokenizer(text)["input_ids"]``, as every Hugging Face tokenizer is.
            samples: number of windows; fewer if the text is short, but never overlapping.
            length: tokens in a window.

        Raises:
            InputError: the text is shorter than one window.
        """
        texts = read_texts(source) if isinstance(source, str | Path) else list(source)
        label = name or (Path(source).name if isinstance(source, str | Path) else "text")
        if not callable(tokenizer):
            raise InputError(f"text needs a tokenizer, got {type(tokenizer).__name__}: the model folder has none")
        end = getattr(tokenizer, "eos_token_id", None)
        ids: list[int] = []
        for tokens in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
            ids += tokens
            if end is not None:
                ids.append(end)
        if len(ids) < max(length, 2):
            raise InputError(
                f"calibration {label!r} has {len(ids)} tokens, fewer than one window of {length}: "
                "give more text or a smaller length"
            )
        count = max(1, min(samples, len(ids) // length))
        starts = torch.linspace(0, len(ids) - length, count).long()
        windows = torch.tensor(ids)[starts[:, None] + torch.arange(length)]
        batches = [{"input_ids": part, "labels": part} for part in windows.split(batch_size)]
        return cls(batches, name=label, unit="nats/token")

    @classmethod
    def from_arrays(cls, path: str | Path, batch_size: int = 32, samples: int | None = None) -> Calibration:
        """Inputs and labels from an ``.npz`` file with arrays ``x`` (samples, ...) and ``y`` (samples,)."""
        inputs, labels = read_arrays(path)
        return cls(
            _image_batches(inputs[:samples], labels[:samples], batch_size), name=Path(path).name, unit="nats/sample"
        )

    @classmethod
    def from_images(
        cls, folder: str | Path, processor: Any = None, batch_size: int = 32, samples: int | None = None
    ) -> Calibration:
        """Images from a folder of class folders; classes are numbered in sorted order of their names."""
        inputs, labels = read_image_folder(folder, processor, samples)
        return cls(_image_batches(inputs, labels, batch_size), name=Path(folder).name, unit="nats/sample")


def as_calibration(data: Any, loss_fn: LossFunction | None = None) -> Calibration:
    """A `Calibration` from itself, or from any re-iterable of batches."""
    if isinstance(data, Calibration):
        return data
    if data is None or isinstance(data, str | Tensor | Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"calibration data: got {type(data).__name__}, expected a Calibration or a list of batches")
    return Calibration(data, loss_fn)


class evaluating:  # noqa: N801 - reads as a statement: `with evaluating(model):`
    """Context: the model and all its modules in evaluation mode, put back as they were on leaving."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        self.training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        return self.model

    def __exit__(self, *_: object) -> None:
        for module in self.training:
            module.training = True


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: the tensor itself, ``.logits``, or the first tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    for value in output.values() if isinstance(output, Mapping) else output:
        if isinstance(value, Tensor) and value.dim() > 0:
            return value
    raise TypeError(f"no logits in a {type(output).__name__}: pass loss_fn(model, batch)")


def to_device(batch: Any, device: torch.device | str) -> Any:
    """`batch` with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _image_batches(inputs: Tensor, labels: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    return [
        {"pixel_values": x, "labels": y}
        for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    ]


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _rows(batch: Any) -> int:
    tensors = [t for t in _tensors(batch) if t.dim() > 0]
    return int(tensors[0].shape[0]) if tensors else 1


def _custom(batch: Any) -> bool:
    return not (isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor))


def _needs_labels(model: nn.Module) -> bool:
    # Encoder-decoder models make the decoder's inputs from the labels.
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(model).forward).parameters
