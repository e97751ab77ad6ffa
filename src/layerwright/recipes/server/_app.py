"""The application: OpenAI's interface over a scheduler."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from layerwright.core.errors import InputError, require_extra
from layerwright.recipes.server._answers import Answer, chat_answer, completion_answer
from layerwright.recipes.server._scheduler import BusyError, Event, Job, Scheduler
from layerwright.recipes.server._schema import Limits, Wanted, read_chat, read_completion
from layerwright.recipes.server._text import TextStream, chat_prompt

__all__ = ["create_app"]


class _RefusedError(Exception):
    """An answer of another status than 200."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code
        super().__init__(message)


def create_app(scheduler: Scheduler, tokenizer: Any, name: str, limits: Limits | None = None) -> Any:
    """A FastAPI application with ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions`` and ``/health``.

    Nothing of a request's content is logged. The scheduler is closed when the application shuts down.

    Args:
        scheduler: around an engine.
        tokenizer: of the model.
        name: by which clients ask for the model.
        limits: see `Limits`; the length of the queue is the scheduler's.

    Raises:
        MissingExtraError: FastAPI is not installed.
    """
    require_extra("fastapi", "serve")
    from fastapi import FastAPI
    from starlette.routing import Route

    server = _Server(scheduler, tokenizer, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, scheduler.close)

    app = FastAPI(title="layerwright", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    routes: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
        ("/health", "GET", server.health),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{model:path}", "GET", server.model),
        ("/v1/completions", "POST", server.completions),
        ("/v1/chat/completions", "POST", server.chat),
    )
    app.router.routes.extend(Route(path, endpoint, methods=[method]) for path, method, endpoint in routes)
    return app


class _Server:
    """The endpoints."""

    def __init__(self, scheduler: Scheduler, tokenizer: Any, name: str, limits: Limits) -> None:
        self.scheduler, self.tokenizer, self.name, self.limits = scheduler, tokenizer, name, limits
        self.created = int(time.time())
        self._reading = asyncio.Lock()

    async def health(self, _request: Any) -> Any:
        """How many requests run and wait."""
        return _json(200, {"status": "ok", **self.scheduler.load()})

    async def models(self, _request: Any) -> Any:
        """The one model."""
        return _json(200, {"object": "list", "data": [self._model()]})

    async def model(self, request: Any) -> Any:
        """The model, by name."""
        if request.path_params["model"] != self.name:
            return self._unknown(request.path_params["model"])
        return _json(200, self._model())

    async def completions(self, request: Any) -> Any:
        """``/v1/completions``."""
        return await self._answer(request, read_completion, completion_answer)

    async def chat(self, request: Any) -> Any:
        """``/v1/chat/completions``."""
        return await self._answer(request, read_chat, chat_answer)

    async def _answer(self, request: Any, read: Callable[[Any], Wanted], answer: Callable[..., Answer]) -> Any:
        from starlette.requests import ClientDisconnect
        from starlette.responses import Response, StreamingResponse

        try:
            wanted = read(await self._body(request))
            if wanted.model != self.name:
                return self._unknown(wanted.model)
            async with self._reading:  # tokenizers are not made for several threads
                ids = await asyncio.to_thread(self._ids, wanted)
            queue, job = self._submit(wanted, ids)
        except _RefusedError as refused:
            return _error(refused.status, refused.message, refused.code)
        except InputError as error:
            return _error(400, str(error))
        except BusyError as busy:
            return _error(429, str(busy), "overloaded")
        except ClientDisconnect:
            return Response(status_code=499)
        form, text = answer(self.name, len(ids)), TextStream(self.tokenizer, wanted.stop)
        if wanted.stream:
            pieces = self._stream(form, text, queue, job, wanted.usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._whole(request, form, text, queue, job)

    async def _body(self, request: Any) -> Any:
        """The body as data; bounded in size and time."""
        most = self.limits.max_body_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _RefusedError(415, "content-type: expected application/json")
        told = request.headers.get("content-length", "0")
        if not told.isdecimal() or int(told) > most:
            raise _RefusedError(413, f"body: larger than {most} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise _RefusedError(413, f"body: larger than {most} bytes")
        except TimeoutError as error:
            raise _RefusedError(408, f"body: not here after {self.limits.body_seconds:g} s") from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, "body: not valid JSON") from error

    def _ids(self, wanted: Wanted) -> list[int]:
        if wanted.messages is not None:
            try:
                return chat_prompt(self.tokenizer, wanted.messages)
            except Exception as error:  # a template may raise anything
                raise InputError("messages: the model's chat template does not take them") from error
        if isinstance(wanted.prompt, str):
            return list(self.tokenizer(wanted.prompt)["input_ids"])
        return list(wanted.prompt or ())

    def _submit(self, wanted: Wanted, ids: list[int]) -> tuple[asyncio.Queue[Event], Job]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        room = self.scheduler.engine.max_length - len(ids)
        most = max(1, room) if wanted.max_tokens is None else wanted.max_tokens
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        return queue, self.scheduler.submit(ids, most, wanted.sampling, seed, deliver)

    async def _stream(
        self, form: Answer, text: TextStream, queue: asyncio.Queue[Event], job: Job, usage: bool
    ) -> AsyncIterator[str]:
        """Events of a stream. Leaving it, whatever the reason, gives the request up."""
        try:
            yield _sse(form.first())
            while True:
                event = await queue.get()
                if event.reason in ("failed", "cancelled"):
                    yield _sse({"error": {"message": event.message, "type": "server_error"}})
                    return
                piece = text.finish() if event.token is None else text.push(event.token)
                if piece:
                    yield _sse(form.piece(piece))
                if event.token is None or text.stopped:
                    yield _sse(form.end("stop" if text.stopped else _reason(event)))
                    break
            if usage:
                yield _sse(form.usage(len(text.ids)))
            yield "data: [DONE]\n\n"
        finally:
            self.scheduler.cancel(job)

    async def _whole(self, request: Any, form: Answer, text: TextStream, queue: asyncio.Queue[Event], job: Job) -> Any:
        """An answer at once; given up when the client hangs up."""
        from starlette.responses import Response

        gone = asyncio.ensure_future(_disconnected(request))
        pieces: list[str] = []
        try:
            while True:
                coming = asyncio.ensure_future(queue.get())
                await asyncio.wait({gone, coming}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    return Response(status_code=499)
                event = coming.result()
                if event.reason in ("failed", "cancelled"):
                    return _error(500 if event.reason == "failed" else 503, event.message)
                pieces.append(text.finish() if event.token is None else text.push(event.token))
                if event.token is None or text.stopped:
                    reason = "stop" if text.stopped else _reason(event)
                    return _json(200, form.whole("".join(pieces), reason, len(text.ids)))
        finally:
            gone.cancel()
            self.scheduler.cancel(job)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "layerwright"}

    def _unknown(self, name: str) -> Any:
        return _error(404, f"model: {name[:200]!r} is not served here; /v1/models lists what is", "model_not_found")


async def _disconnected(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _reason(event: Event) -> str:
    return "length" if event.reason == "length" else "stop"


def _sse(data: Any) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _json(status: int, data: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(data, status_code=status)


def _error(status: int, message: str, code: str | None = None) -> Any:
    from starlette.responses import JSONResponse

    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    field = message.partition(":")[0] if status == 400 and ":" in message else None
    body = {"error": {"message": message, "type": kind, "param": field, "code": code}}
    return JSONResponse(body, status_code=status, headers={"Retry-After": "1"} if status == 429 else None)
