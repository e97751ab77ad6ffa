from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.nn import kernels
from layerwright.nn.kernels import Int4Weight, Int8Weight, build_kernel, int8_matmul
from layerwright.nn.packing import pack
from layerwright.nn.stored import Stored
from stored_samples import normal, quantized, relative

needs_kernels = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no fast integer products here"
)
BFLOAT16_OUTPUT = 3e-3
"""Products are summed in float32; rounding the result to bfloat16 leaves 2**-9 / sqrt(3) = 1.1e-3 on average."""


def kernel_of(stored: Stored) -> Int4Weight | Int8Weight | None:
    assert stored.codes is not None
    assert stored.scale is not None
    assert stored.quantize is not None
    packed = pack(stored.codes[0], stored.quantize.bits)
    zero = None if stored.zero is None else stored.zero[0]
    return build_kernel(packed, stored.scale[0], zero, stored.quantize.bits, stored.shape[2])


@needs_kernels
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 192])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_match_float64(bits: int, group_size: int, symmetric: bool) -> None:
    stored = quantized((1, 40, 384), bits, group_size, symmetric, torch.bfloat16)
    kernel = kernel_of(stored)
    per_row = bits > 4 and group_size == -1 and symmetric
    assert isinstance(kernel, Int8Weight if per_row else Int4Weight)
    weight = stored.to_dense(torch.float64)[0]
    for rows in (1, 3, 17):
        x = normal(rows, 384, seed=rows, dtype=torch.bfloat16)
        got = kernel(x)
        assert got.dtype == torch.bfloat16
        assert relative(got, x.double() @ weight.T) < BFLOAT16_OUTPUT


@needs_kernels
@pytest.mark.parametrize(("bits", "zero"), [(4, -7), (4, 5), (6, -23), (8, -101), (8, 115)])
def test_rounding_of_the_zero_point_stays_below_a_fiftieth_step(bits: int, zero: int) -> None:
    codes = zero + torch.randint(-1, 2, (1, 16, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = torch.full((1, 16, 4), 255 / 128 / 64, dtype=torch.bfloat16)
    zeros = torch.full((1, 16, 4), zero, dtype=torch.int8)
    settings = Quantize(bits, 64, False, "rtn")
    stored = Stored((1, 16, 256), codes=codes, scale=scale, zero=zeros, quantize=settings)
    kernel = kernel_of(stored)
    assert kernel is not None
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    exact = x.double() @ stored.to_dense(torch.float64)[0].T
    step = float(scale[0, 0, 0])
    assert bool(((kernel(x).double() - exact).abs() <= 0.02 * step * 256 + 2**-8 * exact.abs()).all())


@needs_kernels
@pytest.mark.parametrize("bits", [4, 7, 8])
def test_no_input_rows(bits: int) -> None:
    kernel = kernel_of(quantized((1, 24, 64), bits, dtype=torch.bfloat16))
    assert kernel is not None
    assert kernel(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 24)


@needs_kernels
def test_blocks_of_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = quantized((1, 600, 64), 4, 32, dtype=torch.bfloat16)
    parts, whole = kernel_of(stored), None
    monkeypatch.setattr(kernels, "_BLOCK_ROWS", 10_000)
    whole = kernel_of(stored)
    assert isinstance(parts, Int4Weight)
    assert isinstance(whole, Int4Weight)
    assert torch.equal(parts.packed, whole.packed)


@needs_kernels
def test_memory_held() -> None:
    four = kernel_of(quantized((1, 64, 256), 4, 128, dtype=torch.bfloat16))
    planes = kernel_of(quantized((1, 64, 256), 6, 128, dtype=torch.bfloat16))
    eight = kernel_of(quantized((1, 64, 256), 8, dtype=torch.bfloat16))
    assert four is not None
    assert planes is not None
    assert eight is not None
    assert four.nbytes == 64 * 256 // 2 + 64 * 2 * 4
    assert planes.nbytes == 64 * 256 + 2 * 64 * 2 * 4
    assert eight.nbytes == 64 * 256 + 64 * 2


def test_what_no_product_takes() -> None:
    assert kernel_of(quantized((1, 16, 64), 4, dtype=torch.float32)) is None
    assert kernel_of(quantized((1, 16, 64), 4, 16, dtype=torch.bfloat16)) is None
    assert kernel_of(quantized((1, 16, 40), 4, dtype=torch.bfloat16)) is None
    assert kernel_of(quantized((1, 16, 40), 8, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("rows", [0, 1, 2, 16, 33])
@pytest.mark.parametrize(("out", "in_"), [(1, 1), (5, 7), (16, 64), (33, 130)])
def test_integer_product_is_exact(rows: int, out: int, in_: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-128, 128, (rows, in_), generator=generator, dtype=torch.int8)
    w = torch.randint(-128, 128, (out, in_), generator=generator, dtype=torch.int8)
    x_scale, scale = 2.0 ** torch.randint(-3, 3, (rows, 1), generator=generator), torch.full((out, 1), 0.5)
    exact = (x.double() * x_scale) @ (w.double() * scale).T
    assert torch.equal(int8_matmul(x, x_scale, w, scale, torch.float32), exact.float())


def test_integer_product_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(-20, 20, dtype=torch.int8).view(10, 4)
    w, scale = torch.arange(12, dtype=torch.int8).view(3, 4), torch.rand(3, 1)
    whole = [int8_matmul(x, s, w, scale, torch.bfloat16) for s in (torch.tensor(0.3), torch.rand(10, 1))]
    monkeypatch.setattr(kernels, "_PRODUCT_BYTES", 3 * 8 * 3)
    torch.manual_seed(0)
    assert torch.equal(int8_matmul(x, torch.tensor(0.3), w, scale, torch.bfloat16), whole[0])


def test_sums_that_could_overflow_are_refused() -> None:
    x = torch.zeros(1, (1 << 17) + 1, dtype=torch.int8)
    with pytest.raises(InputError, match="overflow"):
        int8_matmul(x, torch.tensor(1.0), x, torch.ones(1, 1), torch.float32)
