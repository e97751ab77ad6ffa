"""What fits into the memory of the devices: weights first, the rest is for keys and values."""

from __future__ import annotations

from layerwright.core.errors import InputError
from layerwright.score.device.processors import Device
from layerwright.score.device.shapes import LMShape

__all__ = ["kv_budget"]


def kv_budget(shape: LMShape, device: Device, n_devices: int, nodes: int = 1) -> float:
    """Bytes that are left for keys and values, on the devices that decode.

    Every node has the weights outside the experts, and experts are spread over all nodes. In the layout `hetero` the
    experts fill the half without a high processor, and the cache must fit beside the other weights; in the layout
    `split` both halves hold all weights, and the cache is on the half that decodes.

    Raises:
        InputError: the weights do not fit; both sizes are named.
    """
    experts = shape.expert_params * shape.bytes_per_element
    others = (shape.weight_bytes - experts) * nodes
    total = n_devices * device.capacity_bytes
    half = total / 2
    if device.layout == "hetero":
        _fits(shape, experts, half, f"the {n_devices // 2} devices of {device.name} that hold the experts")
        _fits(shape, others, half, f"the {n_devices // 2} devices of {device.name} that hold the other layers")
        return half - others
    room = half if device.layout == "split" else total
    part = " that hold a copy each" if device.layout == "split" else ""
    number = n_devices // 2 if device.layout == "split" else n_devices
    _fits(shape, others + experts, room, f"the {number} x {device.name}{part}")
    return room - others - experts


def _fits(shape: LMShape, needed: float, room: float, where: str) -> None:
    if needed > room:
        raise InputError(
            f"{shape.name}: weights of {needed / 1e9:,.1f} GB do not fit into {room / 1e9:,.1f} GB of {where}: "
            "use more devices or fewer bytes per element"
        )
