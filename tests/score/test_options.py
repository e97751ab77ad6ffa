"""Scores of candidate treatments: oracles on tiny models, and agreement with measured damage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.layers import treatable
from layerwright.core.treatment import Quantize
from layerwright.recipes.bench import open_bench
from layerwright.recipes.validate import rank_correlations
from layerwright.score import SCORERS, Subject, fisher, hutchinson, loss_swap, output_error, snr, taylor, weight_error
from layerwright.score.gradients import output_gradients, weight_gradients
from layerwright.score.hessian import hessian_traces
from layerwright.score.inputs import walk_inputs
from layerwright.treat.probe import treat_weights
from zoo import ZOO

OPTIONS = tuple((Quantize(bits, method="rtn"),) for bits in (2, 3, 4, 6))


class Net(nn.Module):
    """Three blocks of one linear layer each, so that oracles stay short."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def small() -> tuple[Net, Calibration]:
    torch.manual_seed(0)
    model = Net().eval()
    return model, Calibration([(torch.randn(16, 16), torch.randint(4, (16,))) for _ in range(3)])


def subject_of(model: nn.Module, data: Calibration, options: tuple = OPTIONS) -> Subject:
    refs = treatable(model)
    return Subject(model, data, layers=refs, candidates={r.path: options for r in refs}, treat=treat_weights)


def test_walk_sees_the_exact_inputs_once_per_group() -> None:
    model, batches = ZOO["llama"]()
    data = Calibration(batches)
    refs = [ref for ref in treatable(model) if ref.block == 0]
    (found,) = list(walk_inputs(model, data, refs, {r.path: "gram" for r in refs}))
    layers, inputs = found
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(ref.path).register_forward_pre_hook(
            lambda _m, args, path=ref.path: seen.__setitem__(
                path, torch.cat([seen.get(path, args[0].flatten(0, 1)[:0]), args[0].flatten(0, 1)])
            )
        )
        for ref in refs
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    for ref in refs:
        torch.testing.assert_close(inputs.of[ref.path].gram[0], seen[ref.path].T @ seen[ref.path], rtol=1e-4, atol=1e-4)
    groups = {frozenset(r.role for r in group) for group in inputs.groups(layers)}
    assert frozenset({"q", "k", "v"}) in groups
    assert frozenset({"gate", "up"}) in groups


def test_weight_gradients_against_autograd() -> None:
    model, data = small()
    refs = treatable(model)
    found = weight_gradients(model, data, refs)
    loss = sum(data.loss(model, batch) for batch in data) / len(data)
    for ref in refs:
        weight = model.get_submodule(ref.path).weight
        expected = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        torch.testing.assert_close(found[ref.path][0], expected)
    assert all(p.requires_grad for p in model.parameters())


def test_output_gradients_against_a_loop() -> None:
    model, data = small()
    refs = treatable(model)
    found = output_gradients(model, data, refs)
    path = refs[1].path
    total = torch.zeros(refs[1].shape[0], refs[1].shape[0])
    for x, y in data.batches:
        for one, label in zip(x, y, strict=True):
            kept = []
            handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
            loss = nn.functional.cross_entropy(model(one[None]), label[None])
            handle.remove()
            gradient = torch.autograd.grad(loss, kept[0])[0][0]
            total += torch.outer(gradient, gradient)
    torch.testing.assert_close(found[path].moment, total / 48, rtol=1e-4, atol=1e-6)
    assert (found[path].tokens, found[path].terms) == (48, 48)


def test_fisher_is_the_factored_quadratic_form() -> None:
    model, data = small()
    scores = fisher(subject_of(model, data))
    gradients = output_gradients(model, data, treatable(model))
    ref = treatable(model)[0]
    inputs = torch.cat([x for x, _ in data.batches])
    weight = model.get_submodule(ref.path).weight.detach()
    (changed,) = treat_weights([weight[None]], [OPTIONS[0]], None)
    change = changed[0] - weight
    moment = inputs.T @ inputs / len(inputs)
    expected = 0.5 * torch.trace(change @ moment @ change.T @ gradients[ref.path].moment)
    assert scores.damages[(ref.path, OPTIONS[0])] == pytest.approx(float(expected), rel=1e-4)


def test_hutchinson_trace_against_the_full_hessian() -> None:
    model, data = small()
    refs = treatable(model)[:1]
    weight = model.get_submodule(refs[0].path).weight

    def loss(flat: torch.Tensor) -> torch.Tensor:
        values = {f"{refs[0].path}.weight": flat.reshape(weight.shape)}
        losses = [
            nn.functional.cross_entropy(torch.func.functional_call(model, values, (x,)), y) for x, y in data.batches
        ]
        return sum(losses) / len(losses)

    exact = torch.autograd.functional.hessian(loss, weight.detach().flatten()).trace()
    found = hessian_traces(model, data, refs, samples=400, seed=0)[refs[0].path]
    assert found == pytest.approx(float(exact), rel=0.15)


def test_loss_swap_measures_and_restores() -> None:
    model, data = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = loss_swap(subject_of(model, data))
    base = data.mean_loss(model)
    ref = treatable(model)[0]
    layer = model.get_submodule(ref.path)
    kept = layer.weight.data.clone()
    layer.weight.data = treat_weights([kept[None]], [OPTIONS[0]], None)[0][0]
    expected = data.mean_loss(model) - base
    layer.weight.data = kept
    assert scores.damages[(ref.path, OPTIONS[0])] == pytest.approx(max(expected, 1e-6), rel=1e-3, abs=1e-6)
    assert scores.base_loss == pytest.approx(base)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scorer", [output_error, fisher, taylor, hutchinson, weight_error, snr])
def test_more_bits_do_less_damage_and_the_model_is_left_alone(scorer) -> None:
    model, batches = ZOO["llama"]()
    data = Calibration(batches)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    scores = scorer(subject_of(model, data))
    refs = treatable(model)
    assert len(scores.damages) == len(refs) * len(OPTIONS)
    assert all(value >= 0 for value in scores.damages.values())
    for ref in refs:
        two, six = scores.damages[(ref.path, OPTIONS[0])], scores.damages[(ref.path, OPTIONS[3])]
        if scorer is not taylor:
            assert six <= two
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_scores_survive_saving(tmp_path) -> None:
    from layerwright.core.option import Scores

    model, data = small()
    scores = snr(subject_of(model, data))
    assert Scores.load(scores.save(tmp_path)).damages == scores.damages


def test_every_scorer_has_a_docstring() -> None:
    for name in SCORERS:
        assert SCORERS.get(name).__doc__


def test_fisher_ranks_layers_of_a_trained_model_like_the_measured_loss() -> None:
    bench = open_bench("demo:lm", samples=8, length=128)
    found = rank_correlations(bench, scorers=["fisher", "weight_error"], every=3)
    assert found["fisher"] > 0.7
    assert found["fisher"] > found["weight_error"]
