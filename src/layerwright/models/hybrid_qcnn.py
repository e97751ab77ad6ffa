"""Convolutions, a quantum circuit whose angles are their features, and a linear classifier of what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.models.backbone import check_images, named_config
from layerwright.nn.quantum_circuit import Circuit, named_circuit
from layerwright.nn.quantum_layer import QuantumLayer

__all__ = [
    "OFFICIAL_IGNORED",
    "OFFICIAL_RULES",
    "HierarchicalClassifier",
    "HybridQCNN",
    "LandUseCNN",
    "reshape_official",
]

SMALLEST = 22
"""Pixels a side that leave one position behind three convolutions without padding and pools."""
OFFICIAL_RULES = ((r"^conv1\.", "trunk.0."), (r"^conv2\.", "trunk.3."), (r"^conv3\.", "trunk.6."),
                  (r"^fc4\.", "angles."), (r"^fc5\.", "classifier."))  # fmt: skip
"""For `load_official_` of the checkpoints of ESA-PhiLab/QNN4EO (their ``model_state_dict``), with `reshape_official`."""
OFFICIAL_IGNORED = r"^fc[123]\."
"""Layers of the released checkpoints that never run."""


def reshape_official(name: str, tensor: Tensor) -> Tensor:
    """Columns of the released classifier in our order of basis states: Qiskit has qubit 0 rightmost."""
    if name != "classifier.weight":
        return tensor
    qubits = tensor.shape[1].bit_length() - 1
    digits = tensor.unflatten(1, (2,) * qubits)
    return digits.permute(0, *range(qubits, 0, -1)).flatten(1)


class _Trunk(nn.Module):
    """Three times convolution 3 x 3 without padding, max pool and ReLU, as in the paper."""

    def __init__(self, in_channels: int, image_size: int, widths: Sequence[int]) -> None:
        super().__init__()
        if image_size < SMALLEST:
            raise InputError(f"image_size: got {image_size}, expected at least {SMALLEST} pixels")
        if len(widths) != 3 or min(widths) < 1 or in_channels < 1:
            raise InputError(
                f"widths, in_channels: got {tuple(widths)} and {in_channels}, expected three widths, all at least 1"
            )
        self.in_channels, self.image_size = in_channels, image_size
        layers: list[nn.Module] = []
        side, inputs = image_size, in_channels
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3), nn.MaxPool2d(2), nn.ReLU()]
            side, inputs = (side - 2) // 2, width
        self.trunk = nn.Sequential(*layers)
        self.num_features = inputs * side * side
        self.feature_strides, self.feature_channels = (8,), (inputs,)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The map ``(batch, channels, height, width)`` at stride 8.

        Raises:
            TypeError, InputError: see `check_images`; a side below 22 pixels.
        """
        check_images(images, self.in_channels, SMALLEST)
        return [self.trunk(images)]

    def _flat(self, images: Tensor) -> Tensor:
        features = self.forward_features(images)[0].flatten(1)
        if features.shape[1] != self.num_features:
            raise InputError(
                f"images: got {images.shape[2]} x {images.shape[3]} pixels, expected {self.image_size} a side, as image_size says"
            )
        return features

    def no_weight_decay(self) -> set[str]:
        """None: biases are vectors, which do not decay anyway."""
        return set()


class HybridQCNN(_Trunk):
    """``classifier(circuit(pi tanh(angles(trunk(x)))))``: a circuit between the convolutions and the classifier.

    The circuit has no weights. All ``2 ** n_qubits`` probabilities are read out; the released code has a ReLU behind
    them, which does nothing to probabilities.

    Source: Sebastianelli et al., "On Circuit-based Hybrid Quantum Neural Networks for Remote Sensing Imagery
    Classification" (2022, arXiv 2109.09484).

    Args:
        circuit: ``ry``, ``bell``, ``real_amplitudes``, or a `Circuit`.
        n_qubits: of a circuit by name.
        num_classes: of the logits, at least 1.
        in_channels: of the pictures, values in 0..1.
        image_size: their side in pixels, at least 22.
        widths: channels of the three convolutions.
        double_softmax: return softmax instead of logits, as the released code does, which gives them to a
            cross-entropy that takes the softmax again and so learns slowly.
        quantum: further settings of `QuantumLayer`, such as ``shots`` and ``grad``.

    Raises:
        InputError: a number outside its range, or an unknown name.
    """

    def __init__(
        self,
        circuit: Circuit | str = "real_amplitudes",
        n_qubits: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 64,
        widths: Sequence[int] = (16, 32, 64),
        double_softmax: bool = False,
        **quantum: Any,
    ) -> None:
        super().__init__(in_channels, image_size, widths)
        if num_classes < 1:
            raise InputError(f"num_classes: got {num_classes}, expected at least 1")
        self.quantum = QuantumLayer(
            named_circuit(circuit, n_qubits) if isinstance(circuit, str) else circuit, **quantum
        )
        self.angles = nn.Linear(self.num_features, self.quantum.n_angles)
        self.classifier = nn.Linear(self.quantum.n_outputs, num_classes)
        self.double_softmax = double_softmax

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network by its circuit: ``real_amplitudes``, ``bell``, ``ry``; or ``test``, with changes."""
        configs: dict[str, dict[str, Any]] = {key: {"circuit": key} for key in ("real_amplitudes", "bell", "ry")}
        configs["test"] = {"image_size": 32, "widths": (4, 8, 8)}
        return cls(**named_config(name, configs, changes))

    def turns(self, images: Tensor) -> Tensor:
        """Angles of the circuit ``(batch, n_angles)`` in ``(-pi, pi)``."""
        return math.pi * torch.tanh(self.angles(self._flat(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.quantum(self.turns(images)))
        return logits.softmax(-1) if self.double_softmax else logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier of `num_classes` classes behind the circuit."""
        self.classifier = nn.Linear(self.classifier.in_features, num_classes).to(self.classifier.weight)


class LandUseCNN(_Trunk):
    """The same convolutions with dense layers behind them: what the circuit is compared with.

    Args:
        hidden: features of the dense layers before the last; ``(8, 16)`` has as many weights as the hybrid with real
            amplitudes, ``(128, 64, 32)`` is the larger network of the paper, of 329,290 parameters.
        num_classes, in_channels, image_size, widths: see `HybridQCNN`.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (8, 16),
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 64,
        widths: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__(in_channels, image_size, widths)
        if num_classes < 1 or min(hidden, default=1) < 1:
            raise InputError(f"num_classes, hidden: got {num_classes} and {tuple(hidden)}, expected at least 1")
        layers: list[nn.Module] = []
        inputs = self.num_features
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.hidden, self.classifier = nn.Sequential(*layers), nn.Linear(inputs, num_classes)

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """``equal`` or ``wide``, the published ones; or ``test``, with changes."""
        configs: dict[str, dict[str, Any]] = {"equal": {}, "wide": {"hidden": (128, 64, 32)}}
        configs["test"] = {"image_size": 32, "widths": (4, 8, 8)}
        return cls(**named_config(name, configs, changes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, image_size, image_size)``."""
        logits: Tensor = self.classifier(self.hidden(self._flat(images)))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last layer of `num_classes` classes."""
        self.classifier = nn.Linear(self.classifier.in_features, num_classes).to(self.classifier.weight)


class HierarchicalClassifier(nn.Module):
    """A coarse classifier of groups of classes, and a fine one for each group: the paper's best network.

    Args:
        coarse: pictures to logits of the groups ``(batch, groups)``.
        fine: for each group, in the order of the coarse logits, pictures to logits of its classes.
        groups: the classes of each group, by the names of `fine`; each class is in one group.

    Raises:
        InputError: names that differ, or classes that are missing or in two groups.
    """

    def __init__(
        self, coarse: nn.Module, fine: Mapping[str, nn.Module], groups: Mapping[str, Sequence[int]]
    ) -> None:  # fmt: skip
        super().__init__()
        if list(fine) != list(groups) or not fine:
            raise InputError(f"groups: got {', '.join(groups)}, expected those of fine in its order: {', '.join(fine)}")
        members = sorted(label for classes in groups.values() for label in classes)
        if members != list(range(len(members))):
            raise InputError(f"groups: got classes {members}, expected each of 0 to {len(members) - 1} in one group")
        self.coarse, self.fine = coarse, nn.ModuleDict(fine)
        self.groups = {name: tuple(classes) for name, classes in groups.items()}
        self.num_classes = len(members)

    def forward(self, images: Tensor) -> Tensor:
        """``log p(group) + log p(class | group)`` of every class, ``(batch, num_classes)``."""
        coarse = functional.log_softmax(self.coarse(images).float(), 1)
        parts = [
            coarse[:, number, None] + functional.log_softmax(self.fine[name](images).float(), 1)
            for number, name in enumerate(self.groups)
        ]
        place = torch.tensor([label for classes in self.groups.values() for label in classes], device=coarse.device)
        return torch.cat(parts, 1).index_select(1, place.argsort())

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Classes ``(batch,)``: the group first, then its classifier alone, as in the paper."""
        group = self.coarse(images).argmax(1)
        found = torch.empty_like(group)
        for number, (name, classes) in enumerate(self.groups.items()):
            chosen = (group == number).nonzero()[:, 0]
            if len(chosen):
                own = torch.tensor(classes, device=group.device)
                found[chosen] = own[self.fine[name](images[chosen]).argmax(1)]
        return found
