"""Tables that one block of a stack owns and the others use: the position bias of T5 stands in its first block."""

from __future__ import annotations

from torch import nn

from layerwright.treat._depth import Arranged

__all__: list[str] = []


def owned_tables(model: nn.Module, item: Arranged, index: int, others: tuple[int, ...]) -> list[str]:
    """Names in the block at `index` of embeddings that none of the blocks at `others` has."""
    modules = item.stack.modules(model)
    theirs = {name for i in others for name, m in modules[i].named_modules() if isinstance(m, nn.Embedding)}
    own = (name for name, module in modules[index].named_modules() if isinstance(module, nn.Embedding))
    return [name for name in own if name not in theirs]


def movable(block: nn.Module, name: str) -> bool:
    """Whether the module around the table says by a flag ``has_<table>`` that it has one."""
    owner, _, table = name.rpartition(".")
    return vars(block.get_submodule(owner)).get(f"has_{table}") is True


def move_tables_(model: nn.Module, item: Arranged) -> None:
    """Give the tables of dropped blocks to the block that is first now."""
    modules = item.stack.modules(model)
    heir = modules[item.order[0]]
    for index in item.dropped:
        for name in owned_tables(model, item, index, tuple(set(item.order))):
            owner, _, table = name.rpartition(".")
            setattr(heir.get_submodule(owner), table, modules[index].get_submodule(name))
            setattr(heir.get_submodule(owner), f"has_{table}", True)


def remove_tables_(copied: nn.Module, tables: list[str]) -> None:
    """Take tables out of a copy of a block: it uses what the first one computes, as all others do."""
    for name in tables:
        owner, _, table = name.rpartition(".")
        delattr(copied.get_submodule(owner), table)
        setattr(copied.get_submodule(owner), f"has_{table}", False)
