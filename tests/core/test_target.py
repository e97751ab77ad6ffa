from __future__ import annotations

import pytest

from layerwright.core.errors import InputError
from layerwright.core.target import TARGETS, Target, target
from layerwright.core.treatment import Drop, LowRank, Quantize, RoundActivations, Sparsify

INT4, INT8 = Quantize(4, 32), Quantize(8, 32)
ACT8 = Quantize(8, act_bits=8)
TOKEN = RoundActivations(8, share="token", symmetric=True)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_takes_what_is_left_alone_and_a_dropped_block(name):
    assert target(name).refuses(()) == ""
    assert target(name).refuses((Drop(),)) == ""


@pytest.mark.parametrize(
    ("name", "treatments", "words"),
    [
        ("layerwright", (Quantize(3, 7, False),), ""),
        ("layerwright", (Sparsify(0.3), Quantize(2)), ""),
        ("layerwright", (LowRank(4), INT4), ""),
        ("hf", (Quantize(3, 32),), ""),
        ("hf", (ACT8,), ""),
        ("hf", (Quantize(4, 32, False),), "hf cannot load zero points"),
        ("hf", (Sparsify(),), "hf cannot load sparse 50%"),
        ("hf", (LowRank(4),), "hf cannot load rank 4"),
        ("hf", (INT4, TOKEN), ""),
        ("hf", (INT4, RoundActivations(5)), ""),
        ("hf", (TOKEN,), "hf cannot load a8 without an integer weight"),
        ("hf", (ACT8, TOKEN), "hf cannot load a8 without an integer weight"),
        ("hf", (INT4, RoundActivations(8, share="token")), "per token: use"),
        ("hf", (INT4, RoundActivations(8, share="channel")), "hf cannot load a8 per channel: use"),
        ("hf", (INT4, RoundActivations(8, grid="two_region")), "hf cannot load a8 two-region"),
        ("vllm", (INT4, TOKEN), "vllm cannot load a8"),
        ("gguf", (INT4, TOKEN), "gguf cannot load a8"),
        ("onnx", (INT4, RoundActivations(8, grid="two_region")), ""),
        ("vllm", (INT4,), ""),
        ("vllm", (Quantize(4, 128, False),), ""),
        ("vllm", (ACT8,), ""),
        ("vllm", (Quantize(3, 32),), r"vllm cannot load 3-bit weights (it loads [4, 8])"),
        ("vllm", (Quantize(4, 16),), r"vllm cannot load group_size 16 (it loads [-1, 32, 64, 128])"),
        ("vllm", (Sparsify(pattern="2:4"),), "vllm cannot load 2:4"),
        ("gguf", (INT4,), ""),
        ("gguf", (INT8,), ""),
        ("gguf", (Quantize(6, 32),), "gguf cannot load 6-bit"),
        ("gguf", (Quantize(4),), "gguf cannot load group_size -1"),
        ("gguf", (Quantize(4, 32, False),), "gguf cannot load zero points"),
        ("onnx", (Quantize(8, 64, False),), ""),
        ("onnx", (LowRank(4),), ""),
        ("onnx", (Quantize(5, 64),), "onnx cannot load 5-bit"),
        ("onnx", (LowRank(4), INT8), "onnx cannot load two treatments on one layer"),
        ("onnx", (Sparsify(), INT8), "onnx cannot load sparse 50%"),
    ],
)
def test_refusals(name, treatments, words):
    refusal = target(name).refuses(treatments)
    assert words in refusal
    assert bool(refusal) == bool(words)
    assert "\n" not in refusal


def test_a_target_of_ones_own():
    mine = Target("mine", bits=frozenset({8}), group_sizes=frozenset({-1}), joint=False)
    assert target(mine) is mine
    assert mine.refuses((Quantize(8),)) == ""
    assert "mine cannot load 4-bit" in mine.refuses((Quantize(4),))
    assert "two treatments" in mine.refuses((Sparsify(), Quantize(8)))


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(InputError, match="unknown target 'ggfu'; did you mean gguf"):
        target("ggfu")


def test_fused_roles_are_the_usual_ones():
    assert set(target("vllm").fused) == {frozenset({"q", "k", "v"}), frozenset({"gate", "up"})}
    assert target("hf").fused == ()
