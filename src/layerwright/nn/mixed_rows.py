"""A linear layer whose output rows have different widths (Zheng et al., 2024, MixLLM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.treatment import MixRows
from layerwright.nn.integer_products import (
    FEW_TOKENS,
    grouped_matmul,
    quantize_token_groups,
    round_token_groups,
    shifted_codes,
)
from layerwright.nn.packing import unpack
from layerwright.nn.quantized import QuantLinear
from layerwright.nn.quantized_weight import scaled_codes
from layerwright.nn.stored import Stored
from layerwright.nn.treated import TreatedLinear, dtype_name, named_dtype, owned

__all__ = ["MixedRowLinear"]


class MixedRowLinear(TreatedLinear):
    """Each width is one `QuantLinear` in `parts` (symmetric at 8 bits, with a zero point below), so that each product
    stays dense; the outputs are put back in order by one selection.

    With `act_bits` 8 the input is rounded to int8 for each token and group, and a product of integers is taken for each
    group (see `layerwright.nn.integer_products`). On a CPU in bfloat16 up to `FEW_TOKENS` input rows take PyTorch's
    products of packed weights instead, with the same rounded input; other devices multiply the dense weight.

    Buffers: those of the parts, `place` int32 ``(out,)`` where there is more than one, `bias`. Memory besides: 8 bytes
    for each row; in the product of integers one byte for each weight of a part, for the time of the call.
    """

    place: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rows: Mapping[int, int],
        dtype: torch.dtype,
        *,
        group_size: int = 128,
        act_bits: int | None = 8,
        method: str = "gptq",
        bias: bool = False,
    ) -> None:
        """An empty layer with ``rows[bits]`` rows of each width.

        Raises:
            InputError: rows that do not add up to `out_features`, widths outside 2 to 8, or a group size that does not
                divide the inputs.
        """
        super().__init__((1, out_features, in_features))
        if sum(rows.values()) != out_features or min(rows.values(), default=0) < 1:
            raise InputError(f"rows: {dict(rows)} do not add up to the {out_features} outputs")
        self.act_bits, self.group_size, self.method = act_bits, group_size, method
        settings: dict[str, Any] = {"group_size": group_size, "method": method, "act_bits": act_bits}
        treatment = MixRows(**settings)
        ordered = sorted(rows.items(), reverse=True)
        self.parts = nn.ModuleList(
            [QuantLinear(in_features, count, treatment.part(bits), dtype, bias=False) for bits, count in ordered]
        )
        mixed = len(rows) > 1
        self.register_buffer("place", torch.empty(out_features, dtype=torch.int32) if mixed else None)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)
        self._order: Tensor | None = None

    @classmethod
    def from_stored(cls, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> MixedRowLinear:
        """A layer that holds `stored` (one matrix of mixed rows), with `bias` ``(out,)`` and scales in `dtype`."""
        parts = stored.parts
        if parts is None or stored.shape[0] != 1:
            raise InputError(f"stored: expected mixed rows of one matrix, got shape {stored.shape}")
        settings = [part.quantize for part in parts if part.quantize is not None]
        rows = {q.bits: part.shape[1] for q, part in zip(settings, parts, strict=True)}
        first = settings[0]
        module = cls(
            stored.shape[2],
            stored.shape[1],
            rows,
            dtype,
            group_size=first.group_size,
            act_bits=stored.act_bits,
            method=first.method,
            bias=bias is not None,
        )
        for part, own in zip(module._parts(), parts, strict=True):
            part.fill_(own)
        if module.place is not None:
            assert stored.place is not None
            module.place = owned(stored.place, torch.int32, module.place.shape)
        if bias is not None:
            module.bias = owned(bias, dtype, bias.shape)
        return module

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> MixedRowLinear:
        """A layer of that form with uninitialised buffers, for a state dict to fill."""
        return cls(
            spec["in_features"],
            spec["out_features"],
            {int(bits): int(count) for bits, count in spec["rows"].items()},
            named_dtype(spec["dtype"]),
            group_size=spec["group_size"],
            act_bits=spec["act_bits"],
            method=spec["method"],
            bias=spec["bias"],
        )

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "mixed_row_linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rows": {str(part.quantize.bits): part.rows for part in self._parts()},
            "group_size": self.group_size,
            "act_bits": self.act_bits,
            "method": self.method,
            "bias": self.bias is not None,
            "dtype": dtype_name(self.dtype),
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is computed with."""
        return self._parts()[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._parts()[0].device

    @property
    def average_bits(self) -> float:
        """Bits for each weight, scales, zero points and places included."""
        tensors = [buffer for name, buffer in self.named_buffers() if name != "bias"]
        return 8 * sum(t.numel() * t.element_size() for t in tensors) / (self.rows * self.columns)

    def logical_parameters(self) -> int:
        """The bias: the parts count themselves."""
        return 0 if self.bias is None else self.bias.numel()

    def forget(self) -> None:
        """Drop what was derived from the stored tensors."""
        self._order = None

    def rows_of(self) -> dict[int, Tensor]:
        """Width to its rows, int64 and in order."""
        place = torch.arange(self.rows) if self.place is None else self.place.long()
        order = place.argsort()
        counts = [part.rows for part in self._parts()]
        rows = order.split(counts)
        return {part.quantize.bits: own.sort().values for part, own in zip(self._parts(), rows, strict=True)}

    def read_rows(self, part: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:stop``, dense in `dtype`."""
        dense = torch.empty(stop - start, self.columns, dtype=dtype, device=self.device)
        wanted = torch.arange(start, stop, device=self.device) if self.place is None else self.place[start:stop].long()
        first = 0
        for own in self._parts():
            inside = ((wanted >= first) & (wanted < first + own.rows)).nonzero().flatten()
            if len(inside):
                dense[inside] = _dense_rows(own, wanted[inside] - first, dtype)
            first += own.rows
        return dense

    def multiply(self, x: Tensor, bias: Tensor | None, part: int) -> Tensor:
        """``x @ W.T + bias`` for `x` ``(M, in)``; see the class."""
        few = x.dtype == torch.bfloat16 and len(x) <= FEW_TOKENS
        if self.act_bits and x.device.type == "cpu" and not few:
            codes, scale = quantize_token_groups(x, self.group_size)
            products = [grouped_matmul(codes, scale, *_integers(own)) for own in self._parts()]
        else:
            rounded = round_token_groups(x, self.group_size) if self.act_bits else x
            products = [own.multiply(rounded, None, 0) for own in self._parts()]
        y = products[0] if len(products) == 1 else torch.cat(products, 1).index_select(1, self._places())
        y = y.to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        rows = ", ".join(f"{part.rows} rows of {part.quantize.bits} bits" for part in self._parts())
        return f"{super().extra_repr()}, {rows}, act_bits={self.act_bits}"

    def _parts(self) -> list[QuantLinear]:
        return list(self.parts)  # type: ignore[arg-type]

    def _places(self) -> Tensor:
        assert self.place is not None
        if self._order is None:
            self._order = self.place.long()
        return self._order


def _integers(part: QuantLinear) -> tuple[Tensor, Tensor]:
    """Codes without zero points ``(rows, in)`` int8, and scale ``(rows, groups)``."""
    return shifted_codes(part.codes(0, 0, part.rows), part.weight_zero), part.weight_scale


def _dense_rows(part: QuantLinear, rows: Tensor, dtype: torch.dtype) -> Tensor:
    packed = part.get_buffer("weight_packed")[rows]
    dense = torch.empty(len(rows), part.columns, dtype=dtype, device=part.device)
    zero = None if part.weight_zero is None else part.weight_zero[rows]
    scaled_codes(unpack(packed, part.quantize.bits, part.columns), part.weight_scale[rows], zero, dense)
    return dense
