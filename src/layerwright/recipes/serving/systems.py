"""Systems that a device is compared with, by name."""

from __future__ import annotations

import dataclasses

from layerwright.core.errors import InputError, unknown_name
from layerwright.recipes.serving.stages import POLICIES
from layerwright.score.device.presets import device, devices
from layerwright.score.device.processors import Device

__all__ = ["system_of"]

_DERIVED = ("gpu", "2xgpu", "pim", "hetero", "split")


def system_of(
    name: str, target: Device, n_devices: int, efficiency: tuple[float, float] | None = None
) -> tuple[Device, int, str]:
    """A system to compare with: device, number of devices, policy.

    Args:
        name: `gpu` (the high processor alone), `2xgpu` (twice as many), `pim` (the low processor alone), `hetero`,
            `split` (the same processors, other layouts), a policy on the same device, another device, or a YAML file.
            ``duplex`` is the policy on the device of that name and the device elsewhere.
        target: the device that is compared.
        n_devices: of the compared system.
        efficiency: shares of their peaks that both processors of another device reach.

    Raises:
        InputError: an unknown name, or one that needs a low processor that `target` lacks.
    """
    if name in ("gpu", "2xgpu"):
        return target.without_low(), n_devices * (2 if name == "2xgpu" else 1), "gpu"
    known = {item.name for item in devices()}
    if name in ("pim", "hetero", "split") and (target.low is not None or name not in known):
        if target.low is None:
            raise InputError(f"compare: {name} needs a low processor, and {target.name} has none")
        if name == "pim":
            return dataclasses.replace(target, high=target.low, low=None, layout="shared", name=name), n_devices, "gpu"
        return (
            dataclasses.replace(target, layout="hetero" if name == "hetero" else "split", name=name),
            n_devices,
            "auto",
        )
    if name in POLICIES and (name not in known or name == target.name):
        return dataclasses.replace(target, layout="shared"), n_devices, name
    if name not in known and not name.endswith((".yaml", ".yml")):
        raise unknown_name("system to compare with", name, [*_DERIVED, *POLICIES, *known])
    other = device(name)
    return other if efficiency is None else other.with_efficiency(*efficiency), n_devices, "auto"
