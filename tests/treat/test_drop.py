"""A dropped block is gone from the model, its configuration and its cache, and from nothing else."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.layers import list_layers, parameter_bytes
from layerwright.treat.arrange import BlockMap
from layerwright.treat.drop import drop_blocks, skip_blocks
from zoo import EXPECTED, ZOO, causal, logits, on_meta

REFUSED = {"encoder.block.0", "decoder.block.0", "resnet.encoder.stages.1.layers.0"}
REFUSED |= {"albert.encoder.albert_layer_groups.0.albert_layers.0"}
NOT_IN_CONFIG = {"swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.0"}
WITHOUT_EFFECT = {"swin.encoder.layers.1.blocks.0"}  # one window covers the image: nothing to shift
EVERY_BLOCK = [
    (name, f"{path}.{index}")
    for name, stacks in EXPECTED.items()
    for path, count in stacks.items()
    for index in range(count)
    if f"{path}.{index}" not in REFUSED
]


def drop(model: nn.Module, *paths: str, **settings: Any) -> tuple[nn.Module, BlockMap]:
    """`drop_blocks` with its warning about reloading allowed, but nothing else."""
    with warnings.catch_warnings():
        if NOT_IN_CONFIG.intersection(paths):
            warnings.simplefilter("ignore")
        return drop_blocks(model, paths, **settings)


@pytest.mark.parametrize(("name", "path"), EVERY_BLOCK)
def test_every_block_of_every_architecture(name: str, path: str, tmp_path: object) -> None:
    model, batches = ZOO[name]()
    before, fingerprint, depth = logits(model, batches[0]), fingerprint_model(model), config_of(model)
    smaller, block_map = drop(model, path)
    # The same function as with the block skipped.
    with skip_blocks(model, [path]):
        skipped = logits(model, batches[0])
    after = logits(smaller, batches[0])
    assert (after - skipped).abs().max() <= 1e-6
    assert (after - before).abs().max() > 1e-3
    # Exactly the block's parameters are gone, and nothing was copied.
    gone = sum(p.numel() for p in model.get_submodule(path).parameters())
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters()) == gone
    assert {p.data_ptr() for p in smaller.parameters()} <= {p.data_ptr() for p in model.parameters()}
    # The original is untouched.
    assert torch.equal(logits(model, batches[0]), before)
    assert (fingerprint_model(model), config_of(model)) == (fingerprint, depth)
    # Its configuration builds it again.
    smaller.save_pretrained(tmp_path)
    reloaded = type(smaller).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, batches[0]), after) == (path not in NOT_IN_CONFIG - WITHOUT_EFFECT)
    assert bool(block_map.notes) == (path in NOT_IN_CONFIG)


def config_of(model: nn.Module) -> dict[str, Any]:
    return model.config.to_dict()


@pytest.mark.parametrize(("name", "path"), EVERY_BLOCK)
def test_the_map_follows_every_parameter(name: str, path: str) -> None:
    model, _ = ZOO[name]()
    smaller, block_map = drop(model, path)
    new = dict(smaller.named_parameters())
    for parameter, value in model.named_parameters():
        moved = block_map.new_path(parameter)
        if moved is None:
            assert parameter.startswith(path + ".")
        else:
            assert new.pop(moved) is value
    assert not new
    assert block_map.dropped == (path,)


GENERATING = [*causal(), "bart", "t5", "whisper"]


@pytest.mark.parametrize("name", GENERATING)
def test_generation_with_and_without_cache_agree(name: str) -> None:
    model, batches = ZOO[name]()
    for stack in find_blocks(model):
        for path in (stack.names[0], stack.names[-1], stack.names[len(stack) // 2]):
            if path in REFUSED:
                continue
            smaller, _ = drop_blocks(model, [path])
            main = smaller.main_input_name
            inputs = {key: batches[0][key] for key in (main, "attention_mask") if key in batches[0]}
            limits = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
            cached = smaller.generate(**inputs, **limits, use_cache=True)
            plain = smaller.generate(**inputs, **limits, use_cache=False)
            assert torch.equal(cached, plain), path


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_beams_after_dropping_from_both_stacks(beams: int) -> None:
    model, batches = ZOO["bart"]()
    smaller, _ = drop_blocks(model, ["model.encoder.layers.0", "model.decoder.layers.1"])
    settings_ = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": beams, "do_sample": False}
    outputs = [smaller.generate(batches[0]["input_ids"], **settings_, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*outputs)


@given(st.sampled_from(["qwen2", "gpt2", "llama4"]), st.sets(st.integers(0, 3), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_any_blocks_dropped_are_as_skipped(name: str, indices: set[int]) -> None:
    model, batches = MODELS[name]
    stack = find_blocks(model)[0]
    paths = [stack.names[i] for i in indices]
    smaller, block_map = drop_blocks(model, paths)
    with skip_blocks(model, paths):
        expected = logits(model, batches[1])
    assert torch.allclose(logits(smaller, batches[1]), expected, atol=1e-6)
    assert len(find_blocks(smaller)[0]) == 4 - len(indices)
    assert [block_map.new_path(path) for path in stack.names if path not in paths] == list(
        find_blocks(smaller)[0].names
    )
    assert [m.layer_idx for n, m in smaller.named_modules() if n.endswith(("self_attn", ".attn"))] == [
        *range(4 - len(indices))
    ]


MODELS = {name: ZOO[name]() for name in ("qwen2", "gpt2", "llama4")}


def test_dropping_twice_is_dropping_both() -> None:
    model, batches = ZOO["qwen2"]()
    once, first = drop_blocks(model, ["model.layers.1"])
    moved = first.new_path("model.layers.3")
    assert moved == "model.layers.2"
    twice, _ = drop_blocks(once, [moved])
    both, _ = drop_blocks(model, ["model.layers.1", "model.layers.3"])
    assert torch.equal(logits(twice, batches[0]), logits(both, batches[0]))
    assert config_of(twice) == config_of(both)


def test_configurations() -> None:
    def config(name: str, *paths: str) -> Any:
        return drop_blocks(ZOO[name]()[0], paths)[0].config

    qwen2 = config("qwen2", "model.layers.1", "model.layers.3")
    assert (qwen2.num_hidden_layers, qwen2.layer_types) == (2, ["full_attention", "sliding_attention"])
    assert config("gpt2", "transformer.h.2").n_layer == 3
    bart = config("bart", "model.decoder.layers.0")
    assert (bart.encoder_layers, bart.decoder_layers, bart.num_hidden_layers) == (2, 2, 2)
    t5 = config("t5", "decoder.block.1")
    assert (t5.num_layers, t5.num_decoder_layers) == (3, 1)
    clip = config("clip", "text_model.encoder.layers.0")
    assert (clip.text_config.num_hidden_layers, clip.vision_config.num_hidden_layers) == (2, 2)
    assert config("resnet", "resnet.encoder.stages.1.layers.2").depths == [2, 2]
    llama4 = config("llama4", "model.layers.0", "model.layers.1")
    assert (llama4.moe_layers, llama4.no_rope_layers) == ([1], [1, 0])
    assert llama4.layer_types == ["chunked_attention", "full_attention"]
    assert config("qwen3_moe", "model.layers.0").mlp_only_layers == [0]
    assert config("qwen3_moe", "model.layers.1").mlp_only_layers == []


def test_t5_stacks_hold_their_own_configurations() -> None:
    smaller, _ = drop_blocks(ZOO["t5"]()[0], ["encoder.block.1"])
    assert (smaller.encoder.config.num_layers, smaller.decoder.config.num_layers) == (2, 2)
    assert (smaller.config.num_layers, smaller.config.num_decoder_layers) == (2, 2)


def test_encoder_less_deep_than_the_decoder_still_generates(tmp_path: object) -> None:
    model, batches = ZOO["t5"]()
    smaller, _ = drop_blocks(model, ["encoder.block.1", "encoder.block.2"])
    assert (smaller.config.num_layers, smaller.config.num_decoder_layers) == (1, 2)
    smaller.save_pretrained(tmp_path)
    reloaded = type(smaller).from_pretrained(tmp_path).eval()
    limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = smaller.generate(batches[0]["input_ids"], **limits, use_cache=False)
    for other in (smaller, reloaded):
        assert torch.equal(other.generate(batches[0]["input_ids"], **limits, use_cache=True), plain)


def test_hidden_states_have_the_new_length() -> None:
    model, batches = ZOO["llama"]()
    assert len(model(**batches[0], output_hidden_states=True).hidden_states) == 5
    smaller, _ = drop_blocks(model, ["model.layers.2"])
    states = smaller(**batches[0], output_hidden_states=True).hidden_states
    assert len(states) == 4
    with skip_blocks(model, ["model.layers.2"]):
        skipped = model(**batches[0], output_hidden_states=True).hidden_states
    assert torch.equal(skipped[2], skipped[3])
    assert torch.allclose(skipped[4], states[3], atol=1e-6)


def test_in_place() -> None:
    model, batches = ZOO["bart"]()
    expected = logits(drop_blocks(model, ["model.decoder.layers.1"])[0], batches[0])
    same, block_map = drop_blocks(model, ["model.decoder.layers.1"], copy=False)
    assert same is model
    assert torch.equal(logits(model, batches[0]), expected)
    assert model.config.decoder_layers == 2
    assert block_map.new_path("model.decoder.layers.2.fc1.weight") == "model.decoder.layers.1.fc1.weight"


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "t5", "convnext"])
def test_meta_device(name: str) -> None:
    model, _ = ZOO[name]()
    path = find_blocks(model)[-1].names[-1]
    empty, block_map = drop_blocks(on_meta(name), [path])
    smaller, expected = drop_blocks(model, [path])
    assert block_map == expected
    assert list_layers(empty) == list_layers(smaller)
    assert parameter_bytes(empty) == parameter_bytes(smaller)


def test_nothing_to_drop() -> None:
    model, batches = ZOO["vit"]()
    same, block_map = drop_blocks(model, [])
    assert same is not model
    assert torch.equal(logits(same, batches[0]), logits(model, batches[0]))
    assert block_map.new_path("vit.layers.1") == "vit.layers.1"
    assert drop_blocks(model, [], copy=False)[0] is model


# What is refused, and why; nothing changes then.


@pytest.mark.parametrize(
    ("name", "paths", "message"),
    [
        ("albert", ["albert.encoder.albert_layer_groups.0.albert_layers.0"], "all 1 blocks"),
        ("llama", [f"model.layers.{i}" for i in range(4)], "leave one at least"),
        ("llama", ["model.layers.9"], "did you mean model.layers.0|unknown block"),
        ("llama", ["model.layers.0.mlp"], "unknown block"),
        ("t5", ["encoder.block.0"], "relative_attention_bias"),
        ("t5", ["decoder.block.0"], "relative_attention_bias"),
        ("resnet", ["resnet.encoder.stages.1.layers.0"], "changes the resolution"),
        ("t5", ["encoder.block.0", "decoder.block.0"], "encoder.block.0 .*decoder.block.0"),
    ],
)
@pytest.mark.parametrize("copy", [True, False])
def test_refused(name: str, paths: list[str], message: str, copy: bool) -> None:
    model, batches = ZOO[name]()
    before, config = logits(model, batches[0]), config_of(model)
    with pytest.raises(InputError, match=message):
        drop_blocks(model, paths, copy=copy)
    assert torch.equal(logits(model, batches[0]), before)
    assert config_of(model) == config


def test_text_instead_of_a_list() -> None:
    with pytest.raises(InputError, match=r"\['model.layers.0'\]"):
        drop_blocks(ZOO["llama"]()[0], "model.layers.0")


SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 64,
}


def test_key_value_sharing() -> None:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    model = Gemma4ForCausalLM(Gemma4TextConfig(**SHARED, global_head_dim=8, hidden_size_per_layer_input=0))
    assert model.config.kv_sharing_modes == [None, None, "store", "store", "reuse", "reuse"]
    for producer in ("model.layers.2", "model.layers.3"):
        with pytest.raises(InputError, match="stores the keys and values"):
            drop_blocks(model, [producer])
    consumer, _ = drop_blocks(model, ["model.layers.4"])
    assert (consumer.config.num_kv_shared_layers, consumer.model.first_kv_shared_layer_idx) == (1, 4)
    plain, _ = drop_blocks(model, ["model.layers.0"])
    assert (plain.config.num_kv_shared_layers, plain.model.first_kv_shared_layer_idx) == (2, 3)
    with pytest.warns(UserWarning, match="model.layers.0.self_attn.store_full_length_kv: False -> True"):
        both, _ = drop_blocks(model, ["model.layers.2", "model.layers.4"])  # a producer and all its consumers
    assert both.config.kv_sharing_modes == ["store", None, "store", "reuse"]


def test_weights_that_depend_on_the_depth() -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    extra = {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6}
    model = Gemma3nForCausalLM(Gemma3nTextConfig(**SHARED, **extra))
    with pytest.raises(InputError, match=r"outside its blocks.*embed_tokens_per_layer"):
        drop_blocks(model, ["model.layers.0"])


def test_scale_by_layer_index_is_told() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()
    with pytest.warns(UserWarning, match="change its blocks in the same way"):
        smaller, block_map = drop_blocks(model, ["transformer.h.1"])
    assert any("transformer.h.1.attn.scal" in note for note in block_map.notes)
    tokens = torch.arange(8)[None]
    with skip_blocks(model, ["transformer.h.1"]), torch.no_grad():
        expected = model(tokens).logits
    assert torch.allclose(smaller(tokens).logits, expected, atol=1e-6)  # the trained scale stays


def test_first_dense_layers() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4}
    sizes |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 2}
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**sizes))
    assert drop_blocks(model, ["model.layers.0"])[0].config.first_k_dense_replace == 1
    assert drop_blocks(model, ["model.layers.3"])[0].config.first_k_dense_replace == 2


# Models of one's own.


@dataclass
class Settings:
    n_layer: int
    width: int = 16


class OwnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class OwnModel(nn.Module):
    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.config, self.n_layer = config, config.n_layer
        self.trunk = nn.ModuleDict({"h": nn.ModuleList(OwnBlock(config.width) for _ in range(config.n_layer))})
        self.head = nn.Linear(config.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.n_layer):
            x = self.trunk["h"][i](x)
        return self.head(x)


def test_own_model() -> None:
    model, x = OwnModel(Settings(4)), torch.randn(2, 16)
    smaller, _ = drop_blocks(model, ["trunk.h.0", "trunk.h.2"])
    assert (smaller.n_layer, smaller.config.n_layer, model.config.n_layer) == (2, 2, 4)
    with skip_blocks(model, ["trunk.h.0", "trunk.h.2"]):
        expected = model(x)
    assert torch.equal(smaller(x), expected)


def test_torch_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    smaller, _ = drop_blocks(model, ["layers.1"])
    with skip_blocks(model, ["layers.1"]):
        expected = model(x)
    assert torch.allclose(smaller(x), expected, atol=1e-6)
    assert (smaller.num_layers, len(smaller.layers)) == (3, 3)


def test_plain_sequential() -> None:
    widths = [8, 16, 16, 16, 4]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model, x = nn.Sequential(*layers), torch.randn(3, 8)
    smaller, block_map = drop_blocks(model, ["2"])
    assert block_map.new_path("6") == "5"
    assert block_map.new_path("2.weight") is None
    with skip_blocks(model, ["2"]):
        assert torch.equal(smaller(x), model(x))
    with pytest.raises(InputError, match="width of its input from 8 to 16"):
        drop_blocks(model, ["0"])


def test_own_convolutions() -> None:
    def unit(before: int, after: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU())

    model = nn.Sequential(unit(3, 8), unit(8, 8), unit(8, 8, 2), unit(8, 16)).eval()
    x = torch.randn(2, 3, 8, 8)
    smaller, _ = drop_blocks(model, ["1"])
    with skip_blocks(model, ["1"]):
        assert torch.equal(smaller(x), model(x))
    for path, message in (("0", "width"), ("2", "resolution"), ("3", "width")):
        with pytest.raises(InputError, match=message):
            drop_blocks(model, [path])


def test_one_block_in_two_places() -> None:
    block = OwnBlock(8)
    with pytest.raises(InputError, match="in several places"):
        drop_blocks(nn.Sequential(block, OwnBlock(8), block), ["0"])


def test_blocks_that_stand_in_no_list() -> None:
    model = nn.Module()
    model.first, model.second = OwnBlock(8), OwnBlock(8)
    with pytest.raises(InputError, match="do not stand in one list"):
        drop_blocks(model, ["first"], blocks=["first", "second"])


# Skipping.


def test_hooks_are_gone_even_after_an_error() -> None:
    model, batches = ZOO["llama"]()
    before = logits(model, batches[0])
    with skip_blocks(model, ["model.layers.1"]) as same:
        assert same is model
        assert not torch.equal(logits(model, batches[0]), before)
    assert torch.equal(logits(model, batches[0]), before)
    with pytest.raises(IndexError), skip_blocks(model, ["model.layers.1"]):
        model(torch.full((1, 2), 10**6))
    assert torch.equal(logits(model, batches[0]), before)
    assert not any(m._forward_hooks for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer")


def test_skipping_t5s_first_block_keeps_the_position_bias() -> None:
    """Unlike dropping: the block still computes the table's bias for the others."""
    model, batches = ZOO["t5"]()
    with skip_blocks(model, ["encoder.block.0"]):
        skipped = logits(model, batches[0])
    with torch.no_grad():
        for name, parameter in model.encoder.block[0].named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                parameter.zero_()  # oracle: a block that adds nothing
    assert torch.allclose(logits(model, batches[0]), skipped, atol=1e-6)


def test_skipping_with_a_cache_generates_what_the_smaller_model_does() -> None:
    model, batches = ZOO["gpt2"]()
    inputs = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    settings_ = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = drop_blocks(model, ["transformer.h.0"])[0].generate(**inputs, **settings_)
    with skip_blocks(model, ["transformer.h.0"]):
        assert torch.equal(model.generate(**inputs, **settings_), expected)


def test_skipping_what_cannot_be_skipped() -> None:
    model, batches = ZOO["resnet"]()
    with (
        skip_blocks(model, ["resnet.encoder.stages.1.layers.0"]),
        pytest.raises(InputError, match="changes the shape"),
    ):
        logits(model, batches[0])
    with pytest.raises(InputError, match="unknown block"), skip_blocks(model, ["resnet.embedder"]):
        pass


def test_gradients_do_not_reach_a_skipped_block() -> None:
    model, batches = ZOO["vit"]()
    with skip_blocks(model, ["vit.layers.1"]):
        model(**batches[0]).loss.backward()
    assert all(p.grad is None for p in model.vit.layers[1].parameters())
    assert all(p.grad is not None for p in model.vit.layers[0].parameters())


def test_map_of_nothing() -> None:
    block_map = BlockMap({"a.1": "a.0"}, ("a.0",))
    assert block_map.new_path("a.0.weight") is None
    assert block_map.new_path("a.1.x.weight") == "a.0.x.weight"
    assert block_map.new_path("a.10") == "a.10"
    assert block_map.new_path("a") == "a"
    assert Blocks("a", ("a.0",)).names == ("a.0",)
