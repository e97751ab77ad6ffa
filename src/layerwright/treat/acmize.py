"""Replace feed-forward parts and attention projections by modules whose width each token chooses (ACM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.nn._adaptive_gate import AdaptiveCalls
from layerwright.nn.adaptive import AdaptiveComputationModule, BiasAt, PassOn
from layerwright.nn.slices import linear_weight
from layerwright.score.costs import count_flops
from layerwright.treat._adaptive_sites import Site, find_sites, site_activation

__all__ = ["ACMHandle", "AdaptiveFlops", "FirstWeights", "acmize", "find_acm", "learner_width"]

FirstWeights = Literal["random", "sliced"]


class AdaptiveFlops(dict[str, float]):
    """FLOPs by part: ``rest``, and each adaptive module by its path."""

    @property
    def total(self) -> float:
        """Of the whole model."""
        return sum(self.values())


class ACMHandle:
    """The adaptive modules of a model: what their gates chose, what that costs, and how to fix their width.

    Args:
        model: with adaptive modules in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        found = self.modules
        if not found:
            raise InputError(f"{type(model).__name__} has no adaptive modules: acmize puts them in")
        calls = next(iter(found.values())).calls
        if calls.hook is None:  # not linked yet
            calls = AdaptiveCalls()
            calls.follow(model)
        for number, module in enumerate(found.values()):
            module.calls, module.index = calls, number
        self.calls = calls

    @property
    def modules(self) -> dict[str, AdaptiveComputationModule]:
        """By path, in the model's order."""
        named = self.model.named_modules()
        return {path: module for path, module in named if isinstance(module, AdaptiveComputationModule)}

    @property
    def inputs(self) -> dict[str, str]:
        """Where in the original model the input of each module is read, by path of the module."""
        entries = {m.to_path: path for path, m in self.model.named_modules() if isinstance(m, PassOn) and m.to_path}
        return {path: entries.get(path, path) for path in self.modules}

    @contextmanager
    def learning(self, seed: int | None = None) -> Iterator[nn.Module]:
        """Context: gates are sampled and get gradients, also in evaluation mode.

        Args:
            seed: of the samples; None draws from torch's own generator.
        """
        before = self.calls.learning, self.calls.seed
        self.calls.learning, self.calls.seed = True, seed
        try:
            yield self.model
        finally:
            self.calls.learning, self.calls.seed = before

    @contextmanager
    def fixed(self, width: int | float) -> Iterator[nn.Module]:
        """Context: all tokens take `width` learners, or that share of them; gates are not asked.

        Raises:
            InputError: more learners than there are, or a share outside 0.0 to 1.0.
        """
        for module in self.modules.values():
            module.width(width)
        before = self.calls.width
        self.calls.width = width
        try:
            yield self.model
        finally:
            self.calls.width = before

    def gates(self) -> dict[str, Tensor]:
        """Gates ``(batch, tokens, num_learners + 1)`` of the last call, by path."""
        found = {path: module.last_gates for path, module in self.modules.items()}
        return {path: gates for path, gates in found.items() if gates is not None}

    def usage(self) -> dict[str, Tensor]:
        """Share of tokens (padding left out) that took 0, 1, ... learners since `reset`, by path, float64."""
        found = {}
        for path, module in self.modules.items():
            counts = torch.zeros(module.num_learners + 1) if module.counts is None else module.counts.cpu()
            found[path] = counts.double() / counts.sum()
        return found

    def executed_fraction(self) -> float:
        """``sum_l c_l mean(k_l) / sum_l c_l N_l`` since `reset`, with `c` the FLOPs of one learner; NaN before a call."""
        modules, usage = self.modules, self.usage()
        whole = sum(module.learner_flops * module.num_learners for module in modules.values())
        spent = sum(
            module.learner_flops * float(usage[path] @ torch.arange(module.num_learners + 1.0).double())
            for path, module in modules.items()
        )
        return spent / whole

    def reset(self) -> None:
        """Count from zero, and forget the last call."""
        for module in self.modules.values():
            module.counts, module.last = None, None

    def flops(self, run: Callable[[], object]) -> AdaptiveFlops:
        """FLOPs of one `run` of the model: what is not adaptive, and gate and learners of each module.

        Those of the modules follow from what their gates choose, ``tokens * (gate + mean(k) * learner)``; padding is
        computed and counted. A multiply-add is 2; matrix products count.
        """
        chosen: dict[str, float] = {}
        handles = [module.register_forward_hook(_spent(path, module, chosen)) for path, module in self.modules.items()]
        try:
            counted = count_flops(self.model, run)
        finally:
            for handle in handles:
                handle.remove()
        inside = sum(counted.get(path, 0.0) for path in self.modules)
        return AdaptiveFlops({"rest": counted[""] - inside} | chosen)


def _spent(path: str, module: AdaptiveComputationModule, into: dict[str, float]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        assert module.last is not None
        choice = module.last.choice
        gate = choice.numel() * module.gate_flops if module.calls.width is None else 0
        into[path] = into.get(path, 0.0) + gate + int(choice.sum()) * module.learner_flops

    return hook


def learner_width(site: Site, num_learners: int, total_flops: float = 1.0) -> int:
    """Hidden features of one learner, so that all of them cost `total_flops` times what stands at the site.

    For a feed-forward part ``round(total / N * weights / (2 d))``: its inner width where it has two matrices, one and a
    half times that where it is gated. For a projection ``round(total / N * (d^2 + d) / (2 d + 1))``, equal parameters.
    """
    share = total_flops / num_learners
    if site.kind == "mlp":
        return max(1, round(share * site.weights / (site.dim + site.out_dim)))
    return max(1, round(share * (site.weights + site.out_dim) / (site.dim + site.out_dim + 1)))


def acmize(
    model: nn.Module,
    targets: str | Sequence[str] = "mlp",
    num_learners: int = 4,
    total_flops: float = 1.0,
    *,
    min_learners: int | None = None,
    activation: str = "gelu",
    first_weights: FirstWeights = "random",
    gate_hidden: int = 16,
    gate_depth: int = 3,
    tau: float = 0.8,
    seed: int = 0,
    copy: bool = True,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Put adaptive modules in place of feed-forward parts and projections (Wojcik et al., 2023, arXiv 2312.10193).

    The new modules know nothing yet (unless `first_weights` is ``sliced``): `tune.acm` trains them on what they
    replace. What was replaced may be one module, or layers in two (BERT) or in the block itself (BART), whose places
    then pass on what they are given.

    Args:
        model: any model with blocks (or any, with `targets` by name).
        targets: ``mlp``, ``attention``, ``mlp+attention``, or names of modules: feed-forward parts, projections of
            attention, linear layers with as many features out as in.
        num_learners: learners of each module, N.
        total_flops: cost of all learners of a module over the cost of what it replaces; above 0.
        min_learners: smallest choice; None for 0 in feed-forward parts and 1 in projections.
        activation: of the learners in feed-forward parts; those in projections are linear.
        first_weights: ``random``; or ``sliced``: learners begin as slices of what they replace, the neurons with the
            largest weights first, in projections its singular directions, so that all of them together compute what
            the part did (a projection: its best approximation of that rank). Takes a plain feed-forward part, its
            own activation and `total_flops` 1, and gives an output bias where the part has one.
        gate_hidden, gate_depth, tau: of the gates.
        seed: of the first weights.
        copy: leave `model` alone; the result shares the tensors that stay. False changes it.

    Returns:
        The model, and the paths of the adaptive modules.

    Raises:
        InputError: a setting outside its range, an unknown name, `min_learners` 0 for a module outside a residual branch,
            or a model that is adaptive already.
        TypeError: a target that is no feed-forward part and no such linear layer.
    """
    if num_learners < 1:
        raise InputError(f"num_learners: got {num_learners}, expected at least 1")
    if not 0 < total_flops < float("inf"):
        raise InputError(f"total_flops: got {total_flops}, expected a number above 0")
    if first_weights not in get_args(FirstWeights):
        raise unknown_name("first_weights", str(first_weights), get_args(FirstWeights))
    if any(isinstance(module, AdaptiveComputationModule) for module in model.modules()):
        raise InputError("model: it has adaptive modules already; acmize the original")
    sites = find_sites(model, targets)
    settings = {"gate_hidden": gate_hidden, "gate_depth": gate_depth, "tau": tau, "num_learners": num_learners}
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, AdaptiveComputationModule] = {}
    for site in sites:
        smallest = _smallest(site, min_learners)
        width = learner_width(site, num_learners, total_flops)
        more: dict[str, Any] = settings | {"out_dim": site.out_dim, "min_learners": smallest, "generator": generator}
        name = "identity" if site.kind == "projection" else activation
        if first_weights == "sliced":
            made[site.path] = _sliced(model, site, width, total_flops, more)
        else:
            made[site.path] = AdaptiveComputationModule(site.dim, width, activation=name, **more)
    result = structure_copy(model) if copy else model
    for site in sites:
        _put_in_(result, site, made[site.path])
    ACMHandle(result)
    return result, tuple(made)


def find_acm(model: nn.Module) -> ACMHandle | None:
    """The handle of a model with adaptive modules (a loaded or copied one too), None if it has none."""
    there = any(isinstance(module, AdaptiveComputationModule) for module in model.modules())
    return ACMHandle(model) if there else None


def _smallest(site: Site, min_learners: int | None) -> int:
    if min_learners is None:
        return 0 if site.residual and site.kind == "mlp" else 1
    if min_learners == 0 and not site.residual:
        raise InputError(
            f"min_learners: got 0 for {site.path}, which is not in a residual branch: no learner gives h_0 = 0, "
            "which would zero the signal; expected at least 1"
        )
    return min_learners


def _put_in_(model: nn.Module, site: Site, module: AdaptiveComputationModule) -> None:
    """Put `module` at the site's output, and pass on what comes before it there, in place."""
    old = model.get_submodule(site.path)
    like = model.get_submodule(site.layers[-1]).weight
    assert isinstance(like, Tensor)
    model.set_submodule(site.path, module.to(device=like.device, dtype=like.dtype).train(old.training))
    for number, path in enumerate(site.passed):
        passing = PassOn("" if number else site.path)
        model.set_submodule(path, passing.train(old.training))


@torch.no_grad()
def _sliced(
    model: nn.Module, site: Site, width: int, total_flops: float, settings: Mapping[str, Any]
) -> AdaptiveComputationModule:
    """A module whose learners are slices of what stands at the site."""
    hidden = width * settings["num_learners"]
    layers = [model.get_submodule(path) for path in site.layers]
    last = layers[-1]
    out_bias = getattr(last, "bias", None)
    if site.kind == "projection":
        left, values, right = torch.linalg.svd(linear_weight(last).float(), full_matrices=False)
        rank = min(hidden, len(values))
        root = values[:rank].sqrt()
        up, down, up_bias, name = root[:, None] * right[:rank], left[:, :rank] * root, None, "identity"
    else:
        name = site_activation(model, site) or ""
        plain = len(layers) == 2 and linear_weight(layers[0]).shape[0] == linear_weight(last).shape[1]
        if not plain or not name or total_flops != 1:
            raise InputError(
                f"first_weights: {site.path} cannot be cut into slices, which takes a feed-forward part of two layers "
                "with a known activation between them, and total_flops 1; use 'random'"
            )
        up, up_bias, down = (
            linear_weight(layers[0]).float(),
            getattr(layers[0], "bias", None),
            linear_weight(last).float(),
        )
        order = (up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True, stable=True)
        up, down = up[order], down[:, order]
        up_bias = None if up_bias is None else up_bias[order]
    biases: dict[tuple[bool, bool], BiasAt] = {(True, True): "both", (True, False): "hidden", (False, True): "out"}
    bias: BiasAt = biases.get((up_bias is not None, out_bias is not None), "none")
    module = AdaptiveComputationModule(site.dim, width, activation=name, bias=bias, **settings)
    rows = min(hidden, up.shape[0])
    for parameter in (module.up.weight, module.down.weight, module.up.bias):
        if parameter is not None:
            parameter.zero_()
    module.up.weight[:rows] = up[:rows]
    module.down.weight[:, :rows] = down[:, :rows]
    if up_bias is not None:
        module.up.bias[:rows] = up_bias[:rows].float()
    if out_bias is not None and module.out_bias is not None:
        module.out_bias[0] = out_bias.float()
    return module
