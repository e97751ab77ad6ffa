"""The files of a streamed run: a module's tensors read from them, its treated form written as a shard of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.checkpoint import Checkpoint
from layerwright.core.errors import NotFiniteError
from layerwright.core.memory import release_free_memory
from layerwright.nn.replace import structure_of
from layerwright.treat.writer import CheckpointWriter, unique_tensors, write_json

__all__ = ["ShardRun", "load_outside", "refuse_nan", "write_rest"]


@dataclass
class ShardRun:
    """One run over a checkpoint: what it works on and where it writes."""

    model: nn.Module
    checkpoint: Checkpoint
    names: dict[str, str]
    writer: CheckpointWriter
    progress: Path
    structure: dict[str, Any]
    shards: list[str]

    def load(self, path: str) -> None:
        """Read the tensors of the module at `path` from the files."""
        module = self.model.get_submodule(path)
        prefix = f"{path}." if path else ""
        wanted = {
            self.names[prefix + name]: name
            for name, tensor in module.state_dict(keep_vars=True).items()
            if tensor.device.type == "meta" and prefix + name in self.names
        }
        dtype = next((t.dtype for t in module.state_dict(keep_vars=True).values() if t.is_floating_point()), None)
        state = {
            wanted[name]: tensor.to(dtype) if tensor.is_floating_point() and dtype is not None else tensor
            for name, tensor in self.checkpoint.read(list(wanted))
        }
        refuse_nan(self.checkpoint.folder, state, prefix)
        _assign(module, state)

    def write(self, path: str) -> None:
        """Write the module at `path` to a shard of its own, and free it."""
        module = self.model.get_submodule(path)
        shard = f"model-{len(self.shards) + 1:05d}"
        tensors = {f"{path}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
        before = self.writer.total_bytes
        self.writer.add(shard, tensors)
        self.structure |= {f"{path}.{name}" if name else path: spec for name, spec in structure_of(module).items()}
        self.shards.append(shard)
        write_json(
            self.progress / f"{shard}.json",
            {
                "path": path,
                "bytes": self.writer.total_bytes - before,
                "tensors": sorted(tensors),
                "structure": {k: v for k, v in self.structure.items() if k == path or k.startswith(path + ".")},
            },
        )
        module.to("meta")
        release_free_memory()

    def restore(self, count: int) -> list[str]:
        """Take up the first `count` shards, which an earlier run finished; returns the paths of their modules."""
        done = []
        for number in range(1, count + 1):
            note = self.progress / f"model-{number:05d}.json"
            data = json.loads(note.read_text())
            shard = note.stem
            self.writer.restore(dict.fromkeys(data["tensors"], f"{shard}.safetensors"), data["bytes"])
            self.structure |= data["structure"]
            self.shards.append(shard)
            done.append(data["path"])
        return done


def refuse_nan(folder: Path, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse a weight of `state` that is not finite.

    Raises:
        NotFiniteError: the first such weight, by its name.
    """
    for name, tensor in state.items():
        # Numbers of one byte are not summed by every version of torch, and come with scales beside them.
        if tensor.is_floating_point() and tensor.itemsize > 1 and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise NotFiniteError(
                f"{folder}: the weight {prefix}{name} holds NaN or infinite values; the checkpoint is damaged"
            )


def _assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        holder = module.get_submodule(owner) if owner else module
        if attribute in holder._parameters:
            holder._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            holder._buffers[attribute] = tensor


def load_outside(run: ShardRun, blocks: Sequence[str]) -> None:
    """Read everything that is in no block."""
    prefixes = tuple(f"{path}." for path in blocks)
    wanted = [name for name in run.names if not name.startswith(prefixes)]
    state = run.model.state_dict(keep_vars=True)
    found = dict(run.checkpoint.read([run.names[name] for name in wanted]))
    refuse_nan(run.checkpoint.folder, found)
    _assign(
        run.model,
        {
            name: tensor.to(state[name].dtype) if tensor.is_floating_point() else tensor
            for name in wanted
            for tensor in [found[run.names[name]]]
        },
    )
    tie: Any = getattr(run.model, "tie_weights", None)
    if tie is not None:
        tie()


def write_rest(run: ShardRun) -> None:
    """Write whatever no shard holds yet, in one shard."""
    tensors = {n: t for n, t in unique_tensors(run.model).items() if n not in run.writer.weight_map}
    run.writer.add("model-00000", tensors)
    for path, spec in structure_of(run.model).items():
        run.structure.setdefault(path, spec)
