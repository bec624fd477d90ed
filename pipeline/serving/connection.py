"""The connection to one client over a WebSocket. A client has at most one stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError
from starlette.websockets import WebSocketState

from pipeline.serving import live, messages
from pipeline.serving.frames import HEADER
from pipeline.serving.live_source import LiveSource
from pipeline.serving.outbox import Outbox
from pipeline.serving.server import Server
from pipeline.serving.spec import SETTINGS, PromptChange, StreamSpec
from pipeline.serving.viewer import Viewer
from pipeline.serving.visitors import BrowserSession
from utils.errors import UserError

VERSION = 1
MOST_MISTAKES = 20  # wrong messages of one client before its connection is closed
SEND_SECONDS = 20.0  # a client that takes nothing for this long counts as gone
HELLO_SECONDS = 10.0
REPORT_SECONDS = 0.3  # between two checks whether a client needs a new status
MEMORY_SECONDS = 3.0
GONE = (WebSocketDisconnect, asyncio.TimeoutError, TimeoutError, OSError)  # errors that a client causes by leaving


class Connection:
    """Serves one client until it leaves.

    Args:
        visitor: the visitor that the client counts for in every limit; see ``limits.visitor_of``.
    """

    def __init__(self, server: Server, socket: WebSocket, visitor: str) -> None:
        self._server, self._socket, self._visitor = server, socket, visitor
        self._outbox = Outbox(asyncio.get_running_loop())
        self._viewer: Viewer | None = None
        self._feed: live.Feed | None = None
        self._session: BrowserSession

    async def run(self) -> None:
        """Greet the client, serve it, and stop its stream when it leaves."""
        await self._socket.accept()
        try:
            self._session = await self._greet()
        except GONE:
            return
        self._server.gallery.listen(self._session.id, self._outbox.put)
        try:
            await self._serve()
        except GONE:
            pass
        finally:
            self._server.gallery.unlisten(self._session.id, self._outbox.put)
            self._server.sessions.leave(self._session)
            self._outbox.close()
            # asyncio may keep a cancelled task, and with it this object, for a while.
            viewer, self._viewer = self._viewer, None
            if viewer is not None:
                viewer.stop()
            await self._close_feed()

    async def _greet(self) -> BrowserSession:
        text = await asyncio.wait_for(self._socket.receive_text(), HELLO_SECONDS)
        try:
            hello = messages.Hello.model_validate_json(text)
        except ValidationError:
            await self._socket.close(1008, "the first message must be hello")
            raise WebSocketDisconnect(1008) from None
        sessions, gallery = self._server.sessions, self._server.gallery
        lost = hello.session is not None and sessions.known(hello.session) is None
        recalled = lost and gallery.recall(hello.session, self._visitor)
        session = sessions.greet(hello.session, self._visitor, recalled=recalled)
        clips = [clip.describe() for clip in gallery.of(session.id)]
        greeting = {"type": "hello", "version": VERSION, "session": session.id, "clips": clips}
        await self._socket.send_json(greeting | {"image": session.image is not None})
        if hello.session not in (None, session.id) and self._server.greeting:
            self._outbox.put({"type": "notice", "message": self._server.greeting})
        return session

    async def _serve(self) -> None:
        """Receive, send and report until one of these tasks ends."""
        runs = (self._receive, self._send, self._report, self._outbox.overrun.wait)
        tasks = [asyncio.create_task(run()) for run in runs]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception) and not isinstance(result, GONE):
                raise result
        if self._outbox.overrun.is_set():
            await self._socket.close(1013, "the client takes its messages too slowly")

    async def _receive(self) -> None:
        mistakes = 0
        while self._socket.application_state is WebSocketState.CONNECTED:  # sending may have found out that it is gone
            try:
                await self._take(await self._socket.receive())
            except (ValidationError, UserError) as error:
                mistakes += 1
                self._outbox.put({"type": "error", "message": _in_words(error)})
            if mistakes == MOST_MISTAKES:
                await self._socket.close(1008, "too many wrong messages")

    async def _take(self, event: dict[str, Any]) -> None:
        """Take one message, after a wait if the visitor sends many."""
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event["code"])
        await asyncio.sleep(self._server.messages.spend(self._visitor))
        if event.get("bytes") is not None:
            await self._take_frame(event["bytes"])
            return
        text = event["text"]
        if len(text) > messages.LONGEST_TEXT:
            raise UserError(
                f"a text message has {len(text):,} characters; at most {messages.LONGEST_TEXT:,} are allowed"
            )
        await asyncio.sleep(self._server.text_bytes.spend(self._visitor, len(text)))
        await self._obey(messages.CLIENT_MESSAGE.validate_json(text))

    async def _take_frame(self, data: bytes) -> None:
        """Pass a frame of the source on, if it belongs to the stream that runs."""
        if len(data) < live.HEADER.size:
            raise UserError("a binary message is not a frame of a source; see docs/api.md")
        kind, stream = live.HEADER.unpack_from(data)
        if self._feed is not None and self._viewer is not None and stream == self._viewer.number:
            await self._feed.take(kind, data[live.HEADER.size :])
            self._viewer.look_again()

    async def _obey(self, message: messages.ClientMessage) -> None:
        viewer = self._viewer
        if isinstance(message, messages.Start):
            await self._start(message)
        elif viewer is None or isinstance(message, messages.Hello):
            raise UserError(f"{message.type} is not possible now: no stream is running; send start first")
        elif isinstance(message, messages.Shown):
            if message.stream == viewer.number:
                viewer.frames_shown(message.frames, message.late)
        elif isinstance(message, messages.SwitchPrompt):
            viewer.change_prompt(prompt_change(message))
        elif isinstance(message, messages.ChangeRate):
            viewer.change_rate(message.fps)
        elif isinstance(message, messages.RecordPart):
            viewer.record(message.on)
        elif isinstance(message, messages.SourceEnded):
            if self._feed is not None:
                self._feed.source.end()
                viewer.look_again()
        else:
            {"pause": viewer.pause, "resume": viewer.resume, "stop": viewer.stop}[message.type]()

    async def _start(self, message: messages.Start) -> None:
        server = self._server
        if server.state != "ready":
            raise UserError("the model is still loading; try again in a few seconds")
        loads = server.loads
        image = self._session.image if message.image else None
        if message.image and image is None:
            raise UserError("image=true, but no image was uploaded; upload one first")
        if message.source and image is not None:
            raise UserError("image=true and source=true: a video follows a source or starts from an image; choose one")
        spec = server.model.spec(message, image)
        await server.take_start(self._visitor)
        server.check_same(loads)
        if self._viewer is not None:
            self._viewer.stop()
        await self._close_feed()
        server.check_same(loads)
        await server.prepare(spec, self._visitor)
        server.check_same(loads)
        if message.source:
            spec = self._open_feed(spec)
        self._viewer = server.hub.submit(spec, self._outbox.put, self._visitor, self._session.id)

    def _open_feed(self, spec: StreamSpec) -> StreamSpec:
        """Return the request with a source whose frames this client sends."""
        if not self._server.sources.enter(self._visitor):
            raise UserError("too many viewers use a camera, a screen or a video now; try again later")
        source = LiveSource(spec.height, spec.width)
        self._feed = live.Feed(source, spec.fps)
        return replace(spec, source=source)

    async def _close_feed(self) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            self._server.sources.leave(self._visitor)
            await feed.close()

    async def _send(self) -> None:
        while True:
            message = await self._outbox.get()
            if isinstance(message, dict):
                await self._transmit(self._socket.send_json(message))
            else:
                await self._send_frame(message)

    async def _transmit(self, sending: Awaitable[None]) -> None:
        """Send within SEND_SECONDS. Raises WebSocketDisconnect if another task has closed the socket meanwhile."""
        try:
            await asyncio.wait_for(sending, SEND_SECONDS)
        except RuntimeError as error:
            if self._socket.application_state is WebSocketState.CONNECTED:
                raise
            raise WebSocketDisconnect(1006) from error

    async def _send_frame(self, frame: bytes) -> None:
        """Send a frame, unless it belongs to a stream that was replaced."""
        # Keep the viewer in no local variable: asyncio keeps those of a cancelled task until a garbage collection.
        if self._viewer is not None and HEADER.unpack_from(frame)[1] == self._viewer.number:
            await self._transmit(self._socket.send_bytes(frame))
            self._viewer.frame_sent()

    async def _report(self) -> None:
        """Send the status when it changes or the memory figure is old, the place in line, and each model's options."""
        told: dict[str, Any] = {}
        place, since, offered = None, 0.0, -1
        while True:
            status = self._server.status()
            news = {key: value for key, value in status.items() if key != "memory"}
            if news != told or since > MEMORY_SECONDS:
                if self._server.state == "ready" and offered != self._server.loads:
                    status, offered = status | {"options": self._server.model.options()}, self._server.loads
                self._outbox.put(status)
                told, since = news, 0.0
            place = self._tell_place(place)
            await asyncio.sleep(REPORT_SECONDS)
            since += REPORT_SECONDS

    def _tell_place(self, told: tuple[int, int] | None) -> tuple[int, int] | None:
        """Send the viewer's place in line if it has changed. Return the place that the client knows now."""
        viewer = self._viewer
        place = None if viewer is None else self._server.hub.place(viewer)
        if place is None or (viewer.number, place) == told:
            return told
        self._outbox.put({"type": "waiting", "stream": viewer.number, "place": place})
        return viewer.number, place


def _in_words(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return messages.explain(error)
    return str(error)


def prompt_change(message: messages.SwitchPrompt) -> PromptChange:
    """Return the change that a message asks for. Without a prompt the scene is kept."""
    style = message.style if message.prompt is not None else "keep"
    settings = {name: getattr(message, name) for name in SETTINGS}
    return PromptChange(message.prompt, style, message.id, **settings)
