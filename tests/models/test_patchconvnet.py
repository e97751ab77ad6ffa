from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.backbone import Backbone, count_macs, load_official_
from layerwright.models.patchconvnet import OFFICIAL_RULES, PatchConvNet, official_state
from layerwright.nn.classifier_heads import GlobalAvgHead
from layerwright.nn.drop_path import DropPath
from layerwright.nn.patch_conv_block import PatchConvBlock


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("s60", 25_231_096, 3.979),
        ("s120", 47_723_896, None),
        ("b60", 99_388_936, 15.803),
        ("b120", 188_611_336, None),
        ("l60", 176_009_576, None),
        ("l120", 334_294_376, None),
        ("s60_multi", 25_614_712, 5.308),
    ],
)
def test_published_sizes(name: str, parameters: int, macs: float | None) -> None:
    with torch.device("meta"):
        model = PatchConvNet.from_config(name).eval()
    assert isinstance(model, Backbone)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if macs is not None:
        assert count_macs(model) / 1e9 == pytest.approx(macs, rel=5e-3)
    scales = [tensor for key, tensor in model.named_parameters() if "layer_scale" in key]
    assert len(scales) == len(model.blocks) + 2


def test_starts_are_the_published_ones() -> None:
    model = PatchConvNet.from_config("test")
    assert sum(p.numel() for p in model.parameters()) < 200_000
    for key, tensor in model.named_parameters():
        if "layer_scale" in key:
            assert torch.equal(tensor, torch.full_like(tensor, 1e-4)), key
    deep = PatchConvNet(8, 2, 2)
    assert all(float(t.detach().max()) == pytest.approx(1e-6) for k, t in deep.named_parameters() if "scale" in k)
    assert [c.out_channels for c in model.stem if isinstance(c, nn.Conv2d)] == [6, 12, 24, 48]
    assert [type(layer) for layer in model.stem] == [nn.Conv2d, nn.GELU] * 3 + [nn.Conv2d]
    assert all(c.bias is None for c in model.stem if isinstance(c, nn.Conv2d))
    # Convolutions keep PyTorch's start: uniform up to the root of one over the fan-in.
    block: Any = model.blocks[0]
    assert (
        float(block.pwconv1.weight.detach().abs().max()) > 0.9 / 48**0.5 > 0.08 and block.pwconv1.bias.abs().max() > 0
    )
    dropping = PatchConvNet(8, 3, 2, drop_path_rate=0.3)
    rates = {key: module.rate for key, module in dropping.named_modules() if isinstance(module, DropPath)}
    assert rates == {**{f"blocks.{i}.drop_path": 0.3 for i in range(3)}, "head.aggregation.drop_path": 0.0}
    assert model.no_weight_decay() == {"head.aggregation.queries"}


@torch.no_grad()
def test_any_size_one_map_and_new_classifiers() -> None:
    torch.manual_seed(0)
    model = PatchConvNet.from_config("test", drop_path_rate=0.5).eval()
    images = torch.randn(2, 3, 64, 96)
    (features,) = model.forward_features(images)
    assert features.shape == (2, 48, 4, 6)
    assert (model.num_features, model.feature_strides, model.feature_channels) == (48, (16,), (48,))
    logits = model(images)
    assert torch.equal(model(images), logits)
    torch.testing.assert_close(model.head(features), logits)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(images), logits, atol=1e-5, rtol=1e-4)  # type: ignore[call-overload]
    assert model(torch.randn(1, 3, 37, 53)).shape == (1, 10) and model(torch.randn(1, 3, 1, 1)).shape == (1, 10)
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    own = PatchConvNet.from_config("test", per_class=True, num_classes=5, stride=4).eval()
    assert own.forward_features(images)[0].shape == (2, 48, 16, 24) and own(images).shape == (2, 5)
    own.reset_classifier(3)
    assert own(images).shape == (2, 3)
    own.head = GlobalAvgHead(48, 7)
    assert own(images).shape == (2, 7)
    with pytest.raises(InputError, match="GlobalAvgHead"):
        own.reset_classifier(3)


@torch.no_grad()
def test_compiles_whole_and_runs_in_bfloat16() -> None:
    model, images = PatchConvNet(8, 2, 3, stride=4).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), model(images))
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def _official(dim: int, depth: int, classes: int, per_class: bool) -> dict[str, Tensor]:
    """Random tensors under the names and shapes of the authors' checkpoints, written from their model file."""
    draw = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=draw)

    def layer(name: str, *shape: int) -> None:
        put(f"{name}.weight", *shape)
        put(f"{name}.bias", shape[0])

    put("cls_token", 1, classes if per_class else 1, dim)
    widths = (3, dim // 8, dim // 4, dim // 2, dim)
    for step in range(4):
        put(f"patch_embed.proj.{2 * step}.0.weight", widths[step + 1], widths[step], 3, 3)
    for number in range(depth):
        block = f"blocks.{number}"
        put(f"{block}.gamma_1", dim)
        layer(f"{block}.norm1", dim)
        layer(f"{block}.attn.qkv_pos.0", dim, dim, 1, 1)
        layer(f"{block}.attn.qkv_pos.2", dim, 1, 3, 3)
        layer(f"{block}.attn.qkv_pos.4.conv_reduce", dim // 4, dim, 1, 1)
        layer(f"{block}.attn.qkv_pos.4.conv_expand", dim, dim // 4, 1, 1)
        layer(f"{block}.attn.qkv_pos.5", dim, dim, 1, 1)
    for name in ("attn.q", "attn.k", "attn.v", "attn.proj"):
        layer(f"blocks_token_only.0.{name}", dim, dim)
    layer("blocks_token_only.0.mlp.fc1", 3 * dim, dim)
    layer("blocks_token_only.0.mlp.fc2", dim, 3 * dim)
    for number in (1, 2):
        put(f"blocks_token_only.0.gamma_{number}", dim)
        layer(f"blocks_token_only.0.norm{number}", dim)
    layer("norm", dim)
    for name, rows in [(f"head.{k}", 1) for k in range(classes)] if per_class else [("head", classes)]:
        layer(name, rows, dim)
    return state


def test_official_names_translate_completely() -> None:
    state = _official(48, 2, 10, per_class=False)
    model = PatchConvNet(48, 2, 10)
    load_official_(model, official_state(state), OFFICIAL_RULES)
    expected = {
        "stem.2.weight": "patch_embed.proj.2.0.weight",
        "blocks.1.layer_scale": "blocks.1.gamma_1",
        "blocks.1.pwconv1.weight": "blocks.1.attn.qkv_pos.0.weight",
        "blocks.1.pwconv2.weight": "blocks.1.attn.qkv_pos.5.weight",
        "blocks.0.norm.bias": "blocks.0.norm1.bias",
        "head.aggregation.queries": "cls_token",
        "head.aggregation.k_proj.weight": "blocks_token_only.0.attn.k.weight",
        "head.aggregation.v_proj.weight": "blocks_token_only.0.attn.v.weight",
        "head.aggregation.q_proj.bias": "blocks_token_only.0.attn.q.bias",
        "head.aggregation.o_proj.weight": "blocks_token_only.0.attn.proj.weight",
        "head.aggregation.layer_scale_2": "blocks_token_only.0.gamma_2",
        "head.aggregation.norm2.weight": "blocks_token_only.0.norm2.weight",
        "head.norm.weight": "norm.weight",
        "head.fc.bias": "head.bias",
    }
    own = model.state_dict()
    for name, official in expected.items():
        assert torch.equal(own[name], state[official]), name
    with pytest.raises(CheckpointError, match="another shape"):
        load_official_(PatchConvNet(48, 2, 9), official_state(state), OFFICIAL_RULES)


def test_official_classifiers_of_single_classes_become_one() -> None:
    state = _official(16, 1, 12, per_class=True)
    model = PatchConvNet(16, 1, 12, per_class=True)
    load_official_(model, official_state(state), OFFICIAL_RULES)
    weight = model.get_parameter("head.fc.weight")
    assert torch.equal(weight[11], state["head.11.weight"][0]) and torch.equal(weight[2], state["head.2.weight"][0])
    assert float(model.get_parameter("head.fc.bias")[10].detach()) == float(state["head.10.bias"])
    del state["head.7.bias"]
    with pytest.raises(CheckpointError, match=r"head\.7\.bias is missing"):
        official_state(state)


def test_scales_let_deep_stacks_start_as_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6, 6)
    shallow = nn.Sequential(*(PatchConvBlock(8) for _ in range(60)))
    assert float((shallow(x) - x).abs().max().detach()) < 1e-3
    plain = nn.Sequential(*(PatchConvBlock(8, layer_scale=1.0) for _ in range(60)))
    assert float((plain(x) - x).abs().max().detach()) > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchConvNet(8, 0), "depth"),
        (lambda: PatchConvNet(8, 1, in_channels=0), "in_channels"),
        (lambda: PatchConvNet(8, 1, stride=6), "stride"),
        (lambda: PatchConvNet(8, 1, stride=1), "stride"),
        (lambda: PatchConvNet(4, 1), "dim: got 4, expected at least 8"),
        (lambda: PatchConvNet(8, 1, num_classes=0), "num_classes"),
        (lambda: PatchConvNet(8, 1, num_classes=0, per_class=True), "num_classes"),
        (lambda: PatchConvNet(8, 1, num_heads=3), "num_heads"),
        (lambda: PatchConvNet(8, 1, drop_path_rate=1), "drop_path"),
        (lambda: PatchConvNet.from_config("s61"), "expected one of s60"),
        (lambda: PatchConvNet(8, 1)(torch.zeros(1, 1, 32, 32)), "3 channels"),
        (lambda: PatchConvNet(8, 1).reset_classifier(0), "num_classes"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    with pytest.raises(TypeError, match="floating-point"):
        PatchConvNet(8, 1, 2)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
