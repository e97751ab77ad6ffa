"""Plans: what every layer gets and why, as a file that a person can read, edit and compare."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from layerwright.core.errors import InputError, PlanError, unknown_name
from layerwright.core.option import Allocation
from layerwright.core.plan_reader import read_plan
from layerwright.core.storage import stored_bytes
from layerwright.core.target import TARGETS
from layerwright.core.treatment import Narrow, Quantize, Sparsify, Treatments, describe

__all__ = ["Change", "Plan"]

HEADER = """\
# What every layer gets, one line per layer. You may edit, add and delete lines under "layers"; a layer that is not
# listed is left alone. A line is "path: {treatment: {setting: value, ...}}"; settings left out take their defaults.
#   {keep: {}}       {quantize: {bits: 4, group_size: 32}}       {sparsify: {pattern: "2:4"}}
#   {low_rank: {inner: 64}}       {drop: {}} removes a whole block       "why" is a remark and changes nothing
# "predicted" is what was expected before any edit; "model" must stay, since a plan fits one model only.
"""
MANY = 20
"""How many unknown layers are reported one by one."""


@dataclass(frozen=True)
class Change:
    """A layer that two plans treat differently."""

    layer: str
    before: Treatments
    after: Treatments

    def __str__(self) -> str:
        return f"{self.layer}: {describe(self.before)} -> {describe(self.after)}"


@dataclass(frozen=True)
class Plan:
    """One treatment set per layer, and how it came about.

    Attributes:
        layers: path of a layer or a block to its treatments, in order of application; a path that is missing, or has
            none, is left alone.
        reasons: path of a listed layer to one sentence.
        model: `name`, `fingerprint` and `architecture` of the model it was made for.
        budget: the budget it was made for, as `Budget.parse` reads it.
        recipe: name of the recipe.
        target: name of the program that must load the result.
        predicted: what was expected of it: `bytes`, `params`, `damage`, `loss`, ...
        seed: seed of everything random that led to it and that applying it takes.
        notes: free text.
        prepare: steps that change weights but not what the model computes, done before any treatment: name to settings.
        source: the file it was read from; not compared.
        lines: path of a layer to its line in that file; not compared.
    """

    layers: Mapping[str, Treatments]
    reasons: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    budget: str = ""
    recipe: str = ""
    target: str = "layerwright"
    predicted: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    notes: str = ""
    prepare: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: str = field(default="", compare=False, repr=False)
    lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        layers = {path: tuple(sorted(treatments, key=lambda t: t.rank)) for path, treatments in self.layers.items()}
        for path, treatments in layers.items():
            tags = [t.tag for t in treatments]
            if len(set(tags)) < len(tags) or (len(tags) > 1 and any(t.scope == "block" for t in treatments)):
                raise PlanError(f"{path}: {describe(treatments)} contradict each other; give one of each, or only drop")
        for path in self.reasons:
            if path not in layers:
                raise PlanError(
                    f"reasons: {path} has a reason but is not in the plan; list it, or leave its reason out"
                )
        reasons = {path: " ".join(why.split()) for path, why in self.reasons.items()}
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "reasons", {path: why for path, why in reasons.items() if why})
        object.__setattr__(self, "model", dict(self.model))
        object.__setattr__(self, "prepare", {name: dict(settings) for name, settings in self.prepare.items()})
        object.__setattr__(self, "predicted", {name: _plain(value) for name, value in self.predicted.items()})

    @classmethod
    def from_allocation(
        cls,
        allocation: Allocation,
        *,
        model: Mapping[str, str] | None = None,
        budget: str = "",
        recipe: str = "",
        target: str = "layerwright",
        base_loss: float | None = None,
        seed: int = 0,
        notes: str = "",
        prepare: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Plan:
        """The plan of an allocator's choice: tied layers are listed one by one, a dropped block by its own path.

        With `base_loss`, the loss of the untouched model, the predicted `loss` is that plus the damage.
        """
        layers: dict[str, Treatments] = {}
        for option in allocation.chosen:
            block = any(t.scope == "block" for t in option.treatments)
            # A narrowed projection is named itself; the layers that feed it follow, with the other treatments.
            rest = tuple(t for t in option.treatments if not isinstance(t, Narrow))
            layers |= dict.fromkeys((option.layer,) if block else option.covers, rest)
            if len(rest) < len(option.treatments):
                layers[option.layer] = option.treatments
        costs = {name: value for name, value in allocation.cost.to_data().items() if isinstance(value, float) and value}
        # Some methods predict no damage (NaN): then none is written.
        known = allocation.predicted is not None
        predicted = {**costs, "damage": allocation.damage} if known else costs
        if base_loss is not None and known:
            predicted["loss"] = base_loss + allocation.damage
        method = f"chosen by {allocation.method}{', proven optimal' if allocation.optimal else ''}"
        return cls(
            layers=layers,
            reasons={path: why for path, why in allocation.reasons.items() if path in layers},
            model=model or {},
            budget=budget,
            recipe=recipe,
            target=target,
            predicted=predicted,
            seed=seed,
            notes=notes or (method if allocation.method else ""),
            prepare=prepare or {},
        )

    def save(self, path: str | Path) -> Path:
        """Write YAML, one line per layer; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.to_yaml(), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def to_yaml(self) -> str:
        """The text that `save` writes; settings that equal the defaults are left out, but for a treatment's first."""
        head = {
            "layerwright_plan": 1,
            "model": dict(self.model),
            "budget": self.budget,
            "recipe": self.recipe,
            "target": self.target,
            "seed": self.seed,
            "predicted": dict(self.predicted),
            "notes": self.notes,
        }
        if self.prepare:
            head["prepare"] = {name: dict(settings) for name, settings in self.prepare.items()}
        text = "".join(f"{key}: {_flow(value)}\n" for key, value in head.items())
        lines = "".join(f"  {_flow(path)}: {_flow(self._entry(path))}\n" for path in self.layers)
        return f"{HEADER}{text}layers:{chr(10) + lines if lines else ' {}' + chr(10)}"

    def _entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        for t in self.layers[path]:
            # The first setting (bits, sparsity, rank) is what a person looks for, so it is always written.
            entry[t.tag] = {
                f.name: getattr(t, f.name)
                for place, f in enumerate(dataclasses.fields(t))
                if place == 0 or getattr(t, f.name) != f.default
            }
        entry = entry or {"keep": {}}
        return {**entry, "why": self.reasons[path]} if path in self.reasons else entry

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote, or a person did.

        Raises:
            FileNotFoundError: there is no such file.
            PlanError: not a plan, or mistakes in it, each as ``path:line: message``.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there is no such plan") from None
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: cannot be read as a text file ({error})") from error
        return cls(**read_plan(str(path), text))

    def check(
        self,
        paths: Iterable[str],
        fingerprint: str = "",
        shapes: Mapping[str, tuple[int, int]] | None = None,
        roles: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Everything that would go wrong on a model, as one line each; empty if nothing would.

        Args:
            paths: paths of all layers and blocks of the model.
            fingerprint: the model's; a plan for another one is refused. Not compared where either is empty.
            shapes: path of each layer with a weight to its matrix ``(out, in)``; with it group sizes, ranks, patterns
                and the kind of layer are checked.
            roles: path to the role in its block (``q``, ``gate``); with it fused roles must share their treatment.
        """
        problems: list[str] = []
        made_for = self.model.get("fingerprint", "")
        if fingerprint and made_for and fingerprint != made_for:
            name = self.model.get("name") or "another model"
            problems.append(
                f"{self.source or 'plan'}: made for {name} ({made_for}), not for this model ({fingerprint})"
            )
        known = set(paths)
        unknown = [path for path in self.layers if path not in known]
        problems += [f"{self._at(path)}{unknown_name('layer', path, known)}" for path in unknown[:MANY]]
        if len(unknown) > MANY:
            problems.append(f"{self.source or 'plan'}: {len(unknown) - MANY} more layers are unknown to this model")
        dropped = [path for path, treatments in self.layers.items() if any(t.scope == "block" for t in treatments)]
        for path, treatments in self.layers.items():
            if path in known and treatments:
                block = next((d for d in dropped if path.startswith(f"{d}.")), None)
                if block is not None:
                    problems.append(f"{self._at(path)}{path} gets {describe(treatments)}, but {block} is dropped")
                problems += [f"{self._at(path)}{path}: {why}" for why in self._misfits(path, treatments, shapes)]
        return problems + self._fused(roles or {})

    def _at(self, path: str) -> str:
        return f"{self.source}:{self.lines[path]}: " if path in self.lines else ""

    def _misfits(self, path: str, treatments: Treatments, shapes: Mapping[str, tuple[int, int]] | None) -> list[str]:
        """What the target or the layer's shape forbids."""
        target = TARGETS.get(self.target)
        refusal = target.refuses(treatments) if target else str(unknown_name("target", self.target, TARGETS))
        found = [refusal] if refusal else []
        if shapes is None:
            return found
        block = any(t.scope != "weight" for t in treatments)
        if block == (path in shapes):
            whole = "its attention module" if any(t.scope == "attention" for t in treatments) else "its block"
            kind = f"has a weight of its own; name {whole}" if block else "has no weight of its own; name its layers"
            return [*found, f"{describe(treatments)} cannot be given to it: it {kind}"]
        if not block:
            out, in_ = shapes[path]
            try:
                stored_bytes(treatments, out, in_)
            except InputError as error:
                found.append(str(error))
            if in_ % 4 and any(isinstance(t, Sparsify) and t.pattern == "2:4" for t in treatments):
                found.append(f"pattern: 2:4 does not fit {in_} inputs; they must be a multiple of 4")
        return found

    def _fused(self, roles: Mapping[str, str]) -> list[str]:
        """Roles that the target fuses, of one parent, and that do not share their treatment."""
        target, groups = TARGETS.get(self.target), dict[tuple[str, frozenset[str]], list[str]]()
        for path, role in roles.items():
            for fused in target.fused if target else ():
                if role in fused:
                    groups.setdefault((path.rpartition(".")[0], fused), []).append(path)
        problems = []
        for members in groups.values():
            got = {path: self.layers.get(path, ()) for path in members}
            if len(set(got.values())) > 1:
                each = ", ".join(f"{path} {describe(treatments)}" for path, treatments in got.items())
                where = next((self._at(path) for path in members if path in self.lines), "")
                problems.append(f"{where}{self.target} fuses these into one matrix, so they must be equal: {each}")
        return problems

    def table(self) -> list[dict[str, str]]:
        """One row per listed layer for display: `layer`, `treatment`, `why`."""
        return [
            {"layer": path, "treatment": describe(treatments), "why": self.reasons.get(path, "")}
            for path, treatments in self.layers.items()
        ]

    def diff(self, other: Plan) -> list[Change]:
        """Layers that `other` treats differently, in this plan's order; a missing layer is one left alone."""
        paths = dict.fromkeys([*self.layers, *other.layers])
        changes = [Change(path, self.layers.get(path, ()), other.layers.get(path, ())) for path in paths]
        return [change for change in changes if change.before != change.after]

    def llama_quantize_arguments(self) -> list[str]:
        """Arguments for llama.cpp's `llama-quantize` that give each tensor of a Llama-type model the plan's bits.

        4 bits become q4_0, 8 bits q8_0, a layer left alone f16; llama.cpp rounds the weights itself. Embedding and
        output have options of their own.

        Raises:
            PlanError: treatments that llama.cpp has no type for, or layers whose name there is not known.
        """
        arguments, bad = list[str](), list[str]()
        for path, treatments in self.layers.items():
            kind, name = _ggml_type(treatments), _ggml_name(path)
            if kind and name:
                arguments += [name, kind] if name.startswith("--") else ["--tensor-type", f"{name}={kind}"]
            elif treatments:
                bad.append(f"{path} ({describe(treatments)})")
        if bad:
            shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            raise PlanError(f"llama-quantize has no type for {shown}; plan with target gguf and drop blocks beforehand")
        return arguments


def _plain(value: Any) -> float:
    """A number of Python's own, so that YAML can write it."""
    return value if type(value) in (int, float) else float(value)


def _flow(value: Any) -> str:
    """YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    if len(text.removesuffix("\n...\n").rstrip("\n").splitlines()) > 1:
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, default_style='"')
    return text.removesuffix("\n...\n").rstrip("\n")


def _ggml_type(treatments: Treatments) -> str:
    if not treatments:
        return "f16"
    q = treatments[0]
    plain = isinstance(q, Quantize) and len(treatments) == 1 and q.group_size == 32 and q.symmetric and not q.act_bits
    return {4: "q4_0", 8: "q8_0"}.get(q.bits, "") if plain and isinstance(q, Quantize) else ""


_GGML_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _ggml_name(path: str) -> str:
    """A tensor's name in a GGUF file, or the option that names it; empty if it is not known."""
    if path in ("model.embed_tokens", "lm_head"):
        return "--output-tensor-type" if path == "lm_head" else "--token-embedding-type"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    return f"blk.{match[1]}.{_GGML_NAMES[match[2]]}" if match and match[2] in _GGML_NAMES else ""
