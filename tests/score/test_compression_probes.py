from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.layer import read_matrix, write_matrix_
from layerwright.core.layers import treatable
from layerwright.core.treatment import Quantize, Sparsify
from layerwright.score import SCORERS, Subject
from layerwright.score.compression_probes import PROBES, compression_sensitivity
from layerwright.treat.probe import treat_weights
from zoo import ZOO

PAIR = {"prune": (0.0, 0.5), "bits": (4, 16)}


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any]:
    model, batches = ZOO["llama"]()
    return model.eval(), as_calibration([{**b, "labels": b["input_ids"]} for b in batches])


def slow_error(model: Any, data: Any, block: str, treatments: Any) -> float:
    """Outputs of the block with one weight changed in place at a time, by whole forwards of the model."""
    outputs: list[torch.Tensor] = []
    handle = model.get_submodule(block).register_forward_hook(lambda _m, _a, out: outputs.append(out.double()))
    refs = [ref for ref in treatable(model) if ref.path.startswith(block + ".")]
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch["input_ids"])
            intact = outputs.pop()
            for ref in refs:
                kept = read_matrix(model, ref).clone()
                write_matrix_(model, ref, treat_weights([kept], [treatments], None)[0])
                model(input_ids=batch["input_ids"])
                write_matrix_(model, ref, kept)
                total += float((outputs.pop() - intact).square().sum())
                count += intact.numel()
    handle.remove()
    return total / count


def test_errors_equal_whole_forwards_and_nothing_changes(case: tuple[Any, Any]) -> None:
    model, data = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = compression_sensitivity(model, data, treat_weights, probes=PAIR)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tuple(table.prune) == find_blocks(model)[0].names and table.samples == data.samples
    for block in table.prune:
        pruned = slow_error(model, data, block, (Sparsify(0.5, method="magnitude"),))
        rounded = slow_error(model, data, block, (Quantize(4, method="rtn"),))
        assert table.prune[block] == {0.0: 0.0, 0.5: pytest.approx(pruned, rel=1e-4)}
        assert table.bits[block] == {4: pytest.approx(rounded, rel=1e-4), 16: 0.0}
        assert table.prune_sensitivity[block] == pytest.approx(pruned / 2, rel=1e-4)


def test_relative_errors_are_shares_of_the_outputs_energy(case: tuple[Any, Any]) -> None:
    model, data = case
    plain = compression_sensitivity(model, data, treat_weights, probes=PAIR)
    found = compression_sensitivity(model, data, treat_weights, probes=PAIR, relative=True)
    assert found == plain.relative() and found.relative() == found
    for block in found.prune:
        outputs: list[torch.Tensor] = []
        handle = model.get_submodule(block).register_forward_hook(lambda _m, _a, out, to=outputs: to.append(out))
        data.mean_loss(model)
        handle.remove()
        energy = torch.cat([out.flatten() for out in outputs]).double().square().mean()
        assert plain.energy[block] == pytest.approx(float(energy), rel=1e-5)
        assert found.prune[block][0.5] == pytest.approx(plain.prune[block][0.5] / float(energy), rel=1e-4)
        assert found.bits[block][4] == pytest.approx(plain.bits[block][4] / float(energy), rel=1e-4)


def test_a_block_that_gives_zeros_has_no_relative_error() -> None:
    model, batches = ZOO["gpt2"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = compression_sensitivity(model, batches, treat_weights, probes=PAIR, relative=True)
    assert set(found.bits_sensitivity.values()) == {0.0}


def test_errors_grow_with_sparsity_and_fall_with_bits(case: tuple[Any, Any]) -> None:
    model, data = case
    table = compression_sensitivity(model, data, treat_weights, probes={**PROBES, "bits": (2, 4, 8)})
    for row in table.prune.values():
        assert sorted(row.values()) == list(row.values()) and len(row) == 7
    for widths in table.bits.values():
        assert widths[2] > widths[4] > widths[8] > 0


def test_the_scorer_is_found_by_name(case: tuple[Any, Any]) -> None:
    model, data = case
    said: list[tuple[int, int]] = []
    subject = Subject(model, data, treat=treat_weights, progress=lambda *at: said.append(at))
    scores = SCORERS.get("compression_probes")(subject, probes=PAIR, kind="bits")
    assert set(scores.sensitivities) == set(find_blocks(model)[0].names) and said[-1] == (4, 4)
    assert scores.meta["prune"]["model.layers.0"]["0.5"] > 0
    with pytest.raises(InputError, match="kind"):
        SCORERS.get("compression_probes")(subject, kind="rank")
    with pytest.raises(InputError, match="treat="):
        SCORERS.get("compression_probes")(Subject(model, data))


@pytest.mark.parametrize(
    ("probes", "words"),
    [({"prune": [1.0]}, "sparsity 1.0"), ({"bits": [9]}, "9 bits"), ({"rank": [1]}, "rank"), ({}, "got none")],
)
def test_probes_outside_their_ranges_are_refused(case: tuple[Any, Any], probes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        compression_sensitivity(*case, treat_weights, probes=probes)


def test_a_model_without_blocks_is_refused() -> None:
    model = torch.nn.Linear(8, 8)
    with pytest.raises(InputError, match="blocks"):
        compression_sensitivity(model, [torch.zeros(1, 8)], treat_weights)


def test_outputs_that_are_not_finite_name_the_block(case: tuple[Any, Any]) -> None:
    model, batches = ZOO["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(InputError, match=r"model\.layers\.1"):
        compression_sensitivity(model, batches, treat_weights, probes=PAIR)
