from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, read_matrix
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Drop, LowRank, Quantize, Sparsify, Treatments
from layerwright.nn.stored import Stored
from layerwright.score.statistics import InputStatistics
from layerwright.treat import compute
from layerwright.treat.checks import check_treatments, needed_statistics
from layerwright.treat.compute import relative_error, treated, treated_group

TREATMENTS: list[Treatments] = [
    (),
    (Quantize(4, 8, method="rtn"),),
    (Quantize(3, 16, False, "mse"),),
    (Quantize(4, -1, False),),
    (Quantize(8, act_bits=8, act_mode="static"),),
    (Sparsify(0.37, method="magnitude"),),
    (Sparsify(0.6, method="wanda"),),
    (Sparsify(0.53),),
    (Sparsify(0.5, "2:4"),),
    (Sparsify(0.5, "2:4", "wanda"), Quantize(4, 8)),
    (Sparsify(0.41), Quantize(3, 8, False)),
    (Sparsify(0.41), Quantize(4, 8, method="rtn")),
    (Sparsify(0.7, method="magnitude"), Quantize(4, -1, False, "mse")),
    (LowRank(5),),
    (LowRank(7, "svd"), Quantize(6, 8, False)),
    (LowRank(7), Quantize(4, 8, method="rtn")),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(features: int, count: int = 1, seed: int = 0, **settings: Any) -> InputStatistics:
    stats = InputStatistics(features, count, **settings)
    for i in range(count):
        shared = normal(100, 4, seed=seed + i) @ normal(4, features, seed=seed + 50 + i)
        stats.update((shared + 0.5 * normal(100, features, seed=seed + i)) * normal(features, seed=1).exp(), expert=i)
    return stats


def measured_bytes(stored: Stored, element_bytes: int) -> int:
    """Bytes of the form that files take: codes packed in 32-bit words along rows, masks in bits."""
    if stored.factors is not None:
        return sum(measured_bytes(part, element_bytes) for part in stored.factors)
    count, out, in_ = stored.shape
    total = 0
    if stored.scale is not None:
        total += stored.scale.numel() * element_bytes + (0 if stored.zero is None else stored.zero.numel())
    words = lambda numbers, bits: (numbers * bits + 31) // 32 * 4  # noqa: E731
    if stored.mask is not None:
        kept = int(stored.mask.sum())
        total += count * out * ((in_ + 7) // 8)
        values = kept * element_bytes
        return total + (words(kept, stored.quantize.bits) if stored.quantize else values)
    if stored.codes is None:
        return count * out * in_ * element_bytes
    assert stored.quantize is not None
    row = in_ if stored.quantize.act_bits else words(in_, stored.quantize.bits)
    return total + count * out * row


@pytest.mark.parametrize("treatments", TREATMENTS, ids=lambda t: "+".join(x.label() for x in t) or "kept")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_treatment_is_of_the_promised_form_and_size(
    treatments: Treatments, count: int, dtype: torch.dtype
) -> None:
    weight, stats = normal(count, 20, 32).to(dtype), statistics(32, count)
    stored, notes = treated(weight, treatments, stats, scale_dtype=dtype)
    assert notes == []
    assert stored.shape == (count, 20, 32)
    dense = stored.to_dense()
    assert dense.shape == (count, 20, 32)
    assert bool(dense.isfinite().all())
    assert measured_bytes(stored, dtype.itemsize) == stored_bytes(treatments, 20, 32, count, dtype.itemsize)
    if stored.dense is not None:
        assert stored.dense.dtype == dtype
    if stored.mask is not None:
        assert bool((dense[~stored.mask] == 0).all())
    error = relative_error(weight, stored, stats)
    assert error < 0.35
    if not treatments:
        assert error == 0
        assert torch.equal(stored.to_dense(dtype), weight)


@pytest.mark.parametrize("treatments", TREATMENTS, ids=lambda t: "+".join(x.label() for x in t) or "kept")
@pytest.mark.parametrize("empty", [True, False])
def test_without_statistics_the_same_form_and_a_note(treatments: Treatments, empty: bool) -> None:
    weight = normal(2, 20, 32)
    stats = InputStatistics(32, 2) if empty else None
    stored, notes = treated(weight, treatments, stats, scale_dtype=torch.float32)
    promised = treatments
    assert measured_bytes(stored, 4) == stored_bytes(promised, 20, 32, 2, 4)
    assert len(notes) == (needed_statistics(treatments) != "none")
    assert all(note.startswith("never reached by the calibration data: ") for note in notes)
    if any(isinstance(t, Quantize) and t.act_bits for t in treatments):
        assert stored.input_scale is None
        assert stored.quantize is not None
        assert stored.quantize.act_mode == "dynamic"


def test_what_each_treatment_needs() -> None:
    assert needed_statistics(()) == "none"
    assert needed_statistics((Quantize(method="mse"),)) == "none"
    assert needed_statistics((Quantize(8, act_bits=8, act_mode="static", method="rtn"),)) == "diagonal"
    assert needed_statistics((Sparsify(method="wanda"), Quantize(method="rtn"))) == "diagonal"
    assert needed_statistics((Sparsify(method="wanda"), Quantize())) == "gram"
    assert needed_statistics((LowRank(),)) == "gram"


def test_diagonal_statistics_are_enough_for_wanda_but_not_for_gptq() -> None:
    weight, stats = normal(1, 8, 16), statistics(16, only_diagonal=True)
    stored, _ = treated(weight, (Sparsify(0.5, method="wanda"),), stats, scale_dtype=torch.float32)
    full, _ = treated(weight, (Sparsify(0.5, method="wanda"),), statistics(16), scale_dtype=torch.float32)
    assert stored.mask is not None
    assert full.mask is not None
    assert torch.equal(stored.mask, full.mask)
    with pytest.raises(InputError, match=r"h\.3\.up: .*only_diagonal=False"):
        treated(weight, (Quantize(),), stats, scale_dtype=torch.float32, name="h.3.up")


def test_layers_that_share_an_input_share_its_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = statistics(32)
    weights = [normal(1, out, 32, seed=out) for out in (12, 20, 7, 9, 9)]
    treatments: list[Treatments] = [
        (Quantize(4, 8),),
        (Quantize(4, 8),),
        (Quantize(3, 16, False),),
        (Sparsify(0.5), Quantize(4, 8)),
        (LowRank(3),),
    ]
    orders = []
    original = compute.prepare

    def counted(*arguments: Any, **settings: Any) -> Any:
        orders.append(settings["order"])
        return original(*arguments, **settings)

    monkeypatch.setattr(compute, "prepare", counted)
    together = treated_group(weights, treatments, stats, scale_dtype=torch.float32, names=list("abcde"))
    assert sorted(orders) == ["descending", "natural"]
    for weight, treatment, (stored, notes) in zip(weights, treatments, together, strict=True):
        alone, _ = treated(weight, treatment, stats, scale_dtype=torch.float32)
        assert notes == []
        assert stored.shape == alone.shape
        assert relative_error(weight, stored, stats) == pytest.approx(relative_error(weight, alone, stats), rel=0.02)


@pytest.mark.parametrize("treatments", TREATMENTS, ids=lambda t: "+".join(x.label() for x in t) or "kept")
def test_experts_in_pieces(treatments: Treatments, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = normal(5, 12, 16), statistics(16, 5)
    stats.tokens[3] = 0
    stats.gram[3] = 0
    whole, notes = treated(weight, treatments, stats, scale_dtype=torch.bfloat16)
    monkeypatch.setattr(compute, "CHUNK_NUMEL", 2 * 16 * 16)
    pieces, notes_in_pieces = treated(weight, treatments, stats, scale_dtype=torch.bfloat16)
    assert notes == notes_in_pieces
    needs = needed_statistics(treatments) != "none"
    assert notes == (["some experts saw no tokens: 3"] if needs else [])
    assert torch.allclose(whole.to_dense(), pieces.to_dense(), atol=1e-4)
    assert measured_bytes(pieces, 2) == stored_bytes(treatments, 12, 16, 5, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "treatments",
    [
        (Quantize(4, -1),),
        (Quantize(4, 9, False, "rtn"),),
        (Sparsify(0.43),),
        (Sparsify(0.43, method="wanda"), Quantize(4)),
        (Sparsify(0.43), Quantize(4)),
        (LowRank(2),),
    ],
    ids=lambda t: "+".join(x.label() for x in t),
)
def test_convolutions(groups: int, treatments: Treatments) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=False)
    model = nn.ModuleDict({"conv": conv})
    columns = 4 // groups * 9
    ref = LayerRef("conv", "conv", "conv.weight", (8, columns), layout="conv")
    stats = InputStatistics.for_layer(model, ref)
    x = normal(6, 4, 9, 9) + normal(6, 4, 9, 9).roll(1, 3) + normal(6, 1, 9, 9, seed=3)
    stats.update(x)
    weight = read_matrix(model, ref).clone()
    stored, notes = treated(weight, treatments, stats, scale_dtype=torch.float32, name="conv")
    grouped = isinstance(treatments[0], LowRank) and groups > 1
    assert notes == (["a grouped convolution is factorised without regard to its inputs"] if grouped else [])
    assert stored.shape == (1, 8, columns)
    assert measured_bytes(stored, 4) == stored_bytes(treatments, 8, columns, 1, 4)
    before = conv(x).detach()
    with torch.no_grad():
        conv.weight.copy_(stored.to_dense().view_as(conv.weight))
    measured = float((conv(x).detach() - before).square().sum() / before.square().sum())
    assert relative_error(weight, stored, stats) == pytest.approx(measured, rel=1e-3)
    if isinstance(treatments[0], LowRank) and groups == 1:
        blind, _ = treated(weight, treatments, None, scale_dtype=torch.float32)
        assert measured < relative_error(weight, blind, stats)


def test_relative_error_is_that_of_the_outputs() -> None:
    x, weight = normal(50, 16) @ normal(16, 16, seed=1), normal(2, 8, 16)
    stored, _ = treated(weight, (Quantize(3, method="rtn"),), None, scale_dtype=torch.float32)
    outputs, rounded = (torch.einsum("ti,coi->tco", x, w) for w in (weight, stored.to_dense()))
    measured = float((outputs - rounded).square().sum() / outputs.square().sum())
    gram = (x.T @ x).expand(2, 16, 16)
    assert relative_error(weight, stored, gram) == pytest.approx(measured, rel=1e-4)
    assert relative_error(weight[:1], dataclasses.replace(stored, shape=(1, 8, 16), **first(stored)), gram[0]) > 0
    plain = float((weight - stored.to_dense()).square().sum() / weight.square().sum())
    assert relative_error(weight, stored, None) == pytest.approx(plain, rel=1e-5)
    zeros = torch.zeros(2, 16, 16)
    assert relative_error(weight, stored, zeros) == 0
    assert relative_error(torch.zeros(2, 8, 16), stored, gram) == float("inf")


def first(stored: Stored) -> dict[str, Tensor]:
    assert stored.codes is not None
    assert stored.scale is not None
    return {"codes": stored.codes[:1], "scale": stored.scale[:1]}


def test_static_activation_scale_covers_the_range() -> None:
    stats = InputStatistics(16)
    x = normal(40, 16).clamp(-2, 3)
    x[0, 0] = -5.1
    stats.update(x)
    stored, _ = treated(
        normal(1, 4, 16), (Quantize(8, act_bits=8, act_mode="static"),), stats, scale_dtype=torch.float32
    )
    assert stored.input_scale is not None
    assert stored.input_scale.shape == ()
    assert stored.input_scale.item() == pytest.approx(5.1 / 127.5)
    dynamic, _ = treated(normal(1, 4, 16), (Quantize(8, act_bits=8),), stats, scale_dtype=torch.float32)
    assert dynamic.input_scale is None


@pytest.mark.parametrize(
    ("treatments", "message"),
    [
        ((Quantize(4, 12),), r"h\.1\.up: group_size 12 does not divide its 30 inputs"),
        ((Sparsify(0.5, "2:4"),), r"h\.1\.up: pattern 2:4 needs a multiple of 4 inputs, it has 30"),
        ((LowRank(20),), r"h\.1\.up: rank 20 is not below min\(20, 30\)"),
        ((LowRank(4), Sparsify(0.5)), r"h\.1\.up: low_rank and sparsify cannot be combined"),
        ((Drop(),), r"h\.1\.up: drop is not a treatment of a weight"),
        ((Quantize(4), Quantize(8)), r"h\.1\.up: .* repeats quantize"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(treatments: Treatments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        treated(normal(1, 20, 30), treatments, statistics(30), scale_dtype=torch.float32, name="h.1.up")
    with pytest.raises(InputError, match=message):
        check_treatments(treatments, 20, 30, "h.1.up")


def test_unusable_weights_and_statistics_are_refused_by_name() -> None:
    weight = normal(1, 4, 8)
    with pytest.raises(
        InputError, match=r"h\.1\.up: its weight is \(1, 4, 8\), its statistics are of 1 inputs of size 9"
    ):
        treated(weight, (Quantize(),), statistics(9), scale_dtype=torch.float32, name="h.1.up")
    with pytest.raises(InputError, match="h"):
        treated(weight, (Quantize(),), statistics(8, 3), scale_dtype=torch.float32, name="h.1.up")
    broken = weight.clone()
    broken[0, 1, 2] = float("nan")
    with pytest.raises(InputError, match=r"h\.1\.up: its weight holds NaN"):
        treated(broken, (), None, scale_dtype=torch.float32, name="h.1.up")
    stats = statistics(8)
    stats.update(torch.full((1, 8), float("inf")))
    with pytest.raises(InputError, match=r"h\.1\.up: its calibration input 0"):
        treated(weight, (Quantize(),), stats, scale_dtype=torch.float32, name="h.1.up")
    with pytest.raises(InputError, match="expected floats"):
        treated(weight[0], (), None, scale_dtype=torch.float32)


def test_no_factor_is_noted() -> None:
    stats = statistics(8)
    stats.gram[0] = torch.full((8, 8), -100.0).fill_diagonal_(1.0)
    stored, notes = treated(normal(1, 4, 8), (Quantize(4),), stats, scale_dtype=torch.float32)
    assert notes == ["factorization failed, rounded to nearest"]
    assert stored.codes is not None


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(0.05, 0.95),
    st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
    st.sampled_from([None, 2, 5]),
)
def test_sizes_are_kept_to_the_byte(
    out: int, quarter: int, count: int, sparsity: float, method: str, bits: int | None
) -> None:
    in_ = 4 * quarter
    treatments: Treatments = (Sparsify(sparsity, method=method),)  # type: ignore[arg-type]
    if bits:
        treatments += (Quantize(bits, 4, False),)
    stored, _ = treated(normal(count, out, in_), treatments, statistics(in_, count), scale_dtype=torch.bfloat16)
    assert measured_bytes(stored, 2 if bits else 4) == stored_bytes(treatments, out, in_, count, 2 if bits else 4)
