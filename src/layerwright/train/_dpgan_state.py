"""A text GAN in training on disk: every tensor as safetensors, everything else as JSON; survives a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import CheckpointError

__all__ = ["STATE", "read_state", "write_state"]

STATE = "dpgan.json"


def write_state(folder: Path, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Write both whole or not at all: the JSON names the tensors' file, and replaces the old one last."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = f"dpgan-{data['phase']}-{data['epoch']}.safetensors"
    mark = f".{os.getpid()}.tmp"
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / (name + mark))
    (folder / (STATE + mark)).write_text(json.dumps({**data, "tensors": name}, indent=1) + "\n", encoding="utf-8")
    (folder / (name + mark)).replace(folder / name)
    (folder / (STATE + mark)).replace(folder / STATE)
    for old in folder.glob("dpgan-*.safetensors"):
        if old.name != name:
            old.unlink()


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_state` wrote, None if nothing is there.

    Raises:
        CheckpointError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / STATE).is_file():
        return None
    try:
        data = json.loads((folder / STATE).read_text(encoding="utf-8"))
        path = folder / Path(data["tensors"]).name
        return load_file(path), data
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{folder}: {STATE} cannot be resumed ({reason}); remove it to begin anew") from error


def flat_optimizer(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of the state of `optimizer` by ``name.parameter.entry``."""
    state = optimizer.state_dict()["state"]
    return {f"{name}.{number}.{key}": value for number, own in state.items() for key, value in own.items()}


def fill_optimizer_(name: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give `optimizer` the state that `flat_optimizer` read."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(name + "."):
            number, entry = key[len(name) + 1 :].split(".")
            state.setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
