"""The HTTP and WebSocket API, version 1. docs/api.md describes it. The page uses only this API.

No route uses a thread of the pool or blocks the event loop. Work that takes long runs in a child process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.requests import ClientDisconnect

from pipeline.serving.clips import Clip
from pipeline.serving.connection import VERSION, Connection
from pipeline.serving.guard import LOOPBACK
from pipeline.serving.images import MOST_BYTES, Refused
from pipeline.serving.server import Server
from pipeline.serving.status import metrics_text
from pipeline.serving.visitors import BrowserSession
from pipeline.serving.workers import Busy
from utils.errors import UserError
from utils.files import is_own_file

PAGE = Path(__file__).parent / "page"
SOON = {"retry-after": "2"}
PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


def create_app(server: Server, lifespan: Callable | None = None) -> FastAPI:
    """Return the application without the page."""
    app = FastAPI(
        title="Self Forcing",
        version=str(VERSION),
        description="Live video from prompts. The stream itself is a WebSocket: see docs/api.md.",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,  # these pages load scripts from other sites
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_status_routes(app, server)
    _add_model_route(app, server)
    _add_image_routes(app, server)
    _add_clip_routes(app, server)
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.websocket("/api/v1/stream")
    async def stream(socket: WebSocket) -> None:
        server.connected()
        try:
            await Connection(server, socket, _visitor(socket)).run()
        finally:
            server.disconnected()

    return app


def _add_status_routes(app: FastAPI, server: Server) -> None:
    @app.get("/healthz", summary="Status 200, or 503 if the model cannot be loaded")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse(f"{server.state}\n", 503 if server.state == "failed" else 200)

    @app.get("/metrics", summary="Figures in the text format of Prometheus")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(server), media_type="text/plain; version=0.0.4")

    @app.get("/api/v1/status", summary="State of the model, number of viewers, memory")
    async def status() -> dict[str, Any]:
        return server.status()

    @app.get("/api/v1/options", summary="Choices that a stream has; 503 until the model is loaded")
    async def options() -> dict[str, Any]:
        if server.state != "ready":
            raise HTTPException(503, f"the model is not ready: {server.stage}", SOON)
        return server.model.options()


def _add_model_route(app: FastAPI, server: Server) -> None:
    @app.put("/api/v1/model", summary="Load another model in place of this one; every stream ends", status_code=202)
    async def choose_model(name: str, request: Request) -> None:
        if not server.may_choose:
            raise HTTPException(403, "only the machine of the server may choose the model; see --visitors-choose")
        if name not in server.model.names:
            raise HTTPException(404, f"no such model; choose from {', '.join(server.model.names)}")
        try:
            await server.choose(name, _visitor(request))
        except UserError as error:
            raise HTTPException(409, str(error)) from error

    @app.post("/api/v1/download", summary="Download the missing weights, then load the model", status_code=202)
    async def download_weights(request: Request) -> None:
        if not _is_from_here(request):
            raise HTTPException(403, "only the person at the server's machine may download weights")
        try:
            server.download()
        except UserError as error:
            raise HTTPException(409, str(error)) from error


def _is_from_here(request: Request) -> bool:
    """Return whether a request comes from this machine, and no proxy has passed it on."""
    here = request.client is not None and request.client.host in LOOPBACK
    return here and not any(name in request.headers for name in PROXY_HEADERS)


def _add_image_routes(app: FastAPI, server: Server) -> None:
    @app.put("/api/v1/sessions/{session_id}/image", summary="Upload the first frame of the session's next stream")
    async def put_image(session_id: str, request: Request) -> dict[str, int]:
        session = _session(server, session_id)
        visitor = _visitor(request)
        if not server.uploads.enter(visitor):
            raise HTTPException(503, "too many images are being uploaded; try again in a few seconds", SOON)
        try:
            image, width, height = await server.decoder.clean(await _body(request))
        except Refused as error:
            raise HTTPException(415, str(error)) from error
        except ClientDisconnect:
            raise HTTPException(400, "the upload ended too early; send the image again") from None
        finally:
            server.uploads.leave(visitor)
        server.sessions.keep_image(session, image)
        return {"width": width, "height": height}

    @app.delete("/api/v1/sessions/{session_id}/image", summary="Delete the uploaded image", status_code=204)
    async def delete_image(session_id: str) -> None:
        server.sessions.keep_image(_session(server, session_id), None)


def _add_clip_routes(app: FastAPI, server: Server) -> None:
    @app.get("/api/v1/sessions/{session_id}/clips", summary="List the finished clips of the session, the latest first")
    async def clips(session_id: str) -> list[dict[str, Any]]:
        return [clip.describe() for clip in server.gallery.of(_session(server, session_id).id)]

    @app.delete("/api/v1/sessions/{session_id}/clips/{name}", summary="Delete a clip of the session", status_code=204)
    async def delete_clip(session_id: str, name: str) -> None:
        clip = _clip(server, name)
        if clip.session_id != _session(server, session_id).id:
            raise HTTPException(404, "no such clip")
        server.gallery.remove(clip)

    @app.get("/api/v1/clips/{name}.{kind}", summary="Download a clip; kind is mp4 or gif")
    async def clip_file(name: str, kind: str) -> FileResponse:
        clip = _clip(server, name)
        if kind not in ("mp4", "gif"):
            raise HTTPException(404, "no such clip")
        try:
            path = clip.path if kind == "mp4" else await server.gifs.path(clip)
        except Busy as error:
            raise HTTPException(503, str(error), SOON) from error
        if not is_own_file(path):  # deleted, or a link that somebody put there
            raise HTTPException(404, "no such clip")
        return FileResponse(path, filename=path.name, content_disposition_type="inline")


async def _body(request: Request) -> bytes:
    """Return the body of a request. Raises HTTPException 413 if it is too long."""
    too_long = HTTPException(413, f"the image has more than {MOST_BYTES >> 20} MB; make it smaller")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MOST_BYTES:
        raise too_long
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise too_long
    return bytes(data)


def _visitor(connection: Request | WebSocket) -> str:
    """Return the visitor whose share a request counts for: the one that the guard found, or the address."""
    client = connection.client.host if connection.client else ""
    return connection.scope.get("state", {}).get("visitor", client)


def _session(server: Server, session_id: str) -> BrowserSession:
    session = server.sessions.known(session_id)
    if session is None:
        raise HTTPException(404, "no such session")
    return session


def _clip(server: Server, name: str) -> Clip:
    clip = server.gallery.get(name)
    if clip is None:
        raise HTTPException(404, "no such clip")
    return clip
