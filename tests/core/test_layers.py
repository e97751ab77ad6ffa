"""The list of layers covers every parameter once, says how each weight is stored, and reads the same without values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.blocks import find_blocks
from layerwright.core.layer import LayerRef, get_parameter, read_matrix, write_matrix_
from layerwright.core.layers import (
    list_layers,
    owned_parameters,
    parameter_bytes,
    saved_tensors,
    structure_copy,
    tensor_key,
    treatable,
)
from zoo import ZOO, logits, on_meta


def by_path(model: nn.Module) -> dict[str, LayerRef]:
    return {ref.path: ref for ref in list_layers(model)}


def last(paths: list[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_belongs_to_one_layer(name: str) -> None:
    model, _ = ZOO[name]()
    refs = list_layers(model)
    assert len({ref.path for ref in refs}) == len(refs)
    owned = [parameter for names in owned_parameters(model, refs).values() for parameter in names]
    assert sorted(owned) == sorted(parameter for parameter, _ in model.named_parameters())
    own = {ref.path: ref for ref in refs if ref.parameter and not ref.tied}
    matrices = {ref.parameter for ref in own.values()}
    others = [p for p in owned if p not in matrices]
    rest = [ref for ref in refs if ref.kind in ("norm", "other")]
    assert all(
        p.endswith("bias") or any(p == ref.path or p.startswith(ref.path + ".") for ref in rest) for p in others
    ), "a matrix that is neither a layer's weight nor listed as something else"


@pytest.mark.parametrize("name", ZOO)
def test_same_on_the_meta_device(name: str) -> None:
    model, _ = ZOO[name]()
    empty = on_meta(name)
    assert list_layers(empty) == list_layers(model)
    assert treatable(empty) == treatable(model)
    assert parameter_bytes(empty) == parameter_bytes(model)


@pytest.mark.parametrize("name", ZOO)
def test_read_and_write_every_treatable_weight(name: str) -> None:
    """Writing back what was read changes nothing; writing something else is read back and changes the logits."""
    model, batches = ZOO[name]()
    before = logits(model, batches[0])
    layers = treatable(model, include_head=True, include_embeddings=True)
    generator = torch.Generator().manual_seed(0)
    for ref in layers:
        matrices = read_matrix(model, ref).clone()
        assert matrices.shape == (ref.count, *ref.shape)
        assert ref.numel == get_parameter(model, ref.parameter).numel()
        write_matrix_(model, ref, matrices)
    assert torch.equal(logits(model, batches[0]), before)
    for ref in layers:
        new = torch.randn(ref.count, *ref.shape, generator=generator)
        write_matrix_(model, ref, new)
        assert torch.equal(read_matrix(model, ref), new)
    assert not torch.allclose(logits(model, batches[0]), before)


@pytest.mark.parametrize("name", ZOO)
def test_blocks_and_places(name: str) -> None:
    model, _ = ZOO[name]()
    refs = list_layers(model)
    stacks = find_blocks(model)
    assert [ref.path for ref in refs if ref.kind == "block"] == [
        path for path, _ in model.named_modules() if any(path in stack.names for stack in stacks)
    ]
    for ref in refs:
        inside = [(s.path, i) for s in stacks for i, b in enumerate(s) if ref.path == b or ref.path.startswith(b + ".")]
        assert [(ref.stack, ref.block)] == (inside or [("", None)])


GATED = {"q", "k", "v", "o", "gate", "up", "down"}
PLAIN = {"q", "k", "v", "o", "up", "down"}
FUSED = {"qkv", "o", "up", "down"}
MIXTURE = {"q", "k", "v", "o", "gate_up", "down", "router"}
BLOCK_ROLES = {
    "albert": PLAIN,
    "bart": PLAIN,
    "bert": PLAIN,
    "bloom": FUSED,
    "clip": PLAIN,
    "convnext": {"up", "down"},
    "deit": PLAIN,
    "distilbert": PLAIN,
    "falcon": FUSED,
    "gemma2": GATED,
    "gemma3": GATED,
    "gpt2": FUSED,
    "gpt_neox": FUSED,
    "gpt_oss": MIXTURE,
    "llama": GATED,
    "llama4": GATED | MIXTURE,
    "mistral": GATED,
    "mixtral": MIXTURE,
    "opt": PLAIN,
    "phi3": {"qkv", "o", "gate_up", "down"},
    "qwen2": GATED,
    "qwen3": GATED,
    "qwen3_moe": GATED | MIXTURE,
    "resnet": set(),
    "roberta": PLAIN,
    "swin": PLAIN,
    "t5": PLAIN,
    "vit": PLAIN,
    "whisper": PLAIN,
}


@pytest.mark.parametrize("name", ZOO)
def test_roles(name: str) -> None:
    refs = list_layers(ZOO[name]()[0])
    assert {ref.role for ref in refs if ref.block is not None} - {""} == BLOCK_ROLES[name]
    for ref in refs:  # every linear layer and every expert weight in a block has a role
        assert ref.role or ref.block is None or ref.kind not in ("linear", "experts"), ref
    attention = [ref.path for ref in refs if ref.kind == "attention"]
    for ref in refs:
        inside = [path for path in attention if ref.path.startswith(path + ".")]
        assert len(inside) == (ref.role in ("q", "k", "v", "qkv", "o")) or ref.kind in ("norm", "other", "embedding")


CONTAINERS = {
    "bert": ({"attention"}, set()),
    "gpt2": ({"attn"}, {"mlp"}),
    "gpt_oss": ({"self_attn"}, {"mlp"}),
    "llama": ({"self_attn"}, {"mlp"}),
    "llama4": ({"self_attn"}, {"feed_forward"}),
    "mixtral": ({"self_attn"}, {"mlp"}),
    "resnet": (set(), set()),
    "t5": ({"SelfAttention", "EncDecAttention"}, {"DenseReluDense"}),
    "vit": ({"attention"}, {"mlp"}),
    "whisper": ({"self_attn", "encoder_attn"}, set()),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_attention_and_mlp(name: str) -> None:
    refs = list_layers(ZOO[name]()[0])
    attention, mlp = CONTAINERS[name]
    assert last([ref.path for ref in refs if ref.kind == "attention"]) == attention
    assert last([ref.path for ref in refs if ref.kind == "mlp"]) == mlp


HEADS = {
    "bart": ["lm_head"],
    "bert": ["classifier"],
    "clip": ["visual_projection", "text_projection"],
    "convnext": ["classifier"],
    "gpt_neox": ["lm_head"],
    "llama": ["lm_head"],
    "resnet": ["classifier.1"],
    "roberta": ["classifier.out_proj"],
    "vit": ["classifier"],
    "whisper": ["proj_out"],
}
STEMS = {
    "clip": ["vision_model.embeddings.patch_embedding"],
    "convnext": ["convnext.embeddings.patch_embeddings"],
    "llama": [],
    "resnet": ["resnet.embedder.embedder.convolution"],
    "swin": ["swin.embeddings.patch_embeddings.projection"],
    "whisper": ["model.encoder.conv1", "model.encoder.conv2"],
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    assert [ref.path for ref in list_layers(ZOO[name]()[0]) if ref.kind == "head"] == HEADS[name]


@pytest.mark.parametrize("name", STEMS)
def test_stems(name: str) -> None:
    assert [ref.path for ref in list_layers(ZOO[name]()[0]) if ref.role == "stem"] == STEMS[name]


@pytest.mark.parametrize("name", ZOO)
def test_what_may_be_treated(name: str) -> None:
    model, _ = ZOO[name]()
    for ref in treatable(model):
        assert ref.kind in ("linear", "conv", "experts")
        assert ref.role not in ("stem", "router")
        assert min(ref.shape) >= 8
        assert not ref.tied
    in_blocks = [ref for ref in list_layers(model) if ref.block is not None and ref.role not in ("", "router")]
    assert set(in_blocks) <= set(treatable(model))


def test_tied_head() -> None:
    model, _ = ZOO["gpt2"]()
    layers = by_path(model)
    assert layers["lm_head"].tied == "transformer.wte"
    assert layers["transformer.wte"].tied == ""
    assert "lm_head" not in [ref.path for ref in treatable(model, include_head=True)]
    assert "transformer.wte" in [ref.path for ref in treatable(model, include_head=True)]
    assert "transformer.wpe" not in [ref.path for ref in treatable(model, include_head=True)]
    assert "transformer.wpe" in [ref.path for ref in treatable(model, include_embeddings=True)]
    assert "lm_head" in [ref.path for ref in treatable(ZOO["llama"]()[0], include_head=True)]


def test_roles_of_projections_that_stand_in_the_block_itself() -> None:
    names = {
        "q_proj": (16, 16),
        "k_proj": (8, 16),
        "v_proj": (8, 16),
        "o_proj": (16, 16),
        "w1": (40, 16),
        "w2": (16, 40),
    }
    blocks = [nn.ModuleDict({n: nn.Linear(i, o) for n, (o, i) in names.items()}) for _ in range(2)]
    roles = [ref.role for ref in list_layers(nn.ModuleDict({"layers": nn.ModuleList(blocks)})) if ref.kind == "linear"]
    assert roles == ["q", "k", "v", "o", "up", "down"] * 2


# Orientation of experts, proven by what the model computes.


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
@torch.no_grad()
def test_orientation_of_experts(name: str) -> None:
    """Without row r of every down matrix, output r is 0; without column c of every gate and up, input c is unused."""
    model, _ = ZOO[name]()
    layers = [ref for ref in list_layers(model) if ref.block == 1 or (name == "qwen3_moe" and ref.block == 0)]
    block = next(ref.block for ref in layers if ref.kind == "experts")
    layers = [ref for ref in layers if ref.block == block]
    mlp = model.get_submodule(next(ref.path for ref in layers if ref.kind == "mlp"))
    for parameter, value in model.named_parameters():
        if parameter.endswith("down_proj_bias"):
            value.zero_()

    def outputs(x: Tensor) -> Tensor:
        y = mlp(x)
        return y[0] if isinstance(y, tuple) else y

    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert outputs(x).reshape(-1, 32)[:, 7].abs().min() > 0
    clear(model, [ref for ref in layers if ref.role == "down"], rows=7)
    assert outputs(x).reshape(-1, 32)[:, 7].abs().max() == 0
    assert outputs(x).reshape(-1, 32)[:, 8].abs().min() > 0
    moved = x.clone()
    moved[..., 3] += 1
    assert not torch.allclose(outputs(moved), outputs(x))
    clear(model, [ref for ref in layers if ref.role in ("gate", "up", "gate_up", "router")], columns=3)
    assert torch.allclose(outputs(moved), outputs(x), atol=1e-6)


def clear(model: nn.Module, refs: list[LayerRef], rows: int | None = None, columns: int | None = None) -> None:
    for ref in refs:
        matrices = read_matrix(model, ref).clone()
        if rows is not None:
            matrices[:, rows] = 0
        if columns is not None:
            matrices[:, :, columns] = 0
        write_matrix_(model, ref, matrices)


class Experts(nn.Module):
    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


def layouts(module: nn.Module) -> dict[str, str]:
    wrapper = nn.Module()
    wrapper.experts = module
    return {ref.path.rpartition(".")[2]: ref.layout for ref in list_layers(wrapper) if ref.kind == "experts"}


def test_square_experts_are_told_by_their_gate() -> None:
    hidden = inner = 16
    straight = Experts(gate_up=torch.randn(3, 2 * inner, hidden), down=torch.randn(3, hidden, inner))
    turned = Experts(gate_up=torch.randn(3, hidden, 2 * inner), down=torch.randn(3, inner, hidden))
    assert set(layouts(straight).values()) == {"experts"}
    assert set(layouts(turned).values()) == {"experts_transposed"}


def test_experts_without_gate() -> None:
    up, down = torch.randn(3, 24, 16), torch.randn(3, 16, 24)
    assert layouts(Experts(up_proj=up, down_proj=down)) == {}  # open: not listed as experts
    module = Experts(up_proj=up, down_proj=down)
    module.hidden_size = 16
    assert set(layouts(module).values()) == {"experts"}
    module.hidden_size = 24
    assert set(layouts(module).values()) == {"experts_transposed"}
    module.is_transposed = False
    assert set(layouts(module).values()) == {"experts"}
    biased = Experts(up_proj=up, up_proj_bias=torch.zeros(3, 24), down_proj=down)
    assert set(layouts(biased).values()) == {"experts"}
    assert owned_parameters(biased)["up_proj"] == ("up_proj", "up_proj_bias")


# Models of one's own.


def test_conv1d_reads_as_out_in() -> None:
    model, _ = ZOO["gpt2"]()
    ref = by_path(model)["transformer.h.0.attn.c_attn"]
    layer = model.get_submodule(ref.path)
    x = torch.randn(3, 32)
    assert (ref.layout, ref.shape) == ("conv1d", (96, 32))
    assert torch.allclose(layer(x), x @ read_matrix(model, ref)[0].T + layer.bias, atol=1e-5)


def test_convolution_reads_as_unfolded_matrix() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Linear(1, 1))
    ref = by_path(model)["2"]
    x = torch.randn(2, 8, 9, 9)
    columns = F.unfold(x, 3, stride=2)
    expected = (read_matrix(model, ref) @ columns).reshape(2, 16, 4, 4) + model[2].bias[:, None, None]
    assert ref.shape == (16, 72)
    assert torch.allclose(model[2](x), expected, atol=1e-5)


def test_first_convolution_of_a_plain_network_is_its_stem() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 10))
    layers = by_path(model)
    assert layers["0"].role == "stem"
    assert layers["4"].kind == "head"
    assert [ref.path for ref in treatable(model)] == ["2"]
    assert (layers["2"].kind, layers["2"].block) == ("conv", 1)


def test_what_cannot_be_treated() -> None:
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(8, 16, 3),
            "attention": nn.MultiheadAttention(16, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            "recurrent": nn.LSTM(16, 16),
            "plain": nn.Linear(16, 16),
            "head": nn.Linear(16, 16),
        }
    )
    layers = by_path(model)
    assert (layers["up"].kind, layers["up"].layout, layers["up"].shape) == ("conv", "none", (16, 72))
    assert layers["attention.in_proj_weight"].layout == layers["attention.out_proj"].layout == "none"
    assert layers["normed"].layout == "none"
    assert [ref.path for ref in treatable(model)] == ["plain"]
    owned = [name for names in owned_parameters(model).values() for name in names]
    assert sorted(owned) == sorted(name for name, _ in model.named_parameters())


def test_shared_modules_and_shared_weights() -> None:
    model = nn.Module()
    model.first, model.other = nn.Linear(16, 16), nn.Linear(16, 16)
    model.again = model.first
    model.other.weight = model.first.weight
    model.head = nn.Linear(16, 12)
    layers = by_path(model)
    assert list(layers) == ["first", "other", "head"]
    assert layers["other"].tied == "first"
    assert [ref.path for ref in treatable(model)] == ["first"]
    assert owned_parameters(model) == {
        "first": ("first.weight", "first.bias"),
        "other": ("other.bias",),
        "head": ("head.weight", "head.bias"),
    }


class Packed(nn.Module):
    """A linear layer that keeps packed integers in buffers."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("codes", torch.zeros(out_features, in_features // 8, dtype=torch.int32))


def test_packed_layers_stay_in_the_list() -> None:
    model, _ = ZOO["llama"]()
    plain = {ref.path: ref for ref in list_layers(model)}
    stacks = find_blocks(model)
    for ref in treatable(model):
        owner, _, name = ref.path.rpartition(".")
        setattr(model.get_submodule(owner), name, Packed(*ref.shape))
    packed = {ref.path: ref for ref in list_layers(model)}
    assert find_blocks(model) == stacks
    assert list(packed) == list(plain)
    assert all((packed[p].kind, packed[p].role, packed[p].shape) == (r.kind, r.role, r.shape) for p, r in plain.items())
    assert treatable(model) == ()


def test_a_model_without_blocks_and_not_a_model() -> None:
    assert [ref.kind for ref in list_layers(nn.Linear(9, 9))] == ["linear"]
    with pytest.raises(TypeError):
        list_layers("model")  # type: ignore[arg-type]


# Bytes and copies.


def test_bytes_count_tied_tensors_once_and_only_what_is_saved() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False).bfloat16()
    model.norm = nn.BatchNorm1d(4)
    assert parameter_bytes(model) == 160 + 80 + 4 * 16 + 8  # table, head, four vectors, the batch counter
    model.head.weight = model.embed.weight
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert parameter_bytes(model) == 160 + 4 * 16 + 8


@pytest.mark.parametrize("name", ["gpt2", "t5", "resnet", "bart"])
def test_bytes_are_those_of_the_file(name: str, tmp_path: object) -> None:
    from safetensors import safe_open

    model, _ = ZOO[name]()
    model.save_pretrained(tmp_path)
    with safe_open(f"{tmp_path}/model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    assert parameter_bytes(model) == sum(t.numel() * t.element_size() for t in tensors)


def test_saved_tensors_and_keys() -> None:
    base = torch.randn(4, 4)
    assert tensor_key(nn.Parameter(base)) == tensor_key(nn.Parameter(base))
    assert tensor_key(base) != tensor_key(base.t())
    assert tensor_key(base) != tensor_key(base.clone())
    model, _ = ZOO["t5"]()
    assert [name for name, t in saved_tensors(model) if t.shape == (96, 32)] == ["shared.weight"]


@pytest.mark.parametrize("name", ["llama", "t5", "resnet"])
def test_structure_copy(name: str) -> None:
    model, batches = ZOO[name]()
    before = logits(model, batches[0])
    copy = structure_copy(model)
    assert type(copy) is type(model)
    assert copy.config is not model.config
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    theirs = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    assert mine.keys() == theirs.keys()
    assert all(mine[key] is theirs[key] for key in mine)
    assert torch.equal(logits(copy, batches[0]), before)
    ref = treatable(copy)[0]
    owner, _, attribute = ref.path.rpartition(".")
    setattr(copy.get_submodule(owner), attribute, nn.Identity())
    assert torch.equal(logits(model, batches[0]), before)
