from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from engine_models import decoder
from layerwright.data.loading import load
from layerwright.recipes.server import BusyError, Event, Limits, Scheduler, create_app
from layerwright.recipes.server._schema import read_chat, read_completion
from layerwright.recipes.server._text import TextStream, chat_prompt
from layerwright.treat.engine import InferenceModel, Sampling, compile_inference

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

NAME = "demo:lm"
GREEDY = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load(NAME, dtype="float32")


class Served:
    """A server on a loopback port, in a thread."""

    def __init__(self, demo: tuple[Any, Any], slots: int, queue: int, limits: Limits | None = None) -> None:
        model, tokenizer = demo
        self.scheduler = Scheduler(compile_inference(model, slots, 1024), queue, prompt_part=16)
        app = create_app(self.scheduler, tokenizer, NAME, limits)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()


def wait_for(done: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def served(demo: tuple[Any, Any]) -> Iterator[Served]:
    found = Served(demo, slots=4, queue=64, limits=Limits(max_body_bytes=20_000, body_seconds=2))
    yield found
    found.close()


@pytest.fixture(scope="module")
def alone(demo: tuple[Any, Any]) -> InferenceModel:
    return compile_inference(demo[0], 1, 1024)


def expected(alone: InferenceModel, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = alone.generate(ids, None, tokens)
    new = found.tokens[0, ids.shape[1] : ids.shape[1] + int(found.lengths[0])]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text


PROMPTS = [
    f"def function_{n}(self, {'value, ' * (n % 7)}name):\n    {'return' if n % 2 else 'for'} " for n in range(32)
]


def test_32_streams_lose_and_mix_up_nothing(served: Served, demo: tuple[Any, Any], alone: InferenceModel) -> None:
    async def one(client: Any, prompt: str, tokens: int) -> tuple[str, int]:
        text, pieces = "", 0
        body = GREEDY | {"prompt": prompt, "max_tokens": tokens, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    pieces += 1
        assert line == "data: [DONE]" or line == ""
        return text, pieces

    async def everyone() -> list[tuple[str, int]]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            return await asyncio.gather(*(one(client, p, 8 + n % 9) for n, p in enumerate(PROMPTS)))

    answers = asyncio.run(everyone())
    for number, (prompt, (text, pieces)) in enumerate(zip(PROMPTS, answers, strict=True)):
        assert text == expected(alone, demo[1], prompt, 8 + number % 9)
        assert pieces > 3
    assert served.scheduler.load() == {"running": 0, "waiting": 0, "served": served.scheduler.served}


def post(served: Served, path: str, **body: Any) -> Any:
    return httpx.post(served.url + path, json=body, timeout=60)


def test_whole_answers(served: Served, demo: tuple[Any, Any], alone: InferenceModel) -> None:
    answer = post(served, "/v1/completions", **GREEDY, prompt="import ", max_tokens=12).json()
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    assert answer["choices"][0]["text"] == expected(alone, demo[1], "import ", 12)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    ids = demo[1]("import ")["input_ids"]
    again = post(served, "/v1/completions", **GREEDY, prompt=ids, max_tokens=12).json()
    assert again["choices"][0]["text"] == answer["choices"][0]["text"]
    messages = [{"role": "user", "content": "import os"}]
    chat = post(served, "/v1/chat/completions", **GREEDY, messages=messages, max_completion_tokens=9).json()
    assert chat["choices"][0]["message"]["role"] == "assistant"
    wanted = expected(alone, demo[1], "user: import os\nassistant:", 9)
    assert chat["choices"][0]["message"]["content"] == wanted


def test_a_seed_repeats_a_draw(served: Served) -> None:
    drawn = {"model": NAME, "prompt": "class ", "max_tokens": 24, "temperature": 1.2, "top_p": 0.95}
    texts = [post(served, "/v1/completions", **drawn, seed=seed).json()["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_openai_client(served: Served, demo: tuple[Any, Any], alone: InferenceModel) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "layerwright"
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "import os"}],
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options=options,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected(alone, demo[1], "user: import os\nassistant:", 9)
    assert chunks[-1].usage.completion_tokens == 9
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="exceed the 1024 tokens"):
        client.completions.create(model=NAME, prompt="a" * 1020, max_tokens=100)


def test_a_stop_text_ends_the_answer(served: Served, demo: tuple[Any, Any], alone: InferenceModel) -> None:
    whole = expected(alone, demo[1], "import os\nimport ", 40)
    stop = whole[6:9]
    answer = post(served, "/v1/completions", **GREEDY, prompt="import os\nimport ", max_tokens=40, stop=[stop, "\0\0"])
    choice = answer.json()["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    wait_for(lambda: served.scheduler.load()["running"] == 0)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid JSON"),
        (b"\xff", 400, "not valid JSON"),
        (b"[" * 10_000, 400, "not valid JSON"),
        (b"[]", 400, "expected a JSON object"),
        (b"{}", 400, "prompt: expected one text"),
        (b'{"prompt": "a"}', 400, "model: expected the name"),
        (b'{"prompt": "a", "model": "other"}', 404, "'other' is not served here"),
        (b'{"prompt": "", "model": "demo:lm"}', 400, "prompt: it has no tokens"),
        (b'{"prompt": [999], "model": "demo:lm"}', 400, "outside the vocabulary"),
        (b'{"prompt": "a", "model": "demo:lm", "max_tokens": 1024}', 400, "exceed the 1024 tokens"),
        (b'{"prompt": "a", "model": "demo:lm", "max_tokens": 0}', 400, "max_tokens: expected"),
        (b'{"prompt": "a", "model": "demo:lm", "temperature": -1}', 400, "temperature: got -1"),
        (b'{"prompt": "a", "model": "demo:lm", "temperature": NaN}', 400, "temperature: got nan"),
        (b'{"prompt": "a", "model": "demo:lm", "top_p": "x"}', 400, "top_p: expected a number"),
        (b'{"prompt": "a", "model": "demo:lm", "n": 2}', 400, "n: not supported"),
        (b'{"prompt": "a", "model": "demo:lm", "stop": ["a", ""]}', 400, "stop: expected"),
        (b'{"prompt": "a", "model": "demo:lm", "stop": 3}', 400, "stop: expected"),
        (b'{"prompt": "a", "model": "demo:lm", "stream": 1}', 400, "stream: expected true or false"),
        (b'{"prompt": "' + b"a" * 20_000 + b'"}', 413, "larger than 20000 bytes"),
    ],
)
def test_bad_requests(served: Served, body: bytes, status: int, words: str) -> None:
    answer = httpx.post(served.url + "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    if status == 400 and ":" in words:
        assert answer.json()["error"]["param"] == words.partition(":")[0]


def test_bad_bodies(served: Served) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    kind = {"Content-Type": "application/json"}
    assert httpx.post(served.url + "/v1/completions", content=pieces(), headers=kind).status_code == 413
    assert httpx.post(served.url + "/v1/completions", content=b"{}").status_code == 415
    assert httpx.get(served.url + "/v1/completions").status_code == 405
    assert httpx.get(served.url + "/v1/models/other").status_code == 404
    assert httpx.get(served.url + "/health").json()["status"] == "ok"
    for messages in (None, [], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}], ["a"]):
        assert post(served, "/v1/chat/completions", **GREEDY, messages=messages).status_code == 400


def test_a_body_that_does_not_arrive_is_given_up(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=20) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in slow.recv(100)


def open_stream(served: Served, tokens: int) -> socket.socket:
    """A client that asks for a stream and reads nothing of it."""
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": tokens, "temperature": 0, "stream": True}).encode()
    client = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def test_a_client_that_leaves_frees_its_row(served: Served) -> None:
    client = open_stream(served, 1000)
    wait_for(lambda: served.scheduler.load()["running"] == 1)
    done = served.scheduler.served
    client.close()
    wait_for(lambda: served.scheduler.load()["running"] == 0)
    assert served.scheduler.served == done + 1

    async def impatient() -> None:
        async with httpx.AsyncClient(base_url=served.url) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=GREEDY | {"prompt": "a", "max_tokens": 1000}, timeout=0.3)

    asyncio.run(impatient())
    begun = time.monotonic()
    wait_for(lambda: served.scheduler.load()["running"] == 0)
    assert time.monotonic() - begun < 5


def test_slow_readers_do_not_stall_others(served: Served) -> None:
    lazy = [open_stream(served, 600) for _ in range(3)]
    try:
        wait_for(lambda: served.scheduler.load()["running"] == 3)
        answer = post(served, "/v1/completions", **GREEDY, prompt="import ", max_tokens=20)
        assert answer.json()["usage"]["completion_tokens"] == 20
    finally:
        for client in lazy:
            client.close()
    wait_for(lambda: served.scheduler.load()["running"] == 0)


def test_no_content_is_logged(served: Served, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    secret = "zzyzx_secret"
    with caplog.at_level(logging.DEBUG):
        post(served, "/v1/completions", **GREEDY, prompt=secret, max_tokens=3)
        httpx.post(
            served.url + "/v1/completions", content=secret.encode(), headers={"Content-Type": "application/json"}
        )
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    out = capfd.readouterr()
    assert secret not in "".join(ours) + out.out + out.err


def test_what_does_not_fit_the_queue_is_refused(demo: tuple[Any, Any]) -> None:
    served = Served(demo, slots=1, queue=2)
    clients = []
    try:
        for waiting in range(3):
            clients.append(open_stream(served, 900))
            wait_for(
                lambda waiting=waiting: sum(served.scheduler.load()[k] for k in ("running", "waiting")) == waiting + 1
            )
        answer = post(served, "/v1/completions", **GREEDY, prompt="a", max_tokens=2)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert "2 requests wait" in answer.json()["error"]["message"]
        for client in clients:
            client.close()
        wait_for(lambda: served.scheduler.load()["waiting"] == 0)
        assert post(served, "/v1/completions", **GREEDY, prompt="a", max_tokens=2).status_code == 200
    finally:
        served.close()
    with pytest.raises(BusyError, match="shutting down"):
        served.scheduler.submit([1], 1, Sampling(), 0, lambda _: None)


class Collected:
    """Events of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.end = threading.Event()
        self.reason: str | None = None

    def __call__(self, event: Event) -> None:
        if event.token is None:
            self.reason = event.reason
            self.end.set()
        else:
            self.tokens.append(event.token)


def test_a_scheduler_gives_each_request_its_own_tokens() -> None:
    model = decoder("llama")
    alone = compile_inference(model, 1, 64)
    scheduler = Scheduler(compile_inference(model, 3, 64), queue=40, prompt_part=4)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 96, (1 + n % 11,), generator=generator).tolist() for n in range(24)]
    samplings = [Sampling(0.8, 10) if n % 3 == 0 else Sampling() for n in range(24)]
    seen = [Collected() for _ in prompts]
    jobs = [scheduler.submit(p, 3 + n % 13, samplings[n], n, seen[n]) for n, p in enumerate(prompts)]
    for n in (4, 9):
        scheduler.cancel(jobs[n])
    for n, prompt in enumerate(prompts):
        if n in (4, 9):
            continue
        assert seen[n].end.wait(20)
        made = alone.generate(
            torch.tensor([prompt]), None, 3 + n % 13, samplings[n], generator=torch.Generator().manual_seed(n)
        )
        tokens = made.tokens[0, len(prompt) : len(prompt) + int(made.lengths[0])].tolist()
        stopped = tokens[-1] in alone.eos_token_ids
        assert seen[n].tokens == (tokens[:-1] if stopped else tokens)
        assert seen[n].reason == ("stop" if stopped else "length")
    scheduler.close()


def test_a_failing_reader_or_engine_does_not_end_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(compile_inference(decoder("llama"), 2, 64), queue=4)

    def broken(_event: Event) -> None:
        raise RuntimeError("gone")

    scheduler.submit([5], 40, Sampling(), 0, broken)
    good = Collected()
    scheduler.submit([5], 4, Sampling(), 0, good)
    assert good.end.wait(10) and good.reason == "length" and len(good.tokens) == 4
    original = scheduler.engine.step_rows

    def failing(*_: Any) -> Any:
        raise ValueError("a matter of the engine")

    monkeypatch.setattr(scheduler.engine, "step_rows", failing)
    bad = Collected()
    scheduler.submit([5], 4, Sampling(), 0, bad)
    assert bad.end.wait(10) and bad.reason == "failed"
    monkeypatch.setattr(scheduler.engine, "step_rows", original)
    again = Collected()
    scheduler.submit([5], 4, Sampling(), 0, again)
    assert again.end.wait(10) and again.tokens == good.tokens
    with pytest.raises(ValueError, match="a server has no beams"):
        scheduler.submit([5], 4, Sampling(num_beams=2), 0, again)
    late = Collected()
    scheduler.submit([5], 60, Sampling(), 0, late)
    scheduler.close()
    assert late.end.wait(10) and late.reason in ("cancelled", "length")


def test_a_draw_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(compile_inference(decoder("llama"), 2, 64), queue=4)
    original = scheduler.engine.step_rows

    def not_finite(*arguments: Any) -> torch.Tensor:
        logits = original(*arguments).clone()
        for row, job in enumerate(scheduler._running):
            if job.sampling.temperature > 0:
                logits[row] = float("nan")
        return logits

    monkeypatch.setattr(scheduler.engine, "step_rows", not_finite)
    good, bad = Collected(), Collected()
    scheduler.submit([5], 40, Sampling(), 0, good)
    scheduler.submit([5], 40, Sampling(1.0), 0, bad)
    assert bad.end.wait(10) and bad.reason == "failed" and len(bad.tokens) <= 1
    assert good.end.wait(10) and good.reason in ("length", "stop")
    scheduler.close()


def test_text_holds_back_half_characters_and_beginnings_of_stops(demo: tuple[Any, Any]) -> None:
    tokenizer = demo[1]
    text = "näive €uro 漢字 end"
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) and "" in pieces
    stopping = TextStream(tokenizer, ["字 e", "字x"])
    shown = ""
    for token in ids:
        shown += stopping.push(token)
        assert "字" not in shown
        if stopping.stopped:
            break
    assert shown + stopping.finish() == "näive €uro 漢"
    cut = TextStream(tokenizer)
    assert "".join(cut.push(token) for token in ids[:2]) + cut.finish() == "n\ufffd"
    noise = TextStream(tokenizer)
    assert len("".join(noise.push(255) for _ in range(20))) > 8


def test_chats_use_the_template_where_there_is_one(demo: tuple[Any, Any]) -> None:
    tokenizer = load(NAME)[1]
    assert (
        tokenizer.decode(chat_prompt(tokenizer, [("system", "a"), ("user", "b")])) == "system: a\nuser: b\nassistant:"
    )
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert tokenizer.decode(chat_prompt(tokenizer, [("user", "b")])) == "<user>b"


def test_schema() -> None:
    wanted = read_completion({"model": "m", "prompt": ["a"], "stop": "x", "seed": -1, "user": "ignored"})
    assert wanted.prompt == "a" and wanted.stop == ("x",) and wanted.max_tokens == 16 and wanted.seed is not None
    assert wanted.sampling == Sampling(1.0) and not wanted.stream
    assert read_completion({"model": "m", "prompt": "a", "temperature": 1e-40}).sampling == Sampling()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = read_chat({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert chat.messages == (("user", "ab"),) and chat.max_tokens is None
    for name, value in (("queue", -1), ("max_body_bytes", 0), ("body_seconds", 0)):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: value})
