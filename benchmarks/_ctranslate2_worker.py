"""Runs in another Python that has numpy and ctranslate2: builds a Llama from a folder and times it on request.

    PYTHON benchmarks/_ctranslate2_worker.py FOLDER COMPUTE_TYPE THREADS

Reads lines of JSON, ``{"prompts": [[...]], "new": 32}``, and answers ``{"seconds": ..., "tokens": [[...]]}``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2  # type: ignore[import-not-found]
import numpy


def specification(weights: Any, config: dict[str, Any]) -> Any:
    """The weights in CTranslate2's form."""
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    spec = TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=config["rope_theta"],
        num_heads_kv=None if kv_heads == heads else kv_heads,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["model.embed_tokens.weight"]
    decoder.layer_norm.gamma = weights["model.norm.weight"]
    decoder.projection.weight = weights["lm_head.weight"]
    for number, layer in enumerate(decoder.layer):
        start = f"model.layers.{number}."
        layer.self_attention.layer_norm.gamma = weights[start + "input_layernorm.weight"]
        layer.ffn.layer_norm.gamma = weights[start + "post_attention_layernorm.weight"]
        parts = [weights[f"{start}self_attn.{name}_proj.weight"] for name in "qkv"]
        layer.self_attention.linear[0].weight = numpy.concatenate(parts)
        layer.self_attention.linear[1].weight = weights[start + "self_attn.o_proj.weight"]
        layer.ffn.linear_0.weight = weights[start + "mlp.gate_proj.weight"]
        layer.ffn.linear_0_noact.weight = weights[start + "mlp.up_proj.weight"]
        layer.ffn.linear_1.weight = weights[start + "mlp.down_proj.weight"]
    spec.register_vocabulary([str(token) for token in range(config["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config["rms_norm_eps"]
    return spec


def main() -> None:
    """Build, then answer."""
    folder, kind, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    config = json.loads((folder / "config.json").read_text())
    converted = folder / f"converted-{kind}"
    spec = specification(dict(numpy.load(folder / "weights.npz")), config)
    spec.validate()
    spec.optimize(quantization=kind)
    converted.mkdir(exist_ok=True)
    spec.save(str(converted))
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type=kind, intra_threads=threads)
    print(json.dumps({"ready": ctranslate2.__version__}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        prompts = [[str(token) for token in prompt] for prompt in wanted["prompts"]]
        begun = time.perf_counter()
        results = generator.generate_batch(
            prompts,
            max_length=wanted["new"],
            min_length=wanted["new"],
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "tokens": [r.sequences_ids[0] for r in results]}), flush=True)


if __name__ == "__main__":
    main()
