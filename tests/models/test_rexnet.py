from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.backbone import Backbone, count_macs, translate_keys
from layerwright.models.bottleneck_net import BottleneckNet
from layerwright.models.rexnet import LITE_RULES, REXNET_RULES, ReXNet, ReXNetLite

REXNET = {
    "x0.9": (4_091_257, 0.348),
    "x1.0": (4_796_873, 0.398),
    "x1.3": (7_557_091, 0.662),
    "x1.5": (9_728_593, 0.876),
    "x2.0": (16_366_620, 1.529),
    "x2.2": (19_485_308, 1.843),
    "x3.0": (34_708_792, 3.396),
}
LITE = {
    "x1.0": (4_740_056, 0.407),
    "x1.3": (6_747_960, 0.646),
    "x1.5": (8_332_296, 0.836),
    "x2.0": (12_966_200, 1.498),
}
VARIANTS = [(ReXNet, name, *sizes) for name, sizes in REXNET.items()]
VARIANTS += [(ReXNetLite, name, *sizes) for name, sizes in LITE.items()]  # type: ignore[misc]
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(("network", "name", "parameters", "gmacs"), VARIANTS)
def test_sizes_are_those_of_the_authors_code(network: type[ReXNet], name: str, parameters: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = network.from_config(name).eval()
    assert isinstance(model, Backbone)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if name == "x1.0":
        assert count_macs(model) / 1e9 == pytest.approx(gmacs, rel=5e-3)


def test_published_widths() -> None:
    with torch.device("meta"):
        plain: Any = ReXNet()
        small: Any = ReXNet(0.9)
        lite: Any = ReXNetLite()
    assert [block.out_channels for block in plain.blocks] == [
        16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185
    ]  # fmt: skip
    assert [block.out_channels for block in lite.blocks] == [
        16, 32, 40, 48, 64, 72, 80, 96, 104, 112, 128, 136, 144, 160, 168, 184
    ]  # fmt: skip
    assert (small.blocks[0].in_channels, small.blocks[0].out_channels, small.num_features) == (32, 16, 1152)
    assert [block.stride for block in plain.blocks] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert [block.se.__class__.__name__ for block in plain.blocks] == ["Identity"] * 3 + ["SqueezeExcite"] * 13
    assert plain.blocks[3].se.reduce.out_channels == 38 * 6 // 12
    assert [block.shortcut for block in plain.blocks][:4] == [False, False, True, False]


def official_shapes(model: Any, lite: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in ``rexnetv1.py`` and ``rexnetv1_lite.py`` of clovaai/rexnet, written down from their lists of layers."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{part}": () if part == NORM[-1] else (channels,) for part in NORM})

    stem = model.blocks[0].in_channels
    conv("features.0", stem, 3, 3)
    norm("features.1", stem)
    before = stem
    for number, block in enumerate(model.blocks):
        inner, at, place = before * (6 if number else 1), f"features.{number + 3}.out", 0
        if number:
            conv(f"{at}.0", inner, before, 1)
            norm(f"{at}.1", inner)
            place = 3
        conv(f"{at}.{place}", inner, 1, 3)
        norm(f"{at}.{place + 1}", inner)
        place += 2
        if number >= 3 and not lite:
            conv(f"{at}.{place}.fc.0", inner // 12, inner, 1)
            shapes[f"{at}.{place}.fc.0.bias"] = (inner // 12,)
            norm(f"{at}.{place}.fc.1", inner // 12)
            conv(f"{at}.{place}.fc.3", inner, inner // 12, 1)
            shapes[f"{at}.{place}.fc.3.bias"] = (inner,)
            place += 1
        conv(f"{at}.{place + 1}", block.out_channels, inner, 1)
        norm(f"{at}.{place + 2}", block.out_channels)
        before = block.out_channels
    conv("features.19", 1280, before, 1)
    norm("features.20", 1280)
    ends = [("output.0", 1024, 1280), ("output.4", 1000, 1024)] if lite else [("output.1", 1000, 1280)]
    for name, outputs, inputs in ends:
        conv(name, outputs, inputs, 1)
        shapes[f"{name}.bias"] = (outputs,)
    if lite:
        norm("output.1", 1024)
    return shapes


@pytest.mark.parametrize("network", [ReXNet, ReXNetLite])
def test_official_checkpoints_load_whole(network: Any) -> None:
    model = network()
    lite = network is ReXNetLite
    state = {
        name: torch.tensor(3) if not shape else torch.rand(shape)
        for name, shape in official_shapes(model, lite).items()
    }
    model.load_official_(state)
    own = model.state_dict()
    names = translate_keys(list(state), LITE_RULES if lite else REXNET_RULES)
    assert set(names.values()) == set(own)
    assert all(torch.equal(own[names[key]].flatten(), tensor.flatten()) for key, tensor in state.items())
    state.pop("features.0.weight")
    with pytest.raises(CheckpointError, match=r"1 missing \(stem.conv.weight\)"):
        model.load_official_(state)


@pytest.fixture(scope="module")
def small() -> ReXNet:
    torch.manual_seed(0)
    return ReXNet.from_config("test").eval()


def test_contract(small: ReXNet) -> None:
    assert sum(p.numel() for p in small.parameters()) < 200_000
    images = torch.randn(2, 3, 64, 48)
    maps = small.forward_features(images)
    assert small.feature_strides == (4, 8, 16, 32)
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 64 // stride, -(-48 // stride))
        for channels, stride in zip(small.feature_channels, small.feature_strides, strict=True)
    ]
    assert small(images).shape == (2, 10) and small.no_weight_decay() == set()
    assert small(torch.randn(1, 3, 33, 47)).shape == (1, 10)
    again = ReXNet.from_config("test")
    again.reset_classifier(4)
    assert again(images).shape == (2, 4)


def test_logits_are_the_head_on_the_last_map(small: ReXNet) -> None:
    images = torch.randn(2, 3, 32, 32)
    pooled = small.wide(small.forward_features(images)[-1]).mean((2, 3))
    torch.testing.assert_close(small(images), small.classifier(pooled))


@pytest.mark.parametrize("network", [ReXNet, ReXNetLite])
def test_learns_and_runs_in_bfloat16(network: type[ReXNet]) -> None:
    torch.manual_seed(0)
    model = network(0.1, num_classes=3)
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half: Tensor = model.eval().bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_compiles_whole() -> None:
    torch.manual_seed(0)
    net = BottleneckNet([4, 6], [2, 1], [1, 6], [False, True], stem_channels=4, wide=8, hidden=8, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(images), net(images))


def test_depth_and_any_widths() -> None:
    with torch.device("meta"):
        deep = ReXNet(depth_mult=2.0)
    assert len(deep.blocks) == 32 and deep.blocks[-1].out_channels == round(16 + 31 * 180 / 32)
    net = BottleneckNet([6, 9, 12], [1, 2, 1], [1, 6, 6], stem_stride=1, stem_channels=8, wide=16, num_classes=3).eval()
    assert net.feature_strides == (2,) and net.feature_channels == (12,)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReXNet(0), "width_mult"),
        (lambda: ReXNet(-1.0), "width_mult"),
        (lambda: ReXNet(float("nan")), "width_mult"),
        (lambda: ReXNet(1.0, 0), "depth_mult"),
        (lambda: ReXNetLite(0), "multiplier"),
        (lambda: ReXNet(0.1, num_classes=0), "num_classes"),
        (lambda: ReXNet(0.1, dropout=1.0), "dropout"),
        (lambda: ReXNet.from_config("x7"), "expected one of x0.9"),
        (lambda: ReXNetLite.from_config("x0.9"), "expected one of x1.0"),
        (lambda: BottleneckNet([4, 4], [1], [1, 6]), "one for each"),
        (lambda: BottleneckNet([], [], []), "at least one block"),
        (lambda: BottleneckNet([4], [1], [1], wide=0), "wide"),
    ],
)
def test_bad_settings_are_named(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def test_bad_pictures_are_named(small: ReXNet) -> None:
    with pytest.raises(InputError, match="3 channels"):
        small(torch.zeros(1, 1, 32, 32))
    with pytest.raises(TypeError, match="int64"):
        small(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
