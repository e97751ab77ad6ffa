"""Read a user's own data: text, images in class folders, arrays."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError, require_extra

__all__ = ["read_arrays", "read_image_folder", "read_texts"]

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def read_texts(path: str | Path) -> list[str]:
    """The documents of a ``.txt`` (one document), ``.jsonl`` (its `text` fields) or ``.parquet`` (column `text`) file.

    Raises:
        FileNotFoundError: no such file.
        InputError: another kind of file, a broken line, no text at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no text file at {path}: give a .txt, .jsonl or .parquet file")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        texts = [
            _json_text(path, number, line)
            for number, line in enumerate(path.open(encoding="utf-8", errors="replace"), 1)
            if line.strip()
        ]
    elif suffix == ".parquet":
        table = require_extra("pyarrow.parquet", "data").read_table(path)
        if "text" not in table.column_names:
            raise InputError(f"{path} has the columns {', '.join(table.column_names)}; expected one called text")
        texts = [str(text) for text in table.column("text").to_pylist() if text is not None]
    elif suffix in ("", ".txt", ".md", ".py", ".text"):
        texts = [path.read_text(encoding="utf-8", errors="replace")]
    else:
        raise InputError(f"{path} is a {suffix} file; text is read from .txt, .jsonl and .parquet")
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(f"{path} holds no text")
    return texts


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON ({error.msg})") from error
    text = record if isinstance(record, str) else record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{path}:{number}: expected a string or an object with a "text" field')
    return text


def read_arrays(path: str | Path) -> tuple[Tensor, Tensor]:
    """``(inputs float32, labels int64)`` from the arrays `x` and `y` of an ``.npz`` file (no pickled objects)."""
    import numpy

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no array file at {path}: give an .npz file with arrays x and y")
    try:
        loaded = numpy.load(path, allow_pickle=False)
        if not hasattr(loaded, "files"):
            raise ValueError("one bare array")
        with loaded as arrays:
            missing = {"x", "y"} - set(arrays.files)
            if missing:
                raise InputError(f"{path} holds {', '.join(arrays.files)}; expected the arrays x and y")
            x, y = arrays["x"], arrays["y"]
            if x.dtype.kind not in "fiub" or y.dtype.kind not in "iu" or y.ndim != 1:
                raise InputError(
                    f"{path}: expected numbers in x and one whole number a sample in y, got {x.dtype} and "
                    f"{y.dtype} of shape {y.shape}"
                )
            inputs, labels = torch.from_numpy(x).float(), torch.from_numpy(y.astype("int64"))
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable .npz file with arrays x and y ({error})") from error
    if len(inputs) != len(labels) or not len(inputs):
        raise InputError(
            f"{path}: x has {len(inputs)} samples and y has {len(labels)}; expected the same number above 0"
        )
    return inputs, labels


def read_image_folder(folder: str | Path, processor: Any = None, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """``(images (samples, channels, height, width), labels (samples,))`` from a folder of class folders.

    Each image goes through `processor` (a Hugging Face image processor); without one it is scaled to 0..1.
    With `samples`, classes take turns, so that a short reading is a balanced one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give a folder with one folder of images per class")
    pillow = require_extra("PIL.Image", "images")
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [[p for p in sorted(c.iterdir()) if p.suffix.lower() in _IMAGES] for c in classes]
    turns = [
        (paths[turn], label)
        for turn in range(max(map(len, files), default=0))
        for label, paths in enumerate(files)
        if turn < len(paths)
    ]
    turns = turns[:samples]
    if not turns:
        raise InputError(f"{folder} holds no images in class folders (class/image.png)")
    images = []
    for path, _ in turns:
        with pillow.open(path) as image:
            images.append(_image_tensor(image, processor))
    if len({tuple(image.shape) for image in images}) > 1:
        raise InputError(f"{folder}: images differ in size; give a processor that resizes them, or resize them first")
    return torch.stack(images), torch.tensor([label for _, label in turns])


def _image_tensor(image: Any, processor: Any) -> Tensor:
    import numpy

    if processor is not None:
        return processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]
    array = torch.from_numpy(numpy.array(image, dtype="float32")) / 255
    return array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1)
