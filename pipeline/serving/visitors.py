"""Sessions: one browser page each, also after it connected anew. Nobody can push out the sessions of others."""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict

from pipeline.serving.limits import Limits, greediest

TOKEN_BYTES = 24


class BrowserSession:
    """What is remembered of one page.

    Args:
        visitor: whose share it counts for; see ``limits.visitor_of``.
    """

    def __init__(self, visitor: str) -> None:
        self.id = secrets.token_urlsafe(TOKEN_BYTES)
        """Unguessable: who knows it sees the session's clips."""
        self.visitor = visitor
        self.connections = 0
        """Open WebSockets of it."""
        self.image: bytes | None = None
        """A PNG to start from."""


class Sessions:
    """All sessions. Used on the event loop only.

    If there are too many, the oldest one without a connection goes, of the visitor that has the most.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._sessions: OrderedDict[str, BrowserSession] = OrderedDict()  # the one longest unseen first

    def __len__(self) -> int:
        return len(self._sessions)

    def greet(self, session_id: str | None, visitor: str) -> BrowserSession:
        """The session of that id, or a new one if it is not known. It has one more connection now."""
        session = self._sessions.pop(session_id, None) if session_id else None
        session = session or BrowserSession(visitor)
        session.connections += 1
        self._sessions[session.id] = session
        self._forget_surplus(visitor)
        return session

    def leave(self, session: BrowserSession) -> None:
        """A connection of it has ended."""
        session.connections -= 1

    def known(self, session_id: str) -> BrowserSession | None:
        """The session of that id."""
        return self._sessions.get(session_id)

    def keep_image(self, session: BrowserSession, image: bytes | None) -> None:
        """Remember a session's image, or forget it. The images of all sessions together are limited."""
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
