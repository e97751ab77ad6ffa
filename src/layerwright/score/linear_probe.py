"""A linear classifier on frozen features: how much of the classes they show."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, NotFiniteError

__all__ = ["linear_probe"]


def linear_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    penalty: float = 1e-3,
    steps: int = 60,
) -> float:
    """Share of the test samples that a multinomial logistic regression on standardised features labels right, in [0, 1].

    Fitted by L-BFGS to mean cross-entropy plus ``penalty / 2`` times the squared weights; convex, so nothing is random.

    Args:
        features, test_features: ``(samples, dim)``.
        labels, test_labels: ``(samples,)``, from 0.
        penalty: at least 0.
        steps: of L-BFGS at most.

    Raises:
        InputError: shapes that do not belong together, or a single class.
        NotFiniteError: features that are not finite.
    """
    if features.dim() != 2 or test_features.shape[1:] != features.shape[1:] or len(features) != len(labels):
        raise InputError(
            f"features: got {tuple(features.shape)} with {len(labels)} labels and {tuple(test_features.shape)} to test on, "
            "expected (samples, dim) of one dim"
        )
    classes = int(max(labels.max(), test_labels.max())) + 1
    if classes < 2 or len(test_features) != len(test_labels):
        raise InputError(
            f"labels: got {classes} classes, {len(test_labels)} test labels; expected 2 or more, one for each"
        )
    if not bool(torch.isfinite(features).all() and torch.isfinite(test_features).all()):
        raise NotFiniteError("features: hold values that are not finite; look for NaN in the weights")
    x, test = features.detach().float(), test_features.detach().float()
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x, test = (x - mean) / scale, (test - mean) / scale
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(((test @ weight.T + bias).argmax(1) == test_labels).float().mean())
