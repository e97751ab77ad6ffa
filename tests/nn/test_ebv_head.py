from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.nn import equiangular_cache
from layerwright.nn.ebv_head import EBVHead, ebv_logits, ebv_loss


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(equiangular_cache, "STEPS", 100)
    torch.manual_seed(0)


def test_logits_are_cosines_over_the_temperature() -> None:
    head, x = EBVHead(12, 10, 6, temperature=0.1), torch.randn(5, 12)
    logits = head(x).detach()
    z = (x @ head.fc.weight.T + head.fc.bias).tolist()
    for b in range(5):
        for k in range(10):
            w = head.vectors[k].tolist()
            dot = sum(p * q for p, q in zip(z[b], w, strict=True))
            cosine = dot / math.sqrt(sum(p * p for p in z[b]) * sum(q * q for q in w))
            assert float(logits[b, k]) == pytest.approx(cosine / 0.1, abs=1e-4)
    torch.testing.assert_close(head.embed(x).norm(dim=-1), torch.ones(5))
    assert sum(p.numel() for p in head.parameters()) == 13 * 6
    assert head(torch.randn(2, 3, 12)).shape == (2, 3, 10)
    assert logits.argmax(1).tolist() == (head.embed(x) @ head.vectors.T).argmax(1).tolist()


def test_length_of_the_features_does_not_matter() -> None:
    head, z = EBVHead(8, 6, bias=False), torch.randn(4, 8)
    torch.testing.assert_close(head(1000 * z), head(z))
    torch.testing.assert_close(head(-z), -head(z))
    zero = torch.zeros(2, 8, requires_grad=True)
    head(zero).sum().backward()
    assert (head(zero) == 0).all() and zero.grad is not None and zero.grad.isfinite().all()


def test_as_many_dimensions_as_classes_are_orthonormal() -> None:
    head = EBVHead(8, 6, reserve=2)
    assert head.dim == 8
    torch.testing.assert_close(head.vectors @ head.vectors.T, torch.eye(8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_its_formula_and_trains(smoothing: float) -> None:
    head = EBVHead(8, 5, 3)
    z, target = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 4])
    loss = ebv_loss(z, target, head.vectors, 0.2, smoothing)
    logs = (z / z.norm(dim=1, keepdim=True) @ head.vectors.T / 0.2).log_softmax(1)
    own = logs[torch.arange(6), target]
    torch.testing.assert_close(loss, -((1 - smoothing) * own + smoothing * logs.mean(1)).mean())
    (gradient,) = torch.autograd.grad(loss, z)
    with torch.no_grad():
        assert ebv_loss(z - 0.01 * gradient, target, head.vectors, 0.2, smoothing) < loss
    torch.testing.assert_close((gradient * z).sum(1), torch.zeros(6), atol=1e-5, rtol=0)  # along the sphere alone


def test_classes_are_added_from_the_reserve() -> None:
    head, x = EBVHead(8, 5, 3, reserve=3), torch.randn(4, 8)
    before, codebook = head(x), head.vectors.clone()
    assert head.reserve == 3 and head.add_classes(2) is head
    assert head.num_classes == 7 and head.reserve == 1
    after = head(x)
    assert after.shape == (4, 7) and torch.equal(head.vectors, codebook)
    torch.testing.assert_close(after[:, :5], before)
    with pytest.raises(InputError, match="count: got 2 new classes, but 1 vectors are in reserve"):
        head.add_classes(2)
    with pytest.raises(InputError, match="count: got -1"):
        head.add_classes(-1)


def test_vectors_are_kept_and_never_learn() -> None:
    head = EBVHead(8, 20, 5)
    assert "vectors" in head.state_dict() and not head.vectors.requires_grad
    other = EBVHead(8, 20, 5, seed=9)
    assert not torch.equal(other.vectors, head.vectors)
    other.load_state_dict(head.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(other(x), head(x))
    mine = torch.eye(9)[:6]
    given = EBVHead(8, 4, vectors=mine, reserve=1)
    mine.zero_()
    assert given.dim == 9 and given.reserve == 2 and given.vectors.sum() == 6
    assert "num_classes=4, dim=9, reserve=2" in repr(given)


def test_bfloat16_keeps_the_vectors_exact() -> None:
    head, x = EBVHead(16, 30, 8), torch.randn(4, 16)
    exact = copy.deepcopy(head)
    head.bfloat16()
    assert head.fc.weight.dtype == torch.bfloat16 and torch.equal(head.vectors, exact.vectors)
    logits = head(x.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact(x), atol=0.15, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        z = exact.fc(x)
        torch.testing.assert_close(exact(x), ebv_logits(z.float(), exact.vectors))
    head.double()
    assert head.vectors.dtype == torch.float32 and torch.equal(head.vectors, exact.vectors)


def test_compiles_and_stands_on_the_meta_device() -> None:
    head, x = EBVHead(8, 6, 3), torch.randn(4, 8)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), head(x))
    with torch.device("meta"):
        empty = EBVHead(8, 100_000, 300)
        assert empty(torch.empty(2, 8)).shape == (2, 100_000)


def test_bad_input() -> None:
    for arguments, message in (
        ((8, 0), "num_classes"),
        ((8, 4, 0), "dim: got 0"),
        ((8, 4, 4, None, 0.0), "temperature: got 0.0"),
        ((8, 4, None, None, 0.07, -1), "reserve"),
        ((8, 4, None, torch.ones(4)), r"vectors: got shape \(4,\)"),
        ((8, 4, 3, torch.eye(4)), r"vectors: got shape \(4, 4\), expected \(n, 3\)"),
        ((8, 4, None, 1.01 * torch.eye(4)), "rows of length 1"),
        ((8, 4, None, torch.eye(4), 0.07, 1), "got 4, expected at least 5"),
    ):
        with pytest.raises(InputError, match=message):
            EBVHead(*arguments)
    with pytest.raises(TypeError, match="vectors"):
        EBVHead(8, 4, vectors=torch.eye(4).long())
    head = EBVHead(8, 4)
    with pytest.raises(TypeError, match=r"x: got torch.int64"):
        head(torch.ones(1, 8).long())
    with pytest.raises(InputError, match="got 7 features, expected 8"):
        head(torch.ones(1, 7))
    with pytest.raises(TypeError, match="features"):
        ebv_loss(torch.ones(2, 4).long(), torch.tensor([0, 1]), head.vectors)
    with pytest.raises(InputError, match="target: got classes 0 to 4, expected 0 to 3"):
        ebv_loss(torch.ones(2, 4), torch.tensor([0, 4]), head.vectors)
    with pytest.raises(InputError, match="target"):
        ebv_loss(torch.ones(2, 4), torch.tensor([-1, 1]), head.vectors)
    with pytest.raises(InputError, match="temperature"):
        ebv_loss(torch.ones(2, 4), torch.tensor([0, 1]), head.vectors, 0)


def test_a_bias_less_head_has_none() -> None:
    assert isinstance(EBVHead(8, 4, bias=False).fc, nn.Linear) and EBVHead(8, 4, bias=False).fc.bias is None
