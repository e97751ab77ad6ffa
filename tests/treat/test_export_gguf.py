from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export_samples import cast_, linears, rtn, sample, treat
from layerwright.core.errors import CheckpointError
from layerwright.core.layers import list_layers
from layerwright.data.loading import load
from layerwright.nn.quantized import QuantEmbedding, QuantLinear
from layerwright.treat.export import dense_copy, export_model
from layerwright.treat.export._gguf import llama_rows, pack_q4_0, pack_q8_0
from zoo import ZOO, logits

gguf = pytest.importorskip("gguf")

int4, int8 = rtn(4, 32), rtn(8, 32)
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def file_name(name: str) -> str:
    """llama.cpp's name, written down by hand."""
    owner, _, last = name.rpartition(".")
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if owner in outer:
        return f"{outer[owner]}.{last}"
    _, _, block, *part = owner.split(".")
    return f"blk.{block}.{PARTS['.'.join(part)]}.{last}"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    values, kinds = {}, {}
    for tensor in reader.tensors:
        kinds[tensor.name] = tensor.tensor_type.name
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values[tensor.name] = torch.from_numpy(np.array(dense, dtype=np.float32))
    return values, kinds, {name: field.contents() for name, field in reader.fields.items()}


def unrotated(weight: Tensor, heads: int) -> Tensor:
    """transformers' order of the rows, one head and one pair at a time."""
    half = weight.shape[0] // heads // 2
    rows = []
    for head in range(heads):
        start = head * 2 * half
        rows += [weight[start + 2 * i] for i in range(half)]
        rows += [weight[start + 2 * i + 1] for i in range(half)]
    return torch.stack(rows)


def halved_(model: nn.Module) -> None:
    """Scales that float16 holds, so that everything can be compared bit by bit."""
    for module in model.modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            module.weight_scale = module.weight_scale.half().to(module.weight_scale.dtype)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_reads_back_exactly(name: str, tmp_path: Path) -> None:
    model, _ = ZOO[name]()
    kinds: list[Any] = [(int4,), (int8,), (rtn(8),), ()]
    plan = {path: kinds[i % 4] for i, path in enumerate(linears(model)) if kinds[i % 4]}
    small = treat(model, plan)
    halved_(small)
    plain = {n: p.detach() for n, p in dense_copy(small).named_parameters()}
    values, stored, fields = read(export_model(small, tmp_path / "out", "gguf"))
    assert set(values) == {file_name(n) for n in plain}
    for own, parameter in plain.items():
        got = values[file_name(own)]
        config: Any = model.config
        if name in ("llama", "mistral") and ".q_proj." in own:
            got = unrotated(got, config.num_attention_heads)
        if name in ("llama", "mistral") and ".k_proj." in own:
            got = unrotated(got, config.num_key_value_heads)
        assert torch.equal(got, parameter), own
    for path, (treatment,) in plan.items():
        assert stored[file_name(f"{path}.weight")] == {4: "Q4_0", 8: "Q8_0"}[treatment.bits]
    architecture = "llama" if name == "mistral" else name
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.block_count"] == len(list_blocks(model))
    assert fields[f"{architecture}.attention.head_count_kv"] == 2
    assert fields[f"{architecture}.context_length"] == (6 if name in ("mistral", "qwen2") else 64)


def list_blocks(model: nn.Module) -> list[str]:
    return [ref.path for ref in list_layers(model) if ref.kind == "block"]


def test_the_demo_with_its_tokenizer_goes_back_through_transformers(tmp_path: Path) -> None:
    import transformers

    model, processor = load("demo:lm")
    paths = linears(model)
    plan: dict[str, Any] = {path: (int4,) if i % 2 else (int8,) for i, path in enumerate(paths)}
    small = treat(model, plan | {"model.embed_tokens": (int8,)})  # the head uses this table too
    out = export_model(small, tmp_path / "demo.gguf", "gguf", processor=processor)
    assert out == tmp_path / "demo.gguf"
    values, kinds, fields = read(out)
    assert kinds["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kinds
    table = small.get_submodule("model.embed_tokens")
    assert isinstance(table, QuantEmbedding)
    assert torch.equal(values["token_embd.weight"], table.dequantize(torch.float32))
    assert kinds["output_norm.weight"] == "F32"
    vocabulary = processor.get_vocab()
    tokens = fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert len(tokens) == model.config.vocab_size == len(fields["tokenizer.ggml.token_type"])
    assert all(tokens[index] == token for token, index in vocabulary.items())
    assert fields["tokenizer.ggml.eos_token_id"] == processor.eos_token_id
    assert fields["tokenizer.ggml.token_type"][processor.eos_token_id] == 3
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="demo.gguf", dtype=torch.float32)
    batch = {"input_ids": torch.tensor([processor("Layers are decisions.")["input_ids"]])}
    expected = logits(dense_copy(small).float(), batch)
    assert (logits(again, batch) - expected).norm() < 0.02 * expected.norm()  # both dense models are rounded copies


def test_matrices_keep_their_dtype(tmp_path: Path) -> None:
    model, _ = ZOO["llama"]()
    cast_(model, torch.bfloat16)
    values, kinds, _ = read(export_model(model, tmp_path / "out", "gguf"))
    assert kinds["blk.0.ffn_up.weight"] == "BF16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert torch.equal(values["output.weight"], model.get_submodule("lm_head").weight.float())  # type: ignore[operator, union-attr]


def test_scaled_frequencies_of_llama_3(tmp_path: Path) -> None:
    import transformers

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model, _ = ZOO["llama"]()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(model.config.to_dict() | {"rope_parameters": rope, "num_hidden_layers": 1}))
    )
    values, _, _ = read(export_model(model, tmp_path / "out", "gguf"))
    plain = 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(plain / values["rope_freqs.weight"], model.model.rotary_emb.inv_freq)
    assert values["rope_freqs.weight"].max() == 8.0
    model.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(CheckpointError, match="yarn"):
        export_model(model, tmp_path / "other", "gguf")


def test_blocks_hold_the_codes_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(3, 2, generator=generator).half()
    for bits, pack, kind in [(4, pack_q4_0, "Q4_0"), (8, pack_q8_0, "Q8_0")]:
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (3, 64), generator=generator, dtype=torch.int8)
        got = gguf.quants.dequantize(pack(codes, scale).numpy(), gguf.GGMLQuantizationType[kind])
        expected = codes.float() * scale.float().repeat_interleave(32, 1)
        assert torch.equal(torch.from_numpy(got), expected)


def test_the_order_of_rows_is_undone_pair_by_pair() -> None:
    weight = torch.arange(24.0).view(24, 1)
    assert torch.equal(unrotated(weight[llama_rows(24, 3)], 3), weight)


@pytest.mark.parametrize(
    ("treatment", "reason"),
    [
        (rtn(3, 32), "3 bits"),
        (rtn(4, 16), "groups of 16"),
        (rtn(4, 32, symmetric=False), "asymmetric"),
        (rtn(8, act_bits=8), "integer activations"),
    ],
)
def test_other_grids_are_refused_before_writing(treatment: Any, reason: str, tmp_path: Path) -> None:
    model, _ = ZOO["llama"]()
    path = linears(model)[2]
    with pytest.raises(CheckpointError, match=reason) as caught:
        export_model(treat(model, {path: (treatment,)}), tmp_path / "out", "gguf")
    assert path in str(caught.value)
    assert "--dequantize" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_models_and_scales_are_refused(tmp_path: Path) -> None:
    _, small, _, _ = sample("llama", "sparse")
    with pytest.raises(CheckpointError, match="SparseLinear"):
        export_model(small, tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel"):
        export_model(ZOO["gpt2"]()[0], tmp_path / "out", "gguf")
    model, _ = ZOO["llama"]()
    path = linears(model)[0]
    tiny = treat(model, {path: (int4,)})
    layer = tiny.get_submodule(path)
    assert isinstance(layer, QuantLinear)
    layer.weight_scale = layer.weight_scale * 1e-7
    with pytest.raises(CheckpointError, match="float16"):
        export_model(tiny, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []
    written = export_model(small, tmp_path / "plain", "gguf", dequantize=True)
    assert written == tmp_path / "plain" / "model.gguf"
    with pytest.raises(CheckpointError, match="--force"):
        export_model(small, tmp_path / "plain", "gguf", dequantize=True)
    export_model(model, tmp_path / "plain", "gguf", force=True)


def test_a_tokenizer_it_cannot_name_is_left_out_with_a_warning(tmp_path: Path) -> None:
    class Words:
        pass

    model, _ = ZOO["llama"]()
    with pytest.warns(UserWarning, match="without a vocabulary"):
        out = export_model(model, tmp_path / "out", "gguf", processor=Words())
    assert read(out)[2]["tokenizer.ggml.model"] == "no_vocab"
