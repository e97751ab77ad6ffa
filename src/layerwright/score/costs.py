"""What each layer costs: parameters, bytes, FLOPs, cache bytes, milliseconds, activations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model, fingerprint_structure
from layerwright.core.layer import LayerRef, get_parameter
from layerwright.core.layers import list_layers
from layerwright.core.profile import LayerProfile, Profile

__all__ = ["count_flops", "kv_bytes", "module_milliseconds", "profile_model", "stored_bytes_of"]


def profile_model(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    refs: Sequence[LayerRef] | None = None,
    name: str = "",
    timing: bool = True,
    repeats: int = 5,
) -> Profile:
    """The cost of every layer, container and block of `model`.

    Parameters and bytes come from the tensors (tied ones count once, where they first stand). With `calibration`,
    one forward over its first batch counts FLOPs and `repeats` more are timed; loss is the mean over all batches.
    Without, a model on the meta device will do, and its fingerprint is that of its structure.
    Costs of a container include what it holds.
    """
    refs = tuple(refs or list_layers(model))
    flops: dict[str, float] = {}
    times: dict[str, float] = {}
    activations: dict[str, int] = {}
    rows = 0
    loss = None
    if calibration is not None:
        batch = next(iter(calibration))
        rows = _rows(batch)
        run = _runner(model, calibration, batch)
        flops = count_flops(model, run)
        paths = [ref.path for ref in refs if _is_module(model, ref.path)]
        times, activations = _times(model, paths, run, repeats if timing else 1)
        times = times if timing else {}
        try:
            loss = calibration.mean_loss(model)
        except TypeError:
            loss = None
    caches = kv_bytes(model, refs)
    layers = []
    for ref in refs:
        module_path = ref.path if _is_module(model, ref.path) else (ref.parameter or ref.path).rpartition(".")[0]
        share = 1.0 if module_path == ref.path else _share(model, ref, module_path)
        params, size = _weight_cost(model, ref)
        ms = times.get(module_path, 0.0) * share
        layers.append(
            LayerProfile(
                ref,
                Cost(
                    params=params,
                    bytes=size,
                    flops=flops.get(module_path, 0.0) * share,
                    kv_bytes_per_token=sum(
                        v for p, v in caches.items() if p == ref.path or p.startswith(ref.path + ".")
                    ),
                    ms=ms,
                    ms_source="measured" if ms else "none",
                ),
                activations.get(module_path, 0),
            )
        )
    total_ms = times.get("", 0.0)
    whole = Cost(
        params=float(sum(p.numel() for p in model.parameters())),
        bytes=float(stored_bytes_of(model)),
        flops=flops.get("", 0.0),
        kv_bytes_per_token=float(sum(caches.values())),
        ms=total_ms,
        ms_source="measured" if total_ms else "none",
    )
    meta = any(p.is_meta for p in model.parameters())
    fingerprint = fingerprint_structure(model) if meta else fingerprint_model(model)
    return Profile(tuple(layers), whole, name, fingerprint, rows, loss)


def stored_bytes_of(module: nn.Module) -> int:
    """Bytes that saving `module` takes: parameters and persistent buffers, tied ones once."""
    seen: dict[tuple[int, int, int], int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            pointer = tensor.data_ptr() if tensor.device.type != "meta" else id(tensor)
            seen[(pointer, tensor.numel(), tensor.element_size())] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _weight_cost(model: nn.Module, ref: LayerRef) -> tuple[float, float]:
    if _is_module(model, ref.path):
        module = model.get_submodule(ref.path)
        if ref.tied:
            own = [p for n, p in module.named_parameters() if n != "weight"]
            return float(sum(p.numel() for p in own)), float(sum(p.numel() * p.element_size() for p in own))
        return float(sum(p.numel() for p in module.parameters())), float(stored_bytes_of(module))
    parameter = get_parameter(model, ref.parameter or ref.path)
    return float(parameter.numel()), float(parameter.numel() * parameter.element_size())


def _is_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
        return True
    except AttributeError:
        return False


def _share(model: nn.Module, ref: LayerRef, module_path: str) -> float:
    whole = sum(p.numel() for p in model.get_submodule(module_path).parameters(recurse=False))
    return ref.numel / max(whole, 1)


# -- FLOPs --------------------------------------------------------------------------------------------------------


def count_flops(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """FLOPs of one `run` by module path, ``""`` for the whole; a multiply-add counts 2.

    ``torch.utils.flop_counter`` does the counting; formulas are added for the operations it does not know: attention
    on the CPU and the products of packed integer weights.
    """
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        run()
    root = type(model).__name__
    counts: dict[str, float] = {}
    for path, operations in counter.get_flop_counts().items():
        name = "" if path in ("Global", root) else path.removeprefix(root + ".")
        counts[name] = max(counts.get(name, 0.0), float(sum(operations.values())))
    return counts


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


def _int4_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _int8_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _int_product_flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _formulas() -> dict[Any, Any]:
    wanted = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "_weight_int4pack_mm_for_cpu": _int4_flops,
        "_weight_int8pack_mm": _int8_flops,
        "_int_mm": _int_product_flops,
    }
    return {getattr(torch.ops.aten, name): formula for name, formula in wanted.items() if hasattr(torch.ops.aten, name)}


_FORMULAS = _formulas()

# -- time ---------------------------------------------------------------------------------------------------------


def module_milliseconds(
    model: nn.Module, paths: Sequence[str], run: Callable[[], object], repeats: int = 5
) -> dict[str, float]:
    """Median milliseconds of each module over `repeats` runs (``""`` is the whole run), after one run to warm up."""
    return _times(model, paths, run, repeats)[0]


def _times(
    model: nn.Module, paths: Sequence[str], run: Callable[[], object], repeats: int
) -> tuple[dict[str, float], dict[str, int]]:
    started: dict[str, list[float]] = {}
    spent: dict[str, float] = {}
    sizes: dict[str, int] = {}
    handles = []
    for path in paths:

        def before(_m: nn.Module, _a: Any, path: str = path) -> None:
            started.setdefault(path, []).append(time.perf_counter())

        def after(_m: nn.Module, _a: Any, output: Any, path: str = path) -> None:
            spent[path] = spent.get(path, 0.0) + time.perf_counter() - started[path].pop()
            try:
                tensor = first_tensor(output)
                sizes[path] = tensor.numel() * tensor.element_size()
            except TypeError:
                sizes[path] = 0

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    samples: dict[str, list[float]] = {}
    try:
        with torch.no_grad(), evaluating(model):
            for number in range(repeats + 1):
                spent.clear()
                begun = time.perf_counter()
                run()
                spent[""] = time.perf_counter() - begun
                if number or repeats == 1:
                    for path, seconds in spent.items():
                        samples.setdefault(path, []).append(1000 * seconds)
    finally:
        for handle in handles:
            handle.remove()
    return {path: statistics.median(values) for path, values in samples.items()}, sizes


# -- cache --------------------------------------------------------------------------------------------------------


def kv_bytes(model: nn.Module, refs: Sequence[LayerRef]) -> dict[str, float]:
    """Key-value cache bytes that one token takes, by attention path; empty for models that do not decode."""
    decoders = {name for stack in find_blocks_or_none(model) if stack.role == "decoder" for name in stack.names}
    found: dict[str, float] = {}
    for ref in refs:
        block = next((name for name in decoders if ref.path.startswith(name + ".")), None)
        if block is None or ref.role not in ("k", "v", "qkv"):
            continue
        owner = ref.path.rpartition(".")[0]
        size = get_parameter(model, ref.parameter).element_size()
        if ref.role == "qkv":
            output = next((r for r in refs if r.role == "o" and r.path.rpartition(".")[0] == owner), None)
            width = ref.shape[0] - (output.shape[1] if output else ref.shape[0] // 3)
        else:
            width = ref.shape[0]
        found[owner] = found.get(owner, 0.0) + width * size
    return found


def find_blocks_or_none(model: nn.Module) -> tuple[Any, ...]:
    """The stacks of blocks, or nothing for a model without."""
    try:
        return find_blocks(model)
    except InputError:
        return ()


def _runner(model: nn.Module, calibration: Calibration, batch: Any) -> Callable[[], object]:
    return lambda: calibration.forward(model, batch)


def _rows(batch: Any) -> int:
    tensors = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    first = next(t for t in tensors if isinstance(t, Tensor))
    return first.numel() if not first.is_floating_point() else int(first.shape[0])
