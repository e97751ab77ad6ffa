"""Modules whose width each token chooses: grouped execution, sampling, settings, saving."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layerwright.nn._adaptive_gate import AdaptiveCalls, gumbel_gates
from layerwright.nn.adaptive import ACTIVATIONS, AdaptiveComputationModule, AdaptiveLayer, PassOn
from layerwright.nn.replace import module_from_spec
from oracles.adaptive import prefix


class Chooses(nn.Module):
    """A gate with choices that are known."""

    def __init__(self, choice: Tensor, choices: int) -> None:
        super().__init__()
        self.choice, self.choices = choice, choices

    def forward(self, _x: Tensor) -> Tensor:
        return F.one_hot(self.choice, self.choices).float()


def made(seed: int = 0, **options: Any) -> AdaptiveComputationModule:
    generator = torch.Generator().manual_seed(seed)
    settings_ = {"dim": 6, "hidden_per_learner": 3} | options
    module = AdaptiveComputationModule(**settings_, generator=generator)
    if module.out_bias is not None:
        module.out_bias.data = torch.randn(module.out_bias.shape, generator=generator)
    return module.double().eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    st.integers(1, 4),
    st.integers(0, 2),
    st.lists(st.integers(0, 100), min_size=0, max_size=12),
    st.sampled_from(["hidden", "out", "both", "none"]),
    st.sampled_from([4, 6]),
)
@settings(max_examples=60, deadline=None)
def test_grouped_tokens_get_the_prefix_that_they_chose(
    learners: int, smallest: int, drawn: list[int], bias: Any, out_dim: int
) -> None:
    smallest = min(smallest, learners)
    module = made(num_learners=learners, min_learners=smallest, bias=bias, out_dim=out_dim)
    choice = torch.tensor([number % module.choices for number in drawn], dtype=torch.long)[None]
    module.gate = Chooses(choice, module.choices)
    x = tokens(1, len(drawn), 6)
    output = module(x)
    every = module(x, mode="all")
    assert every.shape == (1, len(drawn), learners + 1, out_dim)
    chosen = every.gather(2, (choice + smallest)[..., None, None].expand(-1, -1, 1, out_dim))[:, :, 0]
    assert torch.allclose(output, chosen, atol=1e-12)
    for place, number in enumerate((choice + smallest)[0].tolist()):
        assert torch.allclose(output[0, place], prefix(module, x[0, place], number), atol=1e-12)
    assert module.last is not None
    assert torch.equal(module.last.choice, choice + smallest)
    assert module.last_gates is not None
    assert torch.equal(module.last_gates.argmax(-1), choice + smallest)
    assert module.counts is not None
    assert int(module.counts.sum()) == len(drawn)


@pytest.mark.parametrize("number", [0, 4])
def test_all_tokens_choose_alike(number: int) -> None:
    module = made()
    module.gate = Chooses(torch.full((2, 5), number), 5)
    x = tokens(2, 5, 6)
    assert torch.allclose(module(x), module(x, mode="all")[:, :, number], atol=1e-12)
    if not number:
        assert not module(x).any()


def test_the_gates_own_choice_and_gradients_in_evaluation_mode() -> None:
    module = made()
    x = tokens(3, 40, 6).requires_grad_()
    choice = module.logits(x).argmax(-1)
    assert len(choice.unique()) > 1
    every = module(x, mode="all")
    expected = every.gather(2, choice[..., None, None].expand(-1, -1, 1, 6))[:, :, 0]
    output = module(x)
    assert torch.allclose(output, expected)
    names = ("up.weight", "down.weight", "up.bias")
    parameters = [x, *(module.get_parameter(name) for name in names)]
    grads = torch.autograd.grad(output.square().sum(), parameters)
    for got, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        assert torch.allclose(got, wanted)


def test_learners_that_no_token_takes_get_no_gradient() -> None:
    module = made()
    module.gate = Chooses(torch.tensor([[2, 1, 2]]), 5)
    module(tokens(1, 3, 6)).sum().backward()
    grad = module.up.weight.grad
    assert grad is not None
    assert grad[:6].any()
    assert not grad[6:].any()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_all_learners_are_one_network_with_their_hidden_units_side_by_side(activation: str) -> None:
    module = made(activation=activation)
    x = tokens(2, 7, 6)
    act: Any = ACTIVATIONS[activation]
    whole = F.linear(act(F.linear(x, module.up.weight, module.up.bias)), module.down.weight)
    assert torch.allclose(module(x, mode=4), whole, atol=1e-13)
    assert torch.allclose(module(x, mode="all")[:, :, 4], whole, atol=1e-13)
    assert torch.allclose(module(x, mode=0.5), module(x, mode=2))
    assert torch.equal(module(x, mode=1.0), module(x, mode=4))


def test_the_straight_through_gradient_is_that_of_the_softmax_mixture() -> None:
    module = made(bias="both")
    x = tokens(2, 5, 6)
    calls = AdaptiveCalls(learning=True, seed=3)
    module.calls = calls
    logits = tokens(2, 5, 5, seed=2).requires_grad_()
    module.gate = nn.Identity()
    module.logits = lambda _x: logits  # type: ignore[method-assign]
    output = module(x)
    direction = tokens(2, 5, 6, seed=4)
    (got,) = torch.autograd.grad((output * direction).sum(), logits)
    generator = calls.generator(0, torch.device("cpu"))
    drawn = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    soft = ((logits - (-drawn.log()).log()) / module.tau).softmax(-1)
    mixture = (soft[..., None] * module(x, mode="all")).sum(-2)
    (wanted,) = torch.autograd.grad((mixture * direction).sum(), logits)
    assert torch.allclose(got, wanted, atol=1e-12)
    assert module.last_gates is not None
    gates = module.last_gates
    assert torch.equal(gates, F.one_hot(gates.argmax(-1), 5).double())
    hard = module(x, mode="all").gather(2, gates.argmax(-1)[..., None, None].expand(-1, -1, 1, 6))[:, :, 0]
    assert torch.allclose(output, hard, atol=1e-12)


def test_samples_follow_the_logits_and_their_seed() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    first = gumbel_gates(logits, 0.8, torch.Generator().manual_seed(0))
    assert torch.allclose(first.mean(0), logits[0].softmax(-1), atol=0.015)
    assert torch.equal(first, gumbel_gates(logits, 0.8, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="tau"):
        gumbel_gates(logits, 0.0)
    module = made().train()
    module.calls = AdaptiveCalls(seed=5)
    x = tokens(2, 50, 6)
    one, again = module(x), module(x)
    assert torch.equal(one, again)
    module.calls.number += 1
    assert not torch.equal(one, module(x))


def test_training_mode_samples_and_evaluation_does_not() -> None:
    module = made().train()
    assert module(tokens(1, 4, 6)).requires_grad
    assert module.last is not None
    assert module.last.gates is not None
    assert module.last.gates.requires_grad
    assert copy.deepcopy(module).last is None
    module.eval()(tokens(1, 4, 6))
    assert module.last.gates is None


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 3, 4, 6), (0, 3, 6)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    module = made()
    x = tokens(*shape)
    assert module(x).shape == shape
    assert module(x, mode="all").shape == (*shape[:-1], 5, 6)
    assert module(x, mode=3).shape == shape
    module.train()
    assert module(x).shape == shape


def test_half_precision() -> None:
    module = made(dim=32, hidden_per_learner=16)
    x = tokens(2, 30, 32)
    rounded = copy.deepcopy(module).bfloat16()
    rounded.gate = Chooses(torch.arange(60).reshape(2, 30) % 5, 5)
    module.gate = rounded.gate
    output = rounded(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert torch.allclose(output.double(), module(x), atol=0.03)
    assert rounded.train()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("smallest", [0, 1])
def test_operations_are_those_that_run(smallest: int) -> None:
    module = made(min_learners=smallest, out_dim=4)
    x = tokens(3, 17, 6)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert module.last is not None
    numbers = int(module.last.choice.sum())
    assert counter.get_total_flops() == 51 * module.gate_flops + numbers * module.learner_flops
    assert module.learner_flops == 2 * 3 * (6 + 4)
    assert module.gate_flops == 2 * (6 * 16 + 16 * 16 + 16 * (5 - smallest))


def test_detached_prefixes_teach_each_learner_its_own_increment() -> None:
    module = made(bias="both")
    x, y = tokens(2, 5, 6), tokens(2, 5, 6, seed=9)
    assert torch.allclose(module.prefixes(x, detach=True), module.prefixes(x))
    module.zero_grad()
    (module.prefixes(x, detach=True)[..., 3, :] - y).square().mean().backward()
    grad = module.up.weight.grad
    assert grad is not None
    assert grad[6:9].any()
    assert not grad[:6].any()
    assert not grad[9:].any()


def test_spec_there_and_back() -> None:
    module = made(bias="both", min_learners=1, out_dim=4, activation="identity", num_learners=3).to(torch.bfloat16)
    again = module_from_spec(module.spec())
    assert isinstance(again, AdaptiveComputationModule)
    assert again.spec() == module.spec()
    assert {n: (p.shape, p.dtype) for n, p in again.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in module.named_parameters()
    }
    with torch.device("meta"):
        empty = AdaptiveLayer.empty(module.spec())
    assert all(parameter.is_meta for parameter in empty.parameters())
    passing = module_from_spec(PassOn("a.b").spec())
    assert isinstance(passing, PassOn)
    assert passing.to_path == "a.b"


def test_first_weights_come_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = made(0), made(0), made(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.up.weight, other.up.weight)
    assert float(first.up.weight.detach().abs().max()) <= 6**-0.5
    assert 6**-0.5 < float(first.down.weight.detach().abs().max()) <= 3**-0.5


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_learners": 0}, "num_learners"),
        ({"hidden_per_learner": 0}, "hidden_per_learner"),
        ({"min_learners": 5}, "min_learners"),
        ({"min_learners": -1}, "min_learners"),
        ({"tau": 0.0}, "tau"),
        ({"tau": -1.0}, "tau"),
        ({"activation": "gleu"}, "gelu"),
        ({"bias": "outside"}, "bias"),
        ({"gate_depth": 0}, "gate_depth"),
    ],
)
def test_bad_settings(options: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        made(**options)


@pytest.mark.parametrize("mode", [-1, 5, 1.5, -0.1, True, "some", None])
def test_bad_modes(mode: Any) -> None:
    with pytest.raises(ValueError, match="mode"):
        made()(tokens(1, 2, 6), mode=mode)
