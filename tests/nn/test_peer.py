"""PEER layers: every form of the same sums, their gradients, and identities that the mathematics has."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.nn import _expert_rows
from layerwright.nn._expert_rows import RowLists, row_dots, row_sums
from layerwright.nn.peer import PEER, bytes_per_token, expert_tables, flops_per_token, matched_ffn_width
from layerwright.nn.replace import module_from_spec
from oracles.peer import peer_output, sampled_dots


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(**more: object) -> PEER:
    form = {"dim": 12, "num_experts": 49, "heads": 3, "top_k": 4, "query_dim": 8} | more
    return PEER(**form, generator=torch.Generator().manual_seed(1))


def numbers(module: PEER, x: torch.Tensor, backend: str, gradients: str = "dense") -> list[torch.Tensor]:
    """Output, and gradients by input and by every parameter."""
    module.backend, module.gradients = backend, gradients
    for parameter in module.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_()
    y = module(x)
    (y * draw(*y.shape, seed=8).to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.to_dense() for p in module.parameters())]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_output_is_that_of_the_slow_form(shared: bool, norm: str) -> None:
    module = layer(share_keys=shared, query_norm=norm)
    if norm == "batch":
        module(draw(30, 12) + 1)  # statistics that are not the first ones
    module.eval()
    x = draw(2, 3, 12)
    wanted = peer_output(module, x.view(6, 12)).view(2, 3, 12)
    for backend in ("auto", "naive", "bag", "dense"):
        module.backend = backend
        assert torch.allclose(module(x).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("gradients", ["dense", "sparse"])
def test_backends_agree_in_output_and_gradients(activation: str, gradients: str) -> None:
    module = layer(activation=activation, query_norm="none")
    x = draw(2, 5, 12)
    wanted = numbers(module, x, "naive")
    for backend in ("bag", "dense", "auto"):
        for a, b in zip(wanted, numbers(module, x, backend, gradients), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bags", "listed", "rows"), [(5, 7, 50), (3, 40, 30), (4, 1, 9)])
def test_rows_without_copies_are_the_gathered_ones(dtype: torch.dtype, bags: int, listed: int, rows: int) -> None:
    indices = torch.randint(rows, (bags, listed), generator=torch.Generator().manual_seed(3))
    given = [draw(bags, 24), draw(rows, 24, seed=1) / 5, draw(bags, listed, seed=2)]
    lists, found = RowLists(indices), {}
    for backend in ("naive", "bag"):
        wide = torch.float64 if backend == "naive" else dtype
        x, table, weights = (tensor.to(dtype).to(wide).requires_grad_() for tensor in given)
        dots = row_dots(x, table, lists, backend)
        sums = row_sums(dots * weights, table, lists, backend)
        sums.square().sum().backward()
        found[backend] = [dots.detach(), sums.detach(), x.grad, table.grad, weights.grad]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for a, b in zip(found["naive"], found["bag"], strict=True):
        assert b.dtype == dtype
        assert float((a - b.double()).abs().max()) <= tolerance * float(a.abs().max())


def test_every_way_to_the_products_is_one_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = draw(4, 24), draw(30, 24, seed=1)
    lists = RowLists(torch.randint(30, (4, 6), generator=torch.Generator().manual_seed(3)))
    wanted = sampled_dots(x, table, lists.indices)
    assert _expert_rows._sampled_works()
    assert torch.allclose(_expert_rows._sampled(x, table, lists.indices), wanted, atol=1e-5)
    monkeypatch.setattr(_expert_rows, "_sampled_works", lambda: False)
    assert torch.allclose(row_dots(x, table, lists, "bag"), wanted, atol=1e-5)
    assert torch.allclose(row_dots(x, table, lists, "naive"), wanted, atol=1e-5)


def test_a_row_listed_twice_counts_twice_and_others_do_not_matter() -> None:
    table = draw(9, 24)
    table[4:] = float("nan")
    lists = RowLists(torch.tensor([[1, 1, 3], [3, 0, 1]]))
    weights = draw(2, 3).requires_grad_()
    sums = row_sums(weights, table.requires_grad_(), lists, "bag", "sparse")
    assert torch.allclose(sums[0], (weights[0, 0] + weights[0, 1]) * table[1] + weights[0, 2] * table[3], atol=1e-6)
    sums.sum().backward()
    assert table.grad._indices().tolist() == [[0, 1, 3]]  # each row once
    assert torch.allclose(
        table.grad._values()[1], (weights[0, 0] + weights[0, 1] + weights[1, 2]).expand(24), atol=1e-6
    )
    assert bool(weights.grad.isfinite().all())


def test_gradcheck_with_fixed_indices() -> None:
    module = layer(gradients="dense").double()
    indices = torch.randint(49, (3, 3, 4), generator=torch.Generator().manual_seed(0))

    def run(x: torch.Tensor, gates: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        changed = {"down": down, "up": up}
        return torch.func.functional_call(
            _Experts(module), {f"layer.{k}": v for k, v in changed.items()}, (x, gates, indices)
        )

    for backend in ("naive", "bag", "dense"):
        module.backend = backend
        gates = draw(3, 3, 4).double().softmax(-1)
        given = (draw(3, 12).double(), gates, module.down.detach(), module.up.detach())
        assert torch.autograd.gradcheck(run, [tensor.clone().requires_grad_() for tensor in given])


class _Experts(torch.nn.Module):
    def __init__(self, inner: PEER) -> None:
        super().__init__()
        self.layer = inner

    def forward(self, x: torch.Tensor, gates: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return self.layer.experts(x, gates, indices)


def test_all_experts_with_equal_gates_are_a_dense_layer() -> None:
    module = layer(heads=1, top_k=49)
    module.router.keys.data.zero_()
    x = draw(5, 12)
    dense = F.gelu(x @ module.down.t()) @ module.up / 49
    for backend in ("bag", "dense", "naive"):
        module.backend = backend
        assert torch.allclose(module(x), dense, atol=1e-5)


def test_one_expert_of_each_head_is_a_network_assembled_for_the_token() -> None:
    module = layer(top_k=1)  # the softmax of one score is 1
    x = draw(6, 12)
    gates, indices = module.router(x)
    assert torch.equal(gates, torch.ones(6, 3, 1))
    y = module(x)
    for t in range(6):
        own = indices[t, :, 0]
        assert torch.allclose(y[t], F.gelu(x[t] @ module.down[own].t()) @ module.up[own], atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_experts_permuted_with_their_keys_compute_the_same(seed: int) -> None:
    module, other = layer().eval(), layer().eval()
    draws = torch.Generator().manual_seed(seed)
    first, second = torch.randperm(7, generator=draws), torch.randperm(7, generator=draws)
    order = (first[:, None] * 7 + second[None]).flatten()
    with torch.no_grad():
        other.router.keys[0], other.router.keys[1] = module.router.keys[0][first], module.router.keys[1][second]
        other.down.copy_(module.down[order])
        other.up.copy_(module.up[order])
    x = draw(5, 12, seed=seed)
    assert torch.allclose(module(x), other(x), atol=1e-5)


def test_in_evaluation_a_token_depends_on_itself_alone() -> None:
    module = layer()
    module(draw(40, 12) * 2)
    module.eval()
    x = draw(2, 6, 12)
    whole = module(x)
    for t in range(6):
        assert torch.allclose(module(x[:, t : t + 1]), whole[:, t : t + 1], atol=1e-6)
    module.train()
    assert not torch.allclose(module(x[:, :3]), whole[:, :3], atol=1e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's optimizers say nothing about them
def test_sparse_gradients_and_the_optimizers_that_take_them() -> None:
    module = PEER(12, 1024, 2, 2, 8, generator=torch.Generator().manual_seed(1))
    before = module.down.detach().clone()
    optimizers = (
        torch.optim.SparseAdam(expert_tables(module), lr=1e-2),
        torch.optim.Adam([module.router.query, module.router.keys], lr=1e-2),
    )
    x, losses = draw(20, 12), []
    for _ in range(30):
        loss = (module(x) - x).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        assert module.down.grad.is_sparse
        assert module.down.grad._nnz() <= 80
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    changed = (module.down.detach() != before).any(1)
    assert 0 < int(changed.sum()) < 1024
    for kind in (torch.optim.Adagrad, torch.optim.SGD):
        module(x).sum().backward()
        kind(expert_tables(module), lr=1e-3).step()


def test_nothing_of_the_size_of_the_gathered_rows_or_all_experts_is_kept() -> None:
    module = PEER(64, 128**2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    x = draw(64, 64).requires_grad_()
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in {module.down.data_ptr(), module.up.data_ptr()}:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    assert max(kept) <= 64 * 64 * 4  # tokens times active experts, or queries; gathered rows would be 64 times that
    y.sum().backward()
    assert module.down.grad._nnz() < 128**2


def test_gradients_are_the_same_each_time_and_in_threads() -> None:
    module = layer(query_norm="none")
    first = numbers(module, draw(30, 12), "bag")
    for a, b in zip(first, numbers(module, draw(30, 12), "bag"), strict=True):
        assert torch.equal(a, b)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(module(draw(30, 12)).detach())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(result, first[0], atol=1e-6) for result in results)
    assert len(results) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    wide = layer().eval()
    half = layer().eval().to(dtype)
    x = draw(6, 12)
    y = half(x.to(dtype))
    assert y.dtype == dtype
    for backend in ("naive", "bag", "dense"):
        half.backend = backend
        assert torch.allclose(half(x.to(dtype)).float(), y.float(), atol=2e-2)
    again = layer().eval()
    again.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    error = (again(x.to(dtype).float()) - y.float()).detach().abs().max()
    assert float(error) < 0.03 * float(wide(x).detach().abs().max())


def test_compiled_whole() -> None:
    module = layer().eval()
    x = draw(5, 12)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), module(x), atol=1e-6)


def test_backend_is_chosen_by_size() -> None:
    small, large = layer(), layer(num_experts=900, heads=1)
    x = draw(4, 12)
    assert small._backend(x) == "bag"  # gradients are sparse, and asked for
    with torch.no_grad():
        assert small._backend(x) == "dense"
        assert large._backend(x) == "bag"
    small.gradients = "dense"
    assert small._backend(x) == "dense"


def test_costs() -> None:
    module = PEER(64, 64**2, 4, 8, 32)
    assert flops_per_token(module) == 2 * 64 * 4 * 32 + 2 * 4 * 64 * 32 + 4 * 64 * 32 == 40_960
    assert matched_ffn_width(module) == 160
    assert matched_ffn_width(module, gated=True) == round(160 * 2 / 3)
    assert bytes_per_token(module) == 2 * 32 * 64 * 4
    with torch.device("meta"):
        paper = PEER(1024)
    assert sum(p.numel() for p in (paper.down, paper.up)) == 2 * 1024**3
    assert bytes_per_token(paper.to(torch.bfloat16)) == 512 * 1024
    assert (paper.router.heads, paper.router.top_k, paper.active) == (8, 16, 128)


def test_written_down_and_built_again() -> None:
    module = layer(gate="sigmoid", share_keys=False, query_norm="layer", activation="silu", gradients="dense")
    module = module.to(torch.bfloat16).eval()
    again = module_from_spec(module.spec())
    assert isinstance(again, PEER)
    assert again.spec() == module.spec()
    again.load_state_dict(module.state_dict())
    x = draw(5, 12).bfloat16()
    assert torch.equal(again.eval()(x), module(x))
    with torch.device("meta"):
        assert module_from_spec(layer().spec()).down.is_meta


def test_empty_input_and_wrong_ones() -> None:
    module = layer()
    assert module(torch.zeros(0, 12)).shape == (0, 12)
    assert module(torch.zeros(2, 0, 12)).shape == (2, 0, 12)
    with pytest.raises(InputError, match="at least 2"):
        module(torch.zeros(1, 12))
    with pytest.raises(InputError, match=r"expected \(..., 12\)"):
        module(torch.zeros(5, 11))
    with pytest.raises(TypeError, match="floating-point"):
        module(torch.zeros(5, 12, dtype=torch.int32))
    with pytest.raises(InputError, match="needs CUDA and the package triton, got cpu"):
        layer(backend="triton")(torch.zeros(5, 12))
    for wrong in ({"activation": "gellu"}, {"gradients": "some"}, {"backend": "fast"}, {"num_experts": 50}):
        with pytest.raises(InputError):
            layer(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("bags", "listed", "rows", "dim"), [(5, 7, 50, 24), (3, 40, 30, 300), (4, 1, 9, 64)])
def test_kernels_are_the_gathered_form(dtype: torch.dtype, bags: int, listed: int, rows: int, dim: int) -> None:
    """On a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    pytest.importorskip("triton")
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        pytest.skip("neither a GPU nor Triton's interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draws = torch.Generator().manual_seed(3)
    lists = RowLists(torch.randint(rows, (bags, listed), generator=draws).to(device))
    given = [draw(bags, dim), draw(rows, dim, seed=1) / dim**0.5, draw(bags, listed, seed=2)]
    found = {}
    for backend in ("naive", "triton"):
        wide = torch.float64 if backend == "naive" else dtype
        x, table, weights = (tensor.to(dtype).to(device, wide).requires_grad_() for tensor in given)
        dots = row_dots(x, table, lists, backend)
        sums = row_sums(dots * weights, table, lists, backend)
        sums.square().sum().backward()
        found[backend] = [dots.detach(), sums.detach(), x.grad, table.grad, weights.grad]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip(found["naive"], found["triton"], strict=True):
        assert b.dtype == dtype
        assert float((a - b.double()).abs().max()) <= tolerance * float(a.abs().max())
