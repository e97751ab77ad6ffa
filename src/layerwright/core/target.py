"""Targets: where a result must load, and what that place can express."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerwright.core.errors import unknown_name
from layerwright.core.treatment import TREATMENTS, Quantize, RoundActivations, Treatments, weight_treatments

__all__ = ["TARGETS", "Target", "target"]


@dataclass(frozen=True)
class Target:
    """Constraints of a program that loads the result.

    Attributes:
        name: `layerwright`, `hf`, `vllm`, `gguf`, `onnx`.
        bits: weight bits it can load.
        group_sizes: group sizes it can load; None is any (and -1 per channel).
        fused: roles that it fuses into one matrix, so that they must share their treatment.
        asymmetric: it loads zero points.
        kinds: tags of the treatments it can express.
        joint: it can express two treatments of one weight.
        inputs: rounded inputs it can express, if `kinds` has them: `all`, or `affine` ones beside an integer weight (a
            uniform grid with a range of the tensor, or a symmetric one for each token).
        format: the export format that serves it.
    """

    name: str
    bits: frozenset[int] = frozenset(range(2, 9))
    group_sizes: frozenset[int] | None = None
    fused: tuple[frozenset[str], ...] = ()
    asymmetric: bool = True
    kinds: frozenset[str] = frozenset({"quantize", "sparsify", "low_rank", "drop"})
    joint: bool = True
    inputs: Literal["all", "affine"] = "all"
    format: str = "safetensors"

    def refuses(self, treatments: Treatments) -> str:
        """Why this target cannot load `treatments`; ``""`` if it can."""
        for t in treatments:
            if t.tag not in self.kinds:
                return f"{self.name} cannot load {t.label()}"
            if isinstance(t, Quantize):
                if t.bits not in self.bits:
                    return f"{self.name} cannot load {t.bits}-bit weights (it loads {sorted(self.bits)})"
                if self.group_sizes is not None and t.group_size not in self.group_sizes:
                    return f"{self.name} cannot load group_size {t.group_size} (it loads {sorted(self.group_sizes)})"
                if not t.symmetric and not self.asymmetric:
                    return f"{self.name} cannot load zero points: use symmetric: true"
            if isinstance(t, RoundActivations) and self.inputs == "affine":
                if not any(isinstance(other, Quantize) and other.act_bits is None for other in treatments):
                    return f"{self.name} cannot load {t.label()} without an integer weight"
                if t.grid != "uniform" or t.share == "channel" or (t.share == "token" and not t.symmetric):
                    shares = "share: tensor, or share: token with symmetric: true"
                    return f"{self.name} cannot load {t.label()} per {t.share}: use grid: uniform and {shares}"
        if len(weight_treatments(treatments)) > 1 and not self.joint:
            return f"{self.name} cannot load two treatments on one layer"
        return ""


_FUSED = (frozenset({"q", "k", "v"}), frozenset({"gate", "up"}))

TARGETS = {
    t.name: t
    for t in (
        Target("layerwright", kinds=frozenset(TREATMENTS)),
        Target(
            "hf",
            asymmetric=False,
            kinds=frozenset({"quantize", "activations", "drop"}),
            joint=False,
            inputs="affine",
            format="compressed-tensors",
        ),
        Target(
            "vllm",
            bits=frozenset({4, 8}),
            group_sizes=frozenset({-1, 32, 64, 128}),
            fused=_FUSED,
            kinds=frozenset({"quantize", "drop"}),
            joint=False,
            format="compressed-tensors",
        ),
        Target(
            "gguf",
            bits=frozenset({4, 8}),
            group_sizes=frozenset({32}),
            asymmetric=False,
            kinds=frozenset({"quantize", "drop"}),
            joint=False,
            format="gguf",
        ),
        Target(
            "onnx",
            bits=frozenset({4, 8}),
            kinds=frozenset({"quantize", "activations", "drop", "low_rank"}),
            joint=False,
            format="onnx",
        ),
    )
}


def target(name: str | Target) -> Target:
    """The target of that name."""
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]
