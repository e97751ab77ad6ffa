"""`layerwright serve`: a language model behind OpenAI's interface."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwright.cli.console import say
from layerwright.cli.options import Device, Dtype, Model, own_dtype

__all__ = ["serve"]


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than loopback are open to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="By which clients ask for the model; MODEL by default.")
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Requests that are served at once.")] = 8,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that wait; more get 429.")] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", min=2, help="Tokens of prompt and answer; the model's own by default, at most 4096."
        ),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option("--max-body-bytes", min=1, help="Larger requests get 413.")] = 1 << 20,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the engine; PyTorch's choice by default.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Serve a model with continuous batching: /v1/models, /v1/completions, /v1/chat/completions.

    Example: `layerwright serve demo:lm --port 8000`
    """
    from layerwright.recipes.server._job import serve_job

    serve_job(
        model,
        host=host,
        port=port,
        name=name,
        slots=slots,
        queue=queue,
        max_length=max_length,
        max_body_bytes=max_body_bytes,
        threads=threads,
        dtype=own_dtype(dtype),
        device=device,
        tell=say,
    )
