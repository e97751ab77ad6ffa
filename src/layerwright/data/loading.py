"""Load a model by name: a folder in the Hugging Face layout, a hub name, a demo model, or one of our own checkpoints."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from layerwright.core.checkpoint import Checkpoint, build_empty, model_class, model_config, read_config
from layerwright.core.errors import CheckpointError, InputError, unknown_name

__all__ = ["DEMOS", "Modality", "Source", "load", "locate", "modality", "processor_for", "torch_dtype"]

DEMOS = {"demo:lm": "lm", "demo:vit": "vit", "demo:cnn": "cnn"}
"""Trained models that ship with the package, by name."""

STRUCTURE_FILE = "layerwright.json"
Modality = Literal["text", "image", "other"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        folder: the local folder that holds it.
        config: its ``config.json``.
        structure: our own layout's description of treated layers (path to module specification); None for a plain
            Hugging Face checkpoint.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    structure: dict[str, Any] | None = None


def locate(name: str | Path, *, allow_download: bool = True) -> Source:
    """Find the folder of a model and read its configuration; loads no weights.

    Args:
        name: a folder, ``demo:lm``, ``demo:vit``, ``demo:cnn``, or a hub name such as ``org/model``. A hub name is
            looked up in the local cache first, and downloaded (safetensors and text files only) if it is not there.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: the folder is no model folder.
        InputError: an unknown demo name.
    """
    text = str(name)
    if text.startswith("demo:"):
        if text not in DEMOS:
            raise unknown_name("demo model", text, DEMOS)
        folder = Path(__file__).parent / "demo" / DEMOS[text]
    elif Path(text).expanduser().exists():
        folder = Path(text).expanduser()
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file: give the model's folder (with config.json and *.safetensors)")
    elif "/" in text and _HUB_NAME.match(text) and not text.startswith((".", "/", "~")):
        folder = _from_hub(text, allow_download)
    else:
        raise FileNotFoundError(
            f"no model at {text}: give a folder in the Hugging Face layout, a hub name (org/model), or demo:lm"
        )
    config = read_config(folder)
    return Source(text, folder, config, _read_structure(folder))


def _from_hub(name: str, allow_download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        if allow_download:
            return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"no folder {name} here, and the hub gave no model of that name ({reason})") from error
    raise FileNotFoundError(f"no folder {name} here, and no such model in the local hub cache")


def _read_structure(folder: Path) -> dict[str, Any] | None:
    path = folder / STRUCTURE_FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        if data["layerwright_checkpoint"] != 1:
            raise CheckpointError(f"{path} was written by a newer version: update layerwright")
        return data["structure"]  # type: ignore[no-any-return]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a layerwright checkpoint description ({error})") from error


def torch_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """``float32``, ``bfloat16``, ``float16`` or ``auto`` (None) as a torch dtype."""
    if name is None or name == "auto" or isinstance(name, torch.dtype):
        return name if isinstance(name, torch.dtype) else None
    if name not in _DTYPES:
        raise unknown_name("dtype", name, [*_DTYPES, "auto"])
    return _DTYPES[name]


def check_device(name: str | torch.device) -> torch.device:
    """A usable torch device.

    Raises:
        InputError: malformed, or not there.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("meta tensors hold no values")
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device: {name!r} is not there ({reason}); use cpu, or cuda where torch sees a GPU"
        ) from error


def load(
    name: str | Path | Source,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Any]:
    """Load ``(model, processor)``; the processor is a tokenizer, an image processor, or None if there is none.

    Args:
        name: what `locate` takes; checkpoints saved by layerwright load back identically.
        dtype: ``float32``, ``bfloat16``, ``float16``; None keeps the checkpoint's own.
        device: where to put the model.

    Raises:
        FileNotFoundError, CheckpointError, InputError: as `locate`; also NaN weights and broken safetensors.
    """
    place = check_device(device)
    wanted = torch_dtype(dtype)
    source = name if isinstance(name, Source) else locate(name)
    model = _load_treated(source, wanted) if source.structure is not None else _load_plain(source, wanted)
    refuse_nan(model, source.name)
    return model.to(place).eval(), processor_for(source)


def _load_plain(source: Source, dtype: torch.dtype | None) -> nn.Module:
    from safetensors import SafetensorError

    Checkpoint.open(source.folder)  # headers, sizes and paths first: a clear error instead of a deep one
    with _quiet():
        config = model_config(source.folder)
        model: nn.Module
        try:
            model, found = model_class(config).from_pretrained(
                source.folder,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{source.folder} does not load: {str(error).splitlines()[0]}") from error
    missing = sorted(found.get("missing_keys", ()))
    if missing:  # they would be drawn at random
        raise CheckpointError(
            f"{source.folder} lacks {len(missing)} tensor{'s' * (len(missing) > 1)} of {type(model).__name__}: {', '.join(missing[:4])}; "
            "the download is incomplete, or config.json names the wrong architecture"
        )
    return model


def _load_treated(source: Source, dtype: torch.dtype | None) -> nn.Module:
    from layerwright.nn.replace import rebuild_

    checkpoint = Checkpoint.open(source.folder)
    config = model_config(source.folder)
    stored = torch_dtype(str(source.config.get("dtype", "float32")).removeprefix("torch."))
    model = build_empty(config, stored)
    rebuild_(model, source.structure or {})
    assign_tensors(model, checkpoint)
    return model if dtype is None else _cast_saved(model, dtype)


def _cast_saved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Saved floating tensors in `dtype`; computed buffers (rotary frequencies) keep their own, as on loading."""
    kept = {
        (module, name): value
        for module in model.modules()
        for name, value in module._buffers.items()
        if name in module._non_persistent_buffers_set
    }
    model = model.to(dtype)
    for (module, name), value in kept.items():
        module._buffers[name] = value
    return model


def assign_tensors(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill every parameter and saved buffer of `model` from `checkpoint`, by name; tied ones may be absent.

    Raises:
        CheckpointError: tensors that are missing, left over or of the wrong shape.
    """
    expected = model.state_dict(keep_vars=True)
    unknown = sorted(set(checkpoint.files) - set(expected))
    if unknown:
        raise CheckpointError(f"{checkpoint.folder} holds tensors the model does not have: {', '.join(unknown[:4])}")
    state = dict(checkpoint.read(sorted(checkpoint.files)))
    for name, tensor in state.items():
        if tuple(expected[name].shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            )
    model.load_state_dict(state, strict=False, assign=True)
    retie_(model)
    missing = [n for n, t in model.state_dict(keep_vars=True).items() if t.device.type == "meta"]
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {len(missing)} tensors: {', '.join(missing[:4])}")


def retie_(model: nn.Module) -> None:
    """Share tied weights again, where the model says which are tied."""
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def refuse_nan(model: nn.Module, name: str) -> None:
    """Raise `CheckpointError` if a weight of `model` is NaN or infinite."""
    for path, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.sum()):
            raise CheckpointError(f"{name}: the weight {path} holds NaN or infinite values; the checkpoint is damaged")


def modality(source: Source) -> Modality:
    """What the model reads, from its configuration."""
    config = source.config
    if "vocab_size" in config or "vocab_size" in config.get("text_config", {}):
        return "text"
    return "image" if {"num_channels", "image_size"} & set(config) else "other"


def processor_for(source: Source) -> Any:
    """The tokenizer or image processor that lies in the model's folder; None if there is none."""
    import transformers

    files = {path.name for path in source.folder.iterdir()}
    kind: Any = None
    if {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"} & files:
        kind = transformers.AutoTokenizer
    elif "preprocessor_config.json" in files and source.name not in DEMOS:
        kind = transformers.AutoImageProcessor
    if kind is None:
        return None
    with _quiet():
        try:
            return kind.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare ones
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{source.folder}: its tokenizer or processor cannot be read ({reason})") from error


class _quiet:  # noqa: N801 - reads as a statement
    """Context: transformers' own progress bars and warnings are off."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity = copy.copy(logging.get_verbosity())
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()
