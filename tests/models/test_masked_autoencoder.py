from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwright.core.errors import InputError, NotFiniteError
from layerwright.models._vit_blocks import VitBlock, patches_of, sincos_positions
from layerwright.models.masked_autoencoder import ImageClassifier, ImageEncoder, MaskedAutoencoder
from layerwright.nn.random_mask import random_mask
from oracles import bamboo as oracle

SIZES: dict[str, Any] = {"image_size": 16, "patch": 4, "in_chans": 2, "dim": 16, "depth": 2, "heads": 4}


def small(**more: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder(**(SIZES | {"decoder_dim": 8, "decoder_depth": 2} | more)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))


def copied_block(block: VitBlock, layer: Any) -> None:
    attention = layer.attention
    for kind in ("weight", "bias"):
        three = [getattr(getattr(attention, f"{name}_proj"), kind) for name in "qkv"]
        getattr(block.qkv, kind).copy_(torch.cat(three))
        getattr(block.out, kind).copy_(getattr(attention.o_proj, kind))
        getattr(block.attention_norm, kind).copy_(getattr(layer.layernorm_before, kind))
        getattr(block.ffn_norm, kind).copy_(getattr(layer.layernorm_after, kind))
        getattr(block.ffn[0], kind).copy_(getattr(layer.mlp.fc1, kind))
        getattr(block.ffn[2], kind).copy_(getattr(layer.mlp.fc2, kind))


@pytest.mark.parametrize(("norm_pix", "channels"), [(True, 3), (False, 1)])
def test_equal_to_transformers(norm_pix: bool, channels: int) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    config = ViTMAEConfig(
        image_size=16,
        patch_size=4,
        num_channels=channels,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
        mask_ratio=0.75,
        norm_pix_loss=norm_pix,
        layer_norm_eps=1e-6,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    theirs: Any = ViTMAEForPreTraining(config).eval()
    ours = MaskedAutoencoder(16, 4, channels, 24, 3, 3, 16, 2, norm_pix=norm_pix, eps=1e-6).eval()
    vit, decoder = theirs.vit, theirs.decoder
    with torch.no_grad():
        # A model made from a configuration has zeros for positions; published weights have columns first, then rows.
        for own, other in (
            (ours.encoder.positions, vit.embeddings.position_embeddings),
            (ours.decoder_positions, decoder.decoder_pos_embed),
        ):
            table = build_2d_sinusoidal_position_embedding(4, 4, own.shape[1], cls_token=True)
            torch.testing.assert_close(own, table.roll(own.shape[1] // 2, 1))
            other.copy_(table.roll(own.shape[1] // 2, 1))
        for parameter in theirs.parameters():  # biases and norms that are not 0 and 1
            if parameter.requires_grad and parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        decoder.mask_token.normal_()
        vit.embeddings.cls_token.normal_()
        pairs = [
            (ours.encoder.patches, vit.embeddings.patch_embeddings.projection),
            (ours.encoder.norm, vit.layernorm),
            (ours.decoder_embed, decoder.decoder_embed),
            (ours.decoder_norm, decoder.decoder_norm),
            (ours.predict, decoder.decoder_pred),
        ]
        for own, other in pairs:
            own.weight.copy_(other.weight)
            own.bias.copy_(other.bias)
        ours.encoder.cls_token.copy_(vit.embeddings.cls_token.flatten())
        ours.mask_token.copy_(decoder.mask_token.flatten())
        stacks = ((ours.encoder.blocks, _layers(vit)), (ours.decoder, decoder.decoder_layers))
        for blocks, layers in stacks:
            assert len(blocks) == len(layers)
            for block, layer in zip(blocks, layers, strict=True):
                assert isinstance(block, VitBlock)
                copied_block(block, layer)
        x, noise = torch.randn(5, channels, 16, 16), torch.rand(5, 16)
        found, expected = ours(x, noise=noise), theirs(pixel_values=x, noise=noise)
        features = ours.encode(x, random_mask(16, 0.75, noise=noise))
        reference = vit(pixel_values=x, noise=noise).last_hidden_state
    torch.testing.assert_close(found[2], expected.mask)
    torch.testing.assert_close(features, reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], expected.loss, atol=1e-5, rtol=0)


def _layers(vit: Any) -> Any:
    encoder = getattr(vit, "encoder", vit)
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def test_loss_counts_masked_patches_alone(images: Tensor) -> None:
    model = small()
    loss, predicted, mask = model(images, generator=torch.Generator().manual_seed(1))
    assert float(loss.detach()) == pytest.approx(oracle.masked_loss(images, predicted.detach(), mask, 4), rel=1e-5)
    assert mask.sum(1).tolist() == [12] * 3
    pixels = oracle.patches(images, 4)
    assert torch.equal(patches_of(images, 4), pixels)
    other = images.clone()
    for sample, place in (mask == 0).nonzero().tolist():
        top, left = 4 * (place // 4), 4 * (place % 4)
        other[sample, :, top : top + 4, left : left + 4] = torch.randn(2, 4, 4)
    assert torch.equal(model.loss(other, predicted, mask), loss)
    moved = images.clone()
    sample, place = mask.nonzero()[0].tolist()
    moved[sample, :, 4 * (place // 4), 4 * (place % 4)] += 3
    assert not torch.equal(model.loss(moved, predicted, mask), loss)


def test_masked_pixels_do_not_reach_the_encoder(images: Tensor) -> None:
    model = small()
    mask = random_mask(16, 0.75, torch.Generator().manual_seed(2), batch=3)
    features = model.encode(images, mask)
    assert features.shape == (3, 1 + 4, 16)
    spoilt = images.clone()
    for sample, place in mask.mask.nonzero().tolist():
        spoilt[sample, :, 4 * (place // 4) : 4 * (place // 4) + 4, 4 * (place % 4) : 4 * (place % 4) + 4] = float("nan")
    assert torch.equal(model.encode(spoilt, mask), features)


def test_encode_with_a_plain_mask_and_without(images: Tensor) -> None:
    model = small()
    whole = model.encode(images)
    assert whole.shape == (3, 17, 16)
    plain = torch.zeros(3, 16)
    torch.testing.assert_close(model.encode(images, plain), whole, atol=1e-5, rtol=0)
    plain[:, 5:] = 1
    by_places = model.encoder(images, torch.arange(5).expand(3, 5))
    assert torch.equal(model.encode(images, plain), by_places)
    # Seeing all patches is not seeing a few of them.
    assert not torch.allclose(whole[:, :6], by_places, atol=1e-3)


def test_attention_weights_of_a_block() -> None:
    torch.manual_seed(0)
    block = VitBlock(8, 2)
    x = torch.randn(2, 5, 8)
    weights = block.weights(x)
    assert weights.shape == (2, 2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
    value = block._heads(block.attention_norm(x))[2]
    attended = x + block.out((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), attended + block.ffn(block.ffn_norm(attended)))


@pytest.mark.parametrize(("depth", "dim", "weights"), [(3, 104, 389_376), (6, 72, 373_248), (12, 52, 389_376)])
def test_parameters(depth: int, dim: int, weights: int) -> None:
    encoder = ImageEncoder(32, 4, 1, dim, depth, 4)
    assert encoder.block_parameters() == weights == 12 * depth * dim**2
    total = sum(p.numel() for p in encoder.parameters())
    assert total == weights + depth * 13 * dim + 16 * dim + dim + dim + 2 * dim


def test_base_size_has_the_published_number_of_block_parameters() -> None:
    with torch.device("meta"):
        block = VitBlock(768, 12)
    assert 12 * sum(p.numel() for p in block.parameters()) == 85_054_464


def test_deterministic_and_leaves_the_global_generator_alone(images: Tensor) -> None:
    before = torch.get_rng_state()
    one, two = small(seed=3), small(seed=3)
    draws = [model(images, generator=torch.Generator().manual_seed(0))[0] for model in (one, two)]
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(small(seed=4).predict.weight, one.predict.weight)


def test_bfloat16(images: Tensor) -> None:
    model = small()
    exact = model(images, generator=torch.Generator().manual_seed(0))
    half = model.bfloat16()(images.bfloat16(), generator=torch.Generator().manual_seed(0))
    assert half[1].dtype == torch.bfloat16 and half[0].dtype == torch.float32
    assert float(half[0].detach()) == pytest.approx(float(exact[0].detach()), rel=0.05)


def test_it_learns_to_fill_in() -> None:
    grey = torch.arange(16).float().sin().expand(8, 1, 16, 16) * torch.linspace(0.5, 2, 8)[:, None, None, None]
    model = MaskedAutoencoder(16, 4, 1, 16, 1, 2, 16, 1).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        loss = model(grey, generator=draw)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_classifier(images: Tensor, pool: str) -> None:
    encoder = ImageEncoder(**SIZES)
    model = ImageClassifier(encoder, 5, pool)
    assert model(images).shape == (3, 5)
    states = encoder(images)
    expected = states[:, 0] if pool == "cls" else states[:, 1:].mean(1)
    assert torch.equal(model.features(images), expected)


def test_positions() -> None:
    table = sincos_positions(8, 3)
    assert table.shape == (10, 8) and not table[0].any()
    assert table[1 + 5, 0] == pytest.approx(float(torch.tensor(2.0).sin()))  # column 2 of row 1
    assert table[1 + 5, 4] == pytest.approx(float(torch.tensor(1.0).sin()))
    assert torch.equal(sincos_positions(8, 3, cls_token=False), table[1:])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: small(image_size=18), "image_size: got 18, expected a multiple of the patch size 4"),
        (lambda: small(heads=3), "heads: got 3 for a width of 16"),
        (lambda: small(mask_ratio=1.0), "inside"),
        (lambda: small(mask_ratio=0.98), "leaves no visible token"),
        (lambda: small(depth=0), "depth: got 0"),
        (lambda: small(decoder_depth=0), "decoder_depth: got 0"),
        (lambda: small(dim=18, heads=2), "expected a multiple of 4"),
        (lambda: small()(torch.zeros(1, 1, 16, 16)), "images: got shape"),
        (lambda: small().encode(torch.zeros(1, 2, 16, 16), torch.zeros(1, 9)), "mask: got shape"),
        (lambda: ImageClassifier(ImageEncoder(**SIZES), 1), "classes: got 1"),
        (lambda: ImageClassifier(ImageEncoder(**SIZES), 3, "max"), "pool: got 'max'"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_what_is_not_finite_is_told() -> None:
    with pytest.raises(NotFiniteError, match="not finite"):
        small()(torch.full((2, 2, 16, 16), float("nan")))
