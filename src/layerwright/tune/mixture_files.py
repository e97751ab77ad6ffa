"""Adapters on disk, in peft's layout: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.nn.lora import linear_sides
from layerwright.nn.lora_experts import LoRAExperts
from layerwright.nn.lora_mixture import LoRAMixture
from layerwright.treat.writer import unwritable, write_json
from layerwright.tune.mixture import MixtureHandle, put_

__all__ = ["load_adapter", "save_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^base_model\.model\.(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_gating|lora_threshold)"
    r"(?:\.(?P<number>\d+))?\.(?P<last>weight|bias)$"
)
_TYPES = {"LORA": "none", "ADAMOLE": "adaptive", "MOLE": "top-k"}
_UNKNOWN = ("use_dora", "use_rslora", "alpha_pattern", "modules_to_save", "trainable_token_indices", "corda_config")


def save_adapter(handle: MixtureHandle, folder: str | Path, name: str | None = None) -> Path:
    """Write one adapter (the active one) alone; returns the folder.

    With one expert it is plain LoRA, which peft reads. With several, names and settings are those of the released code
    of AdaMoLE (``peft_type`` ``ADAMOLE`` or ``MOLE``, ``lora_A.<expert>.weight``, ``lora_gating``, ``lora_threshold``);
    peft itself does not know these types and refuses them.

    Raises:
        InputError: no such adapter.
        CheckpointError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    experts = handle.experts(name)
    out = Path(folder)
    tensors = {
        f"{_PREFIX}{path}.{key}": value for path, made in experts.items() for key, value in _tensors(made).items()
    }
    kept = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f"{WEIGHTS}.tmp"
        save_file(kept, temporary, metadata={"format": "pt"})
        temporary.replace(out / WEIGHTS)
    except OSError as error:
        raise unwritable(out, error) from error
    write_json(out / CONFIG, _config(handle, experts))
    return out


def load_adapter(
    model: nn.Module | MixtureHandle, folder: str | Path, name: str = "default", *, trainable: bool = False
) -> MixtureHandle:
    """Put an adapter from disk on a model, in place, and make it the active one.

    Args:
        model: a plain model, which is frozen, or the handle of one with adapters.
        folder: of `save_adapter`, of the released code of AdaMoLE, or of peft's plain LoRA.
        name: of the adapter on the model; new.
        trainable: whether it can be trained further.

    Raises:
        CheckpointError: files that are missing or damaged.
        InputError: a kind of adapter that is not known, or one for another model; nothing is changed.
    """
    source = Path(folder)
    config, tensors = _read(source)
    layers = _layers(source, tensors)
    settings = _settings(source, config, layers)
    network = model.model if isinstance(model, MixtureHandle) else model
    modules = dict(network.named_modules())
    for path, parts in layers.items():
        module = modules.get(path)
        sides = linear_sides(module.base if isinstance(module, LoRAMixture) else module) if module is not None else None
        if sides != (parts["lora_B"].shape[0], parts["lora_A"].shape[1]):
            raise InputError(
                f"{source}: {path} has {tuple(parts['lora_A'].shape)} and {tuple(parts['lora_B'].shape)}, and the model "
                f"{'no such layer' if sides is None else f'a layer of {sides}'}: is it an adapter of another model?"
            )
        if isinstance(module, LoRAMixture) and name in module.adapters:
            raise InputError(f"name: {name!r} is taken; expected a new one")
    flags = {key: parameter.requires_grad for key, parameter in network.named_parameters()}
    if not isinstance(model, MixtureHandle):
        network.requires_grad_(False)
    for path, parts in layers.items():
        put_(network, [path], name, settings[path], 0)
        layer = network.get_submodule(path)
        assert isinstance(layer, LoRAMixture)
        made = layer.adapters[name]
        with torch.no_grad():
            for key, value in parts.items():
                getattr(made, key).copy_(value)
    handle = MixtureHandle(network, None if isinstance(model, MixtureHandle) else flags)
    if isinstance(model, MixtureHandle):
        handle.flags = model.flags
    handle.use(name, trainable)
    return handle


def _tensors(made: LoRAExperts) -> dict[str, Tensor]:
    if made.num_experts == 1:
        return {"lora_A.weight": made.lora_A, "lora_B.weight": made.lora_B}
    found: dict[str, Tensor] = {}
    for number, part in enumerate(made.lora_A.split(made.rank)):
        found[f"lora_A.{number}.weight"] = part
    for number, part in enumerate(made.lora_B.split(made.rank, dim=1)):
        found[f"lora_B.{number}.weight"] = part
    for key, value in (
        ("lora_gating.weight", made.lora_gate),
        ("lora_threshold.weight", made.lora_threshold),
        ("lora_threshold.bias", made.lora_offset),
    ):
        if value is not None:
            found[key] = value
    return found


def _config(handle: MixtureHandle, experts: Mapping[str, LoRAExperts]) -> dict[str, Any]:
    made = next(iter(experts.values()))
    settings = made.settings
    config = getattr(handle.model, "config", None)
    transposed = any(type(handle.layers[path].base).__name__ == "Conv1D" for path in experts)
    generates = hasattr(handle.model, "prepare_inputs_for_generation")
    task = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    found: dict[str, Any] = {
        "task_type": task if generates else None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "target_modules": list(experts),
    }
    if made.num_experts == 1:
        ranks = {path: own.rank for path, own in experts.items() if own.rank != made.rank}
        return {"peft_type": "LORA", "r": made.rank, "fan_in_fan_out": transposed, "rank_pattern": ranks, **found}
    found |= {"lora_rank": made.rank, "num_experts": made.num_experts}
    found |= {name: settings[name] for name in ("routing", "balance_on")}
    if made.routing == "adaptive":
        return {"peft_type": "ADAMOLE", "max_threshold": made.max_threshold, **found}
    found["top_k" if made.routing == "top-k" else "threshold"] = made.top_k or made.max_threshold
    return {"peft_type": "MOLE", **found}


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise CheckpointError(f"{source} has no {name}: expected the folder of an adapter")
    try:
        config = json.loads((source / CONFIG).read_text())
        tensors = load_file(source / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be read as an adapter ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source / CONFIG}: expected a mapping")
    return config, tensors


def _layers(source: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Stacked parameters by path and name of the parameter."""
    parts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key, value in tensors.items():
        if ".moe_layer." in key:
            continue  # the released code lists every expert a second time
        match = _KEY.match(key)
        if match is None:
            raise InputError(f"{source}: unknown tensor {key!r}; expected low-rank experts of linear layers")
        part = f"{match['part']}.{match['last']}"
        parts.setdefault(match["path"], {}).setdefault(part, {})[int(match["number"] or 0)] = value
    found: dict[str, dict[str, Tensor]] = {}
    for path, own in parts.items():
        numbers = {len(own.get(part, {})) for part in ("lora_A.weight", "lora_B.weight")}
        if len(numbers) != 1 or 0 in numbers or sorted(own["lora_A.weight"]) != list(range(numbers.pop())):
            raise CheckpointError(f"{source}: {path} has not as many lora_A as lora_B")
        found[path] = {
            "lora_A": torch.cat([own["lora_A.weight"][i] for i in sorted(own["lora_A.weight"])]),
            "lora_B": torch.cat([own["lora_B.weight"][i] for i in sorted(own["lora_B.weight"])], dim=1),
        }
        for part, name in (
            ("lora_gating.weight", "lora_gate"),
            ("lora_threshold.weight", "lora_threshold"),
            ("lora_threshold.bias", "lora_offset"),
        ):
            if part in own:
                found[path][name] = own[part][0]
    if not found:
        raise CheckpointError(f"{source / WEIGHTS} holds no adapter")
    return found


def _settings(
    source: Path, config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    kind = str(config.get("peft_type"))
    if kind not in _TYPES:
        raise InputError(f"{source}: peft_type {kind!r} is not known; expected one of {', '.join(_TYPES)}")
    strange = [name for name in _UNKNOWN if config.get(name)]
    if strange:
        raise InputError(f"{source}: {', '.join(strange)} is set, which these adapters do not have; load it with peft")
    plain = kind == "LORA"
    count = 1 if plain else int(config.get("num_experts", 4))
    routing = "none" if plain else config.get("routing") or _routing(kind, config)
    common: dict[str, Any] = {
        "num_experts": count,
        "alpha": float(config.get("lora_alpha", 8)),
        "dropout": float(config.get("lora_dropout", 0.0)),
        "routing": routing,
        "balance_on": config.get("balance_on", "margin"),
    }
    if routing == "top-k":
        common["top_k"] = config.get("top_k")
    elif routing in ("adaptive", "threshold"):
        common["max_threshold"] = config.get("max_threshold" if routing == "adaptive" else "threshold")
    found = {}
    for path, parts in layers.items():
        rows = parts["lora_A"].shape[0]
        if rows % count or parts["lora_B"].shape[1] != rows:
            raise CheckpointError(f"{source}: {path} has {rows} rows, expected those of {count} experts")
        found[path] = common | {"rank": rows // count}
        made = LoRAExperts(1, 1, **found[path], generator=torch.Generator())
        wanted = {name for name, _ in made.named_parameters()}
        if set(parts) != wanted:
            raise CheckpointError(f"{source}: {path} has {sorted(parts)}, expected {sorted(wanted)} for {routing}")
    return found


def _routing(kind: str, config: Mapping[str, Any]) -> str:
    return "threshold" if kind == "MOLE" and config.get("threshold") is not None else _TYPES[kind]
