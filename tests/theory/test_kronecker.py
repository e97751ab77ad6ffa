from __future__ import annotations

import pytest
import torch

from layerwright.theory.kronecker import balanced_norm, commutation_indices, kron_channel, kron_token


@pytest.mark.parametrize(("tokens", "channels", "rows", "columns"), [(3, 5, 4, 2), (4, 2, 4, 7)])
def test_identities_with_rectangular_matrices(tokens: int, channels: int, rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, dtype=torch.float64, generator=draw)
    w = torch.randn(rows, tokens, dtype=torch.float64, generator=draw)
    v = torch.randn(channels, columns, dtype=torch.float64, generator=draw)
    flat = x.mT.flatten()
    close = {"atol": 1e-12, "rtol": 0.0}
    torch.testing.assert_close(kron_token(w, channels) @ flat, (w @ x).mT.flatten(), **close)
    torch.testing.assert_close(kron_channel(v, tokens) @ flat, (x @ v).mT.flatten(), **close)
    swapped = commutation_indices(tokens, channels)
    assert torch.equal(flat[swapped], x.flatten())
    before = torch.eye(tokens * channels, dtype=torch.float64)[swapped]
    after = torch.eye(tokens * columns, dtype=torch.float64)[commutation_indices(tokens, columns)]
    torch.testing.assert_close(before.mT @ before, torch.eye(tokens * channels, dtype=torch.float64))
    inner = torch.kron(torch.eye(tokens, dtype=torch.float64), v.mT.contiguous())
    torch.testing.assert_close(kron_channel(v, tokens), after.mT @ inner @ before, **close)


def test_the_norm_of_a_product_is_reached_in_balance() -> None:
    draw = torch.Generator().manual_seed(0)
    v, w = (torch.randn(3, n, dtype=torch.float64, generator=draw) for n in (4, 2))
    product = torch.kron(v, w)
    torch.testing.assert_close(balanced_norm(product), torch.linalg.norm(v) * torch.linalg.norm(w))
    scale = (torch.linalg.norm(w) / torch.linalg.norm(v)).sqrt()
    halves = [((s * v).square().sum() + (w / s).square().sum()) / 2 for s in (scale, scale * 1.1, scale / 1.1)]
    torch.testing.assert_close(halves[0], balanced_norm(product))
    assert min(halves[1:]) > halves[0]
