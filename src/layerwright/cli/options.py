"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Budget",
    "Data",
    "Device",
    "Dtype",
    "Force",
    "Json",
    "Length",
    "Model",
    "Out",
    "RecipeName",
    "Samples",
    "Seed",
    "TargetName",
    "own_dtype",
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder in the Hugging Face layout, a hub name, or demo:lm, demo:vit, demo:cnn."
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        "--budget", "-b", help="Limits such as bits=4.25 or size=0.25x,ms=0.8x (bits, size, params, flops, ms, kv)."
    ),
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Recipe name or YAML file; `layerwright recipes` lists them.")
]
TargetName = Annotated[
    str, typer.Option("--target", "-t", help="Where the result must load: layerwright, hf, vllm, gguf, onnx.")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", "-d", help="Calibration data: .txt, .jsonl, .parquet, .npz, or a folder of class folders."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder or file to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (the checkpoint's own), float32, bfloat16, float16.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a finished output of ours in the output folder.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens in one calibration sample.")]


def own_dtype(dtype: str) -> str | None:
    """What `--dtype` says, None for the checkpoint's own."""
    return None if dtype == "auto" else dtype
