"""Read Hugging Face checkpoints tensor by tensor, safely, and build models whose weights are not there yet."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError

__all__ = ["Checkpoint", "build_empty", "empty_parameters", "model_class", "model_config", "read_config"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.bin")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model folder.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: no configuration there, or one that is not JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}: give a folder in the Hugging Face layout, or demo:lm")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: expected a model folder in the Hugging Face layout")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, expected an object")
    return config


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder: where each tensor is, its shape and dtype, read from the headers alone.

    Attributes:
        folder: where they are.
        files: tensor name to file name.
        shapes: tensor name to shape.
        dtypes: tensor name to safetensors dtype (``BF16``, ``F32``, ...).
    """

    folder: Path
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check all headers; no weight is loaded.

        Raises:
            CheckpointError: only pickled weights, an index that points outside the folder or to missing files,
                truncated or corrupted files.
        """
        folder = Path(folder)
        if (folder / INDEX).is_file():
            names = _indexed_files(folder)
        elif (folder / SINGLE).is_file():
            names = [SINGLE]
        else:
            pickled = [name for name in _PICKLES if (folder / name).exists()]
            if pickled:
                raise CheckpointError(
                    f"{folder} holds only pickled weights ({pickled[0]}), which can run code when read; convert them "
                    "once with model.save_pretrained(folder) in a process you trust"
                )
            raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}: expected safetensors weights")
        files: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for name in names:
            for tensor, entry in read_header(folder / name).items():
                files[tensor], shapes[tensor], dtypes[tensor] = name, tuple(entry["shape"]), entry["dtype"]
        return cls(folder, files, shapes, dtypes)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(_element_bytes(self.dtypes[name]) * _product(shape) for name, shape in self.shapes.items())

    def tensor_bytes(self, name: str) -> int:
        """Stored bytes of one tensor."""
        return _element_bytes(self.dtypes[name]) * _product(self.shapes[name])

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, tensor)`` for `names`, opening each file once."""
        from safetensors import SafetensorError, safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise CheckpointError(f"{self.folder} has no tensor {name}")
            by_file.setdefault(self.files[name], []).append(name)
        for file, wanted in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as reader:
                    for name in wanted:
                        yield name, reader.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from error


def _indexed_files(folder: Path) -> list[str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is not a safetensors index ({error})") from error
    root = folder.resolve()
    for name in names:
        path = folder / str(name)
        # A hub cache links its files elsewhere: the name itself must not leave the folder, its target may.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise CheckpointError(f"{folder / INDEX} points outside its folder ({name!r}): refused")
        if root not in (root / name).parents:
            raise CheckpointError(f"{folder / INDEX} points outside its folder ({name!r}): refused")
        if not path.is_file():
            raise CheckpointError(f"{folder / INDEX} names {name}, which is missing: the download is incomplete")
    return names


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's length.

    Raises:
        CheckpointError: truncated or corrupted.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(size - 8, 100_000_000):
            raise CheckpointError(f"{path} is not a safetensors file, or is truncated ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                size_of_one = _element_bytes(entry["dtype"]) * _product(entry["shape"])
                # Types of less than a byte are packed; everything else fills its place exactly.
                if (
                    start < 0
                    or stop - start > size_of_one
                    or (entry["dtype"] in _WIDTHS and stop - start < size_of_one)
                ):
                    raise ValueError(f"{name} has {stop - start} bytes for the shape {entry['shape']}")
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} has a corrupted header ({error})") from error
    if size - 8 - length != end:
        raise CheckpointError(
            f"{path} is truncated or corrupted: its header promises {end + 8 + length:,} bytes, the file has {size:,}"
        )
    return header  # type: ignore[no-any-return]


_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}


def _element_bytes(dtype: str) -> int:
    return _WIDTHS.get(dtype, 1)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def model_config(folder: str | Path) -> Any:
    """The transformers configuration in `folder`; no code of the checkpoint runs.

    Raises:
        CheckpointError: transformers does not know the architecture, or refuses a value.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: validators of every configuration class
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}/config.json cannot be used ({reason}): expected an architecture of transformers"
        ) from error


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Context: every parameter registered on any module becomes a shape on the meta device; buffers stay real."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def model_class(config: Any) -> Any:
    """The transformers class that a configuration names first in `architectures`, else the causal language model."""
    import transformers

    names = getattr(config, "architectures", None) or []
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def build_empty(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of `config` whose parameters are shapes on the meta device, in evaluation mode.

    Buffers that are computed (rotary frequencies, position ids) are real.
    """
    cls = model_class(config)
    build = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
    with empty_parameters():
        model: nn.Module = build(config, **({"dtype": dtype} if dtype is not None else {}))
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model.eval()
