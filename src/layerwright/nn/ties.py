"""Which parameters of a model are one and the same, and how to part them for good."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

__all__ = ["sharing_names", "untie_"]


def sharing_names(model: nn.Module, parameter: str) -> list[str]:
    """Full names of the other parameters that are, or that the model declares to be, the same as `parameter`.

    A transformers model declares its ties (``all_tied_weights_keys``); these hold even while `parameter` has been
    exchanged and the others have not.
    """
    everything = dict(model.named_parameters(remove_duplicate=False))
    own = everything.get(parameter)
    names = {name for name, other in everything.items() if other is own}
    for prefix, _, declared in _declaring(model):
        ties = {prefix + target: prefix + source for target, source in declared.items()}
        source = ties.get(parameter, parameter)
        names |= {target for target, other in ties.items() if other == source} | (
            {source} if parameter in ties else set()
        )
    return sorted(
        name for name in names - {parameter} if name in everything and not _same_module(model, name, parameter)
    )


def untie_(model: nn.Module, gone: Collection[str]) -> None:
    """Take the parameters `gone` (full names) out of all declared ties.

    What was tied to one of them is tied to the first of its like instead. Without this, transformers would look for
    the parameters, or tie them again, at the next opportunity.
    """
    for prefix, module, _ in _declaring(model):
        missing = {name.removeprefix(prefix) for name in gone if name.startswith(prefix)}
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if isinstance(ties, dict) and missing & (set(ties) | set(ties.values())):
                setattr(module, attribute, _without(ties, missing))


def _without(ties: dict[str, str], missing: Collection[str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    heirs: dict[str, str] = {}
    for target, source in ties.items():
        if target in missing:
            continue
        if source not in missing:
            kept[target] = source
        elif source in heirs:
            kept[target] = heirs[source]
        else:
            heirs[source] = target
    return kept


def _declaring(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """``(prefix, module, target to source)`` of every part that declares ties."""
    for path, module in model.named_modules():
        declared = getattr(module, "all_tied_weights_keys", None)
        if isinstance(declared, dict):
            yield (f"{path}." if path else ""), module, declared


def _same_module(model: nn.Module, one: str, other: str) -> bool:
    """Whether both names reach the same module by different paths."""
    first, second = (model.get_submodule(name.rpartition(".")[0]) for name in (one, other))
    return first is second
