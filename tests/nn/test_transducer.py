"""The transducer loss against every alignment written out, and the joiner and the collapsed lattice."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwright.nn.transducer import TransducerJoiner, collapse_lattice, lattice_mask
from layerwright.nn.transducer_loss import transducer_loss
from oracles.transducer import enumerated_loss, loop_loss


def lattice(batch: int, frames: int, labels: int, symbols: int, blank: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, frames, labels + 1, symbols, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, symbols - 1, (batch, labels), generator=generator)
    return logits, targets + (targets >= blank)


@pytest.mark.parametrize("blank", [0, 1, 2])
@pytest.mark.parametrize(("frames", "labels"), [(t, u) for t in (1, 2, 3, 4) for u in (0, 1, 3, 4)])
def test_every_alignment(frames: int, labels: int, blank: int) -> None:
    logits, targets = lattice(2, frames, labels, 3, blank, seed=frames)
    lengths = torch.full((2,), frames), torch.full((2,), labels)
    found = transducer_loss(logits, targets, *lengths, blank, "none")
    expected = [enumerated_loss(own, target.tolist(), blank) for own, target in zip(logits, targets, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    single = transducer_loss(logits.float(), targets, *lengths, blank, "none")
    assert single.dtype == torch.float32
    assert single.tolist() == pytest.approx(expected, abs=1e-4)
    assert float(transducer_loss(logits, targets, *lengths, blank)) == pytest.approx(sum(expected) / 2)
    assert float(transducer_loss(logits, targets, *lengths, blank, "sum")) == pytest.approx(sum(expected))


UNEVEN = torch.tensor([5, 1, 3, 4]), torch.tensor([3, 2, 0, 1])


def test_samples_of_unlike_lengths() -> None:
    logits, targets = lattice(4, 5, 3, 4)
    found = transducer_loss(logits, targets, *UNEVEN, reduction="none")
    for row, (frames, labels) in enumerate(zip(*(lengths.tolist() for lengths in UNEVEN), strict=True)):
        own = logits[row, :frames, : labels + 1]
        assert float(found[row]) == pytest.approx(enumerated_loss(own, targets[row, :labels].tolist()))
    # What is behind the end of the labels may be anything, even blank.
    targets[2] = 0
    assert torch.equal(transducer_loss(logits, targets, *UNEVEN, reduction="none"), found)


def test_gradients() -> None:
    logits, targets = lattice(4, 5, 3, 4)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transducer_loss(x, targets, *UNEVEN, reduction="none"), logits)
    (gradient,) = torch.autograd.grad(transducer_loss(logits, targets, *UNEVEN, reduction="sum"), logits)
    inside = lattice_mask(logits, *UNEVEN)
    assert not gradient[~inside].any()
    assert bool((gradient[inside].abs().sum(-1) > 0).all())
    assert torch.allclose(gradient.sum(-1), torch.zeros(()).double(), atol=1e-12)  # of a softmax


def test_padding_may_be_huge() -> None:
    logits, targets = lattice(4, 5, 3, 4)
    inside = lattice_mask(logits, *UNEVEN)
    other = logits.masked_fill(~inside[..., None], 1e4).requires_grad_()
    losses = transducer_loss(other, targets, *UNEVEN, reduction="none")
    assert torch.equal(losses, transducer_loss(logits, targets, *UNEVEN, reduction="none"))
    losses.sum().backward()
    assert other.grad is not None and bool(other.grad.isfinite().all()) and not other.grad[~inside].any()


def test_long_lattices_keep_their_accuracy_in_float32() -> None:
    logits, targets = lattice(2, 150, 40, 12)
    lengths = torch.tensor([150, 120]), torch.tensor([40, 25])
    gradients, losses = [], []
    for dtype in (torch.float32, torch.float64):
        own = logits.to(dtype).requires_grad_()
        loss = transducer_loss(own, targets, *lengths, reduction="none")
        loss.sum().backward()
        assert own.grad is not None
        gradients.append(own.grad.double())
        losses.append(loss.detach().double())
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-5)
    assert float((gradients[0] - gradients[1]).abs().max()) < 5e-4


def test_loop_and_half_precision_agree() -> None:
    logits, targets = lattice(3, 6, 4, 5)
    lengths = torch.tensor([6, 4, 2]), torch.tensor([4, 1, 3])
    own = logits.clone().requires_grad_()
    loop = logits.clone().requires_grad_()
    transducer_loss(own, targets, *lengths).backward()
    loop_loss(loop, targets, *lengths).mean().backward()
    assert own.grad is not None and loop.grad is not None
    assert torch.allclose(own.grad, loop.grad, atol=1e-12)
    half = logits.bfloat16().requires_grad_()
    loss = transducer_loss(half, targets, *lengths)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    assert torch.allclose(half.grad.double(), own.grad, atol=0.02)


def test_faster_than_a_loop_over_cells() -> None:
    logits, targets = lattice(8, 30, 10, 31)
    lengths = torch.full((8,), 30), torch.full((8,), 10)

    def seconds(loss: Any) -> float:
        own = logits.float().requires_grad_()
        begun = time.perf_counter()
        loss(own, targets, *lengths).sum().backward()
        return time.perf_counter() - begun

    seconds(transducer_loss)
    ratios = [seconds(loop_loss) / seconds(transducer_loss) for _ in range(3)]
    assert statistics.median(ratios) > 20  # more than 100 on an idle core


def test_peak_memory() -> None:
    """Saved for the backward pass: the logits themselves, and a few numbers for each node."""
    logits, targets = lattice(2, 20, 6, 64)
    own = logits.float().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        transducer_loss(own, targets, torch.full((2,), 20), torch.full((2,), 6))
    others = [t for t in saved if t.data_ptr() != own.data_ptr()]
    assert len(others) < len(saved)
    assert sum(t.nbytes for t in others) < 0.1 * own.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits"),
        ({"logits": torch.zeros(2, 3, 5, 4)}, "targets: got shape"),
        ({"targets": torch.ones(2, 2, dtype=torch.long)}, "targets: got shape"),
        ({"targets": torch.ones(2, 3)}, "targets"),
        ({"targets": torch.tensor([[1, 0, 2], [1, 1, 1]])}, "hold blank"),
        ({"targets": torch.tensor([[1, 4, 2], [1, 1, 1]])}, "outside 0 to 3"),
        ({"targets": torch.tensor([[1, -1, 2], [1, 1, 1]])}, "outside 0 to 3"),
        ({"frame_lengths": torch.tensor([0, 3])}, "frame_lengths"),
        ({"frame_lengths": torch.tensor([4, 3])}, "frame_lengths"),
        ({"frame_lengths": torch.tensor([3])}, "frame_lengths"),
        ({"frame_lengths": torch.tensor([3.0, 3.0])}, "frame_lengths"),
        ({"target_lengths": torch.tensor([4, 3])}, "target_lengths"),
        ({"target_lengths": torch.tensor([-1, 3])}, "target_lengths"),
        ({"blank": 4}, "blank"),
        ({"reduction": "average"}, "reduction"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "logits": torch.zeros(2, 3, 4, 4),
        "targets": torch.ones(2, 3, dtype=torch.long),
        "frame_lengths": torch.tensor([3, 3]),
        "target_lengths": torch.tensor([3, 3]),
    }
    assert torch.isfinite(transducer_loss(**good))
    with pytest.raises(ValueError, match=message):
        transducer_loss(**(good | change))


def test_joiner() -> None:
    joiner = TransducerJoiner(3, 4, 5, 6)
    h, g = torch.randn(2, 7, 3), torch.randn(2, 4, 4)
    found = joiner(h, g)
    assert found.shape == (2, 7, 4, 6)
    for t, u in ((0, 0), (6, 3), (2, 1)):
        inner = (joiner.encoder_projection(h[:, t]) + joiner.predictor_projection(g[:, u])).tanh()
        assert torch.allclose(found[:, t, u], joiner.output(inner), atol=1e-6)
    found.sum().backward()
    assert all(p.grad is not None for p in joiner.parameters())


@pytest.mark.parametrize("blank", [0, 2, 3])
def test_collapsed_lattice(blank: int) -> None:
    logits, targets = lattice(2, 3, 2, 4, blank)
    lengths = torch.tensor([2, 1])
    found = collapse_lattice(logits, targets, lengths, blank)
    assert found.shape == (2, 3, 3, 3)
    assert torch.allclose(found.exp().sum(-1), torch.ones(()).double())
    p = logits.softmax(-1)
    for n, t, u in ((0, 0, 0), (0, 2, 1), (1, 1, 0)):
        label, b = p[n, t, u, targets[n, u]], p[n, t, u, blank]
        assert torch.allclose(found[n, t, u].exp(), torch.stack([label, b, 1 - label - b]))
    for n, u in ((0, 2), (1, 1), (1, 2)):  # no label is left
        b = p[n, :, u, blank]
        assert torch.allclose(found[n, :, u].exp(), torch.stack([0 * b, b, 1 - b], -1))
    targets[1, 1] = 99  # behind the end of the labels: anything
    assert torch.equal(collapse_lattice(logits, targets, lengths, blank), found)
    assert collapse_lattice(logits.bfloat16(), targets, lengths, blank).dtype == torch.float32
    with pytest.raises(ValueError, match="symbols"):
        collapse_lattice(logits[..., :2], targets, lengths)
