from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.expert_routing import balance_loss, choose_above, choose_adaptive, choose_top
from layerwright.nn.lora import LoraLinear
from layerwright.nn.lora_mixture import LoRAMixture, NotMergeableError
from layerwright.nn.replace import module_from_spec, structure_of
from oracles.lora_mixture import change, token_weights

ROUTINGS = ("adaptive", "top-k", "threshold")


def mixture(routing: str = "adaptive", num_experts: int = 4, seed: int = 0, **more: object) -> LoRAMixture:
    """With random B and gates that differ between tokens."""
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(6, 5)
    made = LoRAMixture(base, num_experts, 2, dropout=0.0, routing=routing, generator=generator, **more).requires_grad_(
        True
    )  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.adapters.parameters():
            parameter.normal_(generator=generator)
    return made


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("routing", [*ROUTINGS, "none"])
def test_a_new_mixture_changes_nothing(routing: str) -> None:
    base = nn.Linear(6, 5)
    layer = LoRAMixture(base, 1 if routing == "none" else 4, routing=routing)  # type: ignore[arg-type]
    x = inputs(2, 3, 6)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.eval()(x), base(x))
    bound = 6**-0.5
    assert 0.5 * bound < float(layer.lora_A.detach().abs().max()) <= bound


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_loop_over_tokens(routing: str, dispatch: bool) -> None:
    layer = mixture(routing, dispatch=dispatch)
    x = inputs(3, 5, 6)
    expected = layer.base(x) + change(layer.experts, x.reshape(-1, 6)).float().reshape(3, 5, 5)
    torch.testing.assert_close(layer(x), expected, atol=2e-5, rtol=1e-5)
    weights = torch.tensor([token_weights(layer.experts, row) for row in x.reshape(-1, 6)])
    torch.testing.assert_close(layer.last_weights, weights, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.last_selected | (weights < 1e-6), torch.ones_like(weights, dtype=torch.bool))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_both_paths_and_single_tokens_agree(routing: str) -> None:
    layer = mixture(routing)
    x = inputs(7, 6)
    dense = layer(x)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x]), dense)
    layer.dispatch = True
    torch.testing.assert_close(layer(x), dense)


@given(st.integers(1, 9), st.integers(0, 1000), st.floats(0, 30), st.floats(-200, 200))
@settings(max_examples=40, deadline=None)
def test_by_default_a_token_always_has_an_expert(count: int, seed: int, size: float, offset: float) -> None:
    layer = mixture(num_experts=count, seed=seed)
    with torch.no_grad():
        layer.experts.lora_gate.mul_(size / 10)
        layer.experts.lora_offset.fill_(offset)
    layer(inputs(20, 6, seed=seed))
    assert bool(layer.last_selected.any(-1).all())
    torch.testing.assert_close(layer.last_weights.sum(-1), torch.ones(20))


def test_no_expert_above_the_threshold_is_the_base() -> None:
    layer = mixture(max_threshold=1.0)
    with torch.no_grad():
        layer.experts.lora_gate.mul_(0.1)
        layer.experts.lora_threshold.zero_()
        layer.experts.lora_offset.fill_(100.0)
    x = inputs(4, 6).requires_grad_()
    y = layer(x)
    assert torch.equal(y, layer.base(x))
    y.sum().backward()
    assert not layer.last_selected.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_one_expert_is_plain_lora() -> None:
    for routing in ("adaptive", "none"):
        layer = mixture(routing, num_experts=1)
        plain = LoraLinear(layer.base, 2)
        with torch.no_grad():
            plain.lora_A.copy_(layer.lora_A)
            plain.lora_B.copy_(layer.lora_B)
            if layer.experts.lora_offset is not None:
                layer.experts.lora_offset.fill_(500.0)  # a sigmoid of 1 in floating point
        x = inputs(4, 6)
        torch.testing.assert_close(layer(x), plain(x))
        assert torch.equal(layer.last_weights, torch.ones(4, 1))
        torch.testing.assert_close(layer.merged()(x), plain(x))


def test_agrees_with_peft() -> None:
    import peft

    model = nn.Sequential(nn.Linear(6, 5))
    layer = mixture("none", num_experts=1)
    base = copy.deepcopy(layer.base)
    model[0] = base
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=16, target_modules=["0"]))
    with torch.no_grad():
        inner = wrapped.base_model.model[0]
        inner.lora_A["default"].weight.copy_(layer.lora_A)
        inner.lora_B["default"].weight.copy_(layer.lora_B)
    x = inputs(3, 6)
    torch.testing.assert_close(layer(x), wrapped(x))


def test_gradients() -> None:
    layer = mixture().double()
    experts = layer.experts
    x = inputs(5, 6).double()
    choice = experts.choose(x)
    assert choice.scores.abs().min() > 1e-4  # away from the kink
    assert 0 < int(choice.selected.sum()) < choice.selected.numel()
    names = [name for name, _ in experts.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {f"adapters.default.{n}": v for n, v in zip(names, values)}, (x,))

    values = [p.detach().clone().requires_grad_() for p in experts.parameters()]
    assert torch.autograd.gradcheck(run, values, eps=1e-7)
    layer(x).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 1e-6 for p in experts.parameters())


def test_weights_are_continuous_where_an_expert_enters() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    below, above = (choose_adaptive(p, torch.tensor([[0.3 + d]])) for d in (1e-6, -1e-6))
    assert below.selected.sum() == 1
    assert above.selected.sum() == 2
    torch.testing.assert_close(below.weights, above.weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(choose_adaptive(p, torch.tensor([[0.1]])).weights, torch.tensor([[4, 2, 1]]) / 7)
    torch.testing.assert_close(choose_above(p, 0.3).weights, torch.tensor([[5, 3, 0]]) / 8)
    torch.testing.assert_close(choose_top(p, 2).weights, torch.tensor([[5, 3, 0]]) / 8)
    assert not choose_above(p, 0.6).weights.any()


def test_balance_by_hand() -> None:
    selected = torch.tensor([[True, False], [True, True], [False, True]])
    scores = torch.tensor([[0.4, -0.1], [0.2, 0.1], [-0.3, 0.5]])
    f, q = [2 / 3, 2 / 3], [0.1, 0.5 / 3]
    torch.testing.assert_close(balance_loss(selected, scores), torch.tensor(2 * (f[0] * q[0] + f[1] * q[1])))
    real = torch.tensor([True, True, False])
    torch.testing.assert_close(balance_loss(selected, scores, real), torch.tensor(2 * (1 * 0.3 + 0.5 * 0.0)))
    layer = mixture()
    with torch.no_grad():
        layer.experts.lora_gate.zero_()
        layer.experts.lora_threshold.zero_()
        layer.experts.lora_offset.zero_()
    x = inputs(6, 6)
    layer(x)
    torch.testing.assert_close(layer.aux_loss, torch.tensor(4 * 4 * 0.125))  # all selected, margins 1/4 - 1/8
    layer.experts.balance_on = "probability"
    layer(x)
    torch.testing.assert_close(layer.aux_loss, torch.tensor(4.0))
    assert layer.aux_loss.requires_grad
    layer.eval()(x)
    assert float(layer.aux_loss) == 0
    assert layer.aux_loss.grad_fn is None


def test_dropout_is_drawn_in_training_only() -> None:
    layer = mixture()
    layer.experts.dropout = 0.5
    x = inputs(9, 6)
    for dispatch in (False, True):
        layer.dispatch = dispatch
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_of_the_base_is_kept(dtype: torch.dtype) -> None:
    layer = mixture()
    layer.base.to(dtype)
    y = layer(inputs(2, 3, 6).to(dtype))
    assert y.dtype is dtype
    assert layer.lora_A.dtype is torch.float32
    assert layer.last_weights.dtype is torch.float32
    assert layer.to(torch.bfloat16)(inputs(2, 6).bfloat16()).dtype is torch.bfloat16


def test_usage_counts_tokens() -> None:
    layer = mixture()
    x = inputs(2, 5, 6)
    assert layer.usage() is None
    layer(x)
    selected, weights = layer.last_selected, layer.last_weights
    layer(x)
    usage = layer.usage()
    assert usage.tokens == 20
    torch.testing.assert_close(torch.tensor(usage.shares), selected.float().mean(0))
    torch.testing.assert_close(torch.tensor(usage.weights), weights.mean(0))
    assert usage.mean_active == pytest.approx(float(selected.sum(-1).float().mean()))
    assert usage.std_active == pytest.approx(float(selected.sum(-1).float().std(correction=0)), abs=1e-6)
    layer.reset()
    assert layer.usage() is None


def test_there_and_back() -> None:
    layer = mixture("top-k", top_k=3)
    layer.add("other", {"num_experts": 2, "rank": 3})
    layer.active = "other"
    again = module_from_spec(layer.spec())
    again.load_state_dict(layer.state_dict())
    x = inputs(4, 6)
    assert torch.equal(again.eval()(x), layer.eval()(x))
    again.active = layer.active = "default"
    assert torch.equal(again(x), layer(x))
    assert structure_of(nn.Sequential(layer)) == {"0": layer.spec()}
    layer.train()(x)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_merge_is_refused_where_the_input_decides() -> None:
    with pytest.raises(NotMergeableError, match=r"merge.*input"):
        mixture().merged()
    with pytest.raises(NotImplementedError):
        mixture("top-k").merged()


@pytest.mark.parametrize(
    ("given_settings", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"num_experts": 0}, "num_experts"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"max_threshold": 0.0}, "max_threshold"),
        ({"max_threshold": 1.1}, "max_threshold"),
        ({"max_threshold": float("nan")}, "max_threshold"),
        ({"routing": "top-k", "top_k": 9}, "top_k"),
        ({"routing": "top-k", "top_k": 0}, "top_k"),
        ({"top_k": 2}, "top_k"),
        ({"top_k": 2, "max_threshold": 0.1}, r"top_k and max_threshold"),
        ({"routing": "top-k", "max_threshold": 0.1}, "max_threshold"),
        ({"routing": "topk"}, r"routing.*did you mean top-k"),
        ({"routing": "none"}, "plain LoRA"),
        ({"balance_on": "margins"}, "balance_on"),
        ({"name": "a.b"}, "name"),
    ],
)
def test_bad_settings(given_settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LoRAMixture(nn.Linear(4, 4), **given_settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="base"):
        LoRAMixture(nn.LayerNorm(4))
