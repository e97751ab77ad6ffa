"""Blocks are found from structure alone, in every architecture of the zoo and in models of one's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.blocks import Blocks, find_blocks, tower
from layerwright.core.errors import InputError
from zoo import EXPECTED, ZOO, on_meta

ROLES = {
    "bart": ("encoder", "decoder"),
    "bert": ("encoder",),
    "bloom": ("decoder",),
    "clip": ("vision", "encoder"),
    "gpt2": ("decoder",),
    "llama": ("decoder",),
    "opt": ("decoder",),
    "resnet": ("stage", "stage"),
    "swin": ("stage", "stage"),
    "t5": ("encoder", "decoder"),
    "vit": ("encoder",),
    "whisper": ("encoder", "decoder"),
}


def counts(stacks: tuple[Blocks, ...]) -> list[tuple[str, int]]:
    return [(stack.path, len(stack)) for stack in stacks]


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(name: str) -> None:
    model, _ = ZOO[name]()
    stacks = find_blocks(model)
    assert counts(stacks) == list(EXPECTED[name].items())
    assert all(name == f"{stack.path}.{i}" for stack in stacks for i, name in enumerate(stack))
    if name in ROLES:
        assert tuple(stack.role for stack in stacks) == ROLES[name]


@pytest.mark.parametrize("name", ZOO)
def test_meta_device(name: str) -> None:
    assert find_blocks(on_meta(name)) == find_blocks(ZOO[name]()[0])


@pytest.mark.parametrize("name", ZOO)
def test_blocks_run_in_this_order(name: str) -> None:
    """Oracle: hooks record the order in which blocks run; each stack's own order must agree with it."""
    model, batches = ZOO[name]()
    ran: list[str] = []
    for stack in find_blocks(model):
        for path in stack:
            model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path))
    model(**batches[0])
    for stack in find_blocks(model):
        assert list(dict.fromkeys(path for path in ran if path in stack.names)) == list(stack.names)
    assert set(ran) == {path for stack in find_blocks(model) for path in stack}


OTHERS = {
    "cvt": [("encoder.stages.0.layers", 1), ("encoder.stages.1.layers", 2), ("encoder.stages.2.layers", 10)],
    "deberta-v2": [("encoder.layer", 24)],
    "jamba": [("layers", 32)],
    "llava": [("vision_tower.encoder.layers", 24), ("language_model.layers", 32)],
    "mamba": [("layers", 32)],
    "poolformer": [(f"encoder.block.{i}", depth) for i, depth in enumerate((2, 2, 6, 2))],
    "segformer": [(f"stages.{i}.blocks", 2) for i in range(4)],
    "switch_transformers": [("encoder.block", 12), ("decoder.block", 12)],
    "wav2vec2": [("encoder.layers", 12)],
}


@pytest.mark.parametrize("name", OTHERS)
def test_full_size_models_on_the_meta_device(name: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[name]())
    assert counts(find_blocks(model)) == OTHERS[name]


class Residual(nn.Module):
    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v))


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Mixture(nn.Module):
    """Experts in a list inside the block, with a router beside them."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(feed_forward(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class Block(nn.Module):
    def __init__(self, width: int, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList([Residual(width, Attention(width)), Residual(width, mlp or feed_forward(width))])

    def forward(self, x: Tensor) -> Tensor:
        for sublayer in self.sublayers:
            x = sublayer(x)
        return x


class Own(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.trunk = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 11)


def test_own_transformer() -> None:
    assert counts(find_blocks(Own(*(Block(16) for _ in range(4))))) == [("trunk", 4)]


def test_experts_are_no_stack() -> None:
    assert counts(find_blocks(Own(*(Block(16, Mixture(16, e)) for e in (3, 4))))) == [("trunk", 2)]


def test_dense_and_mixture_blocks_in_one_stack() -> None:
    assert counts(find_blocks(Own(Block(16), Block(16, Mixture(16, 4)), Block(16)))) == [("trunk", 3)]


def test_torch_transformer_encoder_and_decoder() -> None:
    model = nn.Transformer(16, 2, 3, 2, 32, batch_first=True)
    stacks = find_blocks(model)
    assert counts(stacks) == [("encoder.layers", 3), ("decoder.layers", 2)]
    assert [stack.role for stack in stacks] == ["encoder", "decoder"]


def test_one_block() -> None:
    assert counts(find_blocks(Own(Block(16)))) == [("trunk", 1)]


def test_numbered_dict() -> None:
    model = nn.Module()
    model.layers = nn.ModuleDict({str(i): Block(8) for i in range(3)})
    assert find_blocks(model)[0].names == ("layers.0", "layers.1", "layers.2")


def test_one_module_in_two_places_is_one_block() -> None:
    block = Block(16)
    assert find_blocks(Own(block, block, Block(16)))[0].names == ("trunk.0", "trunk.2")


class Basic(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()


class OwnResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16), Basic(16, 16), Basic(16, 16))
        self.fc = nn.Linear(16, 10)


def test_own_resnet() -> None:
    assert counts(find_blocks(OwnResNet())) == [("layer1", 2), ("layer2", 3)]


class Stage(nn.Module):
    def __init__(self, before: int, after: int, depth: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, after, 2, 2)
        self.blocks = nn.Sequential(*(Basic(after, after) for _ in range(depth)))


def test_stages_are_taken_apart_even_those_of_one_block() -> None:
    model = nn.Sequential(Stage(3, 8, 1), Stage(8, 16, 2))
    stacks = find_blocks(model)
    assert counts(stacks) == [("0.blocks", 1), ("1.blocks", 2)]
    assert {(stack.role, stack.group) for stack in stacks} == {("stage", "")}
    assert {stack.group for stack in find_blocks(Own(*(Block(16), Block(16))))} == {None}


@given(st.lists(st.integers(8, 12), min_size=3, max_size=7))
@settings(max_examples=20, deadline=None)
def test_plain_mlp(widths: list[int]) -> None:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    (stack,) = find_blocks(nn.Sequential(*layers))
    assert stack.names == tuple(str(2 * i) for i in range(len(widths) - 2))  # all but the head
    assert stack.path == ""


def test_plain_cnn_of_two_parts() -> None:
    model = nn.Module()
    model.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert [stack.names for stack in find_blocks(model)] == [("features.0", "features.2"), ("classifier.0",)]


def test_conv_and_norm_pairs() -> None:
    def unit(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU())

    model = nn.Sequential(unit(3, 8), unit(8, 8), unit(8, 8), nn.Flatten(), nn.Linear(8, 3))
    assert find_blocks(model)[0].names == ("0", "1", "2")


def test_nothing_found_names_the_override() -> None:
    with pytest.raises(InputError, match="blocks="):
        find_blocks(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="expected a torch"):
        find_blocks("model")  # type: ignore[arg-type]


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc1, self.fc2 = (
            nn.Conv2d(1, 6, 5),
            nn.Conv2d(6, 16, 5),
            nn.Linear(256, 84),
            nn.Linear(84, 10),
        )


def test_override() -> None:
    assert find_blocks(LeNet(), ["conv1", "conv2", "fc1"]) == (Blocks("", ("conv1", "conv2", "fc1")),)
    model = Own(*(Block(16, Mixture(16, 3)) for _ in range(2)))
    inner = "trunk.0.sublayers.1.inner.experts"
    assert counts(find_blocks(model, inner)) == [(inner, 3)]
    assert counts(find_blocks(model, f"trunk, {inner}")) == [("trunk", 2), (inner, 3)]
    assert counts(find_blocks(model, ["trunk", inner])) == [("trunk", 2), (inner, 3)]
    assert find_blocks(model, ["trunk.1"]) == (Blocks("trunk", ("trunk.1",)),)


@pytest.mark.parametrize(
    ("override", "message"),
    [("trunc", "did you mean trunk"), ([], "empty"), ("head", "no children"), (["trunk.0", "trunk.1"], "twice")],
)
def test_bad_override(override: str | list[str], message: str) -> None:
    block = Block(16)
    with pytest.raises(InputError, match=message):
        find_blocks(Own(block, block), override)


def test_tower() -> None:
    model, _ = ZOO["clip"]()
    stacks = find_blocks(model)
    assert [tower(stack, stacks) for stack in stacks] == ["vision_model", "text_model"]
    stages = find_blocks(ZOO["swin"]()[0])
    assert {tower(stage, stages) for stage in stages} == {""}
