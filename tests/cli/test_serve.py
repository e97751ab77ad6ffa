from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
import typer

from layerwright.cli.serve import serve
from layerwright.core.errors import InputError
from layerwright.recipes.server._job import serve_job

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")


def test_serve_answers_on_loopback_and_ends_on_interrupt() -> None:
    code = "import typer; from layerwright.cli.serve import serve; app = typer.Typer(); app.command()(serve); app()"
    command = [
        sys.executable,
        "-c",
        code,
        "demo:lm",
        "--port",
        "0",
        "--slots",
        "2",
        "--threads",
        "1",
        "--name",
        "small",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("small on http://127.0.0.1:") and "2 slots, 1024 tokens each" in line
        address = line.split()[2].removesuffix("/v1:")
        body = json.dumps({"model": "small", "prompt": "import ", "max_tokens": 3, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", body, headers)
        answer = json.load(urllib.request.urlopen(request, timeout=20))
        assert answer["usage"]["completion_tokens"] == 3
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    assert "import" not in out.split("\n", 1)[-1]


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="cannot listen there"):
            serve_job("no/such-model", port=taken.getsockname()[1])


def test_models_without_text_are_refused() -> None:
    with pytest.raises((InputError, TypeError), match="tokenizer"):
        serve_job("demo:vit", port=0)
    with pytest.raises(FileNotFoundError):
        serve_job("./no-such-folder", port=0)


def test_the_command_binds_to_loopback_by_default() -> None:
    app = typer.Typer()
    app.command()(serve)
    command = typer.main.get_command(app)
    defaults = {parameter.name: parameter.default for parameter in command.params}
    assert defaults["host"] == "127.0.0.1"
    assert defaults["slots"] == 8 and defaults["queue"] == 64 and defaults["max_body_bytes"] == 1 << 20
