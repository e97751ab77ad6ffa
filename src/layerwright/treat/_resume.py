"""The resumable state of a streamed run: whose it is, the shards that are finished, the activations behind them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from layerwright.core.calibration import Calibration
from layerwright.core.checkpoint import Checkpoint
from layerwright.core.errors import CheckpointError
from layerwright.core.lockstep import Lockstep, LockstepState, NotResumableError
from layerwright.core.plan import Plan
from layerwright.treat.writer import prepare_folder, write_json

__all__ = ["finished_count", "open_progress", "read_state", "run_key", "write_state"]


def run_key(plan: Plan, checkpoint: Checkpoint, calibration: Calibration | None) -> str:
    """What a run depends on, as a digest: plan, source files and calibration data."""
    digest = hashlib.sha256()
    digest.update(json.dumps(sorted((k, str(v)) for k, v in plan.layers.items())).encode())
    digest.update(json.dumps(sorted((k, str(v)) for k, v in checkpoint.shapes.items())).encode())
    for file in sorted(set(checkpoint.files.values())):
        status = (checkpoint.folder / file).stat()
        digest.update(f"{file} {status.st_size} {status.st_mtime_ns}".encode())
    digest.update((calibration.fingerprint() if calibration is not None else "").encode())
    return digest.hexdigest()


def open_progress(folder: Path, key: str, out: Path, *, force: bool = False) -> None:
    """Make the folder of the state of the run `key`, or take up the one that is there.

    Raises:
        CheckpointError: the folder holds the state of another run, and not `force`.
    """
    note = folder / "run.json"
    if note.is_file():
        if json.loads(note.read_text()).get("key") == key:
            return
        if not force:
            raise CheckpointError(
                f"{out} holds the unfinished state of another run (other plan, model or data): give another folder, "
                "or pass --force to start again"
            )
        shutil.rmtree(folder)
        prepare_folder(out, force=True)
    folder.mkdir(exist_ok=True)
    write_json(note, {"key": key})


def write_state(folder: Path, number: int, walk: Lockstep) -> None:
    """Save the activations that stand behind shard `number`, and forget the earlier ones.

    A walk whose state cannot be saved writes nothing: such a run is resumed from its start.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    try:
        state = walk.state()
    except NotResumableError:
        return
    temporary = folder / "state.tmp"
    try:
        save_file({name: tensor.clone() for name, tensor in state.tensors.items()}, temporary)
        temporary.replace(folder / f"state-{number:05d}.safetensors")
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{folder} cannot be written ({error}): is the disk full?") from error
    write_json(folder / f"state-{number:05d}.json", state.passes)
    for old in folder.glob("state-*"):
        if f"{number:05d}" not in old.name:
            old.unlink()


def finished_count(folder: Path, kind: str) -> int:
    """Number of shards (`model`) that were written, or that the saved activations (`state`) stand behind."""
    numbers = [int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{kind}-*.json")]
    if kind == "state":
        return max(numbers, default=0)
    return next(n for n in range(len(numbers) + 1) if n + 1 not in numbers)


def read_state(folder: Path, number: int) -> LockstepState | None:
    """The activations that `write_state` saved behind shard `number`, None if there are none."""
    from safetensors.torch import load_file

    note = folder / f"state-{number:05d}.json"
    if number == 0 or not note.is_file():
        return None
    return LockstepState(json.loads(note.read_text()), load_file(folder / f"state-{number:05d}.safetensors"))
