"""What treatments need to know of a layer, and whether they fit it."""

from __future__ import annotations

from typing import Literal

from layerwright.core.errors import InputError
from layerwright.core.treatment import LowRank, MixRows, Narrow, Quantize, Sparsify, Treatments, describe

__all__ = ["Needs", "check_treatments", "needed_statistics"]

Needs = Literal["none", "diagonal", "gram"]
"""Nothing, diagonal second moments and ranges, or the whole gram of the inputs."""


def needed_statistics(treatments: Treatments) -> Needs:
    """What `treated` should be given for these treatments."""
    methods = {getattr(t, "method", "") for t in treatments}
    if methods & {"gptq", "sparsegpt", "activation"}:
        return "gram"
    if any(isinstance(t, Narrow) and (t.compensate or t.method == "activation") for t in treatments):
        return "gram"
    static = any(isinstance(t, Quantize) and t.act_bits and t.act_mode == "static" for t in treatments)
    return "diagonal" if static or "wanda" in methods else "none"


def check_treatments(treatments: Treatments, out: int, in_: int, name: str = "layer") -> None:
    """Refuse treatments that do not fit a weight ``(out, in)``.

    Raises:
        InputError: a group size that does not divide the inputs, a rank that saves nothing, 2:4 with inputs that are
            no multiple of 4, treatments that exclude each other or are not for weights; names the layer.
    """
    kinds = [type(t) for t in treatments]
    for t in treatments:
        if isinstance(t, Narrow):
            in_ = t.kept(in_)
    for t in treatments:
        if not isinstance(t, Quantize | Sparsify | LowRank | MixRows | Narrow):
            raise InputError(f"{name}: {t.label()} is not a treatment of a weight")
        if kinds.count(type(t)) > 1:
            raise InputError(f"{name}: {describe(treatments)} repeats {t.tag}; give it once")
        if isinstance(t, Quantize | MixRows) and t.group_size != -1 and in_ % t.group_size:
            raise InputError(f"{name}: group_size {t.group_size} does not divide its {in_} inputs; use a divisor or -1")
        if isinstance(t, Sparsify) and t.pattern == "2:4" and in_ % 4:
            raise InputError(f"{name}: pattern 2:4 needs a multiple of 4 inputs, it has {in_}; use unstructured")
        if isinstance(t, LowRank) and t.inner >= min(out, in_):
            raise InputError(f"{name}: rank {t.inner} is not below min{(out, in_)}; use a smaller one")
    if MixRows in kinds:
        if len(kinds) > 1:
            raise InputError(f"{name}: {describe(treatments)} cannot be combined on one layer; choose one")
        try:
            next(t for t in treatments if isinstance(t, MixRows)).widths(out)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    if LowRank in kinds and Sparsify in kinds:
        raise InputError(f"{name}: low_rank and sparsify cannot be combined on one layer; choose one")
