"""A proxy of bit vectors as a scorer: damages per layer and width that every allocator can use."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.option import Scores
from layerwright.core.treatment import Quantize, Treatments, describe
from layerwright.score.base import Subject
from layerwright.score.proxies.expression import ProxyTree
from layerwright.score.proxies.handmade import BIT_PROXIES, BitProxy, Gains
from layerwright.score.proxies.statistics import STATISTICS, layer_statistics
from layerwright.score.proxies.weighting import Weighting

__all__ = ["as_proxy", "bundled_proxy", "emq", "proxy_damages"]

_BUNDLED = Path(__file__).parent / "emq.json"


@cache
def bundled_proxy() -> ProxyTree:
    """The expression that `evolve_proxy` found on the measured bit vectors of the demo models."""
    return ProxyTree.from_genotype(json.loads(_BUNDLED.read_text())["genotype"])


def as_proxy(proxy: str | Path | ProxyTree | BitProxy, weighting: Weighting | None = None) -> BitProxy:
    """A proxy by name (``emq`` for the bundled one, or hand-made), by expression, or by file of a finished search.

    `weighting` replaces the way in which bits enter an expression (see `bit_weights`); None leaves it.

    Raises:
        InputError: none of these, or a weighting for a hand-made proxy; FileNotFoundError: no such file.
    """
    if isinstance(proxy, BitProxy):
        return _unweighted(proxy, weighting)
    if isinstance(proxy, ProxyTree):
        tree = proxy
    elif str(proxy) == "emq":
        tree = bundled_proxy()
    elif str(proxy).endswith(".json"):
        tree = _read_file(Path(proxy))
    elif "(" in str(proxy) or str(proxy) in STATISTICS:
        tree = ProxyTree.from_string(str(proxy))
    else:
        return _unweighted(BIT_PROXIES.get(str(proxy)), weighting)
    if weighting is not None:
        tree = dataclasses.replace(tree, weighting=weighting)
    needs = tuple(dict.fromkeys(part for name in tree.inputs for part in (("G", "W") if name == "GW" else (name,))))
    return BitProxy(tree.to_string(), needs, tree.gains)


def _unweighted(proxy: BitProxy, weighting: Weighting | None) -> BitProxy:
    if weighting is not None:
        raise InputError(f"weighting: {proxy.name} is a proxy of its own form; leave the weighting out")
    return proxy


def _read_file(path: Path) -> ProxyTree:
    if not path.is_file():
        raise FileNotFoundError(f"no proxy file at {path}")
    try:
        return ProxyTree.from_genotype(json.loads(path.read_text())["genotype"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no proxy that a search has written ({error})") from error


def emq(
    subject: Subject,
    proxy: str | Path | ProxyTree | BitProxy = "emq",
    *,
    weighting: Weighting | None = None,
    samples: int = 64,
    limit: int = 1 << 17,
) -> Scores:
    """Damages from a proxy of bit vectors, without treating a weight (Dong et al., EMQ, 2023, arXiv 2307.10554).

    ``damage(l, b) = gain(l, b_max) - gain(l, b)`` with ``b_max`` the widest candidate. No unit of the loss: damages
    rank choices, and leaving a layer alone counts like the widest candidate. See `proxy_damages`.

    Args:
        proxy, weighting: see `as_proxy`.
        samples: samples of the calibration that statistics are measured on.
        limit: numbers of a statistic that are kept per layer.

    Raises:
        InputError: a candidate that is not a quantization, or what `layer_statistics` refuses.
    """
    begun = time.perf_counter()
    chosen = as_proxy(proxy, weighting)
    refs = [ref for ref in subject.layers if subject.candidates.get(ref.path)]
    widths = sorted({_bits(t, ref.path) for ref in refs for t in subject.candidates[ref.path]})
    damages: dict[tuple[str, Treatments], float] = {}
    if refs:
        statistics = layer_statistics(
            subject.model, subject.calibration, refs, chosen.needs, samples=samples, limit=limit, seed=subject.seed
        )
        table = proxy_damages(chosen.gains(statistics, widths), widths, statistics.numel)
        for row, ref in zip(table, refs, strict=True):
            for treatments in subject.candidates[ref.path]:
                damages[(ref.path, treatments)] = float(row[widths.index(_bits(treatments, ref.path))])
    if subject.progress:
        subject.progress(len(refs), len(refs))
    return Scores(
        scorer="emq",
        damages=damages,
        model=fingerprint_model(subject.model),
        data=subject.calibration.fingerprint(),
        seconds=time.perf_counter() - begun,
        meta={"loss_units": False, "proxy": chosen.name, "samples": samples},
    )


def proxy_damages(gains: Gains, widths: Sequence[int], numel: Sequence[int]) -> Gains:
    """``(layers, widths)`` damages, 0 at the widest, from gains of ascending `widths`; their mean magnitude is 1.

    A proxy may say that bits hurt a layer. ``c numel b`` is then added to all gains, with the smallest ``c`` that makes
    every bit help: choices of one size keep their order.

    Raises:
        InputError: a gain that is not finite.
    """
    if not np.isfinite(gains).all():
        raise InputError("emq: the proxy is not finite on this model; choose another one")
    sizes = np.asarray(numel, dtype=np.float64)
    steps = np.diff(gains, axis=1) / np.diff(np.asarray(widths, dtype=np.float64)) / sizes[:, None]
    shift = max(0.0, -float(steps.min(initial=0.0)))
    shifted = gains + shift * np.outer(sizes, widths)
    damages = shifted[:, -1:] - shifted
    scale = float(np.abs(damages).mean()) or 1.0
    return np.asarray(np.maximum(damages / scale, 0.0))


def _bits(treatments: Treatments, path: str) -> int:
    if len(treatments) != 1 or not isinstance(treatments[0], Quantize):
        raise InputError(f"emq judges bits: {path} is offered {describe(treatments)}, expected quantization alone")
    return treatments[0].bits
