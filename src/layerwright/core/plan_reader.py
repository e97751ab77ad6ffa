"""Reading a plan's YAML so that every mistake is reported with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from layerwright.core.errors import InputError, PlanError, unknown_name
from layerwright.core.target import TARGETS
from layerwright.core.treatment import Treatments, treatments_from_data

__all__ = ["read_plan"]

MODEL_KEYS = ("name", "fingerprint", "architecture")


def read_plan(path: str, text: str) -> dict[str, Any]:
    """The fields of a `Plan` from the `text` of the file `path`, `source` and `lines` included.

    Only plain YAML data is read: no tags, no references.

    Raises:
        PlanError: not a plan, or mistakes in it, each as ``path:line: message``.
    """
    return _Reader(path, text).plan()


class _Reader:
    """Reads a plan's YAML with the line of everything, so that a mistake can be pointed at."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.loader = yaml.SafeLoader(text)
        self.seen: set[int] = set()
        try:
            self.root = self.loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise PlanError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
        except (yaml.YAMLError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).replace("\n", " ")
            raise PlanError(f"{path}:1: not valid YAML: {reason}") from error

    def error(self, node: yaml.Node, message: str) -> PlanError:
        return PlanError(f"{self.path}:{node.start_mark.line + 1}: {message}")

    def mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key to (key's node, value's node)."""
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"{what}: got {_kind(node)}, expected a mapping (name: value)")
        if not node.tag.startswith("tag:yaml.org,2002:map"):
            raise self.error(node, f"{what}: has the tag {node.tag}; plans hold plain values only")
        if id(node) in self.seen:
            raise self.error(node, f"{what}: a reference (*name) to something above; write it out")
        self.seen.add(id(node))
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            name = self.value(key, what)
            if not isinstance(name, str):
                raise self.error(key, f"{what}: got the name {name!r}, expected text")
            if name in found:
                first = found[name][0].start_mark.line + 1
                raise self.error(key, f"{what}: {name} is given twice (first in line {first}); delete one of the two")
            found[name] = (key, value)
        return found

    def value(self, node: yaml.Node, what: str) -> Any:
        """Plain data."""
        if isinstance(node, yaml.MappingNode):
            return {name: self.value(value, what) for name, (_, value) in self.mapping(node, what).items()}
        if isinstance(node, yaml.SequenceNode):
            raise self.error(node, f"{what}: got a list, expected a single value")
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.error(node, f"{what}: {node.value!r} cannot be read: {str(error).splitlines()[0]}") from error

    def plan(self) -> dict[str, Any]:
        """The fields of the plan."""
        if self.root is None:
            raise PlanError(f"{self.path}:1: the file is empty, expected a plan")
        top = self.mapping(self.root, "plan")
        version = self.value(top["layerwright_plan"][1], "layerwright_plan") if "layerwright_plan" in top else None
        if version != 1:
            raise self.error(self.root, f"layerwright_plan: got {version!r}, expected 1: not a plan of this version")
        kinds = {
            "model": str,
            "budget": str,
            "recipe": str,
            "target": str,
            "seed": int,
            "predicted": float,
            "notes": str,
        }
        given: dict[str, Any] = {}
        for name, (key, node) in top.items():
            if name not in {*kinds, "layerwright_plan", "prepare", "layers"}:
                raise self.error(key, str(unknown_name("key", name, [*kinds, "prepare", "layers"])))
            if name == "prepare":
                given[name] = {
                    step: self.settings(v, f"prepare: {step}") for step, (_, v) in self.mapping(node, name).items()
                }
            if name in ("model", "predicted"):
                entries = self.mapping(node, name)
                if name == "model" and (odd := next((e for e in entries if e not in MODEL_KEYS), None)):
                    raise self.error(entries[odd][0], str(unknown_name("key", odd, MODEL_KEYS, "model")))
                given[name] = {e: self.typed(v, f"{name}.{e}", kinds[name]) for e, (_, v) in entries.items()}
            elif name in kinds:
                given[name] = self.typed(node, name, kinds[name])
        if "target" in given and given["target"] not in TARGETS:
            raise self.error(top["target"][1], str(unknown_name("target", given["target"], TARGETS)))
        if "layers" not in top:
            raise self.error(self.root, "layers: missing; list them, or write layers: {}")
        return self.layers(self.mapping(top["layers"][1], "layers"), given)

    def settings(self, node: yaml.Node, what: str) -> dict[str, Any]:
        """Settings of one step; none may be written as nothing at all."""
        value = self.value(node, what)
        if value is not None and not isinstance(value, dict):
            raise self.error(node, f"{what}: got {value!r}, expected settings such as {{alpha: 0.5}}, or {{}}")
        return value or {}

    def typed(self, node: yaml.Node, what: str, kind: type) -> Any:
        value = self.value(node, what)
        allowed = (int, float) if kind is float else (kind,)
        if not isinstance(value, allowed) or isinstance(value, bool):
            word = {str: "text", int: "a whole number", float: "a number such as 0.5 or 1.0e-06"}[kind]
            raise self.error(node, f"{what}: got {value!r}, expected {word}")
        return value

    def layers(self, nodes: dict[str, tuple[yaml.Node, yaml.Node]], given: dict[str, Any]) -> dict[str, Any]:
        """All layers; every layer with a mistake is named."""
        layers: dict[str, Treatments] = {}
        reasons: dict[str, str] = {}
        problems: list[str] = []
        for path, (_, node) in nodes.items():
            try:
                layers[path], reasons[path] = self.entry(path, node)
            except PlanError as error:
                problems.append(str(error))
        if problems:
            raise PlanError("; ".join(problems), problems)
        lines = {path: key.start_mark.line + 1 for path, (key, _) in nodes.items()}
        return {**given, "layers": layers, "reasons": reasons, "source": self.path, "lines": lines}

    def entry(self, path: str, node: yaml.Node) -> tuple[Treatments, str]:
        """Treatments and reason of one layer."""
        if not isinstance(node, yaml.MappingNode):
            fields, data, why = {}, self.value(node, path), ""
            if data is not None and not isinstance(data, str):
                raise self.error(node, f"{path}: got {data!r}, expected a mapping such as {{quantize: {{bits: 4}}}}")
        else:
            fields = self.mapping(node, path)
            why = self.typed(fields.pop("why")[1], f"{path}: why", str) if "why" in fields else ""
            data = {name: self.value(value, f"{path}: {name}") for name, (_, value) in fields.items()}
            if "keep" in data and (len(data) > 1 or data["keep"] not in (None, {}, True)):
                raise self.error(fields["keep"][0], f"{path}: keep stands alone; it contradicts everything else given")
            data = None if "keep" in data else data
        try:
            return treatments_from_data(data, path), why
        except InputError as error:
            about = str(error).replace(path, "", 1)
            raise self.error(_guilty(fields, about, node), str(error)) from error


def _guilty(fields: Mapping[str, tuple[yaml.Node, yaml.Node]], message: str, entry: yaml.Node) -> yaml.Node:
    """The node that an error of `treatments_from_data` is about: the setting, else the treatment, else the entry."""
    for tag, (key, value) in fields.items():
        if repr(tag) in message:
            return key
        for name, _ in value.value if isinstance(value, yaml.MappingNode) else ():
            if re.search(rf"'{re.escape(str(name.value))}'|(\.| ){re.escape(str(name.value))}(:|;|$| got)", message):
                assert isinstance(name, yaml.Node)
                return name
    return next((key for tag, (key, _) in fields.items() if f" {tag} " in message), entry)


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"{node.value!r}"
