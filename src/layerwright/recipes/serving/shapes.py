"""The shape of a model by name; reads no weights."""

from __future__ import annotations

import re
from pathlib import Path

from layerwright.core.checkpoint import model_config
from layerwright.core.errors import CheckpointError, unknown_name
from layerwright.data.loading import DEMOS, locate
from layerwright.score.device.shapes import LMShape, preset_shapes

__all__ = ["shape_of"]

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def shape_of(model: str) -> LMShape:
    """The shape of a model; reads no weights.

    Args:
        model: a preset (`mixtral`, `glam`, `grok1`, `opt-66b`, `llama3-70b`), a folder in the Hugging Face layout, its
            ``config.json``, a folder of the hub's cache (``models--org--name``), a demo model, or a hub name, of which only
            the configuration is fetched.

    Raises:
        FileNotFoundError: nothing of that name.
        InputError: an unknown preset (close ones are listed), or a model the cost model does not cover.
    """
    if model in preset_shapes():
        return preset_shapes()[model]
    path = Path(model).expanduser()
    if path.exists():
        return LMShape.from_config(model_config(_config_folder(path)), path.name if path.is_dir() else path.parent.name)
    if model.startswith("demo:"):
        if model not in DEMOS:
            raise unknown_name("demo model", model, DEMOS)
        return LMShape.from_config(model_config(locate(model).folder), model)
    if _HUB_NAME.match(model):
        return LMShape.from_config(model_config(_hub_config(model)), model)
    if "/" in model or model.endswith(".json"):
        raise FileNotFoundError(
            f"no model at {model}: give a preset, a folder with config.json, or a hub name (org/model)"
        )
    raise unknown_name("model", model, [*preset_shapes(), *DEMOS])


def _config_folder(path: Path) -> Path:
    """The folder with ``config.json``, also inside the hub's cache."""
    if path.is_file():
        if path.name != "config.json":
            raise CheckpointError(f"{path} is no config.json: give the model's folder or its config.json")
        return path.parent
    if (path / "config.json").is_file() or not (path / "snapshots").is_dir():
        return path
    reference = path / "refs" / "main"
    if reference.is_file() and (path / "snapshots" / reference.read_text().strip()).is_dir():
        return path / "snapshots" / reference.read_text().strip()
    found = sorted(path.glob("snapshots/*/config.json"))
    if not found:
        raise CheckpointError(f"{path} has no snapshot with a config.json: expected a model folder of the hub's cache")
    return found[-1].parent


def _hub_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"no folder {name} here, and the hub gave no config.json of it ({reason})") from error
