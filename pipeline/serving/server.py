"""The state behind the API: visitors, the model on its way into memory, the hub and the gallery."""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil

from pipeline.serving import messages
from pipeline.serving.clips import Gallery
from pipeline.serving.hub import Hub, Session, StreamSpec
from utils.errors import UserError

log = logging.getLogger(__name__)

MOST_VISITORS = 512  # remembered with their first-frame image; the one longest gone is forgotten


class Model(Protocol):
    """What is served; ``pipeline.serving.models.Models`` for real."""

    def load(self, report: Callable[[str, float], None]) -> None:
        """Bring it into memory; ``report`` gets what is being done and the share that is done. Raises UserError."""
        ...

    def options(self) -> dict[str, Any]:
        """What the page may offer; docs/api.md lists the keys."""
        ...

    def spec(self, message: messages.Start, image: bytes | None) -> StreamSpec:
        """A checked request. Raises UserError for what the model cannot do."""
        ...

    def prepare(self, spec: StreamSpec) -> None:
        """Load what a stream needs and is not there yet; may take a while."""
        ...

    def open(self, spec: StreamSpec) -> Session:
        """Begin a stream."""
        ...


@dataclass
class Visitor:
    """One browser page, also after it connected anew."""

    session: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    """Unguessable: who knows it sees the visitor's clips."""
    image: bytes | None = None
    """A PNG to start from."""


class Server:
    """Everything a route needs.

    Args:
        model: loaded by :meth:`load` on a thread of its own.
        hub, gallery: as in their modules.
    """

    def __init__(self, model: Model, hub: Hub, gallery: Gallery) -> None:
        self.model, self.hub, self.gallery = model, hub, gallery
        self.stage, self.progress, self.state = "starting", 0.0, "loading"
        self.error: UserError | None = None
        self.connections = 0
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()  # oldest visit first
        self._lock = threading.Lock()

    def load(self) -> None:
        """Load the model; a failure is kept for whoever started the server and shown on the page."""
        try:
            self.model.load(self.report)
        except Exception as error:
            self.error = error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")
            if not isinstance(error, UserError):
                log.error("the model did not load", exc_info=error)
            self.state, self.stage = "failed", str(self.error)
            return
        self.report("ready", 1.0)
        self.state = "ready"
        self.hub.ready(self.model.open)

    def report(self, stage: str, progress: float) -> None:
        """Say what is being loaded and how far it is."""
        self.stage, self.progress = stage, progress

    def visitor(self, session: str | None) -> Visitor:
        """The visitor of a session, or a new one where it is not known."""
        with self._lock:
            visitor = self._visitors.pop(session, None) if session else None
            visitor = visitor or Visitor()
            self._visitors[visitor.session] = visitor
            while len(self._visitors) > MOST_VISITORS:
                self._visitors.popitem(last=False)
        return visitor

    def known(self, session: str) -> Visitor | None:
        """The visitor of a session."""
        with self._lock:
            return self._visitors.get(session)

    def status(self) -> dict[str, Any]:
        """What every client sees."""
        return {
            "type": "status",
            "model": {"state": self.state, "stage": self.stage, "progress": round(self.progress, 3)},
            "viewers": len(self.hub.seated),
            "waiting": len(self.hub.line),
            "max_viewers": self.hub.max_viewers,
            "memory": memory_use(),
        }


def memory_use() -> dict[str, float | None]:
    """Gigabytes in use: ``ram`` of this process, ``vram`` of the GPU."""
    torch = sys.modules.get("torch")  # not worth waiting for its import
    vram = total = None
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():  # asking would open a context
        free, total = torch.cuda.mem_get_info()
        vram, total = (total - free) / 1e9, total / 1e9
    return {"ram": resident_bytes() / 1e9, "vram": vram, "vram_total": total}


def resident_bytes() -> int:
    """Memory of this process."""
    return psutil.Process().memory_info().rss
