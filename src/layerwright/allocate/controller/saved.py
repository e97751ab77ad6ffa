"""A controller on disk: weights and the state of its optimizer, as safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from layerwright.allocate.controller.network import MetaController
from layerwright.core.errors import CheckpointError

__all__ = ["load_controller_", "save_controller"]

_PREFIX = "optimizer."


def save_controller(controller: MetaController, path: str | Path) -> Path:
    """Write weights and Adam's moments to `path`, whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: tensor.detach().clone() for name, tensor in controller.state_dict().items()}
    for number, state in controller.optimizer.state_dict()["state"].items():
        tensors |= {f"{_PREFIX}{number}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)
    return path


def load_controller_(controller: MetaController, path: str | Path) -> None:
    """Bring `controller` to where `save_controller` left one of the same form.

    Raises:
        CheckpointError: the file is not there, damaged, or of another form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_PREFIX):
                number, _, kind = name.removeprefix(_PREFIX).partition(".")
                states.setdefault(int(number), {})[kind] = tensor
        controller.load_state_dict(weights)
        groups = controller.optimizer.state_dict()["param_groups"]
        controller.optimizer.load_state_dict({"state": states, "param_groups": groups})
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} holds no controller of this form ({' '.join(str(error).split())[:120]})"
        ) from error
