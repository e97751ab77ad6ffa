"""The laws as functions of a vector of parameters, with their derivatives.

Every law is a sum of powers, perhaps raised to a power, perhaps above a floor. Parameters are exponents ``a`` and
intercepts ``p = a log scale`` (so that ``(scale / x)**a = exp(p - a log x)``): intercepts and exponents are far less
collinear than scales and exponents. A floor enters as its logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

__all__ = ["LAWS", "Law"]

Array = NDArray[numpy.float64]
_SYMBOLS = {"n_params": "N", "tokens": "D", "flops": "C", "steps": "S"}


@dataclass(frozen=True)
class Law:
    """How the loss depends on one or two quantities.

    Attributes:
        name: by which it is asked for.
        inputs: fields of a run that it reads: ``n_params``, ``tokens``, ``flops``, ``steps``.
        form: ``power`` for a sum of one power for each input; ``joint`` for Kaplan's
            ``L(N, D) = ((Nc/N)**(aN/aD) + Dc/D)**aD``.
        floor: whether an irreducible loss is added.
    """

    name: str
    inputs: tuple[str, ...]
    form: str = "power"
    floor: bool = False

    @property
    def symbols(self) -> tuple[str, ...]:
        """``N``, ``D``, ``C`` or ``S`` of each input."""
        return tuple(_SYMBOLS[name] for name in self.inputs)

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return 2 * len(self.inputs) + self.floor

    def log_loss(self, theta: Array, logs: Array) -> Array:
        """``log L`` ``(..., points)`` for parameters ``(..., parameters)`` and log inputs ``(inputs, points)``.

        Parameters are all exponents, then all intercepts, then the log of the floor.
        """
        return self.gradient(theta, logs)[0]

    def gradient(self, theta: Array, logs: Array) -> tuple[Array, Array]:
        """``log L`` and its derivatives ``(..., points, parameters)``."""
        count = len(self.inputs)
        a, p = theta[..., :count, None], theta[..., count : 2 * count, None]
        terms = p - a * logs  # (..., inputs, points)
        if self.form == "joint":
            value, by_a, by_p = _joint(a, terms, logs)
        else:
            value, share = _log_sum(terms)
            by_a, by_p = -share * logs, share
        columns = [by_a, by_p]
        if self.floor:
            both = numpy.stack([value, numpy.broadcast_to(theta[..., -1, None], value.shape)], -2)
            value, share = _log_sum(both)
            above = share[..., :1, :]
            columns = [column * above for column in columns] + [share[..., 1:, :]]
        return value, numpy.moveaxis(numpy.concatenate(columns, -2), -2, -1)

    def named(self, theta: Array) -> dict[str, float]:
        """Exponents (``alpha_N``), scales (``N_c``) and the floor (``L_inf``) as they are written in the paper.

        Of ``chinchilla`` the numerators of ``E + A / N**alpha + B / D**beta`` too, as ``A_N`` and ``A_D``.
        """
        count = len(self.inputs)
        found: dict[str, float] = {}
        with numpy.errstate(all="ignore"):
            for number, symbol in enumerate(self.symbols):
                found[f"alpha_{symbol}"] = float(theta[number])
                found[f"{symbol}_c"] = float(numpy.exp(theta[count + number] / theta[number]))
            if self.name == "chinchilla":
                found |= {f"A_{s}": float(numpy.exp(theta[count + n])) for n, s in enumerate(self.symbols)}
            if self.floor:
                found["L_inf"] = float(numpy.exp(theta[-1]))
        return found

    def theta(self, named: Mapping[str, float]) -> Array:
        """The inverse of `named`."""
        exponents = [named[f"alpha_{symbol}"] for symbol in self.symbols]
        intercepts = [a * numpy.log(named[f"{s}_c"]) for a, s in zip(exponents, self.symbols, strict=True)]
        return numpy.array([*exponents, *intercepts, *([numpy.log(named["L_inf"])] if self.floor else [])])


def _log_sum(terms: Array) -> tuple[Array, Array]:
    """Log of the sum of exponentials over the second axis from the end, and each term's share."""
    highest = terms.max(-2, keepdims=True)
    powers = numpy.exp(terms - highest)
    total = powers.sum(-2, keepdims=True)
    return (highest + numpy.log(total))[..., 0, :], powers / total


def _joint(a: Array, terms: Array, logs: Array) -> tuple[Array, Array, Array]:
    """``aD log(exp(tN / aD) + exp(tD / aD))``, with ``t = p - a log x``: value, derivatives by ``a`` and by ``p``."""
    outer = a[..., 1:, :]
    inner, share = _log_sum(terms / outer)
    value = outer[..., 0, :] * inner
    by_a = -share * logs
    by_a[..., 1, :] += inner - (share * terms).sum(-2) / outer[..., 0, :]
    return value, by_a, share


LAWS: dict[str, Law] = {
    "N": Law("N", ("n_params",)),
    "D": Law("D", ("tokens",)),
    "C": Law("C", ("flops",)),
    "ND": Law("ND", ("n_params", "tokens"), "joint"),
    "NS": Law("NS", ("n_params", "steps")),
    "chinchilla": Law("chinchilla", ("n_params", "tokens"), floor=True),
}
"""``N``, ``D``, ``C``: ``L = (x_c / x)**alpha``. ``ND``: Kaplan et al. (2020), equation 1.5. ``NS``: 1.6, with
``steps`` as the least steps of an unlimited batch. ``chinchilla``: Hoffmann et al. (2022, arXiv 2203.15556)."""


def published(name: str) -> dict[str, Any]:
    """The constants of Kaplan et al. (2020) for WebText2: nats per token, 1024 tokens of context."""
    return dict(_PUBLISHED[name])


_PF_DAY = 8.64e19
_PUBLISHED: dict[str, dict[str, float]] = {
    "N": {"alpha_N": 0.076, "N_c": 8.8e13},
    "D": {"alpha_D": 0.095, "D_c": 5.4e13},
    "C": {"alpha_C": 0.050, "C_c": 3.1e8 * _PF_DAY},
    "ND": {"alpha_N": 0.076, "N_c": 6.4e13, "alpha_D": 0.103, "D_c": 1.8e13},
    "NS": {"alpha_N": 0.077, "N_c": 6.5e13, "alpha_S": 0.76, "S_c": 2.1e3},
}
