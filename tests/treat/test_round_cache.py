"""Keys and values rounded by a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError, PlanError
from layerwright.core.layers import list_layers, parameter_bytes, structure_copy, treatable
from layerwright.core.plan import Plan
from layerwright.core.storage import activation_bytes, stored_bytes
from layerwright.core.target import TARGETS, target
from layerwright.core.treatment import Quantize, RoundActivations, RoundAttention, RoundCache, treatments_from_data
from layerwright.data.loading import load
from layerwright.nn.rounded_cache import KeyValueRounding, round_cache_
from layerwright.recipes.apply import apply_job
from layerwright.treat.apply import apply_plan
from zoo import ZOO


def attention_of(model: torch.nn.Module) -> list[str]:
    return [ref.path for ref in list_layers(model) if ref.kind == "attention"]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", "bloom", "gpt_neox", "falcon", "gemma2", "llama4", "qwen3_moe"]
)
@pytest.mark.parametrize("simulate", [False, True])
@torch.no_grad()
def test_a_plan_rounds_the_caches_it_names(name: str, simulate: bool) -> None:
    model, batches = ZOO[name]()
    ids = batches[0]["input_ids"]
    model.eval()
    plain = model(input_ids=ids).logits
    paths = attention_of(model)
    bits = {path: 3 + place % 2 for place, path in enumerate(paths[1:])}
    treated, report = apply_plan(model, {path: (RoundCache(b),) for path, b in bits.items()}, simulate=simulate)
    by_hand = structure_copy(model)
    names = find_blocks(model)[0].names
    round_cache_(by_hand, {names[0]: 16} | {names[1 + place]: b for place, b in enumerate(bits.values())})
    logits = treated(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, by_hand(input_ids=ids, use_cache=False).logits)
    assert not torch.allclose(logits, plain, atol=1e-4) and torch.equal(model(input_ids=ids).logits, plain)
    assert [(r.layer, r.treatment, r.status) for r in report.records] == [
        (path, f"cache int{b}", "done") for path, b in bits.items()
    ]
    assert parameter_bytes(treated) == parameter_bytes(model)


def test_nothing_is_stored_for_it() -> None:
    assert activation_bytes((RoundCache(4),)) == 0
    assert stored_bytes((Quantize(4, -1), RoundCache(4)), 8, 8) == stored_bytes((Quantize(4, -1),), 8, 8)


def test_it_travels_through_a_plan_file(tmp_path: Path) -> None:
    model, _ = ZOO["llama"]()
    path = attention_of(model)[0]
    plan = Plan({path: (RoundAttention(8), RoundCache(4))})
    again = Plan.load(plan.save(tmp_path / "plan.yaml"))
    assert again == plan and "cache: {bits: 4}" in plan.to_yaml()
    refs = list_layers(model)
    shapes = {ref.path: ref.shape for ref in refs if ref.layout != "none"}
    assert again.check([ref.path for ref in refs], shapes=shapes) == []
    weight = treatable(model)[0].path
    (problem,) = Plan({weight: (RoundCache(4),)}).check([ref.path for ref in refs], shapes=shapes)
    assert "name its attention module" in problem and "\n" not in problem


@torch.no_grad()
def test_ranges_of_activations_follow_rounded_values() -> None:
    model, batches = ZOO["llama"]()
    reader = next(ref.path for ref in treatable(model) if ref.role == "o")
    both = {attention_of(model)[0]: (RoundCache(2),), reader: (RoundActivations(8, observer="minmax"),)}
    rounded, _ = apply_plan(model, both, batches)
    alone, _ = apply_plan(model, {reader: both[reader]}, batches)
    scales = [m.get_submodule(f"{reader}.input_quantizer").quantizer.scale for m in (rounded, alone)]  # type: ignore[union-attr]
    assert not torch.equal(*scales)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    """Applied to files, packed beside quantized weights, and loaded again: the same logits, also token by token."""
    model, tokenizer = load("demo:lm")
    ids = torch.tensor([tokenizer("def join(self, parts): return")["input_ids"]])
    layers = {ref.path: (Quantize(8, method="rtn"),) for ref in treatable(model) if ref.role == "q"}
    layers |= {path: (RoundCache(4),) for path in attention_of(model)}  # type: ignore[misc]
    expected, _ = apply_plan(model, layers)
    Plan(layers).save(tmp_path / "plan.yaml")
    said: list[str] = []
    result = apply_job("demo:lm", tmp_path / "plan.yaml", tmp_path / "out", samples=4, length=32, say=said.append)
    assert not result.streamed and "the cache" in said[0]
    again, _ = load(str(tmp_path / "out"))
    assert {m.bits for m in again.modules() if isinstance(m, KeyValueRounding)} == {4}
    logits = again(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits, expected(input_ids=ids, use_cache=False).logits)
    step = again(input_ids=ids[:, :-1], use_cache=True)
    last = again(input_ids=ids[:, -1:], past_key_values=step.past_key_values).logits
    torch.testing.assert_close(last[:, 0], logits[:, -1], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(logits, model(input_ids=ids).logits, atol=1e-2)


def test_other_targets_refuse_it_in_one_line() -> None:
    assert target("layerwright").refuses((RoundCache(8),)) == ""
    for name in set(TARGETS) - {"layerwright"}:
        assert target(name).refuses((RoundCache(8),)) == f"{name} cannot load cache int8"


def test_what_cannot_be_is_refused() -> None:
    for bits in (1, 9, 16, True, 4.0):
        with pytest.raises(InputError, match="bits"):
            RoundCache(bits)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="bits"):
        treatments_from_data({"cache": {"bits": 1}})
    model, _ = ZOO["llama"]()
    with pytest.raises(InputError, match="is for attention modules, this is a linear"):
        apply_plan(model, {treatable(model)[0].path: (RoundCache(4),)})
    vit, _ = ZOO["vit"]()
    with pytest.raises(InputError, match="ViTAttention keeps no keys"):
        apply_plan(vit, {attention_of(vit)[0]: (RoundCache(4),)})
    t5, _ = ZOO["t5"]()
    with pytest.raises(InputError, match="encoder-decoder"):
        apply_plan(t5, {attention_of(t5)[0]: (RoundCache(4),)})
