"""Networks on disk: the words and sizes as JSON, the weights as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.densenet import DenseNetBC
from layerwright.models.plain_cnn import PlainCNN

__all__ = ["ARCHITECTURE", "WEIGHTS", "from_spec", "load_network", "save_network"]

ARCHITECTURE = "architecture.json"
WEIGHTS = "model.safetensors"
Network = PlainCNN | DenseNetBC
_KINDS: dict[str, type[PlainCNN] | type[DenseNetBC]] = {"plain_cnn": PlainCNN, "densenet_bc": DenseNetBC}


def from_spec(spec: Sequence[str], **settings: Any) -> Network:
    """The network that `spec` describes: a `DenseNetBC` for ``g4 g4 t g6``, else a `PlainCNN`.

    Settings that are not of that kind (the image size, for a DenseNet) are left out.

    Raises:
        InputError: a word that is not known, or see the classes.
    """
    if not spec:
        raise InputError("spec: got no words, expected such as conv-8-3 pool fc-16, or g4 g4 t g6")
    if all(word == "t" or word[:1] == "g" for word in spec):
        settings = {key: value for key, value in settings.items() if key not in ("size", "batch_norm")}
        return DenseNetBC.from_spec(spec, **settings)
    return PlainCNN.from_spec(spec, **settings)


def save_network(model: Network, folder: str | Path) -> Path:
    """Write ``architecture.json`` and ``model.safetensors`` into `folder`, each whole or not at all."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, cls in _KINDS.items() if isinstance(model, cls))
    data = {"kind": kind, "spec": model.to_spec(), "settings": model.settings()}
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    mark = f".{os.getpid()}.tmp"
    save_file(state, folder / (WEIGHTS + mark))
    (folder / (ARCHITECTURE + mark)).write_text(json.dumps(data, indent=1) + "\n")
    for name in (WEIGHTS, ARCHITECTURE):
        (folder / (name + mark)).replace(folder / name)
    return folder


def load_network(folder: str | Path) -> Network:
    """The network that `save_network` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / ARCHITECTURE).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no network in {folder}: expected {ARCHITECTURE} and {WEIGHTS}, as `grow` writes them")
    try:
        data = json.loads((folder / ARCHITECTURE).read_text())
        model = _KINDS[data["kind"]].from_spec(data["spec"], **data["settings"])
        state = load_file(folder / WEIGHTS)
        dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        model.to(dtype).load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, StopIteration, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{folder} holds no readable network ({reason})") from error
    if not all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point()):
        raise CheckpointError(f"{folder}: a weight holds NaN or infinite values; the network is damaged")
    result: nn.Module = model.eval()
    assert isinstance(result, PlainCNN | DenseNetBC)
    return result
