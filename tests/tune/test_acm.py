"""Labels, the three losses, the phases, and the tuner of adaptive computation modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import layerwright as lw
from layerwright.data.demo_data import demo_data
from layerwright.nn._adaptive_gate import AdaptiveCall
from layerwright.nn.adaptive import AdaptiveComputationModule
from layerwright.treat.acmize import ACMHandle, acmize, find_acm
from layerwright.tune._acm_phases import watch_parts
from layerwright.tune.acm import ACMObjective, acm, choice_labels, distill_modules, prefix_errors, pretrain_gates
from oracles.adaptive import budget, diversity, entropy, label
from zoo import ZOO


def handle_of(model: nn.Module) -> ACMHandle:
    handle = find_acm(model)
    assert handle is not None
    return handle


errors_of_tokens = st.integers(2, 5).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 0.6, 1.0, 1.15, 1.3, 2.0, 3.0]), min_size=n, max_size=n),
        min_size=1,
        max_size=6,
    )
)


@given(errors_of_tokens, st.sampled_from([0.9, 1.0, 1.2, 2.0]), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_labels_are_the_first_number_after_which_one_more_helps_little(
    errors: list[list[float]], threshold: float, smallest: int
) -> None:
    smallest = min(smallest, len(errors[0]) - 1)
    found = choice_labels(torch.tensor(errors, dtype=torch.float64), threshold, min_learners=smallest)
    assert found.tolist() == [label(row, threshold, smallest) for row in errors]


def test_the_released_rule_is_one_off() -> None:
    errors = torch.tensor([[4.0, 3.9, 1.0, 0.5, 0.2], [4.0, 2.0, 1.9, 1.0, 0.5], [16, 8, 4, 2, 1.0]])
    assert choice_labels(errors).tolist() == [0, 1, 4]
    assert choice_labels(errors, rule="official").tolist() == [4, 2, 4]


def test_errors_are_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    prefixes, y = torch.randn(2, 3, 5, 7, generator=generator), torch.randn(2, 3, 7, generator=generator)
    found = prefix_errors(prefixes, y)
    assert found.shape == (2, 3, 5)
    assert float(found[1, 2, 3]) == pytest.approx(float((prefixes[1, 2, 3] - y[1, 2]).norm()))


def called(numbers: Tensor, real: Tensor | None, costs: list[int]) -> ACMHandle:
    """Modules whose gates chose `numbers` ``(modules, batch, tokens)``; learners cost in proportion to `costs`."""
    modules = [AdaptiveComputationModule(4, cost) for cost in costs]
    handle = ACMHandle(nn.Sequential(*modules))
    for module, chosen in zip(modules, numbers, strict=True):
        gates = nn.functional.one_hot(chosen, 5).float().requires_grad_()
        module.last = AdaptiveCall(chosen, real, gates)
    return handle


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.25, 0.6, 1.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_terms_against_loops(seed: int, beta: float, padded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 5, (2, 3, 6), generator=generator)
    real = torch.rand(3, 6, generator=generator) < 0.6
    real[:, 0] = True
    real = real if padded else torch.ones_like(real)
    handle = called(numbers, real if padded else None, [1, 3])
    terms = ACMObjective(beta).terms(handle)
    costs = [float(module.learner_flops) for module in handle.modules.values()]
    lists, kept = numbers.tolist(), real.tolist()
    assert float(terms["budget"].detach()) == pytest.approx(abs(budget(lists, kept, costs, 4) - beta), abs=1e-6)
    assert float(terms["entropy"].detach()) == pytest.approx(entropy(lists, kept, 4), abs=1e-5)
    assert float(terms["diversity"].detach()) == pytest.approx(diversity(lists, kept, 4), abs=1e-5)
    whole = float(ACMObjective(beta, (2, 3, 4)).loss(handle).detach())
    expected = sum(w * float(term.detach()) for w, term in zip((2, 3, 4), terms.values(), strict=True))
    assert whole == pytest.approx(expected, abs=1e-5)


def test_terms_at_their_ends() -> None:
    half = called(torch.tensor([[[0, 4, 2, 2], [1, 3, 2, 2]]]), None, [2])
    terms = ACMObjective(0.5).terms(half)
    assert float(terms["budget"].detach()) == 0
    assert float(terms["diversity"].detach()) == 0
    uniform = called(torch.tensor([[[0, 1, 2, 3, 4]]]), None, [2])
    assert float(ACMObjective(0.5).terms(uniform)["entropy"].detach()) == pytest.approx(-1, abs=1e-6)
    alike = called(torch.full((1, 2, 4), 3), None, [2])
    assert float(ACMObjective(0.5).terms(alike)["entropy"].detach()) == 0


@pytest.mark.parametrize(("beta", "sign"), [(0.25, 1), (0.75, -1)])
def test_the_budget_pushes_towards_itself(beta: float, sign: int) -> None:
    handle = called(torch.tensor([[[2, 2], [2, 2]]]), None, [2])
    module = next(iter(handle.modules.values()))
    ACMObjective(beta).terms(handle)["budget"].backward()
    assert module.last is not None
    assert module.last.gates is not None
    grad = module.last.gates.grad
    assert grad is not None
    slope = grad[0, 0].diff()
    assert bool((sign * slope > 0).all())


def test_gradients_stay_finite_where_a_choice_is_never_made() -> None:
    handle = called(torch.full((2, 2, 3), 1), None, [1, 1])
    ACMObjective(0.5).loss(handle).backward()
    for module in handle.modules.values():
        assert module.last is not None
        assert module.last.gates is not None
        assert module.last.gates.grad is not None
        assert torch.isfinite(module.last.gates.grad).all()


def test_a_smallest_choice_counts_among_the_others_only() -> None:
    module = AdaptiveComputationModule(4, 2, min_learners=1)
    handle = ACMHandle(nn.Sequential(module))
    chosen = torch.tensor([[1, 2, 3, 4]])
    module.last = AdaptiveCall(chosen, None, nn.functional.one_hot(chosen, 5).float())
    assert float(ACMObjective(0.5).terms(handle)["entropy"]) == pytest.approx(-1, abs=1e-6)


def test_the_losses_see_what_padding_is() -> None:
    model, batches = ZOO["llama"]()
    adaptive, _ = acmize(model, "mlp+attention")
    handle = handle_of(adaptive)
    ids = batches[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    with handle.learning(0):
        adaptive(padded, attention_mask=mask)
    values = ACMObjective(0.3).terms(handle)
    for module in handle.modules.values():
        last = module.last
        assert last is not None
        assert last.gates is not None
        module.last = AdaptiveCall(last.choice[:, :12], None, last.gates[:, :12])
    for name, value in ACMObjective(0.3).terms(handle).items():
        assert float(value.detach()) == pytest.approx(float(values[name].detach()), abs=1e-6)


def test_the_loss_needs_a_call_of_learning() -> None:
    model, batches = ZOO["vit"]()
    adaptive, _ = acmize(model)
    handle = handle_of(adaptive)
    with pytest.raises(RuntimeError, match="no sampled gates"):
        ACMObjective(0.5).loss(handle)
    with torch.no_grad():
        adaptive(batches[0]["pixel_values"])
    with pytest.raises(RuntimeError, match="no sampled gates"):
        ACMObjective(0.5).loss(handle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.1,), "beta"),
        ((-0.1,), "beta"),
        ((float("nan"),), "beta"),
        ((0.5, (1, 1)), "weights"),
        ((0.5, (1, -1, 1)), "weights"),
    ],
)
def test_bad_objectives(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACMObjective(*arguments)


@pytest.mark.parametrize(("options", "message"), [({"threshold": 0.0}, "threshold"), ({"rule": "clear"}, "clean")])
def test_bad_labels(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choice_labels(torch.ones(3), **options)


def part_errors(original: nn.Module, model: nn.Module, batches: Any) -> dict[str, Tensor]:
    """Mean ``e_0`` to ``e_N`` by module."""
    handle = handle_of(model)
    found: dict[str, Tensor] = {}

    def see(path: str, x: Tensor, y: Tensor, _real: Tensor | None) -> None:
        found[path] = prefix_errors(handle.modules[path].prefixes(x), y).flatten(0, -2).mean(0)

    with torch.no_grad(), watch_parts(original, handle.inputs, see):
        lw.Calibration(batches).forward(original, batches[0])
    return found


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2", "albert"])
def test_learners_learn_what_they_replace(name: str) -> None:
    model, batches = ZOO[name]()
    adaptive, names = acmize(model, "mlp+attention")
    before = {key: value.clone() for key, value in adaptive.state_dict().items()}
    trained = distill_modules(model, adaptive, batches, steps=40)
    assert all(torch.equal(value, before[key]) for key, value in adaptive.state_dict().items())
    changed = {key for key, value in trained.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if any(key.startswith(f"{p}.") for p in names) and ".gate." not in key}
    first, last = part_errors(model, adaptive, batches), part_errors(model, trained, batches)
    assert set(first) == set(names)
    for path in names:
        assert float(last[path][4]) < 0.9 * float(first[path][4])
    again = distill_modules(model, adaptive, batches, steps=40)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_modules_learn_apart() -> None:
    model, batches = ZOO["vit"]()
    adaptive, names = acmize(model)
    handle = handle_of(adaptive)
    losses: dict[str, Tensor] = {}

    def see(path: str, x: Tensor, y: Tensor, _real: Tensor | None) -> None:
        losses[path] = (handle.modules[path].prefixes(x) - y[..., None, :]).square().mean()

    with watch_parts(model, handle.inputs, see):
        model(batches[0]["pixel_values"])
    for path in names:
        adaptive.zero_grad()
        losses[path].backward(retain_graph=True)
        for other, module in handle.modules.items():
            touched = [
                p.grad is not None and bool(p.grad.any()) for n, p in module.named_parameters() if "gate" not in n
            ]
            assert all(touched) if other == path else not any(touched)


def test_padding_teaches_nothing() -> None:
    model, batches = ZOO["bert"]()
    adaptive, _ = acmize(model)
    ids = batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    results = []
    for filler in (5, 60):
        filled = torch.where(mask.bool(), ids, filler)
        data = [{"input_ids": filled, "attention_mask": mask}]
        results.append(distill_modules(model, adaptive, data, steps=3))
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_gates_learn_the_labels() -> None:
    model, batches = ZOO["vit"]()
    adaptive, names = acmize(model, "mlp+attention")
    adaptive = distill_modules(model, adaptive, batches, steps=60)
    gated = pretrain_gates(model, adaptive, batches, steps=60, threshold=1.05)
    for name, value in gated.state_dict().items():
        assert torch.equal(value, adaptive.state_dict()[name]) or ".gate." in name

    def agreement(network: nn.Module) -> float:
        handle, hits = handle_of(network), []

        def see(path: str, x: Tensor, y: Tensor, _real: Tensor | None) -> None:
            module = handle.modules[path]
            labels = choice_labels(prefix_errors(module.prefixes(x), y), 1.05, min_learners=module.min_learners)
            hits.append((module.logits(x).argmax(-1) + module.min_learners == labels).float().mean())

        with torch.no_grad(), watch_parts(model, handle.inputs, see):
            model(batches[0]["pixel_values"])
        assert len(hits) == len(names)
        return float(torch.stack(hits).mean())

    assert agreement(gated) > agreement(adaptive) + 0.2


def test_hooks_leave_the_original_even_after_an_error() -> None:
    model, batches = ZOO["vit"]()
    adaptive, _ = acmize(model)
    with pytest.raises(ValueError, match="size"):
        distill_modules(model, adaptive, [{"pixel_values": batches[0]["pixel_values"][..., :8]}], steps=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("beta", [0.25, 0.75])
def test_the_tuner_keeps_to_its_budget(beta: float) -> None:
    model, processor = lw.load("demo:vit")
    data = demo_data("demo:vit", processor, samples=128)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rates: Any = {"learning_rate": 1e-3, "gate_speed": 5.0}
    tuned = acm(model, data, budget=beta, steps=60, distill_steps=30, gate_steps=15, **rates)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle = handle_of(tuned)
    assert all(module.counts is None and module.last is None for module in handle.modules.values())
    loss = data.mean_loss(tuned)
    assert abs(handle.executed_fraction() - beta) < 0.12
    untrained, _ = acmize(model)
    assert loss < data.mean_loss(untrained) - 0.5
    assert all(parameter.requires_grad for parameter in tuned.parameters())


def test_same_seed_same_weights_and_other_targets() -> None:
    model, batches = ZOO["gpt2"]()
    options: Any = {"steps": 3, "distill_steps": 2, "gate_steps": 2, "targets": "mlp+attention", "num_learners": 2}
    first, second = acm(model, batches, seed=1, **options), acm(model, batches, seed=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = acm(model, batches, seed=2, **options)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_an_adaptive_model_is_trained_on() -> None:
    model, batches = ZOO["bert"]()
    adaptive, names = acmize(model)
    calls: list[str] = []

    def tell(name: str, _done: int, _total: int) -> None:
        calls.append(name)

    tuned = acm(adaptive, batches, steps=2, budget=0.3, progress=tell)
    assert set(calls) == {"adaptive width"}
    assert tuple(handle_of(tuned).modules) == names
    calls.clear()
    acm(adaptive, batches, teacher=model, steps=2, gate_steps=1, progress=tell)
    assert calls == ["distilling modules"] * 2 + ["training gates"] + ["adaptive width"] * 2


def test_half_precision_is_tuned() -> None:
    model, batches = ZOO["llama"]()
    tuned = acm(model.bfloat16(), batches, steps=3, distill_steps=3, gate_steps=2, learning_rate=1e-3)
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.bfloat16}
    assert torch.isfinite(torch.tensor(lw.Calibration(batches).mean_loss(tuned)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.2}, "beta"),
        ({"budget": -0.1}, "beta"),
        ({"threshold": 0.0}, "threshold"),
        ({"label_rule": "best"}, "official"),
        ({"gate_speed": 0.0}, "gate_speed"),
        ({"distill_steps": -1}, "distill_steps"),
        ({"num_learners": 0}, "num_learners"),
        ({"budget": 0.1, "targets": "attention"}, "min_learners"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_settings(options: Any, message: str) -> None:
    model, batches = ZOO["vit"]()
    with pytest.raises(ValueError, match=message):
        acm(model, batches, **({"steps": 1} | options))


def test_back_from_disk(tmp_path: Path) -> None:
    model, processor = lw.load("demo:lm")
    data = demo_data("demo:lm", processor, samples=4, length=32)
    tuned = acm(model, data, steps=2, distill_steps=2, gate_steps=1)
    lw.save(tuned, tmp_path / "out")
    loaded: Any = lw.load(tmp_path / "out")[0]
    assert data.mean_loss(loaded) == pytest.approx(data.mean_loss(tuned), abs=1e-5)
    ids = torch.arange(40, 52)[None]
    with_cache = loaded.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(with_cache, loaded.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))
