"""The HTTP and WebSocket API, version 1: docs/api.md. The page uses nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocketState

from pipeline.serving import messages
from pipeline.serving.frames import HEADER
from pipeline.serving.hub import Message, Stream, Switch
from pipeline.serving.images import MOST_BYTES, clean_image
from pipeline.serving.server import Server, Visitor, memory_use
from utils.errors import UserError

VERSION = 1
PAGE = Path(__file__).parent / "page"
MOST_CONNECTIONS = 400
MOST_QUEUED = 1024  # messages to one client; pacing keeps them far fewer
MOST_MISTAKES = 20  # of one client before it is shown out
SEND_SECONDS = 20.0  # a client that takes nothing for so long is gone
HELLO_SECONDS = 10.0
STATUS_SECONDS = 0.3
MEMORY_SECONDS = 3.0
GONE = (WebSocketDisconnect, asyncio.TimeoutError, OSError)  # what a client that leaves looks like


def create_app(server: Server, lifespan: Callable | None = None) -> FastAPI:
    """The application without its page."""
    app = FastAPI(
        title="Self Forcing",
        version=str(VERSION),
        description="Live video from prompts. The stream itself is a WebSocket: see docs/api.md.",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_http_routes(app, server)
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.websocket("/api/v1/stream")
    async def stream(socket: WebSocket) -> None:
        await Connection(server, socket).run()

    return app


def _add_http_routes(app: FastAPI, server: Server) -> None:
    @app.get("/healthz", summary="Whether the server can still show something")
    def healthz() -> PlainTextResponse:
        return PlainTextResponse(f"{server.state}\n", 503 if server.state == "failed" else 200)

    @app.get("/metrics", summary="Counters in Prometheus' text format")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(server), media_type="text/plain; version=0.0.4")

    @app.get("/api/v1/status", summary="The model, who is watching, and memory")
    def status() -> dict[str, Any]:
        return server.status()

    @app.get("/api/v1/options", summary="What a stream may ask for; 503 until the model is loaded")
    def options() -> dict[str, Any]:
        if server.state != "ready":
            raise HTTPException(503, f"the model is not ready: {server.stage}")
        return server.model.options()

    @app.put("/api/v1/sessions/{session}/image", summary="The image the session's next stream starts from, as the body")
    async def put_image(session: str, request: Request) -> dict[str, int]:
        visitor = _visitor(server, session)
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MOST_BYTES:
                raise HTTPException(413, f"the image has more than {MOST_BYTES >> 20} MB")
        try:
            visitor.image, width, height = await run_in_threadpool(clean_image, bytes(data))
        except UserError as error:
            raise HTTPException(415, str(error)) from error
        return {"width": width, "height": height}

    @app.delete("/api/v1/sessions/{session}/image", summary="Forget the image", status_code=204)
    def delete_image(session: str) -> None:
        _visitor(server, session).image = None

    @app.get("/api/v1/sessions/{session}/clips", summary="Finished clips of the session, the latest first")
    def clips(session: str) -> list[dict[str, Any]]:
        return [clip.describe() for clip in server.gallery.of(_visitor(server, session).session)]

    @app.get("/api/v1/clips/{name}.{kind}", summary="A clip's file, kind mp4 or gif")
    def clip_file(name: str, kind: str) -> FileResponse:
        clip = server.gallery.get(name)
        if clip is None or kind not in ("mp4", "gif"):
            raise HTTPException(404, "no such clip")
        path = clip.path if kind == "mp4" else server.gallery.gif(clip)
        return FileResponse(path, filename=path.name, content_disposition_type="inline")


def _visitor(server: Server, session: str) -> Visitor:
    visitor = server.known(session)
    if visitor is None:
        raise HTTPException(404, "no such session")
    return visitor


class Connection:
    """One client at the other end of a WebSocket, with at most one stream."""

    def __init__(self, server: Server, socket: WebSocket) -> None:
        self._server, self._socket = server, socket
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._stream: Stream | None = None
        self._visitor: Visitor | None = None
        self._overrun = asyncio.Event()

    async def run(self) -> None:
        """Serve the client until it goes, then stop its stream."""
        await self._socket.accept()
        if self._server.connections >= MOST_CONNECTIONS:
            await self._socket.close(1013, "too many connections: try again later")
            return
        self._server.connections += 1
        try:
            await self._greet()
            await self._serve()
        except GONE:
            pass
        finally:
            self._server.connections -= 1
            if self._stream is not None:
                self._stream.stop()

    async def _greet(self) -> None:
        text = await asyncio.wait_for(self._socket.receive_text(), HELLO_SECONDS)
        try:
            hello = messages.Hello.model_validate_json(text)
        except ValidationError as error:
            await self._socket.close(1008, "the first message must be hello")
            raise WebSocketDisconnect(1008) from error
        self._visitor = self._server.visitor(hello.session)
        clips = [clip.describe() for clip in self._server.gallery.of(self._visitor.session)]
        greeting = {"type": "hello", "version": VERSION, "session": self._visitor.session, "clips": clips}
        await self._socket.send_json(greeting)

    async def _serve(self) -> None:
        """Receive, send and report until one of the three ends."""
        tasks = [asyncio.create_task(run()) for run in (self._receive, self._send, self._report, self._overrun.wait)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, GONE):
                raise result
        if self._overrun.is_set():
            await self._socket.close(1013, "too slow")

    async def _receive(self) -> None:
        mistakes = 0
        while self._socket.application_state is WebSocketState.CONNECTED:  # not where sending found it gone
            try:
                message = messages.CLIENT_MESSAGE.validate_json(await self._socket.receive_text())
                await self._obey(message)
            except (ValidationError, UserError, KeyError) as error:  # KeyError: a binary message
                mistakes += 1
                self.deliver({"type": "error", "message": _explain(error)})
            if mistakes == MOST_MISTAKES:
                await self._socket.close(1008, "too many mistakes")

    async def _obey(self, message: messages.ClientMessage) -> None:
        stream = self._stream
        if isinstance(message, messages.Start):
            await self._start(message)
        elif stream is None or isinstance(message, messages.Hello):
            raise UserError(f"{message.type} makes no sense here")
        elif isinstance(message, messages.Shown):
            if message.stream == stream.number:
                stream.frames_shown(message.frames)
        elif isinstance(message, messages.Switch):
            stream.switch(Switch(message.prompt, message.style))
        else:
            {"pause": stream.pause, "resume": stream.resume, "stop": stream.stop}[message.type]()

    async def _start(self, message: messages.Start) -> None:
        if self._server.state != "ready":
            raise UserError("the model is still loading")
        image = self._visitor.image if message.image else None
        if message.image and image is None:
            raise UserError("no image was uploaded: put one first")
        spec = self._server.model.spec(message, image)
        if self._stream is not None:
            self._stream.stop()
        await run_in_threadpool(self._server.model.prepare, spec)
        self._stream = self._server.hub.submit(spec, self.deliver, self._visitor.session)

    def deliver(self, message: Message) -> None:
        """Queue a message to the client; from any thread."""
        with suppress(RuntimeError):  # the server is closing and its loop with it
            self._loop.call_soon_threadsafe(self._enqueue, message)

    def _enqueue(self, message: Message) -> None:
        if self._queue.qsize() >= MOST_QUEUED:
            self._overrun.set()
            return
        self._queue.put_nowait(message)

    async def _send(self) -> None:
        while True:
            message = await self._queue.get()
            if isinstance(message, dict):
                await asyncio.wait_for(self._socket.send_json(message), SEND_SECONDS)
                continue
            stream = self._stream
            if stream is not None and HEADER.unpack_from(message)[1] == stream.number:  # not one that was replaced
                await asyncio.wait_for(self._socket.send_bytes(message), SEND_SECONDS)
                stream.frame_sent()

    async def _report(self) -> None:
        """Say what changed in the status, now and then the memory in use, and once what is on offer."""
        told, since, offered = None, 0.0, False
        while True:
            status = self._server.status()
            news = {key: value for key, value in status.items() if key != "memory"}
            if news != told or since > MEMORY_SECONDS:
                if self._server.state == "ready" and not offered:
                    status["options"], offered = self._server.model.options(), True
                self.deliver(status)
                told, since = news, 0.0
            await asyncio.sleep(STATUS_SECONDS)
            since += STATUS_SECONDS


def _explain(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'message'}: {first['msg']}"
    return str(error) if isinstance(error, UserError) else "messages are text"


def metrics_text(server: Server) -> str:
    """All figures, one a line with its type."""
    hub, counters = server.hub, server.hub.counters
    memory = memory_use()
    vram = {"gpu_used_bytes": memory["vram"], "gpu_total_bytes": memory["vram_total"]}
    figures = [
        ("connections", "gauge", server.connections),
        ("viewers", "gauge", len(hub.seated)),
        ("waiting", "gauge", len(hub.line)),
        ("model_ready", "gauge", int(server.state == "ready")),
        ("streams_total", "counter", counters.streams),
        ("chunks_total", "counter", counters.chunks),
        ("frames_total", "counter", counters.frames),
        ("failures_total", "counter", counters.failures),
        ("resident_bytes", "gauge", round(memory["ram"] * 1e9)),
        *((name, "gauge", round(value * 1e9)) for name, value in vram.items() if value is not None),
    ]
    lines = [f"# TYPE self_forcing_{name} {kind}\nself_forcing_{name} {value}" for name, kind, value in figures]
    if counters.seconds:
        lines.append("# TYPE self_forcing_stage_seconds_total counter")
    for stage, seconds in sorted(counters.seconds.items()):
        lines.append(f'self_forcing_stage_seconds_total{{stage="{stage}"}} {seconds:.3f}')
    return "\n".join(lines) + "\n"
