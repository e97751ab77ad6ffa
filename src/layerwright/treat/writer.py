"""Write checkpoints in our own layout: safetensors shards, an index, the configuration and the structure."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerwright.core.checkpoint import INDEX
from layerwright.core.errors import CheckpointError
from layerwright.nn.replace import structure_of
from layerwright.nn.treated import dtype_name

__all__ = [
    "PROGRESS",
    "CheckpointWriter",
    "beside",
    "check_folder",
    "copy_side_files",
    "prepare_folder",
    "save_model",
    "staged_folder",
    "unwritable",
    "write_json",
]

PROGRESS = ".layerwright-unfinished"
"""Folder inside the output that holds the state of a run that has not ended."""

STRUCTURE = "layerwright.json"
SHARD_BYTES = 2_000_000_000
_OURS = {
    "config.json", STRUCTURE, INDEX, "plan.yaml", "report.html", "report.json", "apply.jsonl", "recipe.yaml", "subtuning.json"
}  # fmt: skip
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def check_folder(out: str | Path, *, force: bool = False, resume: bool = True) -> Path:
    """Whether `out` can be used for an output; nothing is written.

    Without `resume` the unfinished state of `apply` is refused too, unless `force`.

    Raises:
        CheckpointError: it is a file, cannot be written, or holds something that is not an output of ours (or a
            finished output, unless `force`; an unfinished one is gone on with).
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file: give a folder for the output")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if PROGRESS in names and not resume and not force:
        raise CheckpointError(
            f"{out} holds the unfinished state of `apply`: finish it, give another folder, or pass --force to replace it"
        )
    if names and PROGRESS not in names and not (force and names & _OURS):
        finished = STRUCTURE in names or INDEX in names
        raise CheckpointError(
            f"{out} already holds {'a finished output' if finished else 'something else'} "
            f"({', '.join(sorted(names)[:3])}): give another folder"
            + (" or pass --force to replace it" if finished else "")
        )
    parent = next(path for path in [out, *out.absolute().parents] if path.exists())
    if not os.access(parent, os.W_OK) or _read_only(parent):
        raise CheckpointError(f"{out} cannot be written (read-only): give a folder you may write to")
    return out


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def prepare_folder(out: str | Path, *, force: bool = False, resume: bool = True) -> Path:
    """Make `out` ready to be written to: `check_folder`, then create it, or clear a finished output with `force`.

    Raises:
        CheckpointError: as `check_folder`.
    """
    folder = check_folder(out, force=force, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and (folder / PROGRESS).exists():
            shutil.rmtree(folder / PROGRESS)
        if not (folder / PROGRESS).exists():
            for path in folder.iterdir():
                if path.name in _OURS or path.suffix == ".safetensors" or path.name in _SIDE_FILES:
                    path.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written ({error.strerror or error}): give a folder you may write to"
        ) from error
    return folder


@contextmanager
def staged_folder(out: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `out` whose content moves into `out` when the block ends well, and vanishes otherwise.

    Raises:
        CheckpointError: `out` cannot be used (before the block runs), or a file cannot be written.
    """
    check_folder(out, force=force, resume=False)
    temporary = beside(out)
    try:
        yield temporary
        prepare_folder(out, force=force, resume=False)
        # Configuration and index go last: without them nothing takes the folder for a model.
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name in ("config.json", INDEX), path.name)):
            if path.is_dir():
                shutil.rmtree(out / path.name, ignore_errors=True)
            path.replace(out / path.name)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def beside(out: Path) -> Path:
    """A new folder on the same file system as `out`, so that a rename is enough."""
    parent = next(path for path in out.absolute().parents if path.is_dir())
    try:
        return Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    except OSError as error:
        raise unwritable(out, error) from error


def unwritable(out: Path, error: OSError) -> CheckpointError:
    """One line for an output that cannot be written."""
    return CheckpointError(f"{out} cannot be written ({error.strerror or error}): is the disk full or read-only?")


class CheckpointWriter:
    """Writes shards one at a time under temporary names; the index comes last, so that a half-written folder never
    loads.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.weight_map: dict[str, str] = {}
        self.total_bytes = 0

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard called ``<name>.safetensors``.

        Raises:
            CheckpointError: the disk is full or refuses.
        """
        from safetensors.torch import save_file

        file = f"{name}.safetensors"
        temporary = self.out / f"{file}.tmp"
        kept = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        try:
            save_file(kept, temporary, metadata={"format": "pt"})
            temporary.replace(self.out / file)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.out / file} cannot be written ({error}): is the disk full or read-only?"
            ) from error
        for key, tensor in kept.items():
            self.weight_map[key] = file
            self.total_bytes += tensor.numel() * tensor.element_size()

    def restore(self, weight_map: Mapping[str, str], total_bytes: int) -> None:
        """Count shards that an earlier run wrote."""
        self.weight_map.update(weight_map)
        self.total_bytes += total_bytes

    def finish(self, config: Mapping[str, Any], structure: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Write configuration, structure and, last of all, the index."""
        write_json(self.out / "config.json", config)
        write_json(
            self.out / STRUCTURE,
            {"layerwright_checkpoint": 1, "structure": dict(sorted(structure.items())), **extra},
        )
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(self.weight_map.items())),
        }
        write_json(self.out / INDEX, index)


def write_json(path: Path, data: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1, default=str) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror or error}): is the disk full or read-only?"
        ) from error


def copy_side_files(source: Path | None, out: Path, processor: Any = None) -> None:
    """Copy tokenizer and processor files beside the weights; save `processor` where there is no folder to copy from."""
    if source is not None:
        for name in _SIDE_FILES:
            if (source / name).is_file() and not (out / name).exists():
                shutil.copyfile(source / name, out / name)
    elif processor is not None and hasattr(processor, "save_pretrained"):
        processor.save_pretrained(out)


def unique_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The saved tensors of `module` by full name; of tied ones only the first."""
    seen: set[tuple[int, int]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            continue
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[prefix + name] = tensor
    return kept


def _dtype_of(model: nn.Module) -> str:
    """The dtype of the weights; the configuration of a model that was not loaded does not say."""
    tensors = [*model.parameters(), *model.buffers()]
    named = (dtype_name(tensor.dtype) for tensor in tensors if tensor.is_floating_point())
    return next(named, "float32")


def save_model(
    model: nn.Module, out: str | Path, *, config: Mapping[str, Any] | None = None, force: bool = False
) -> Path:
    """Save a model (treated or not) in our layout, in shards of at most 2 GB; `layerwright.load` reads it back
    identically.

    Raises:
        CheckpointError: the folder cannot be used, or the model has no Hugging Face configuration.
    """
    folder = prepare_folder(out, force=force)
    if config is None:
        own = getattr(model, "config", None)
        if own is None or not hasattr(own, "to_dict"):
            raise CheckpointError(
                f"{type(model).__name__} has no configuration to rebuild it from: save model.state_dict() with "
                "safetensors and the structure with layerwright.nn.structure_of(model)"
            )
        config = own.to_dict() | {"architectures": [type(model).__name__], "dtype": _dtype_of(model)}
    writer = CheckpointWriter(folder)
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in unique_tensors(model).items():
        if size and size + tensor.numel() * tensor.element_size() > SHARD_BYTES:
            writer.add(f"model-{number:05d}", shard)
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor
        size += tensor.numel() * tensor.element_size()
    writer.add(f"model-{number:05d}", shard)
    writer.finish(config, structure_of(model), {})
    return folder
