"""Networks that take turns on one machine, and what autograd keeps of a pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import evaluating
from layerwright.core.capture import first_tensor

__all__ = ["fixed_threads", "kept_activation_bytes", "milliseconds", "rounds_in_turns"]


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Context: torch computes on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def rounds_in_turns(models: Sequence[nn.Module], inputs: Any, rounds: int) -> list[list[float]]:
    """Milliseconds of each model in each round; models take turns, and two rounds go before."""
    device = first_tensor(inputs).device
    times: list[list[float]] = [[] for _ in models]
    for number in range(rounds + 2):
        for model, taken in zip(models, times, strict=True):
            with evaluating(model):
                spent = milliseconds(partial(model, inputs), device)
            if number >= 2:
                taken.append(spent)
    return times


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one `run`: of the thread itself where one thread runs on a CPU, else of the clock on the wall."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _wait(device)
    begun = clock()
    run()
    _wait(device)
    return 1000 * (clock() - begun)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def kept_activation_bytes(model: nn.Module, inputs: Any) -> int:
    """Bytes of storage that autograd keeps of one forward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict(keep_vars=True).values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with evaluating(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(inputs)  # what is kept lives as long as this does, so that no address is used twice
        del output
    return sum(kept.values())
