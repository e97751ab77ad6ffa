"""Growth keeps the function: exact in float64, whatever is grown in whatever order."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models import DenseNetBC, PlainCNN, deepen_dense_, widen_dense_, widen_transitions_
from layerwright.treat.expand import expand_blocks
from layerwright.treat.grow import (
    GrowthMap,
    Reader,
    deepen,
    deepen_,
    find_reach,
    growth_map,
    widen,
    widen_,
    widen_consumer,
    widen_mlp,
    widen_producer,
)
from layerwright.treat.narrow import feed_forwards
from zoo import ZOO


def noisy(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with BatchNorms as after training."""
    generator = noisy(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model.double().eval()


def plain(batch_norm: bool = True, seed: int = 0) -> PlainCNN:
    spec = ["conv-3-3", "conv-4-1", "pool", "conv-4-5", "fc-5", "fc-4"]
    return lived_in(PlainCNN(spec, batch_norm=batch_norm, generator=noisy(seed)), seed)  # type: ignore[return-value]


def images(samples: int = 6, seed: int = 3) -> Tensor:
    return torch.randn(samples, 1, 8, 8, generator=noisy(seed), dtype=torch.float64)


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    return float((a(x) - b(x)).abs().max())


# -- maps ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 6), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_duplicates_of_consumer_weights_sum_to_the_original(
    width: int, more: int, before: int, after: int, positions: int, seed: int
) -> None:
    growth = growth_map(width, width + more, noisy(seed))
    assert growth.indices[:width].tolist() == list(range(width))
    assert (growth.width, growth.new_width) == (width, width + more)
    total = before + width + after
    weight = torch.randn(3, total * positions, generator=noisy(seed), dtype=torch.float64)
    wider = widen_consumer(weight, growth, before, positions)
    assert wider.shape == (3, (total + more) * positions)
    sums = torch.zeros(3, total, positions, dtype=torch.float64)
    # By the definition: channel j of the wider input belongs to old channel own[j].
    own = [*range(before), *(before + int(i) for i in growth.indices), *range(before + width, total)]
    for j, i in enumerate(own):
        sums[:, i] += wider.view(3, -1, positions)[:, j]
    assert (sums.view(3, -1) - weight).abs().max() <= 1e-12


def test_producer_rows_and_noise() -> None:
    growth = GrowthMap.of(torch.tensor([0, 1, 2, 1]))
    weight = torch.randn(3, 5, generator=noisy(0))
    assert torch.equal(widen_producer(weight, growth), weight[[0, 1, 2, 1]])
    wide = GrowthMap.of(torch.cat([torch.arange(3), torch.zeros(3000, dtype=torch.long)]))
    loud = widen_producer(weight, wide, noise=0.5, generator=noisy(1))
    assert torch.equal(loud[:3], weight)  # only new outputs are noisy
    assert (loud[3:] - weight[0]).std() == pytest.approx(0.5 * float(weight.std(correction=0)), rel=0.05)


def test_maps_that_would_lose_an_output() -> None:
    with pytest.raises(InputError, match="occurs nowhere"):
        GrowthMap(torch.tensor([0, 2]), torch.tensor([1, 0, 1]))
    with pytest.raises(InputError, match="counts"):
        GrowthMap(torch.tensor([0, 1]), torch.tensor([1, 2]))


# -- exact preservation ---------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=12, deadline=None)
def test_ten_random_steps_keep_a_plain_network(seed: int, batch_norm: bool) -> None:
    model, x = plain(batch_norm, seed), images()
    grown = copy.deepcopy(model)
    generator = noisy(seed)
    for step in range(10):
        places = [path for word, path in grown.places() if word != "pool"]
        path = places[int(torch.randint(len(places), (), generator=generator))]
        layer = grown.get_submodule(path)
        if int(torch.randint(2, (), generator=generator)):
            more = 1 + int(torch.randint(3, (), generator=generator))
            widen_(grown, path, layer.weight.shape[0] + more, generator=generator)
        else:
            kernel = (1, 3, 5)[step % 3]
            deepen_(grown, path, kernel_size=kernel, calibration=images(8, seed), generator=generator)
    assert difference(model, grown, x) <= 1e-8
    assert grown.to_spec() != model.to_spec()


@given(st.integers(0, 10_000))
@settings(max_examples=6, deadline=None)
def test_ten_random_steps_keep_a_dense_network(seed: int) -> None:
    model = lived_in(DenseNetBC([[2, 1], [2]], bc_ratio=2, generator=noisy(seed)), seed)
    assert isinstance(model, DenseNetBC)
    grown, generator = copy.deepcopy(model), noisy(seed)
    for step in range(10):
        block = int(torch.randint(2, (), generator=generator))
        layer = int(torch.randint(len(grown.growths[block]), (), generator=generator))
        if step == 5:
            widen_transitions_(grown, generator)
        elif int(torch.randint(2, (), generator=generator)):
            widen_dense_(grown, block, layer, grown.growths[block][layer] + 1, generator)
        else:
            deepen_dense_(grown, block, layer, generator)
    widen_transitions_(grown, generator)
    assert difference(model, grown, images(4)) <= 1e-8
    assert grown.to_spec() != model.to_spec()


def test_noise_moves_the_function_in_proportion() -> None:
    model, x = plain(), images()

    def moved(kind: str, ratio: float) -> float:
        if kind == "wider":
            grown, _ = widen(model, "layers.0", 9, generator=noisy(1), noise=ratio)
        else:
            grown, _ = deepen(model, "layers.0", calibration=images(), generator=noisy(1), noise=ratio)
        return difference(model, grown, x)

    for kind in ("wider", "deeper"):
        assert moved(kind, 0.0) <= 1e-8
        small, large = moved(kind, 1e-6), moved(kind, 4e-6)
        assert small > 1e-9
        assert large / small == pytest.approx(4, rel=0.02)


def test_dense_noise_moves_the_function_in_proportion() -> None:
    model = lived_in(DenseNetBC([[2, 1], [2]], bc_ratio=2))
    moved = []
    for ratio in (1e-6, 4e-6):
        grown = copy.deepcopy(model)
        deepen_dense_(grown, 0, 0, noisy(1), ratio)  # type: ignore[arg-type]
        moved.append(difference(model, grown, images()))
    assert moved[0] > 1e-9 and moved[1] / moved[0] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_copies_stay_equal_in_training_only_without_noise(noise: float) -> None:
    model, growth = widen(plain(), "layers.0", 6, generator=noisy(2), noise=noise)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(images()), torch.arange(6)).backward()
    optimizer.step()
    weight = model.layers[0].weight.detach()
    apart = (weight[3:] - weight[growth.indices[3:]]).abs().amax((1, 2, 3))
    moved = (weight[:3] - plain().layers[0].weight.detach()).abs().amax((1, 2, 3))
    assert bool((moved > 1e-6).all())  # the step did something
    assert bool((apart <= 1e-12).all()) if noise == 0 else bool((apart > 1e-6).all())


def test_grown_network_keeps_its_function_in_float32_and_bfloat16() -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.15)):
        model = plain().to(dtype)
        wider, _ = widen(model, "layers.0", 5)
        deeper, _ = deepen(wider, "layers.0", calibration=images().to(dtype))
        assert {p.dtype for p in deeper.parameters()} == {dtype}
        assert difference(model, deeper, images().to(dtype)) <= bound


def test_copies_leave_the_original_alone() -> None:
    model = plain()
    before = copy.deepcopy(model.state_dict())
    grown, _ = widen(model, "layers.0", 5)
    deeper, path = deepen(model, "layers.0", calibration=images())
    with torch.no_grad():
        for p in [*grown.parameters(), *deeper.parameters()]:
            p.zero_()
    assert path == "layers.3" and list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training


def test_same_generator_same_growth() -> None:
    one, growth = widen(plain(), "layers.0", 8, generator=noisy(5), noise=0.1)
    two, other = widen(plain(), "layers.0", 8, generator=noisy(5), noise=0.1)
    assert torch.equal(growth.indices, other.indices)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(widen(plain(), "layers.0", 8, generator=noisy(6))[1].indices, growth.indices)


def test_inserted_norm_is_an_identity_that_normalises() -> None:
    model, x = plain(), images(8)
    deeper, path = deepen(model, "layers.0", calibration=[x, x[:1] + 100])  # the first batch counts
    norm = deeper.get_submodule("layers.4")
    assert path == "layers.3" and isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        values = model.layers[:3](x).transpose(0, 1).flatten(1)
    assert torch.allclose(norm.running_mean, values.mean(1)) and torch.allclose(norm.bias, values.mean(1))
    assert torch.allclose(norm.running_var, values.var(1, correction=0))
    assert torch.allclose(norm.weight, (values.var(1, correction=0) + norm.eps).sqrt())
    assert int(norm.num_batches_tracked) == 0
    # In training mode on the same batch it is the same map, with the statistics of the batch.
    inside = nn.Sequential(*deeper.layers[3:6]).train()
    with torch.no_grad():
        before = model.layers[:3](x)
        assert torch.allclose(inside(before), before, atol=1e-6)


# -- other networks -------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A residual branch, pre-activation, a concatenation and functional pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.inner = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.outer = nn.Conv2d(4, 3, 1)
        self.side = nn.Conv2d(3, 2, 1)
        self.slope = nn.PReLU(2)
        self.depthwise = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.last = nn.Conv2d(5, 2, 1)
        self.head = nn.Linear(2 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(torch.relu(self.norm(self.inner(x))))
        both = torch.cat([x, self.slope(self.side(x)), self.slope(self.side(x))][:2], dim=1)
        out = nn.functional.max_pool2d(self.last(self.depthwise(both)), 2)
        return self.head(out.view(out.size(0), -1))


def branches() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lived_in(Branches())


def test_layers_inside_a_branch_and_before_a_view_grow() -> None:
    model = branches()
    inner, _ = widen(model, "inner", 7)
    assert difference(model, inner, images()) <= 1e-8
    assert inner.norm.num_features == 7 and inner.outer.in_channels == 7
    last, _ = widen(model, "last", 3)
    assert last.head.in_features == 48 and difference(model, last, images()) <= 1e-8


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("stem", "addends must share one map"),
        ("outer", "addends must share one map"),
        ("depthwise", "5 groups"),
        ("head", "outputs of the model"),
        ("side", "groups"),
        ("norm", "expected Conv2d or Linear"),
        ("nothing", "there is no 'nothing'"),
    ],
)
def test_what_cannot_grow_alone(layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        widen_(branches(), layer, 9)


def test_concatenation_with_a_channel_wise_slope() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 3, 1)
            self.slope = nn.PReLU(3)
            self.norm = nn.BatchNorm2d(8)
            self.read = nn.Conv2d(8, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            b = self.slope(self.b(x))
            return self.read(self.norm(torch.cat((b, self.a(x), b), 1))).mean((2, 3))

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = lived_in(Cat())
        nn.init.uniform_(model.slope.weight)  # type: ignore[union-attr, arg-type]
    reach = find_reach(model, "b")
    assert reach.consumers == (Reader("read", (0, 5), 1),)
    grown, _ = widen(model, "b", 5)
    assert grown.norm.num_features == 12 and grown.slope.num_parameters == 5
    assert difference(model, grown, images()) <= 1e-8
    assert difference(model, widen(model, "a", 4)[0], images()) <= 1e-8


def test_consumers_that_the_caller_names() -> None:
    model = plain()
    by_trace, _ = widen(model, "layers.7", 6, generator=noisy(1))
    named, _ = widen(model, "layers.7", 6, ["layers.8", "layers.11"], generator=noisy(1))
    assert all(
        torch.equal(a, b) for a, b in zip(by_trace.state_dict().values(), named.state_dict().values(), strict=True)
    )
    with pytest.raises(InputError, match=r"no 'layers\.99'"):
        widen_(plain(), "layers.7", 6, ["layers.99"])
    with pytest.raises(InputError, match="at least one layer"):
        widen_(plain(), "layers.7", 6, ["layers.8"])
    with pytest.raises(InputError, match="no multiple"):
        widen_(plain(), "layers.0", 6, ["layers.7"])
    with pytest.raises(InputError, match="does not fit"):
        widen_(plain(), "layers.0", 6, [Reader("layers.3", (2,))])


def test_shared_layers_and_untraceable_models() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    with pytest.raises(InputError, match="used 2 times"):
        widen_(Twice(), "a", 5)

    class Depends(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else x

    with pytest.raises(InputError, match="cannot be traced"):
        widen_(Depends(), "a", 5)
    assert widen_(Depends(), "a", 5, ["b"]).new_width == 5


def test_new_width_must_be_larger() -> None:
    for width in (3, 2, 0):
        with pytest.raises(ValueError, match="new_width"):
            widen_(plain(), "layers.0", width)


# -- deepen -----------------------------------------------------------------------------------------------------------


def stack(activation: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 2)).double().eval()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.Hardtanh()])
def test_idempotent_activations_pass(activation: nn.Module) -> None:
    model = stack(activation)
    deeper, path = deepen(model, "0", "linear")
    assert path == "2" and len(deeper) == 5
    assert difference(model, deeper, torch.randn(9, 4, generator=noisy(0), dtype=torch.float64)) <= 1e-8


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.LeakyReLU()])
def test_other_activations_are_refused(activation: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"after: {type(activation).__name__}"):
        deepen_(stack(activation), "0")


def test_deepen_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(ValueError, match="kernel_size: got 4"):
        deepen_(plain(), "layers.0", kernel_size=4, calibration=images())
    with pytest.raises(ValueError, match="calibration: a BatchNorm"):
        deepen_(plain(), "layers.0")
    with pytest.raises(ValueError, match="kind: got 'linear'"):
        deepen_(plain(), "layers.0", "linear", calibration=images())
    with pytest.raises(ValueError, match="after: there is no"):
        deepen_(plain(), "layers.77")
    with pytest.raises(ValueError, match="no activation module"):
        deepen_(branches(), "stem")
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), nn.Identity())
    model[3] = shared
    with pytest.raises(ValueError, match="used 2 times"):
        deepen_(model, "0")


def test_an_activation_outside_a_sequence_becomes_one() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.conv(x)))

    model = Named().double().eval()
    deeper, path = deepen(model, "conv", kernel_size=5)
    assert path == "act.1" and deeper.get_submodule(path).kernel_size == (5, 5)
    assert difference(model, deeper, images()) <= 1e-8
    again, path = deepen(deeper, path)
    assert path == "act.3" and difference(model, again, images()) <= 1e-8


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_feed_forward_parts_of_transformers(name: str) -> None:
    model, batches = ZOO[name]()
    model = model.double().eval()
    ids = batches[0]["input_ids"]
    part = next(iter(feed_forwards(model)))
    before = feed_forwards(model)[part].neurons
    wider, growth = widen_mlp(model, part, before + 7, noisy(0))
    assert feed_forwards(wider)[part].neurons == before + 7 == growth.new_width
    assert feed_forwards(model)[part].neurons == before
    with torch.no_grad():
        assert (model(input_ids=ids).logits - wider(input_ids=ids).logits).abs().max() <= 1e-8
        loud, _ = widen_mlp(model, part, before + 7, noisy(0), noise=0.1)
        assert (model(input_ids=ids).logits - loud(input_ids=ids).logits).abs().max() > 1e-8


def test_feed_forward_bad_input() -> None:
    model, _ = ZOO["llama"]()
    part = next(iter(feed_forwards(model)))
    with pytest.raises(ValueError, match="use widen_mlp"):
        widen_(model, part.replace("down", "up"), 99)
    with pytest.raises(ValueError, match="new_width"):
        widen_mlp(model, part, 1)
    with pytest.raises(ValueError, match="unknown feed-forward part"):
        widen_mlp(model, "no.such.part", 99)
    with pytest.raises(ValueError, match="no plain feed-forward part"):
        widen_mlp(nn.Linear(2, 2), "x", 99)


def test_wider_and_deeper_transformer_together() -> None:
    """Identity blocks and wider parts compose."""
    model, batches = ZOO["llama"]()
    model = model.double().eval()
    grown = expand_blocks(model, 1, init="identity")[0]
    part = list(feed_forwards(grown))[-1]
    wider, _ = widen_mlp(grown, part, feed_forwards(grown)[part].neurons + 3)
    with torch.no_grad():
        ids = batches[0]["input_ids"]
        assert (model(input_ids=ids).logits - wider(input_ids=ids).logits).abs().max() <= 1e-8
