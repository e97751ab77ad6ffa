from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize, Sparsify
from layerwright.nn.lora import LoraLinear
from layerwright.treat.apply import apply_plan
from layerwright.treat.exits import add_exits
from layerwright.tune import TUNERS
from layerwright.tune.saved_bytes import SavedBytes
from layerwright.tune.window import WindowTuner, exit_order, window
from zoo import ZOO


@pytest.fixture
def case() -> tuple[nn.Module, list[dict[str, Any]]]:
    model, batches = ZOO["llama"]()
    return model.eval(), [{"input_ids": b["input_ids"], "labels": b["input_ids"]} for b in batches]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("schedule", ["phases", "cyclic", "random"])
@pytest.mark.parametrize("lora", [{"rank": 2, "alpha": 4.0}, None])
def test_the_loss_of_every_exit_falls(case: Any, schedule: Any, lora: Any) -> None:
    model, batches = case
    exits = add_exits(model, 2)
    before = weights(exits)
    report = WindowTuner(exits, schedule=schedule, lora=lora, learning_rate=1e-2, seed=3).fit(batches, 40)
    assert len(report.losses) == len(report.exits) == len(report.saved_bytes) == 40
    for place in exits.positions:
        losses = report.losses_of(place)
        assert sum(losses[-4:]) < sum(losses[:4])
    assert all(torch.equal(p, before[name]) for name, p in exits.named_parameters())
    assert all(not p.requires_grad and p.grad is None for p in report.model.parameters())


def test_gradients_are_none_outside_window_and_head(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = case
    tuner = WindowTuner(add_exits(model, 2), lora=None, schedule="cyclic")
    seen: dict[int, set[str]] = {}
    from layerwright.tune._window_steps import WindowOptimizers

    real = WindowOptimizers.step_
    copies: list[Any] = []
    made = tuner.trainable
    monkeypatch.setattr(tuner, "trainable", lambda: copies.append(made()) or copies[0])

    def step(self: Any, place: int, clip: float) -> None:
        seen[place] = {name for name, p in copies[0].named_parameters() if p.grad is not None}
        real(self, place, clip)

    monkeypatch.setattr(WindowOptimizers, "step_", step)
    tuner.fit(batches, 4)
    names = {name for name, _ in copies[0].named_parameters()}
    for place, low in ((2, 0), (4, 2)):
        blocks = tuple(f"model.model.layers.{i}." for i in range(low, place))
        expected = {name for name in names if name.startswith(blocks) or name == f"heads.{place}.weight"}
        assert seen[place] == expected


def test_a_step_changes_its_window_alone(case: Any) -> None:
    model, batches = case
    exits = add_exits(model, 2)
    report = WindowTuner(exits, lora=None, schedule="cyclic", learning_rate=1e-2).fit(batches, 1)
    before = weights(exits)
    changed = {name for name, p in report.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(
        name.startswith(("model.model.layers.0.", "model.model.layers.1.", "heads.2.")) for name in changed
    )


def test_the_loss_does_not_depend_on_blocks_above_the_exit(case: Any) -> None:
    model, batches = case
    other, _ = ZOO["llama"]()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.model.layers[2:].parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(5))
    found = [WindowTuner(add_exits(m, 2), seed=1).fit(batches, 6).losses_of(2) for m in (model, other)]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zero_after_twenty_steps(case: Any, dtype: torch.dtype) -> None:
    model, batches = case
    pruned, _ = apply_plan(
        model,
        {f"model.layers.{i}.mlp.up_proj": (Sparsify(0.5),) for i in range(4)},
        as_calibration(batches),
        simulate=True,
    )
    pruned = pruned.to(dtype)
    exits = add_exits(pruned, 2)
    zeros = {name: p == 0 for name, p in exits.named_parameters() if "up_proj" in name}
    assert all(int(z.sum()) == z.numel() // 2 for z in zeros.values())
    report = WindowTuner(exits, lora=None, schedule="cyclic", learning_rate=1e-2, weight_decay=0.1).fit(batches, 20)
    tuned = dict(report.model.named_parameters())
    before = dict(exits.named_parameters())
    for name, z in zeros.items():
        assert torch.equal(tuned[name] == 0, z) and not torch.equal(tuned[name], before[name])


def test_a_window_keeps_less_than_all_blocks_and_states_of_one_window(case: Any) -> None:
    model, batches = case
    few = WindowTuner(add_exits(model, 1), lora=None).fit(batches, 4)
    all_of_them = WindowTuner(add_exits(model, positions=[4]), lora=None).fit(batches, 1)
    assert few.peak_saved_bytes < 0.5 * all_of_them.peak_saved_bytes
    assert max(few.state_bytes) < 0.5 * max(all_of_them.state_bytes)
    kept = WindowTuner(add_exits(model, 1), lora=None, schedule="cyclic").fit(batches, 4)
    # On the CPU there is nowhere to move states to; they are made as windows come.
    assert list(kept.state_bytes) == sorted(kept.state_bytes) and kept.state_bytes[0] < kept.state_bytes[-1]


def test_saved_bytes_counts_each_storage_once_and_no_weights() -> None:
    layer = nn.Linear(4, 8)
    x = torch.randn(3, 4)
    with SavedBytes(layer) as kept:
        y = layer(x).relu()
    assert kept.bytes == (3 * 4 + 3 * 8) * 4
    y.sum().backward()
    assert layer.weight.grad is not None


def test_overlapping_windows_share_their_weights(case: Any) -> None:
    model, batches = case
    exits = add_exits(model.to(torch.bfloat16), positions=[2, 3, 4])
    tuner = WindowTuner(exits, window=2, lora=None, schedule="cyclic", learning_rate=1e-2)
    assert tuner.windows == {2: 2, 3: 2, 4: 2}
    report = tuner.fit(batches, 24)
    assert report.losses_of(4)[-1] < report.losses_of(4)[0]


def test_exit_orders() -> None:
    assert exit_order((2, 4, 6), 8, "phases") == (2, 2, 4, 4, 6, 6, 6, 6)
    assert exit_order((2, 4), 5, "cyclic") == (2, 4, 2, 4, 2)
    drawn = exit_order((2, 4, 6), 60, "random", seed=1)
    assert set(drawn) == {2, 4, 6} and drawn == exit_order((2, 4, 6), 60, "random", seed=1)
    assert drawn != exit_order((2, 4, 6), 60, "random", seed=2)
    with pytest.raises(InputError, match="at least 3"):
        exit_order((2, 4, 6), 2, "phases")


def test_same_seed_same_weights(case: Any) -> None:
    model, batches = case
    found = [WindowTuner(add_exits(model, 2), schedule="random", seed=s).fit(batches, 6).model for s in (1, 1, 2)]
    one, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in found)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_stride_and_windows(case: Any) -> None:
    model, _ = case
    exits = add_exits(model, 1)
    assert WindowTuner(exits, 2).windows == {2: 2, 4: 2}
    with pytest.warns(UserWarning, match="does not divide"):
        assert WindowTuner(exits, 3).windows == {3: 3, 4: 1}


def test_bad_settings_are_refused(case: Any) -> None:
    model, batches = case
    exits = add_exits(model, 2)
    for settings, words in (
        ({"window": 3}, "window"),
        ({"window": 0}, "window"),
        ({"stride": 1}, "exits after"),
        ({"schedule": "spiral"}, "schedule"),
        ({"heads": "some"}, "heads"),
        ({"lora": {"width": 1}}, "width"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ):
        with pytest.raises(InputError, match=words):
            WindowTuner(exits, **settings)
    with pytest.raises(InputError, match="add_exits"):
        WindowTuner(model)  # type: ignore[arg-type]
    tuner = WindowTuner(exits)
    for wrong in ([], [torch.zeros(1, 4)]):
        with pytest.raises(InputError, match="batches"):
            tuner.fit(wrong, 4)
    with pytest.raises(InputError, match="steps"):
        tuner.fit(batches, 1)
    with pytest.raises(InputError, match="not finite"):
        tuner.fit(batches, 4, loss_fn=lambda logits, _: logits.sum() * float("nan"))


def test_gradient_checkpointing_warns_and_works(case: Any) -> None:
    model, batches = case
    plain = WindowTuner(add_exits(model, 2)).fit(batches, 2).losses
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing"):
        tuner = WindowTuner(add_exits(model, 2))
    assert tuner.fit(batches, 2).losses == plain


@pytest.mark.parametrize("packed", [False, True])
def test_the_tuner_returns_a_model_without_exits(case: Any, packed: bool) -> None:
    model, batches = case
    data = as_calibration(batches)
    if packed:
        plan = {f"model.layers.{i}.mlp.up_proj": (Quantize(4, method="rtn"),) for i in range(4)}
        model, _ = apply_plan(model, plan, data)
    before = data.mean_loss(model)
    said: list[tuple[str, int, int]] = []
    tuned = TUNERS.get("window")(
        model, data, seed=0, steps=60, rank=4, learning_rate=2e-2, progress=lambda *line: said.append(line)
    )
    assert type(tuned) is type(model) and said[-1] == ("window tuning", 60, 60)
    assert data.mean_loss(tuned) < before
    adapters = [m for m in tuned.modules() if isinstance(m, LoraLinear)]
    assert bool(adapters) == packed
    assert torch.equal(tuned.lm_head.weight, model.lm_head.weight)


def test_a_depth_that_no_quarter_divides_says_nothing() -> None:
    model, batches = ZOO["opt"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window(model, [{"input_ids": b["input_ids"]} for b in batches], steps=3, every=2)
