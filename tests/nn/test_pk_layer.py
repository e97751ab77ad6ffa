from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.nn.mixer_block import MixerBlock
from layerwright.nn.pk_layer import PKLayer, ShallowMixer, SparseWeightMLP
from layerwright.theory.kronecker import commutation_indices, kron_channel, kron_token, to_dense_mlp


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vec(x: torch.Tensor) -> torch.Tensor:
    """Columns one below the other, ``(batch, rows, columns)``."""
    return x.mT.flatten(1)


@pytest.mark.parametrize(("tokens", "channels", "behind"), [(3, 5, 4), (5, 2, 7), (4, 4, 4)])
def test_layers_are_the_mixings_of_an_image(tokens: int, channels: int, behind: int) -> None:
    x = torch.randn(6, tokens, channels, dtype=torch.float64, generator=draw())
    token = PKLayer(tokens, channels, behind, bias=False, generator=draw(1)).double()
    torch.testing.assert_close(token(vec(x)), vec(token.weight @ x), atol=1e-12, rtol=0)
    torch.testing.assert_close(token.dense_weight(), kron_token(token.weight, channels), atol=1e-12, rtol=0)
    channel = PKLayer(channels, tokens, behind, "commute", "commute", bias=False, generator=draw(2)).double()
    torch.testing.assert_close(channel(vec(x)), vec(x @ channel.weight.mT), atol=1e-12, rtol=0)
    torch.testing.assert_close(channel.dense_weight(), kron_channel(channel.weight.mT, tokens), atol=1e-12, rtol=0)


def test_commuting_is_its_permutation_and_identities_are_none() -> None:
    tokens, channels = 3, 4
    order = commutation_indices(tokens, channels)
    fast = PKLayer(channels, tokens, None, "commute", "commute", generator=draw())
    slow = PKLayer(channels, tokens, None, order, order.argsort(), generator=draw())
    x = torch.randn(5, 12)
    torch.testing.assert_close(fast(x), slow(x))
    plain = PKLayer(tokens, channels, generator=draw())
    same = PKLayer(tokens, channels, None, torch.arange(12), torch.arange(12), generator=draw())
    torch.testing.assert_close(plain(x), same(x))
    torch.testing.assert_close(x[:, order].relu(), x.relu()[:, order])


@pytest.mark.parametrize("permute", [False, True])
def test_a_dense_perceptron_does_the_same(permute: bool) -> None:
    mixer = nn.Sequential(*(ShallowMixer(3, 5, permute, bias=True, generator=draw(n)) for n in range(2))).double()
    for module in mixer.modules():
        if isinstance(module, PKLayer) and module.bias is not None:
            nn.init.normal_(module.bias)
    dense, x = to_dense_mlp(mixer), torch.randn(7, 15, dtype=torch.float64, generator=draw(9))
    torch.testing.assert_close(dense(x), mixer(x), atol=1e-10, rtol=0)
    counts = [int((layer.weight != 0).sum()) for layer in dense if isinstance(layer, nn.Linear)]
    assert counts == [3 * 15, 5 * 15] * 2, "tokens channels (tokens + channels) for a pair"
    with pytest.raises(InputError, match="the largest is 4096"):
        to_dense_mlp(ShallowMixer(65, 64))
    with pytest.raises(InputError, match="ReLU"):
        to_dense_mlp(nn.Sequential(nn.ReLU()))


def test_gradients_are_sums_over_tied_entries() -> None:
    layer, x = PKLayer(3, 4, bias=False, generator=draw()).double(), torch.randn(5, 12, dtype=torch.float64)
    target = torch.randn(5, 12, dtype=torch.float64)
    (layer(x) * target).sum().backward()
    dense = layer.dense_weight().detach().requires_grad_()
    (x @ dense.mT * target).sum().backward()
    assert dense.grad is not None
    blocks = dense.grad.reshape(4, 3, 4, 3)
    torch.testing.assert_close(layer.weight.grad, sum(blocks[n, :, n] for n in range(4)))


def test_random_permutations_are_kept_and_saved(tmp_path: object) -> None:
    mixer, x = ShallowMixer(4, 6, permute=True, generator=draw(3)), torch.randn(2, 24)
    assert torch.equal(mixer(x), mixer(x))
    other = ShallowMixer(4, 6, permute=True, generator=draw(4))
    assert not torch.allclose(other(x), mixer(x))
    other.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(other(x), mixer(x))
    stored = sum(t.numel() for t in mixer.state_dict().values())
    assert stored == 4 * 24 + 16 + 36, "four permutations and two small matrices"
    assert copy.deepcopy(mixer)(x).equal(mixer(x))


def test_first_weights_keep_the_second_moment() -> None:
    x = torch.randn(200, 64 * 32, generator=draw())
    for layer in (PKLayer(64, 32, generator=draw(1)), PKLayer(32, 64, None, "random", "random", generator=draw(1))):
        assert float(layer(x).detach().relu().square().mean()) == pytest.approx(1, rel=0.15)
    sparse = SparseWeightMLP(256, 1 / 16, 1, generator=draw(1))
    assert float(sparse(x[:, :256]).detach().square().mean()) == pytest.approx(1, rel=0.15)


def test_sparse_weights_stay_sparse() -> None:
    model = SparseWeightMLP(32, 0.25, 2, generator=draw())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 32)).sum().backward()
    optimizer.step()
    assert not model.weight[~model.mask].any() and float(model.mask.float().mean()) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("skip", [True, False])
def test_a_block_is_its_formula(skip: bool) -> None:
    block, x = MixerBlock(5, 6, 2.0, skip=skip), torch.randn(3, 5, 6)
    gelu, norm = nn.functional.gelu, nn.functional.layer_norm
    mixed = torch.stack(
        [
            block.token2.weight @ gelu(block.token1.weight @ one + block.token1.bias[:, None])
            + block.token2.bias[:, None]
            for one in norm(x, (6,))
        ]
    )
    hidden = x + mixed if skip else mixed
    out = gelu(norm(hidden, (6,)) @ block.channel1.weight.mT + block.channel1.bias) @ block.channel2.weight.mT
    out = out + block.channel2.bias
    torch.testing.assert_close(block(x), hidden + out if skip else out, atol=1e-5, rtol=1e-4)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))
    assert block.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_layers_compile_and_run_in_half_precision() -> None:
    layer, x = PKLayer(4, 6, 5, "random", "commute", generator=draw()), torch.randn(3, 24)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    half = layer.to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(
        half.float(), PKLayer(4, 6, 5, "random", "commute", generator=draw())(x), atol=0.1, rtol=0.1
    )


def test_bad_input_is_named() -> None:
    for make, message in (
        (lambda: PKLayer(0, 3), "dim_block"),
        (lambda: PKLayer(2, 3, perm_in=torch.tensor([0, 1, 2, 3, 4, 4])), "perm_in"),
        (lambda: PKLayer(2, 3, perm_out=torch.arange(5)), "perm_out"),
        (lambda: PKLayer(2, 3, perm_in="shuffle"), "perm_in"),  # type: ignore[arg-type]
        (lambda: PKLayer(2, 3)(torch.randn(1, 5)), r"expected \(batch, 6\)"),
        (lambda: SparseWeightMLP(8, 0.0, 1), "density"),
        (lambda: SparseWeightMLP(8, 0.5, 0), "depth"),
        (lambda: MixerBlock(0, 3), "tokens"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    with pytest.raises(TypeError, match="int64"):
        PKLayer(2, 3)(torch.zeros(1, 6, dtype=torch.long))
