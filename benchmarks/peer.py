"""A PEER layer beside the PyPI package PEER-pytorch: time of a forward pass, and of a forward and backward pass.

    python -m benchmarks.peer [--peer PYTHON] [--experts 65536 1048576] [--dim 256] [--tokens 512] [--scratch /dev/shm]

``--peer`` is the interpreter of an environment that has PEER-pytorch. Both layers are given the same tables, keys,
query weights and tokens (PEER-pytorch has keys of its own for each head and no query norm: so have ours here), and
their outputs are compared. Each lives in a process of its own; the tables are mapped into both, so that they are in
memory once. They take turns; a ratio compares two times of one round, and the median over rounds is printed. Beside it
stands the floor: the bytes of the retrieved rows over the speed at which this machine reads memory, measured in the
same run; with the backward pass three times that, since rows are read twice and their gradients written.
Without ``--peer`` ours is timed beside its own naive form, which gathers the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TABLES = ("down", "up")


def shapes(a: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """What is stored, in the layout of our layer."""
    half = a.dim // 2
    keys = (2, a.heads, math.isqrt(a.experts), half)
    rows = (a.experts, a.dim)
    return {"down": rows, "up": rows, "query": (a.heads * 2 * half, a.dim), "keys": keys, "x": (a.tokens, a.dim)}


def store(a: argparse.Namespace) -> None:
    """Draw everything and write it to files, table by table."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes(a).items():
        scale = 1.0 if name == "x" else shape[-1] ** -0.5
        whole = _mapped(a, name, shape)
        for part in whole.view(-1).split(1 << 24):
            part.normal_(0, scale, generator=generator)


def _mapped(a: argparse.Namespace, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    path = str(Path(a.folder) / name)
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)


def ours(a: argparse.Namespace, stored: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Our layer, its tables mapped."""
    from layerwright.nn.peer import PEER

    with torch.device("meta"):
        layer = PEER(
            a.dim,
            a.experts,
            a.heads,
            a.top_k,
            a.dim // 2 * 2,
            query_norm="none",
            share_keys=False,
            backend="naive" if a.serve == "naive" else "auto",
            gradients="sparse" if a.serve == "ours" else "dense",
        )
    layer.down, layer.up = (torch.nn.Parameter(stored[name]) for name in TABLES)
    layer.router.query = torch.nn.Parameter(stored["query"])
    layer.router.keys = torch.nn.Parameter(stored["keys"])
    return layer


def theirs(a: argparse.Namespace, stored: dict[str, torch.Tensor]) -> torch.nn.Module:
    """PEER-pytorch's layer on the same numbers."""
    from PEER_pytorch import PEER

    with torch.device("meta"):
        layer = PEER(
            a.dim,
            heads=a.heads,
            num_experts=a.experts,
            num_experts_per_head=a.top_k,
            dim_key=a.dim // 2,
            non_competing_scores=False,
        )
    layer.weight_down_embed.weight, layer.weight_up_embed.weight = (torch.nn.Parameter(stored[n]) for n in TABLES)
    query = stored["query"].view(a.heads, 2, a.dim // 2, a.dim).transpose(0, 1).reshape(-1, a.dim)
    layer.to_queries[0].weight = torch.nn.Parameter(query.contiguous())
    layer.keys = torch.nn.Parameter(stored["keys"].permute(1, 2, 0, 3).contiguous())
    return torch.nn.Sequential(_Batched(layer))


class _Batched(torch.nn.Module):
    """Takes tokens without a batch dimension."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, dim)`` to the same."""
        return self.layer(x[None])[0]


def serve(a: argparse.Namespace) -> None:
    """Answer each line of standard input (``forward``, ``both``, ``output``) with seconds, or numbers to compare."""
    torch.set_num_threads(a.threads)
    stored = {name: _mapped(a, name, shape) for name, shape in shapes(a).items()}
    layer = (theirs if a.serve == "peer" else ours)(a, stored)
    x = stored.pop("x")
    for line in sys.stdin:
        what = line.strip()
        if what == "output":
            with torch.inference_mode():
                y = layer(x)
            print(json.dumps(y[:: max(1, a.tokens // 8)].flatten().tolist()), flush=True)
            continue
        for parameter in layer.parameters():
            parameter.grad = None
        begun = time.perf_counter()
        if what == "forward":
            with torch.inference_mode():
                layer(x)
        else:
            layer(x.clone().requires_grad_()).square().sum().backward()
        print(json.dumps(time.perf_counter() - begun), flush=True)


class Worker:
    """A layer in a process of its own."""

    def __init__(self, a: argparse.Namespace, kind: str, interpreter: str) -> None:
        words = [interpreter, __file__, "--serve", kind, "--folder", a.folder, "--experts", str(a.experts)]
        for name in ("dim", "tokens", "heads", "top_k", "threads"):
            words += [f"--{name.replace('_', '-')}", str(getattr(a, name))]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Any:
        """The answer to one line."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a layer's process ended: see its message above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def read_speed() -> float:
    """Bytes per second of reading memory that is in no cache, the best of five."""
    block = torch.ones(1 << 26)
    return block.numel() * 4 / min(_seconds(block.sum) for _ in range(5))


def _seconds(fn: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


def compare(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for one number of experts."""
    others = {"PEER-pytorch": ("peer", a.peer)} if a.peer else {}
    kinds = {"ours": ("ours", sys.executable), **others, "ours, dense gradients": ("ours-dense", sys.executable)}
    kinds["naive form"] = ("naive", sys.executable)
    rows: list[dict[str, Any]] = []
    floor = 2 * a.heads * a.top_k * a.dim * 4 * a.tokens / read_speed()
    with tempfile.TemporaryDirectory(dir=a.scratch) as a.folder:
        store(a)
        workers = {name: Worker(a, *how) for name, how in kinds.items() if name == "ours" or a.all or name in others}
        if len(workers) == 1:
            workers["naive form"] = Worker(a, *kinds["naive form"])
        outputs = {name: torch.tensor(worker.ask("output")) for name, worker in workers.items()}
        for what in ("forward", "both"):
            rounds = []
            for number in range(a.rounds + 1):
                times = {name: worker.ask(what) for name, worker in workers.items()}
                if number:  # the first round warms up
                    rounds.append(times)
            for name in workers:
                rows.append(
                    {
                        "experts": a.experts,
                        "pass": "forward" if what == "forward" else "forward + backward",
                        "layer": name,
                        "ms": 1e3 * statistics.median(times[name] for times in rounds),
                        "floor ms": 1e3 * floor * (1 if what == "forward" else 3),  # read twice, gradients written
                        "ours is faster by": statistics.median(times[name] / times["ours"] for times in rounds),
                        "lowest": min(times[name] / times["ours"] for times in rounds),
                        "highest": max(times[name] / times["ours"] for times in rounds),
                        "output differs by": float((outputs[name] - outputs["ours"]).abs().max()),
                    }
                )
        for worker in workers.values():
            worker.close()
    return rows


def main() -> None:
    """Time and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", help="python of an environment with PEER-pytorch")
    parser.add_argument("--experts", type=int, nargs="+", default=[65_536, 1_048_576])
    defaults = {"dim": 256, "tokens": 512, "heads": 8, "top-k": 16, "rounds": 7, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--all", action="store_true", help="also ours with dense gradients, and its naive form")
    parser.add_argument("--scratch", help="folder for the tables; one in memory (/dev/shm) keeps the disk out of it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=["ours", "ours-dense", "naive", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    sizes = a.experts
    if a.serve:
        a.experts = sizes[0]
        serve(a)
        return
    rows = []
    for a.experts in sizes:
        rows += compare(a)
    if a.json:
        print(json.dumps(rows))
        return
    print(f"{'experts':>8} {'pass':18} {'layer':22} {'ms':>8} {'floor':>6} {'ours faster':>11}  range       differs by")
    for row in rows:
        span = f"{row['lowest']:.2f}..{row['highest']:.2f}"
        print(
            f"{row['experts']:8d} {row['pass']:18} {row['layer']:22} {row['ms']:8.1f} {row['floor ms']:6.1f} "
            f"{row['ours is faster by']:10.2f}x  {span:11} {row['output differs by']:.1e}"
        )


if __name__ == "__main__":
    main()
