"""Can vision transformers perform convolution? (Li et al., 2021, arXiv 2111.01353): nine heads, exactly, and as a start."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.evidence import Check, Evidence
from layerwright.data.shape_scenes import SHAPES, single_scenes
from layerwright.nn.conv_as_attention import conv_to_attention, patch_conv_blocks
from layerwright.nn.patches import PatchConv, from_patches, to_patches
from layerwright.nn.rel_pos_patch_attention import RelPosPatchAttention
from layerwright.studies.vision import accuracy, few_shot, fit_, mean_of, split_digits
from layerwright.theory.conv_attention import head_dims, heads_necessary, heads_sufficient, span_residual
from layerwright.tune.two_phase import two_phase

__all__ = ["CLAIM", "PatchTransformer", "exactness_rows", "run", "trained_residual"]

CLAIM = (
    "One attention layer over patches is any convolution, with nine heads where the kernel reaches no farther than the next "
    "patch and not with fewer; trained as convolutions first, a vision transformer needs less data."
)
SIZE, PATCH, CHANNELS, DEPTH, KEY_DIM, SHARPNESS = 16, 4, 3, 4, 8, 6.0
BATCH, RATE = 32, 4e-3
EPOCHS = {"digits": (25, 15), "scenes": (16, 10)}
"""Of the first and of the second phase; other arms train for their sum."""
PER_CLASS = {"digits": 10, "scenes": 50}
ARMS = ("plain", "two-phase", "offsets")
Progress = Callable[[str, int, int], None]
Labelled = tuple[Tensor, Tensor]


class PatchTransformer(nn.Module):
    """A vision transformer of few blocks: patches, a linear layer, blocks with norms first, the mean of the tokens.

    Args:
        mixer: makes what mixes the tokens of a block, from ``(batch, tokens, PATCH^2 CHANNELS)`` to the same.
        in_channels, classes: of the pictures and the logits.
    """

    def __init__(self, mixer: Callable[[], nn.Module], in_channels: int, classes: int) -> None:
        super().__init__()
        dim = PATCH**2 * CHANNELS
        self.embed = nn.Linear(PATCH**2 * in_channels, dim)
        self.mixers = nn.ModuleList([mixer() for _ in range(DEPTH)])
        self.mixer_norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(DEPTH)])
        self.ffns = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(DEPTH)]
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        x: Tensor = self.embed(to_patches(images, PATCH))
        for norm, mixer, ffn in zip(self.mixer_norms, self.mixers, self.ffns, strict=True):
            x = x + mixer(norm(x))
            x = x + ffn(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def exactness_rows(patches: Sequence[int], kernels: Sequence[int]) -> list[dict[str, Any]]:
    """Errors of convolutions with random weights and channels as attention, and heads used and needed."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for patch in patches:
        for kernel in kernels:
            inputs, outputs = (int(torch.randint(1, 5, (), generator=draw)) for _ in range(2))
            conv = nn.Conv2d(inputs, outputs, kernel, padding="same", dtype=torch.float64)
            _redraw_(conv, draw)
            images = torch.randn(2, inputs, 4 * patch, 5 * patch, dtype=torch.float64, generator=draw)
            row = {
                "arm": f"P = {patch}, K = {kernel}", "patch": patch, "kernel": kernel, "channels": f"{inputs} to {outputs}",
                "error, float64": _error(conv, patch, images), "error, float32": _error(conv.float(), patch, images.float()),
            }  # fmt: skip
            row["heads used"] = conv_to_attention(conv, patch).num_heads
            row["heads sufficient"] = heads_sufficient(kernel, patch)
            row["heads necessary"] = heads_necessary(conv.weight, patch)
            rows.append(row)
    return rows


@torch.no_grad()
def _error(conv: nn.Conv2d, patch: int, images: Tensor) -> float:
    grid = images.shape[2] // patch, images.shape[3] // patch
    out = from_patches(conv_to_attention(conv, patch)(to_patches(images, patch), grid), patch, grid)
    return float((out - conv(images)).abs().max())


@torch.no_grad()
def _redraw_(conv: nn.Conv2d, draw: torch.Generator) -> None:
    """Weights and bias at random, uniform, as layers start."""
    bound = conv.weight[0].numel() ** -0.5
    for parameter in conv.parameters():
        parameter.uniform_(-bound, bound, generator=draw)


def trained_residual(weight: Tensor, patch: int, heads: int, steps: int, seed: int = 0) -> float:
    """Relative error of heads without content, trained by L-BFGS in float64 to follow a convolution for white noise.

    What each head gives to the patches around an interior one (a softmax) is trained; its matrix is the best for that, by
    least squares, at every step.
    """
    target = torch.stack([block.flatten() for block in patch_conv_blocks(weight.double(), patch).values()])
    left, sizes, _ = torch.linalg.svd(target, full_matrices=False)
    target = left * sizes / sizes.norm()
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(target), heads, dtype=torch.float64, generator=draw).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-14,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    ridge = 1e-13 * torch.eye(heads, dtype=torch.float64)

    def loss() -> Tensor:
        looks = logits.softmax(0)
        best = torch.linalg.solve(looks.mT @ looks + ridge, looks.mT @ target)
        return (looks @ best - target).square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    optimizer.step(closure)
    return float(loss().detach().sqrt())


def _data(name: str, seed: int, quick: bool) -> tuple[Labelled, Labelled]:
    """A few standardised pictures of each class to train on, and many to test on."""
    per_class = 4 if quick else PER_CLASS[name]
    if name == "digits":
        train, *others = split_digits(SIZE)
        held = torch.cat([images for images, _ in others]), torch.cat([labels for _, labels in others])
        return few_shot(train, per_class, seed), held
    parts = [
        single_scenes(n, SIZE, seed=s, radius=(0.28, 0.42))
        for n, s in ((100 if quick else 600, 51), (200 if quick else 900, 52))
    ]
    pool, held = (((part.images - 0.35) / 0.25, part.first_labels) for part in parts)
    return few_shot(pool, per_class, seed), held


def _attention(one_hot: bool) -> RelPosPatchAttention:
    """Attention as wide as a converted convolution, from random weights; with `one_hot` every head looks at one neighbour."""
    widths = head_dims(3, PATCH, CHANNELS, CHANNELS)
    dim = PATCH**2 * CHANNELS
    layer = RelPosPatchAttention(dim, dim, len(widths), list(widths.values()), key_dim=KEY_DIM)
    for linear in (layer.query, layer.key, layer.value, layer.out):
        assert linear is not None
        nn.init.xavier_uniform_(linear.weight)
    if one_hot and layer.query is not None:
        layer.look_at_([list(widths)[number] for number in torch.randperm(len(widths)).tolist()], SHARPNESS)
        nn.init.zeros_(layer.query.weight)
    return layer


def _convert(mixer: nn.Module) -> nn.Module:
    assert isinstance(mixer, PatchConv)
    return conv_to_attention(mixer.conv, mixer.patch, sharpness=SHARPNESS, content=True, key_dim=KEY_DIM)


def _row(
    task: str, arm: str, data: tuple[Labelled, Labelled], epochs: tuple[int, int], seed: int, progress: Progress | None
) -> dict[str, Any]:
    """Train one arm; accuracy of new pictures at the end, and before and after the conversion."""
    train, test = data
    fit = partial(
        fit_,
        images=train[0],
        labels=train[1],
        batch=BATCH,
        rate=RATE,
        seed=seed,
        progress=progress,
        name=f"{task}, {arm}, seed {seed}",
    )
    row: dict[str, Any] = {"arm": f"{task}, {arm}", "seed": seed}

    def convolutions(model: nn.Module) -> None:
        fit(model, epochs=epochs[0])
        row["as convolutions"] = accuracy(model, *test)

    def attention(model: nn.Module) -> None:
        row["just converted"] = accuracy(model, *test)
        fit(model, epochs=epochs[1])

    sizes = train[0].shape[1], int(train[1].max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arm == "two-phase":
            start = PatchTransformer(lambda: PatchConv(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), PATCH), *sizes)
            model = two_phase(start, convolutions, attention, _convert)
        else:
            model = PatchTransformer(partial(_attention, arm == "offsets"), *sizes)
            fit(model, epochs=sum(epochs))
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["accuracy"] = accuracy(model, *test)
    return row


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    used = tuple(range(1 if quick else seeds))
    exact = exactness_rows((1, 2, 4), (3, 5) if quick else (3, 5, 7, 9))
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    steps = 50 if quick else 200
    left = {heads: trained_residual(weight, PATCH, heads, steps) for heads in (8, 9)}
    fewer = [
        {"arm": f"{heads} heads", "residual": left[heads], "least residual": span_residual(weight, PATCH, heads)}
        for heads in left
    ]
    table: list[dict[str, Any]] = [*exact, *fewer]
    for task, epochs in EPOCHS.items():
        for seed in used:
            data = _data(task, seed, quick)
            table += [_row(task, arm, data, (2, 1) if quick else epochs, seed, progress) for arm in ARMS]
    near = [row for row in exact if row["patch"] >= 2 and row["kernel"] <= 2 * row["patch"] + 1]
    mean = {(task, arm): mean_of(table, f"{task}, {arm}", "accuracy") for task in EPOCHS for arm in ARMS}
    checks = [
        Check("largest error, float32", max(row["error, float32"] for row in exact), 1e-5),
        Check("largest error, float64", max(row["error, float64"] for row in exact), 1e-12),
        Check("most heads used where K <= 2 P + 1 and P >= 2", max(row["heads used"] for row in near), 9),
        Check("fewest heads necessary there", min(row["heads necessary"] for row in near), 9, ">="),
        Check("relative residual of 8 trained heads", left[8], 0.02, ">="),
        Check("relative residual of 9 trained heads", left[9], 1e-6),
        *(
            Check(f"{task}: accuracy of two-phase against plain + 0.03", mean[task, "two-phase"], mean[task, "plain"] + 0.03, ">=")
            for task in EPOCHS
        ),
    ]  # fmt: skip
    return Evidence("vit-conv", CLAIM, table, checks, time.perf_counter() - begun, used, _notes(mean, table))


def _notes(mean: dict[tuple[str, str], float], table: list[dict[str, Any]]) -> list[str]:
    found = {(row["arm"], row["seed"]): row["accuracy"] for row in table if "accuracy" in row}
    used = sorted({seed for _, seed in found})
    gains = {
        task: ", ".join(f"{found[f'{task}, two-phase', seed] - found[f'{task}, plain', seed]:+.3f}" for seed in used)
        for task in EPOCHS
    }
    first = {task: mean_of(table, f"{task}, two-phase", "as convolutions") for task in EPOCHS}
    return [
        "mean accuracies: " + ", ".join(f"{task} {arm} {value:.3f}" for (task, arm), value in mean.items())
        + "; two-phase before its conversion: " + ", ".join(f"{task} {value:.3f}" for task, value in first.items()),
        f"{SIZE} x {SIZE} pictures, {PATCH} x {PATCH} patches of {CHANNELS} channels behind a linear embedding, {DEPTH} blocks with 9 "
        f"heads as wide as their matrices' ranks and queries of {KEY_DIM}, in all arms; {PER_CLASS['digits']} digits a class, or "
        f"{PER_CLASS['scenes']} scenes of one large shape of {len(SHAPES)} kinds. The paper trains on 32 x 32 photographs",
        f"two-phase: {EPOCHS['digits']} and {EPOCHS['scenes']} epochs as 3 x 3 convolutions, then as attention, sharpness {SHARPNESS:g}; other "
        f"arms train for the sum of both; AdamW at {RATE:g} in all arms and phases",
        "offsets: heads start at the nine neighbours in random order, with the same sharpness and random matrices: what comes of "
        "looking near alone, without trained convolutions",
        "gains of two-phase over plain, seed by seed: " + "; ".join(f"{task} {gains[task]}" for task in EPOCHS)
        + ". At full length offsets was ahead of two-phase in the mean of both tasks (in five of six seeds), so that heads which look "
        "near explain the gain at this size; nothing here shows that the convolutions trained before add to it",
        "settings were tried on seed 7, which is not reported. There, at 1e-3 for attention, scenes of smaller shapes (radius 0.14 to "
        "0.3) went against the claim: plain attention was 0.02 to 0.06 ahead of two-phase, at 24 x 24 pixels and at 16 x 16, all arms at 0.28 to "
        "0.39; the convolutions had learnt little by then (0.24). With a convolution in place of the linear embedding plain and "
        "two-phase were equal (0.46). 4e-3 was the best of 1e-3, 2e-3 and 4e-3 for scenes in both arms (plain 0.39, 0.42, 0.44), "
        "and for digits plain lay within 0.60 to 0.62 at all three",
        "a run of three seeds with 2e-3 for convolutions and 1e-3 for attention came first: digits 0.765 against 0.625, scenes 0.455 "
        "against 0.424. It was replaced because the rates differed between arms",
        "8 and 9 heads: an interior patch that sees its nine neighbours, from 2 to 3 channels, P = 4, K = 3; a head may give any "
        "weights to them, and its matrix is the best for these, by least squares. With matrices trained by L-BFGS as well, 9 heads "
        "from a random start still had 0.067 after 500 steps, and 8 heads 0.064: a matter of the search, not of what can be written",
    ]  # fmt: skip
