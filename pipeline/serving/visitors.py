"""Sessions of browsers. A session outlives its connections, and no visitor can displace the sessions of others."""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict

from pipeline.serving.limits import Limits, greediest

TOKEN_BYTES = 24


class BrowserSession:
    """What the server remembers of one browser.

    Args:
        visitor: the visitor that the session counts for; see ``limits.visitor_of``.
        session_id: the id of a session of an earlier run of the server. None makes a new one.
    """

    def __init__(self, visitor: str, session_id: str | None = None) -> None:
        self.id = session_id or secrets.token_urlsafe(TOKEN_BYTES)
        """A secret that nobody can guess. Who knows it can see the session's clips."""
        self.visitor = visitor
        self.connections = 0
        """Number of its open WebSockets."""
        self.image: bytes | None = None
        """The uploaded first frame as a PNG."""


class Sessions:
    """All sessions. Only the event loop may use this object.

    If there are too many, the visitor with the most unconnected sessions loses the oldest of them.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[str, BrowserSession] = OrderedDict()  # the least recently used one is first

    def __len__(self) -> int:
        return len(self._sessions)

    def greet(self, session_id: str | None, visitor: str, *, recalled: bool = False) -> BrowserSession:
        """Return the session of that id, or a new one if the id is not known. Count one more connection of it.

        Args:
            recalled: whether an earlier run of the server made the id. The new session then has it too.
        """
        session = self._sessions.pop(session_id, None) if session_id else None
        session = session or BrowserSession(visitor, session_id if recalled else None)
        session.connections += 1
        self._sessions[session.id] = session
        self._forget_surplus(visitor)
        return session

    def leave(self, session: BrowserSession) -> None:
        """Count one connection of the session less."""
        session.connections -= 1

    def known(self, session_id: str) -> BrowserSession | None:
        """Return the session of that id, or None."""
        return self._sessions.get(session_id)

    def keep_image(self, session: BrowserSession, image: bytes | None) -> None:
        """Set or delete (None) a session's image. If all images together are too large, old ones are deleted."""
        session.image = image
        while (total := self._image_bytes()).total() > self._limits.image_bytes:
            visitor = total.most_common(1)[0][0]
            oldest = next(s for s in self._sessions.values() if s.image is not None and s.visitor == visitor)
            oldest.image = None

    def _image_bytes(self) -> Counter[str]:
        sizes: Counter[str] = Counter()
        for session in self._sessions.values():
            sizes[session.visitor] += len(session.image or b"")
        return sizes

    def _forget_surplus(self, visitor: str) -> None:
        left = [session for session in self._sessions.values() if session.connections == 0]
        own = [session for session in left if session.visitor == visitor]
        have = sum(session.visitor == visitor for session in self._sessions.values())
        if have > self._limits.sessions_each and own:
            del self._sessions[own[0].id]
        elif len(self._sessions) > self._limits.sessions and left:
            most = greediest(session.visitor for session in left)
            del self._sessions[next(session for session in left if session.visitor == most).id]
