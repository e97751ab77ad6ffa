"""Every recipe at a budget on the demo models, against one plain rule for all layers at the same bytes.

``python -m benchmarks.recipes`` prints the table; ``--write docs/recipes_measured.md`` also writes it as a page.
``--recipes mixed,mixllm`` takes some. All rows of one run see the same data. ``--seeds 3`` repeats each row on random
three quarters of the calibration data. With ``--peer PYTHON``, the interpreter of an environment that holds
llmcompressor, its GPTQ is run on ``demo:lm`` with the very widths of our uniform baseline.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.recipe_baselines import ABOUT, Baselines, baselines, tuned
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, logits_of
from layerwright.core.layers import parameter_bytes
from layerwright.core.treatment import Quantize
from layerwright.recipes.bench import Bench, open_bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide
from layerwright.recipes.measure import sample_losses
from layerwright.studies._byte_lm import paired_interval
from layerwright.treat.apply import apply_plan

ROWS: tuple[tuple[str, str, str], ...] = (
    ("mixed", "demo:lm", "bits=3"),
    ("rtn", "demo:lm", "bits=3"),
    ("joint", "demo:lm", "size=0.25x"),
    ("mixllm", "demo:lm", "bits=4.4"),
    ("fptq", "demo:lm", "bits=4.5"),
    ("edge_llm", "demo:lm", "size=0.3x"),
    ("shortened-llama", "demo:lm", "size=0.8x"),
    ("adaquant", "demo:cnn", "bits=2.25"),
    ("adaquant_light", "demo:cnn", "bits=2.5"),
    ("emq", "demo:cnn", "bits=2.25"),
    ("mixed_td", "demo:cnn", "ms=0.65x"),
    ("mptq_vit", "demo:vit", "bits=4"),
    ("lrp_qvit", "demo:vit", "bits=4"),
    ("evol_q", "demo:vit", "bits=3"),
)
"""Recipe, model, budget. ``demo:cnn`` at 3 bits is not worth a row: uniform GPTQ loses 0.0003 nats there."""

HEADS = (
    "recipe",
    "model",
    "budget",
    "before",
    "recipe's result",
    "nearest, uniform",
    "baseline",
    "baseline is",
    "result - baseline",
    "divergence: result, baseline",
    "peer's GPTQ",
    "bytes: result, baseline",
    "seconds",
)
SHARE = 0.75
"""Of the calibration samples that a seed draws, where there are several seeds."""


@dataclass(frozen=True)
class Quality:
    """One model on the held-out data: losses and divergences from the untouched model ``(samples,)``, share of right
    labels.
    """

    losses: Tensor
    divergences: Tensor
    accuracy: float | None

    @classmethod
    def of(cls, model: nn.Module, reference: nn.Module, data: Calibration) -> Quality:
        """Measure `model`."""
        losses, right = sample_losses(model, data)
        return cls(losses, divergences(model, reference, data), None if right is None else float(right.double().mean()))


@torch.no_grad()
def divergences(model: nn.Module, reference: nn.Module, data: Calibration) -> Tensor:
    """KL divergence of the predictions of `model` from those of `reference`, mean of each sample's rows, in nats."""
    found = []
    for batch in data:
        wanted, got = (logits_of(data.forward(m, batch)).double().log_softmax(-1) for m in (reference, model))
        found.append((wanted.exp() * (wanted - got)).sum(-1).reshape(len(wanted), -1).mean(1))
    return torch.cat(found)


@dataclass(frozen=True)
class Seeded:
    """What one seed gave: quality by name of the model, bytes, seconds of the recipe, and what the baseline is."""

    quality: Mapping[str, Quality]
    bytes: tuple[int, int, int]
    seconds: float
    words: str
    peer: str = ""


def drawn(bench: Bench, seed: int, seeds: int) -> Bench:
    """`bench` with a random part of its calibration samples; all of them for a single seed."""
    if seeds == 1:
        return bench
    data = bench.calibration
    joined = {key: torch.cat([batch[key] for batch in data]) for key in next(iter(data))}
    count = len(next(iter(joined.values())))
    size = max(1, count // len(list(data.batches)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: round(SHARE * count)]
    batches = [{key: values[part] for key, values in joined.items()} for part in order.split(size)]
    return dataclasses.replace(bench, calibration=Calibration(batches, data.loss_fn, name=data.name, unit=data.unit))


def measured(name: str, model: str, budget: str, seed: int, seeds: int, peer: str) -> Seeded:
    """One recipe, once: its result and its baselines on the held-out data."""
    bench = drawn(open_bench(model), seed, seeds)
    begun = time.perf_counter()
    decision = decide(bench, budget, recipe(name), seed=seed)
    after = tuned(bench, decision, apply_plan(bench.model, decision.plan, bench.calibration)[0], seed)
    seconds = time.perf_counter() - begun
    others: Baselines = baselines(bench, decision, after, seed)
    models = {"before": bench.model, "after": after, "baseline": others.best}
    if others.nearest is not None:
        models["nearest"] = others.nearest
    quality = {key: Quality.of(item, bench.model, bench.heldout) for key, item in models.items()}
    sizes = (parameter_bytes(bench.model), parameter_bytes(after), parameter_bytes(others.best))
    found = peer_loss(peer, bench, others.plan) if peer and model == "demo:lm" and others.plan else ""
    return Seeded(quality, sizes, seconds, others.words, found)


def row(name: str, model: str, budget: str, first: int, seeds: int, peer: str) -> list[str]:
    """One line of the table."""
    runs = [measured(name, model, budget, first + n, seeds, peer if n == 0 else "") for n in range(seeds)]

    def quality(which: str) -> str:
        own = [run.quality[which] for run in runs if which in run.quality]
        if not own:
            return ""
        means = [float(q.losses.mean()) for q in own]
        words = f"{statistics.fmean(means):.4f}"
        words += f" ± {statistics.stdev(means):.4f}" if seeds > 1 and which != "before" else ""
        right = [q.accuracy for q in own if q.accuracy is not None]
        return words + (f" ({statistics.fmean(right):.1%})" if right else "")

    def compared(what: str) -> tuple[Tensor, Tensor, str, str]:
        after, plain = (
            torch.stack([getattr(run.quality[key], what) for run in runs]).mean(0) for key in ("after", "baseline")
        )
        low, high = paired_interval(after, plain)
        verdict = "better" if high < 0 else "worse" if low > 0 else "even"
        return after.mean(), plain.mean(), f"[{low:+.4f}, {high:+.4f}]", verdict

    after, plain, interval, verdict = compared("losses")
    nearer, farther, _, judged = compared("divergences")
    before, size, other = runs[0].bytes
    return [
        f"`{name}`",
        f"`{model}`",
        f"`{budget}`",
        quality("before"),
        f"**{quality('after')}**",
        quality("nearest"),
        quality("baseline"),
        runs[0].words,
        f"{float(after - plain):+.4f} {interval} {verdict}",
        f"{float(nearer):.5f}, {float(farther):.5f} {judged}",
        runs[0].peer,
        f"{size:,}, {other:,} of {before:,}",
        f"{statistics.fmean(run.seconds for run in runs):.0f}",
    ]


# -- the peer -----------------------------------------------------------------------------------------------------


def peer_loss(python: str, bench: Bench, plan: Mapping[str, Quantize]) -> str:
    """Held-out loss after llmcompressor's GPTQ of the same layers, widths and data, or why there is none."""
    assert bench.source is not None
    widths: dict[tuple[int, int], list[str]] = {}
    for path, t in plan.items():
        widths.setdefault((t.bits, t.group_size), []).append(path)
    groups = [{"bits": bits, "group": group, "layers": paths} for (bits, group), paths in widths.items()]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.pt"
        torch.save({"calibration": _tokens(bench.calibration), "heldout": _tokens(bench.heldout)}, data)
        job = json.dumps({"model": str(bench.source.folder), "data": str(data), "groups": groups})
        # The peer writes a log into the folder it is started from.
        done = subprocess.run(
            [python, "-c", _PEER, job], capture_output=True, text=True, check=False, cwd=folder, env=os.environ
        )
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:120]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return f"{found['loss']:.4f} in {found['seconds']:.0f} s"


def _tokens(calibration: Calibration) -> list[Tensor]:
    return [batch["input_ids"] for batch in calibration]


_PEER = """
import json, sys, time, torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    from llmcompressor.modifiers.gptq import GPTQModifier
except ImportError:
    from llmcompressor.modifiers.quantization import GPTQModifier
job = json.loads(sys.argv[1])
data = torch.load(job["data"], weights_only=True)
model = AutoModelForCausalLM.from_pretrained(job["model"]).eval()
rows = torch.cat(data["calibration"])
def scheme(group):
    weights = dict(num_bits=group["bits"], type="int", symmetric=True)
    weights |= dict(strategy="channel") if group["group"] == -1 else dict(strategy="group", group_size=group["group"])
    return dict(targets=group["layers"], weights=weights)
recipe = GPTQModifier(config_groups={f"group_{i}": scheme(g) for i, g in enumerate(job["groups"])})
begun = time.perf_counter()
tokens = dict(input_ids=rows.tolist(), attention_mask=torch.ones_like(rows).tolist())
oneshot(model=model, dataset=Dataset.from_dict(tokens), recipe=recipe, max_seq_length=rows.shape[1],
        processor=AutoTokenizer.from_pretrained(job["model"]), num_calibration_samples=len(rows))
seconds = time.perf_counter() - begun
total = count = 0
with torch.no_grad():
    for ids in data["heldout"]:
        total += float(model(input_ids=ids, labels=ids).loss) * len(ids)
        count += len(ids)
print(json.dumps(dict(loss=total / count, seconds=seconds)))
"""


# -- the page -----------------------------------------------------------------------------------------------------


def page(lines: Sequence[str], command: str, seeds: int, peer: bool) -> str:
    """The table with what it shows."""
    seeded = (
        f"Means of {seeds} seeds ± their standard deviation; each seed draws {SHARE:.0%} of the calibration samples."
        if seeds > 1
        else "One seed, all calibration samples."
    )
    other = (
        " The peer is llmcompressor 0.14: GPTQ with the very widths of the baseline, on the same data, where weights "
        "alone are rounded." if peer else ""
    )  # fmt: skip
    return "\n".join(
        [
            "# Recipes, measured",
            "",
            f"Written by `{command}`. Quality is the mean loss on held-out data in nats (a byte for `demo:lm`, an image for"
            f" the others), and accuracy in brackets. {seeded}",
            "",
            ABOUT + other,
            "",
            "`result - baseline` is the difference of held-out losses with its 95 % interval, paired by sample: *better* and"
            " *worse* where the interval leaves out 0. `divergence` is that of the predictions from the untouched model's, in"
            " nats, judged in the same way: it tells models apart whose losses do not. `seconds` is the recipe's own time on this machine: scoring,"
            " deciding, treating and tuning.",
            "",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Measure and print; write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", help="names, separated by commas; all by default")
    parser.add_argument("--write", type=Path, help="also write the table as a page")
    parser.add_argument("--peer", default="", help="python of an environment with llmcompressor")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--budget", help="in place of the rows' own")
    a = parser.parse_args()
    wanted = {recipe(name).name for name in a.recipes.split(",")} if a.recipes else {name for name, _, _ in ROWS}
    lines = [f"| {' | '.join(HEADS)} |", f"|{' --- |' * len(HEADS)}"]
    print("\n".join(lines), flush=True)
    for name, model, budget in ROWS:
        if name in wanted:
            lines.append(f"| {' | '.join(row(name, model, a.budget or budget, a.seed, a.seeds, a.peer))} |")
            print(lines[-1], flush=True)
    if a.write:
        command = "python -m benchmarks.recipes" + (f" --seeds {a.seeds}" if a.seeds > 1 else "")
        a.write.write_text(page(lines, command + " --write docs/recipes_measured.md", a.seeds, bool(a.peer)))


if __name__ == "__main__":
    main()
