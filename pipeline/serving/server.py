"""The state behind the API: the model on its way into memory, the sessions, the hub and the gallery."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from pipeline.serving import messages
from pipeline.serving.clips import Gallery
from pipeline.serving.hub import Hub
from pipeline.serving.limits import Count, Limits, Rate
from pipeline.serving.spec import StreamSpec
from pipeline.serving.status import MEMORY_SECONDS, Remembered, memory_use
from pipeline.serving.viewer import Session
from pipeline.serving.visitors import Sessions
from pipeline.serving.workers import GifMaker, ImageDecoder
from utils.errors import UserError

log = logging.getLogger(__name__)

STATUS_SECONDS = 0.2  # for which a status is told again; shorter than the time between two reports to a client
LONGEST_START_WAIT = 10.0  # seconds that a start may have to wait for the visitor's share


class Model(Protocol):
    """What is served; ``pipeline.serving.models.Models`` in the demo."""

    def load(self, report: Callable[[str, float], None]) -> None:
        """Bring it into memory; ``report`` gets what is being done and the share that is done. Raises UserError."""
        ...

    def options(self) -> dict[str, Any]:
        """What the page may offer; docs/api.md lists the keys."""
        ...

    def spec(self, message: messages.Start, image: bytes | None) -> StreamSpec:
        """A checked request. Raises UserError for what the model cannot do."""
        ...

    def is_prepared(self, spec: StreamSpec) -> bool:
        """Whether a stream can begin without :meth:`prepare`."""
        ...

    def prepare(self, spec: StreamSpec) -> None:
        """Load what a stream needs and is not there yet; may take a while."""
        ...

    def open(self, spec: StreamSpec) -> Session:
        """Begin a stream."""
        ...


class Server:
    """Everything a route needs.

    Args:
        model: loaded by :meth:`load` on a thread of its own.
        hub, gallery: see their modules.
        limits: what visitors may ask for.
    """

    def __init__(self, model: Model, hub: Hub, gallery: Gallery, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.model, self.hub, self.gallery, self.limits = model, hub, gallery, limits
        self.stage, self.progress, self.state = "starting", 0.0, "loading"
        self.error: UserError | None = None
        self.sessions = Sessions(limits)
        self.messages = Rate(limits.messages, 4 * limits.messages)
        self.uploads = Count(limits.uploads_each, limits.uploads)
        self.decoder, self.gifs = ImageDecoder(limits), GifMaker(gallery, limits)
        self.memory = Remembered(memory_use, MEMORY_SECONDS)
        self.status = Remembered(self._status, STATUS_SECONDS)
        self.connections = 0
        self._starts = Rate(limits.starts, limits.starts_at_once)
        self._precisions = Rate(limits.precisions, 2)
        self._loader = ThreadPoolExecutor(1, "prepare")  # one at a time; those who answer requests are not kept

    def connected(self) -> None:
        """A WebSocket was opened."""
        self.connections += 1

    def disconnected(self) -> None:
        """A WebSocket was closed."""
        self.connections -= 1

    def load(self) -> None:
        """Load the model; a failure is kept for whoever started the server and shown on the page."""
        try:
            self.model.load(self.report)
        except Exception as error:
            self.fail(error)
            return
        self.report("ready", 1.0)
        self.state = "ready"
        self.hub.ready(self.model.open)

    def fail(self, error: Exception) -> None:
        """Say on the page, and to whoever started the server, why it cannot serve."""
        self.error = error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")
        if not isinstance(error, UserError):
            log.error("the model did not load", exc_info=error)
        self.state, self.stage = "failed", str(self.error)

    def report(self, stage: str, progress: float) -> None:
        """Say what is being loaded and how far it is."""
        self.stage, self.progress = stage, progress

    async def take_start(self, visitor: str) -> None:
        """Take a start from the visitor's share, after a wait if need be. Raises UserError if it would be long."""
        wait = self._starts.try_spend(visitor, LONGEST_START_WAIT)
        if wait is None:
            raise UserError("too many videos were started from here: wait a minute")
        await asyncio.sleep(wait)

    async def prepare(self, spec: StreamSpec, visitor: str) -> None:
        """As the model's ``prepare``, on a thread. Raises UserError if the visitor asks too often."""
        if self.model.is_prepared(spec):
            return
        if self._precisions.try_spend(visitor) is None:
            raise UserError("the precision was changed too often from here: wait a minute")
        await asyncio.get_running_loop().run_in_executor(self._loader, self.model.prepare, spec)

    def close(self) -> None:
        """Stop every stream; clips are finished first."""
        self.hub.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _status(self) -> dict[str, Any]:
        """What every client sees."""
        return {
            "type": "status",
            "model": {"state": self.state, "stage": self.stage, "progress": round(self.progress, 3)},
            "viewers": self.hub.viewers,
            "waiting": self.hub.waiting,
            "max_viewers": self.hub.max_viewers,
            "memory": self.memory(),
        }
