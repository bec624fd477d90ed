"""What those who steer a stream must know of it. This module imports no torch, so the demo can start before it."""

from __future__ import annotations

from enum import Enum


class SessionState(Enum):
    """The state of a session."""

    running = "running"
    paused = "paused"
    stopped = "stopped"
    finished = "finished"


class Stopped(Exception):
    """A chunk belongs to a stream that was stopped or restarted."""


class SwitchStyle(Enum):
    """How the context is treated when the prompt changes."""

    cut = "cut"
    """The context is forgotten. A new clip begins, at position 0."""
    keep = "keep"
    """The context is kept without a change."""
    recache = "recache"
    """The visible frames are encoded again with the new prompt, in one pass (LongLive, arXiv 2509.22622)."""
    blend = "blend"
    """The context is kept. The caller moves the embeddings to the new prompt over several chunks."""
