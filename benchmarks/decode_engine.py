"""The inference engine against ``transformers.generate``, and against CTranslate2 with the same weights.

    python -m benchmarks.decode_engine [--hidden 2048] [--blocks 4] [--batch 1] [--prompt 128] [--new 24]
                                       [--threads 1] [--rounds 7] [--peer PYTHON] [--json]

A Llama with random weights, its head scaled so that it weighs in a few blocks what it does in 22 blocks with 32000
tokens. All arms take turns; a ratio compares two times of one round, and the median over rounds is printed with the
quartiles. A prompt alone is timed too, and taken from the time of prompt and new tokens together. Every float32 arm
must give the same tokens. `PYTHON` is an interpreter with ctranslate2 and numpy; the peer runs in a process of its own,
in turn with the others.

``bandwidth`` is the share of what reading all weights once a token takes at the speed at which so many bytes are
summed on the spot: no way of computing can be faster with weights that do not fit the caches.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from benchmarks.decode import FULL_BLOCKS, FULL_VOCABULARY, bandwidth, packed
from torch import Tensor

from layerwright.core.treatment import Quantize
from layerwright.treat.engine import InferenceModel, compile_inference

Run = Callable[[int], tuple[float, Tensor]]
"""Seconds and new tokens for a prompt and so many new tokens."""


def build(arguments: argparse.Namespace) -> Any:
    """A random Llama in float32 with grouped heads of 64."""
    import transformers

    hidden = arguments.hidden
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=arguments.intermediate or 128 * round(8 * hidden / 3 / 128),
        num_hidden_layers=arguments.blocks,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=max(256, FULL_VOCABULARY * arguments.blocks // FULL_BLOCKS),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def of_transformers(model: Any, ids: Tensor) -> Run:
    """``generate`` with its own cache."""

    def run(new: int) -> tuple[float, Tensor]:
        mask = torch.ones_like(ids)
        begun = time.perf_counter()
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return time.perf_counter() - begun, found[:, ids.shape[1] :]

    return run


def of_engine(engine: InferenceModel, ids: Tensor) -> Run:
    """Ours."""

    def run(new: int) -> tuple[float, Tensor]:
        begun = time.perf_counter()
        found = engine.generate(ids, None, new)
        return time.perf_counter() - begun, found.tokens[:, ids.shape[1] :]

    return run


class Peer:
    """CTranslate2 in another process."""

    def __init__(self, python: str, folder: Path, kind: str, threads: int) -> None:
        script = Path(__file__).with_name("_ctranslate2_worker.py")
        command = [python, str(script), str(folder), kind, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["ready"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer ended; its error stands above")
        return dict(json.loads(line))

    def run(self, ids: Tensor) -> Run:
        """Its greedy decoding."""

        def run(new: int) -> tuple[float, Tensor]:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"prompts": ids.tolist(), "new": new}) + "\n")
            self.process.stdin.flush()
            found = self._read()
            return float(found["seconds"]), torch.tensor(found["tokens"])

        return run

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def write_weights(model: Any, folder: Path) -> None:
    """What the peer reads."""
    numpy.savez(folder / "weights.npz", **{name: value.numpy() for name, value in model.state_dict().items()})
    config = model.config
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rms_norm_eps")
    data = {name: getattr(config, name) for name in names} | {"rope_theta": config.rope_parameters["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(data))


def arms(arguments: argparse.Namespace, folder: Path, ids: Tensor) -> tuple[dict[str, Run], dict[str, int], list[Peer]]:
    """Every way of decoding, the bytes of weights that it reads a token, and processes to end."""
    model = build(arguments)
    half = copy.deepcopy(model).to(torch.bfloat16)
    length = ids.shape[1] + arguments.new
    table = model.get_parameter("model.embed_tokens.weight").numel()
    dense = sum(p.numel() for p in model.parameters()) - table
    runs: dict[str, Run] = {
        "transformers float32": of_transformers(model, ids),
        "transformers bfloat16": of_transformers(half, ids),
    }
    read = {"transformers float32": 4 * dense, "transformers bfloat16": 2 * dense}
    settings = {"int8": Quantize(8, -1, True, "rtn"), "int4 g128": Quantize(4, 128, True, "rtn")}
    given = {"float32": model, "bfloat16": half} | {name: packed(half, s) for name, s in settings.items()}
    given |= {"float32, packed": model, "int4, dense prompts": given["int4 g128"]}
    for name, source in given.items():
        prompts: Any = "dense" if name.endswith("prompts") else "codes"
        layout: Any = "packed" if name.endswith("packed") else "auto"
        engine = compile_inference(source, len(ids), length, prompt_weights=prompts, layout=layout)
        runs[f"engine {name}"] = of_engine(engine, ids)
        decoder = engine.decoder
        read[f"engine {name}"] = decoder.nbytes - decoder.embedding.nbytes
    read["engine int4, dense prompts"] = read["engine int4 g128"]  # a step reads the codes
    peers = []
    if arguments.peer:
        write_weights(model, folder)
        for kind, size in (("float32", 4), ("int8", 1)):
            peers.append(Peer(arguments.peer, folder, kind, arguments.threads))
            runs[f"ctranslate2 {kind}"] = peers[-1].run(ids)
            read[f"ctranslate2 {kind}"] = size * dense
    return runs, read, peers


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each arm."""
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(1)
    vocabulary = max(256, FULL_VOCABULARY * arguments.blocks // FULL_BLOCKS)
    ids = torch.randint(1, vocabulary, (arguments.batch, arguments.prompt), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        runs, read, peers = arms(arguments, Path(folder), ids)
        prompts: dict[str, list[float]] = {name: [] for name in runs}
        steps: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(arguments.rounds + 1):
            for name, run in runs.items():
                prompt, _ = run(1)
                whole, tokens = run(arguments.new)
                if number:  # the first round warms up
                    prompts[name].append(1e3 * prompt)
                    steps[name].append(1e3 * (whole - prompt) / (arguments.new - 1))
                elif name == "transformers float32":
                    reference = tokens
                elif "float32" in name:
                    assert torch.equal(tokens, reference), f"{name} gives other tokens"
        for peer in peers:
            peer.close()
    speed = bandwidth(max(read.values()))
    return [_row(name, prompts, steps, read[name] / speed * 1e3) for name in runs]


def _row(name: str, prompts: dict[str, list[float]], steps: dict[str, list[float]], floor: float) -> dict[str, Any]:
    base = "transformers bfloat16" if "int" in name or "bfloat16" in name else "transformers float32"
    if name.startswith("ctranslate2"):
        base = "transformers float32"
    faster = [b / own for b, own in zip(steps[base], steps[name], strict=True)]
    low, middle, high = statistics.quantiles(faster, n=4) if len(faster) > 1 else (faster[0],) * 3
    to_engine = [e / own for e, own in zip(steps["engine float32"], steps[name], strict=True)]
    return {
        "arm": name,
        "ms_per_step": statistics.median(steps[name]),
        "prompt_ms": statistics.median(prompts[name]),
        "against": base,
        "faster": middle,
        "low": low,
        "high": high,
        "prompt_faster": statistics.median(b / own for b, own in zip(prompts[base], prompts[name], strict=True)),
        "against_engine_float32": statistics.median(to_engine),
        "bandwidth": floor / statistics.median(steps[name]),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = {"hidden": 2048, "blocks": 4, "batch": 1, "prompt": 128, "new": 24, "threads": 1, "rounds": 7}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--intermediate", type=int, default=0, help="8/3 of the hidden size by default")
    parser.add_argument("--peer", default=None, help="a Python with ctranslate2 and numpy")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(
        f"{'':26} {'ms/step':>8} {'prompt ms':>9} {'step':>6}  {'quartiles':>12} {'prompt':>6} {'bandwidth':>9}  against"
    )
    for row in rows:
        print(
            f"{row['arm']:26} {row['ms_per_step']:8.2f} {row['prompt_ms']:9.1f} {row['faster']:5.2f}x "
            f"{row['low']:6.2f}..{row['high']:.2f} {row['prompt_faster']:5.2f}x {row['bandwidth']:9.0%}  {row['against']}"
        )


if __name__ == "__main__":
    main()
