"""Why a layer got what it got: damage per unit saved, of the choice and of its neighbours."""

from __future__ import annotations

import numpy as np

from layerwright.allocate.problem import Problem
from layerwright.allocate.tree import Floats, Integers
from layerwright.core.option import Option
from layerwright.core.treatment import describe

__all__ = ["explain"]

UNITS = {
    "bytes": "byte",
    "ms": "ms",
    "flops": "FLOP",
    "params": "parameter",
    "kv_bytes_per_token": "cache byte",
}


def explain(problem: Problem, chosen: Integers) -> dict[str, str]:
    """One sentence for every layer that `chosen` decides, and for every block it drops.

    ``int3 g32 gptq: 2.1e-06 damage per byte saved; next cheaper int2 g32 gptq costs 9.8e-06, next better int4 g32 gptq
    would save 1.2e-07``: all in damage per unit of the first limited resource (bytes where nothing is limited), the
    first against the layer's least damaging option, the others against the choice.
    """
    resource = problem.resources[0] if problem.resources else "bytes"
    spent = problem.cost[:, 0] if problem.resources else problem.bytes
    reasons: dict[str, str] = {}
    for i in chosen.tolist():
        own = problem.tree.options_of(int(problem.tree.node[i]))
        sentence = _sentence(problem.options, problem.damage, spent, i, own, UNITS[resource])
        for path in dict.fromkeys((problem.options[i].layer, *problem.options[i].covers)):
            reasons[path] = sentence
    return reasons


def _sentence(options: tuple[Option, ...], damage: Floats, spent: Floats, i: int, own: Integers, unit: str) -> str:
    best = own[np.lexsort((spent[own], damage[own]))[0]]
    saved = spent[best] - spent[i]
    name = describe(options[i].treatments)
    if len(own) == 1:
        head = f"{name}: its only option, {damage[i]:.2g} damage"
    elif saved > 0:
        head = f"{name}: {(damage[i] - damage[best]) / saved:.2g} damage per {unit} saved"
    else:
        head = f"{name}: the least damage of its {len(own)} options"
    dearer, cheaper = own[spent[own] > spent[i]], own[spent[own] < spent[i]]
    dearer = dearer[damage[dearer] < damage[i]]
    notes = []
    if len(cheaper):
        rates = (damage[cheaper] - damage[i]) / (spent[i] - spent[cheaper])
        k = int(np.argmin(rates))
        notes.append(f"next cheaper {describe(options[cheaper[k]].treatments)} costs {rates[k]:.2g}")
    if len(dearer):
        rates = (damage[i] - damage[dearer]) / (spent[dearer] - spent[i])
        k = int(np.argmax(rates))
        notes.append(f"next better {describe(options[dearer[k]].treatments)} would save {rates[k]:.2g}")
    return f"{head}; {', '.join(notes)}" if notes else head
