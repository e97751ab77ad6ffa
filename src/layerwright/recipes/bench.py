"""The bench: a model with its data, set up for a job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.core.calibration import Calibration, LossFunction, as_calibration
from layerwright.core.errors import InputError
from layerwright.data.demo_data import demo_data
from layerwright.data.loading import DEMOS, Source, load, locate, modality, processor_for
from layerwright.data.stdlib import stdlib_text

__all__ = ["Bench", "open_bench", "read_data", "refuse_misfits", "split_data"]


@dataclass
class Bench:
    """What a job works on.

    Attributes:
        model: in evaluation mode.
        processor: tokenizer or image processor, or None.
        calibration: for scoring and treating.
        heldout: for measuring; none of it is in `calibration`.
        name: of the model.
        source: where it was loaded from; None for a module that was handed over.
    """

    model: nn.Module
    processor: Any
    calibration: Calibration
    heldout: Calibration
    name: str
    source: Source | None = None


def open_bench(
    model: str | Path | nn.Module,
    data: str | Path | Calibration | Iterable[Any] | None = None,
    *,
    loss_fn: LossFunction | None = None,
    samples: int = 128,
    length: int = 256,
    dtype: str | None = None,
    device: str = "cpu",
) -> Bench:
    """Load the model and its data.

    Without `data` a demo model gets its own, and a text model gets the text of Python's standard library. A file or
    folder is split: its last fifth is held out. A `Calibration` or list that is handed over is split likewise.

    Raises:
        InputError, FileNotFoundError: what cannot be read, or no data for a model that needs some.
    """
    if isinstance(model, nn.Module):
        if data is None or isinstance(data, str | Path):
            raise InputError("a module that is handed over needs its data: pass a list of batches or a Calibration")
        calibration, heldout = split_data(as_calibration(data, loss_fn))
        return Bench(model.eval(), None, calibration.to(device), heldout.to(device), type(model).__name__)
    source = locate(model)
    calibration, heldout = read_data(source, data, samples=samples, length=length)
    network, processor = load(source, dtype=dtype, device=device)
    return Bench(network, processor, calibration.to(device), heldout.to(device), source.name, source)


def read_data(
    source: Source,
    data: str | Path | Calibration | Iterable[Any] | None,
    *,
    samples: int = 128,
    length: int = 256,
    heldout_samples: int = 64,
) -> tuple[Calibration, Calibration]:
    """``(calibration, held out)`` for a model, before it is loaded."""
    if data is not None and not isinstance(data, str | Path):
        return split_data(as_calibration(data))
    parts = _read_data(source, data, samples, length, heldout_samples)
    for part in parts:
        refuse_misfits(source, part)
    return parts


def refuse_misfits(source: Source, data: Calibration) -> None:
    """Raise `InputError` for tokens, images or labels that the model of `source` cannot take."""
    config = source.config
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    # Configurations leave out the labels where they are the two of the default.
    classes = len(config.get("id2label") or ()) or config.get("num_labels") or 2
    channels, size = config.get("num_channels"), config.get("image_size")
    for batch in data.batches:
        ids, images = batch.get("input_ids"), batch.get("pixel_values")
        if ids is not None and vocabulary and int(ids.max()) >= vocabulary:
            raise InputError(
                f"{source.name}: its tokenizer makes the id {int(ids.max())}, and its vocabulary ends at {vocabulary - 1}: "
                "the tokenizer belongs to another model"
            )
        if images is not None:
            wanted = (channels or "any", *(size if isinstance(size, list | tuple) else [size or "any"] * 2))
            given = tuple(images.shape[1:])
            if len(given) != 3 or any(w not in ("any", g) for w, g in zip(wanted, given, strict=True)):
                raise InputError(
                    f"{data.name}: got samples of shape {given}, and {source.name} takes (channels, height, width) = "
                    f"({', '.join(map(str, wanted))})"
                )
            low, high = int(batch["labels"].min()), int(batch["labels"].max())
            if low < 0 or high >= classes:
                raise InputError(
                    f"{data.name}: labels reach from {low} to {high}, and {source.name} has {classes} classes"
                )


def _read_data(
    source: Source, data: str | Path | None, samples: int, length: int, heldout_samples: int
) -> tuple[Calibration, Calibration]:
    processor = processor_for(source)
    if data is None and source.name in DEMOS:
        heldout = 360 if source.name != "demo:lm" else heldout_samples
        return (
            demo_data(source.name, processor, "calibration", samples, length),
            demo_data(source.name, processor, "heldout", heldout, length),
        )
    kind = modality(source)
    if kind == "text":
        longest = source.config.get("max_position_embeddings") or source.config.get("n_positions") or length
        length = min(length, int(longest))
        if data is None:
            budget = 16 * length * max(samples, heldout_samples)
            parts = (stdlib_text("calibration", budget), stdlib_text("heldout", budget))
            wanted = (samples, heldout_samples)
            first, second = (
                Calibration.from_text(text, processor, count, length, name="standard library")
                for text, count in zip(parts, wanted, strict=True)
            )
            return first, second
        if Path(data).is_dir():
            raise InputError(f"{data} is a folder, and {source.name} reads text: give a .txt, .jsonl or .parquet file")
        return split_data(Calibration.from_text(data, processor, samples + heldout_samples, length))
    if data is None:
        raise InputError(
            f"{source.name} needs data: pass --data with a folder of class folders or an .npz with x and y"
        )
    if not Path(data).exists():
        raise FileNotFoundError(
            f"no data at {data}: {source.name} takes a folder of class folders, or an .npz with x and y"
        )
    if Path(data).is_file() and Path(data).suffix.lower() != ".npz":
        raise InputError(
            f"{data} is a {Path(data).suffix or 'plain'} file, and {source.name} reads images: give a folder of class "
            "folders, or an .npz with x and y"
        )
    if Path(data).is_dir():
        return split_data(Calibration.from_images(data, processor, samples=None))
    return split_data(Calibration.from_arrays(data))


def split_data(data: Calibration, share: float = 0.2) -> tuple[Calibration, Calibration]:
    """The first part for calibration and the last `share` of the batches held out.

    Raises:
        InputError: a single batch with a single sample cannot be split.
    """
    batches = list(data.batches)
    if len(batches) == 1:
        batches = _split_batch(batches[0])
    if len(batches) < 2:
        raise InputError(f"calibration {data.name!r} holds one sample: give at least two, so that one can be held out")
    count = max(1, round(share * len(batches)))
    kept, held = batches[:-count], batches[-count:]
    return (
        Calibration(kept, data.loss_fn, name=data.name, unit=data.unit),
        Calibration(held, data.loss_fn, name=f"{data.name} (held out)", unit=data.unit),
    )


def _split_batch(batch: Any) -> list[Any]:
    from torch import Tensor

    if isinstance(batch, Tensor):
        return list(batch.split(max(1, -(-len(batch) // 5))))  # type: ignore[no-untyped-call]
    if isinstance(batch, tuple | list):
        parts = [_split_batch(item) for item in batch]
        return [type(batch)(items) for items in zip(*parts, strict=False)]
    if isinstance(batch, dict):
        split = {key: _split_batch(value) for key, value in batch.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in batch.items() if key not in split}
        return [dict(zip(split, items, strict=True)) | rest for items in zip(*split.values(), strict=False)]
    return [batch]
