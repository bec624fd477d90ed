"""The state behind the API: the model, which is loaded in the background, the sessions, the hub and the gallery."""

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
from pipeline.serving.missing import MissingWeights
from pipeline.serving.spec import StreamSpec
from pipeline.serving.status import MEMORY_SECONDS, Remembered, memory_use
from pipeline.serving.viewer import Session
from pipeline.serving.visitors import Sessions
from pipeline.serving.workers import GifMaker, ImageDecoder
from utils.errors import UserError

log = logging.getLogger(__name__)

STATUS_SECONDS = 0.2  # for which a status is reused; shorter than the time between two reports to a client
LONGEST_START_WAIT = 10.0  # seconds; a start that would have to wait longer is refused


class Model(Protocol):
    """The interface of a model to serve. The demo uses ``pipeline.serving.models.Models``."""

    @property
    def names(self) -> list[str]:
        """The names of the models among which visitors may choose, the default first."""
        ...

    @property
    def chosen(self) -> str:
        """The name of the model that is loaded or will be."""
        ...

    def check(self, name: str) -> None:
        """Raise UserError if a model cannot be loaded for a reason that shows without loading it."""
        ...

    def choose(self, name: str) -> None:
        """Drop the loaded model. :meth:`load` then loads the one of this name."""
        ...

    def load(self, report: Callable[[str, float], None]) -> None:
        """Load the model. `report` gets the stage as text and the finished share in [0, 1].

        Raises:
            MissingWeights: weights are missing, and :meth:`download` can fetch them.
            UserError: it cannot be loaded.
        """
        ...

    def download(self, report: Callable[[str, float], None]) -> None:
        """Download the missing weights. Raises UserError."""
        ...

    def options(self) -> dict[str, Any]:
        """Return the choices that the page may offer. docs/api.md lists the keys."""
        ...

    def spec(self, message: messages.Start, image: bytes | None) -> StreamSpec:
        """Return the checked request. Raises UserError if the model cannot do what it asks for."""
        ...

    def is_prepared(self, spec: StreamSpec) -> bool:
        """Return whether a stream can begin without :meth:`prepare`."""
        ...

    def prepare(self, spec: StreamSpec) -> None:
        """Load what a stream needs and is not loaded yet. This may take minutes."""
        ...

    def open(self, spec: StreamSpec) -> Session:
        """Open the session of a stream."""
        ...


class Server:
    """Everything that a route needs.

    Args:
        model: the model. :meth:`load` loads it on its own thread.
        hub, gallery: see their modules.
        limits: how much visitors may use.
        greeting: text for a client that comes with a session of another server. It gets none if this is empty.
        may_choose: whether visitors may choose among the models. A choice ends every running stream.
    """

    def __init__(
        self,
        model: Model,
        hub: Hub,
        gallery: Gallery,
        limits: Limits | None = None,
        *,
        greeting: str = "",
        may_choose: bool = False,
    ) -> None:
        limits = limits or Limits()
        self.greeting, self.may_choose = greeting, may_choose
        self.loads = 0
        """How many times another model was chosen."""
        self.problem = ""
        """Why the model that was chosen last was not loaded, or its weights were not downloaded."""
        self.missing: MissingWeights | None = None
        """The weights that are missing while the state is "missing"."""
        self.model, self.hub, self.gallery, self.limits = model, hub, gallery, limits
        self.stage, self.progress, self.state = "starting", 0.0, "loading"
        self.error: UserError | None = None
        self.sessions = Sessions(limits)
        self.messages = Rate(limits.messages, 4 * limits.messages)
        self.text_bytes = Rate(limits.text_bytes, 2 * limits.text_bytes)
        self.sources = Count(limits.sources_each, limits.sources)
        self.uploads = Count(limits.uploads_each, limits.uploads)
        self.decoder, self.gifs = ImageDecoder(limits), GifMaker(gallery, limits)
        self.memory = Remembered(memory_use, MEMORY_SECONDS)
        self.status = Remembered(self._status, STATUS_SECONDS)
        self.connections = 0
        self._starts = Rate(limits.starts, limits.starts_at_once)
        self._precisions = Rate(limits.precisions, 2)
        self._loader = ThreadPoolExecutor(1, "prepare")  # one model at a time, beside the threads of requests

    def connected(self) -> None:
        """Count a WebSocket that was opened."""
        self.connections += 1

    def disconnected(self) -> None:
        """Stop counting a WebSocket that was closed."""
        self.connections -= 1

    async def choose(self, name: str, visitor: str) -> None:
        """Begin to load another model in place of this one. Every stream ends with a notice.

        Raises:
            UserError: a model is being loaded, this one cannot be, or the visitor asks too often.
        """
        if name == self.model.chosen and self.state == "ready":
            return
        self._check_not_loading()
        if self._precisions.try_spend(visitor) is None:
            raise UserError("the model was changed too often from your address; wait a minute")
        await asyncio.get_running_loop().run_in_executor(self._loader, self.model.check, name)
        self._check_not_loading()
        self.loads += 1
        self._begin("ending the videos that run")
        self._loader.submit(self._exchange, name)

    def download(self) -> None:
        """Begin to download the missing weights; the model is loaded after that. Raises UserError if none miss."""
        self._check_not_loading()
        if self.missing is None:
            raise UserError("no weights are missing that could be downloaded")
        self._begin("downloading the weights")
        self._loader.submit(self._download)

    def _begin(self, stage: str) -> None:
        self.state, self.error, self.problem = "loading", None, ""
        self.report(stage, 0.02)

    def _download(self) -> None:
        try:
            self.model.download(self.report)
        except Exception as error:
            self.problem = str(_known(error))
        self.load()  # or say what is still missing

    def check_same(self, loads: int) -> None:
        """Raise UserError if another model was chosen since `loads` was read."""
        if self.state != "ready" or self.loads != loads:
            raise UserError("another model was chosen meanwhile; start again when it is loaded")

    def _check_not_loading(self) -> None:
        if self.state == "loading":
            raise UserError("a model is being loaded; wait until it is ready")

    def _exchange(self, name: str) -> None:
        """Load another model in place of this one. If that fails, load this one again and tell why."""
        before = self.model.chosen
        self.hub.end_all(f"This video was ended because another model was chosen: {name}.")
        self.model.choose(name)
        try:
            self.model.load(self.report)
        except MissingWeights as error:
            self._miss(error)
        except Exception as error:
            self.problem = f"{name} cannot be loaded: {_known(error)}. {before} is used again."
            self.model.choose(before)
            self.load()
        else:
            self._loaded()

    def load(self) -> None:
        """Load the model, unless it is loaded. An error is shown on the page and kept in `error`."""
        if self.state == "ready":
            self.report("ready", 1.0)
            return
        try:
            self.model.load(self.report)
        except MissingWeights as error:
            self._miss(error)
            return
        except Exception as error:
            self.fail(error)
            return
        self._loaded()

    def _miss(self, weights: MissingWeights) -> None:
        """Record which weights are missing. A person can download them, or choose another model."""
        log.warning("%s", weights)
        self.missing, self.stage = weights, str(weights)
        self.state = "missing"

    def _loaded(self) -> None:
        self.missing = None
        self.report("ready", 1.0)
        self.state = "ready"
        self.hub.ready(self.model.open)

    def fail(self, error: Exception) -> None:
        """Record why the server cannot serve. The page shows the reason, and `error` keeps it."""
        self.error = _known(error)
        self.state, self.stage = "failed", str(self.error)

    def report(self, stage: str, progress: float) -> None:
        """Record what is being loaded, and the finished share in [0, 1]."""
        self.stage, self.progress = stage, progress

    async def take_start(self, visitor: str) -> None:
        """Count a start of a stream, and wait if the visitor has started many. Raises UserError if the wait is long."""
        wait = self._starts.try_spend(visitor, LONGEST_START_WAIT)
        if wait is None:
            raise UserError("too many videos were started from your address; wait a minute")
        await asyncio.sleep(wait)

    async def prepare(self, spec: StreamSpec, visitor: str) -> None:
        """Call the model's ``prepare`` on a thread. Raises UserError if the visitor asks too often."""
        if self.model.is_prepared(spec):
            return
        if self._precisions.try_spend(visitor) is None:
            raise UserError("the precision was changed too often from your address; wait a minute")
        await asyncio.get_running_loop().run_in_executor(self._loader, self.model.prepare, spec)

    def close(self) -> None:
        """Stop every stream and finish the clips."""
        self.hub.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _status(self) -> dict[str, Any]:
        """Return the status message that every client gets."""
        return {
            "type": "status",
            "model": {"state": self.state, "stage": self.stage, "progress": round(self.progress, 3)},
            "models": self.model.names,
            "chosen": self.model.chosen,
            "may_choose": self.may_choose,
            "problem": self.problem,
            "missing": self.missing.describe() if self.state == "missing" else None,
            "viewers": self.hub.viewers,
            "waiting": self.hub.waiting,
            "max_viewers": self.hub.max_viewers,
            "memory": self.memory(),
        }


def _known(error: Exception) -> UserError:
    """Return an error as one that a person can read. The log gets the whole error."""
    if isinstance(error, UserError):
        return error
    log.error("the model did not load", exc_info=error)
    return UserError(f"{type(error).__name__}: {error}")
