"""The first two phases of adaptive computation modules: learners that imitate what they replace, gates that learn when
the next learner is worth it (ACM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._adaptive_gate import AdaptiveCalls
from layerwright.treat.acmize import ACMHandle
from layerwright.tune._loop import Progress, Schedule, train_

__all__ = ["LabelRule", "choice_labels", "distill_modules_", "prefix_errors", "pretrain_gates_", "watch_parts"]

LabelRule = Literal["clean", "official"]
SeePart = Callable[[str, Tensor, Tensor, "Tensor | None"], None]
"""``see(path, input, output, real tokens)``."""


def prefix_errors(prefixes: Tensor, target: Tensor) -> Tensor:
    """``e_k = |h_k - y|`` in float32, ``(..., N + 1)``.

    Args:
        prefixes: ``h_0`` to ``h_N``, ``(..., N + 1, features)``.
        target: ``y``, ``(..., features)``.
    """
    return (prefixes.float() - target.float()[..., None, :]).norm(dim=-1)


def choice_labels(errors: Tensor, threshold: float = 1.2, rule: LabelRule = "clean", min_learners: int = 0) -> Tensor:
    """How many learners a token is worth: the first ``k`` with ``e_k / e_{k+1} < threshold``, else all.

    That is, the next learner makes the error smaller by less than the factor `threshold`. Of two errors of 0 the next
    learner does nothing.

    Args:
        errors: ``e_0`` to ``e_N``, ``(..., N + 1)``.
        threshold: the factor, above 0.
        rule: ``official`` is the released code's: with ``j`` the first position that fulfils it, ``j + 1``, and all
            learners if that is the very first (or none).
        min_learners: smallest choice; the search begins there.

    Raises:
        InputError: a threshold of 0 or less, or an unknown rule.
    """
    if not threshold > 0:
        raise InputError(f"threshold: got {threshold}, expected a number above 0")
    if rule not in get_args(LabelRule):
        raise unknown_name("label_rule", str(rule), get_args(LabelRule))
    most = errors.shape[-1] - 1
    now, after = errors[..., min_learners:-1], errors[..., min_learners + 1 :]
    enough = (now < threshold * after) | (now == 0)
    if not enough.shape[-1]:
        return torch.full(errors.shape[:-1], most, device=errors.device)
    first, found = enough.int().argmax(-1), enough.any(-1)
    if rule == "official":
        return torch.where(first == 0, most, first + min_learners + 1)
    return torch.where(found, first + min_learners, most)


@contextmanager
def watch_parts(original: nn.Module, inputs: Mapping[str, str], see: SeePart) -> Iterator[None]:
    """Context: `see` is called with the input and the output of each part of `original` that an adaptive module replaces.

    Args:
        original: runs as it is.
        inputs: path of the module that reads a part's input, by path of the one that gives its output.
    """
    given: dict[str, Tensor] = {}
    calls = AdaptiveCalls()
    calls.follow(original)
    handles = [calls.hook]
    for path, entry in inputs.items():

        def before(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            given[path] = first_tensor([*args, *kwargs.values()])

        def after(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
            x = given.pop(path)
            see(path, x, first_tensor(output), calls.real(x))

        handles.append(original.get_submodule(entry).register_forward_pre_hook(before, with_kwargs=True))
        handles.append(original.get_submodule(path).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            assert handle is not None
            handle.remove()


def distill_modules_(
    original: nn.Module,
    handle: ACMHandle,
    data: Calibration,
    schedule: Schedule,
    *,
    detach: bool = False,
    progress: Progress | None = None,
) -> list[float]:
    """Train the learners of all modules on what they replace, in place; returns the losses."""
    modules = handle.modules

    def of_part(path: str, x: Tensor, y: Tensor) -> Tensor:
        return (modules[path].prefixes(x, detach).float() - y.float()[..., None, :]).square().mean((-1, -2))

    chosen = [p for m in modules.values() for name, p in m.named_parameters() if not name.startswith("gate.")]
    return _train_parts_(original, handle, data, schedule, of_part, chosen, "distilling modules", progress)


def pretrain_gates_(
    original: nn.Module,
    handle: ACMHandle,
    data: Calibration,
    schedule: Schedule,
    *,
    threshold: float = 1.2,
    rule: LabelRule = "clean",
    progress: Progress | None = None,
) -> list[float]:
    """Train the gates on `choice_labels` of the learners as they are, in place; returns the losses."""
    modules = handle.modules

    def of_part(path: str, x: Tensor, y: Tensor) -> Tensor:
        module = modules[path]
        with torch.no_grad():
            labels = choice_labels(prefix_errors(module.prefixes(x), y), threshold, rule, module.min_learners)
        shares = module.logits(x).softmax(-1).gather(-1, (labels - module.min_learners)[..., None])
        return -(shares.squeeze(-1) + 1e-20).log()

    chosen = [p for m in modules.values() for p in m.gate.parameters()]
    return _train_parts_(original, handle, data, schedule, of_part, chosen, "training gates", progress)


def _train_parts_(
    original: nn.Module,
    handle: ACMHandle,
    data: Calibration,
    schedule: Schedule,
    of_part: Callable[[str, Tensor, Tensor], Tensor],
    parameters: list[nn.Parameter],
    name: str,
    progress: Progress | None,
) -> list[float]:
    """Train on the mean over modules and real tokens of ``of_part(path, input, output)``, a number for each token."""
    inputs = handle.inputs

    def loss_of(_network: nn.Module, batch: Any) -> Tensor:
        losses: list[Tensor] = []

        def see(path: str, x: Tensor, y: Tensor, real: Tensor | None) -> None:
            with torch.enable_grad():
                every = of_part(path, x.detach(), y.detach())
                losses.append(every.mean() if real is None else every[real].mean())

        with torch.no_grad(), watch_parts(original, inputs, see):
            data.forward(original, batch)
        if not losses:
            raise InputError("original: none of its parts that are adaptive ran; is it the model that was changed?")
        return torch.stack(losses).mean()

    with evaluating(original):
        return train_(
            handle.model,
            list(data),
            loss_of,
            schedule,
            parameters=parameters,
            progress=progress,
            name=name,
            distributed=False,
        )
