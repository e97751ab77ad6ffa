"""Extracted sub-networks compute what the slices do, and own what they compute it with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layerwright.data.speech import generated_speech
from layerwright.models.rnnt import RNNT
from layerwright.nn.elastic import ElasticLinear, ElasticStack, FeedForward, active_parameters
from layerwright.nn.subnet import SubnetConfig
from layerwright.treat.subnet import extract_subnet
from layerwright.tune.supernet import Supernet


def network(bidirectional: bool = False) -> RNNT:
    return RNNT(
        12,
        9,
        3,
        (4, 8),
        dim=8,
        heads=2,
        state_size=4,
        predictor_dim=8,
        joiner_dim=8,
        dropout=0.2,
        bidirectional=bidirectional,
    )


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_configuration(bidirectional: bool) -> None:
    model = network(bidirectional).eval()
    supernet = Supernet(model)
    batch = next(generated_speech(3, 1).batches(3))
    assert len(supernet.space) == 26
    for config in supernet.space:
        small = extract_subnet(model, config)
        with supernet.active(config), torch.no_grad():
            expected = model(**batch).logits
            assert torch.allclose(small(**batch).logits, expected, atol=1e-6)
            assert sum(p.numel() for p in small.parameters()) == active_parameters(model)
        assert not any(isinstance(module, ElasticLinear | ElasticStack) for module in small.modules())
        assert all(p.is_contiguous() for p in small.parameters())
        assert [block.ffn.dropout_rate for block in small.blocks] == pytest.approx(  # type: ignore[union-attr]
            [0.2 * width / 8 for width in config.widths]
        )


def test_slices_that_do_not_run_get_no_gradient() -> None:
    model = network()
    supernet = Supernet(model)
    batch = next(generated_speech(3, 1).batches(3))
    for config in supernet.space:
        model.zero_grad(set_to_none=True)
        with supernet.active(config):
            model(**batch).logits.square().sum().backward()
        chosen = dict(zip(config.keep, config.widths, strict=True))
        for index, part in enumerate(supernet.stack.feed_forwards()):
            if index not in chosen:
                assert all(p.grad is None for p in model.blocks[index].parameters())
                continue
            width = chosen[index]
            for parameter, dim in ((part.inner.weight, 0), (part.inner.bias, 0), (part.outer.weight, 1)):
                assert parameter.grad is not None
                assert parameter.grad.narrow(dim, 0, width).any()
                assert not parameter.grad.narrow(dim, width, 8 - width).any()


def test_the_model_is_left_alone_and_shares_nothing() -> None:
    model = network()
    supernet = Supernet(model)
    before = copy.deepcopy(model.state_dict())
    small = extract_subnet(model, SubnetConfig((0, 2), (4, 8)))
    assert supernet.stack.config == supernet.max()
    assert small.training and all(isinstance(block.ffn, FeedForward) for block in small.blocks)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The small model is of the same class, described by its own words, and trains.
    small = extract_subnet(model, SubnetConfig((0, 2), (4, 8))).eval()
    assert small.to_spec() == ["ffn-4", "ffn-8"]
    again = RNNT.from_spec(small.to_spec(), **small.settings()).eval()
    again.load_state_dict(small.state_dict())
    batch = next(generated_speech(3, 1).batches(3))
    assert torch.equal(again(**batch).logits, small(**batch).logits)
    small(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="holds 0 ElasticStack"):
        extract_subnet(nn.Linear(2, 2), SubnetConfig((0,), (4,)))
    for config, axis in ((SubnetConfig((0,), (5,)), "widths"), (SubnetConfig((3,), (4,)), "keep")):
        with pytest.raises(ValueError, match=axis):
            extract_subnet(network(), config)
