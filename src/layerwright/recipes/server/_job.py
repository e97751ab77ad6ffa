"""What `layerwright serve` does: load, compile, listen."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from layerwright.core.errors import InputError, require_extra
from layerwright.data.loading import load
from layerwright.recipes.server._app import create_app
from layerwright.recipes.server._scheduler import Scheduler
from layerwright.recipes.server._schema import Limits
from layerwright.treat.engine import compile_inference

__all__ = ["serve_job"]

_LONGEST = 4096


def serve_job(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    queue: int = 64,
    max_length: int | None = None,
    max_body_bytes: int = 1 << 20,
    threads: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    tell: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted; see ``layerwright serve --help``. The port is taken before the model is loaded.

    Raises:
        InputError: a model without a tokenizer, or one that the engine does not run.
        OSError: the port is taken.
        MissingExtraError: the extra ``serve`` is not installed.
    """
    import torch

    uvicorn = require_extra("uvicorn", "serve")
    require_extra("fastapi", "serve")
    limits = Limits(queue=queue, max_body_bytes=max_body_bytes)
    with _listening(host, port) as listener:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded, tokenizer = load(model, dtype=dtype, device=device)
        if tokenizer is None or not hasattr(tokenizer, "decode"):
            raise InputError(f"{model}: it has no tokenizer, without which there is no text to serve")
        most = min(_LONGEST, int(getattr(loaded.config, "max_position_embeddings", _LONGEST)))
        engine = compile_inference(loaded, slots, max_length or most)
        del loaded
        app = create_app(Scheduler(engine, queue), tokenizer, name or model, limits)
        place = listener.getsockname()
        tell(
            f"{name or model} on http://{_shown(place[0])}:{place[1]}/v1: {slots} slots, {engine.max_length} tokens each"
        )
        if not _loopback(place[0]):
            tell("note: this address can be reached from other machines, and the server asks for no password")
        # Access logs hold addresses and paths, never bodies; they are off all the same.
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=4 * (slots + queue) + 16,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(settings).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # who comes before the application runs waits instead of being refused
    except OSError as error:
        listener.close()
        raise OSError(f"host {host}, port {port}: cannot listen there ({error.strerror or error})") from error
    return listener


def _loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
