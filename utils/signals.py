"""Records signals that ask a program to end, so that it can end cleanly."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)  # Windows has no SIGHUP
)


class StopSignals:
    """While the block runs, signals are only recorded, so the work can continue to a point where it can end cleanly.

    `received` is the first signal, or None. A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread,
    where Python allows no handlers, the block changes nothing.
    """

    def __init__(
        self,
        *,
        more: Sequence[signal.Signals] = (),
        on_signal: Callable[[signal.Signals], None] | None = None,
        repeat_within: float = 0.0,
    ) -> None:
        """`more` signals are recorded besides SIGINT, SIGTERM and SIGHUP; `on_signal` is called with the first one.

        A Ctrl-C within `repeat_within` seconds of the first signal is taken as the same one, because a launcher
        forwards a signal that the terminal has already sent to all processes.
        """
        self.received: signal.Signals | None = None
        self._repeat_within = repeat_within
        self._since = 0.0
        self._numbers = (*ENDING, *more)
        self._on_signal = on_signal
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if signal.getsignal(number) is signal.SIG_IGN and number != signal.SIGINT:
                    continue  # such as SIGHUP under nohup, which is ignored on purpose
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _record(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._since = time.monotonic()
            if self._on_signal is not None:
                self._on_signal(self.received)
        elif number == signal.SIGINT and time.monotonic() - self._since >= self._repeat_within:
            sys.stderr.write("\n")
            raise KeyboardInterrupt


class Stopper:
    """Ends the server when a signal asks for it, also before there is one."""

    def __init__(self) -> None:
        self.asked = False
        self.leaves_threads = False
        self._end: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        """Ask for the end."""
        self.asked = True
        self._end()

    def ends(self, end: Callable[[], None]) -> None:
        """Set the function that ends the program. It is called at once if the end was asked for already."""
        self._end = end
        if self.asked:
            end()

    def leave_threads(self) -> None:
        """Say that threads still work that nobody waits for."""
        self.leaves_threads = True
