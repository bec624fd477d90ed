"""Decide who may stream: the first viewers get a seat, the others wait in line, and each visitor gets a fair share.

The hub holds a lock when it calls this code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pipeline.serving.limits import Limits
from pipeline.serving.viewer import Viewer

NOBODY_WATCHES = "This video was stopped because nobody was watching it. Press Start to begin again."
OTHERS_WAIT = "This video was stopped because others are waiting and you have several. Press Start to wait in line."
LONG_ENOUGH = "This video was stopped because others are waiting. Press Start to wait in line again."


class Seats:
    """Seats and the line in front of them.

    Args:
        count: number of streams that run at the same time.
        limits: how long a viewer may keep its seat.
    """

    def __init__(self, count: int, limits: Limits) -> None:
        self.count, self._limits = count, limits
        self.taken: list[Viewer] = []
        """Viewers with a seat, in the order in which they got it."""
        self.line: list[Viewer] = []
        """Waiting viewers, in the order in which they came."""

    def join(self, viewer: Viewer) -> None:
        """Put a viewer at the end of the line."""
        self.line.append(viewer)

    def leave(self, viewer: Viewer) -> None:
        """Free the seat of a viewer."""
        self.taken.remove(viewer)

    def fill(self) -> list[Viewer]:
        """Give free seats to the next viewers in line. Return these viewers."""
        seated = []
        while self.line and len(self.taken) < self.count:
            viewer = self.in_order()[0]
            self.line.remove(viewer)
            self.taken.append(viewer)
            seated.append(viewer)
        return seated

    def drop_stopped(self) -> list[Viewer]:
        """Remove stopped viewers from the line. Return them."""
        stopped = [viewer for viewer in self.line if viewer.stopped]
        self.line = [viewer for viewer in self.line if not viewer.stopped]
        return stopped

    def in_order(self) -> list[Viewer]:
        """Return the line in the order in which seats are given.

        The next viewer is the one whose visitor has the fewest seats. Among several, the one that came first is next.
        """
        given = Counter(viewer.visitor for viewer in self.taken)
        ranked = []
        for arrival, viewer in enumerate(self.line):
            ranked.append((given[viewer.visitor], arrival, viewer))
            given[viewer.visitor] += 1
        return [viewer for *_, viewer in sorted(ranked, key=lambda entry: entry[:2])]

    def to_stop(self, now: float) -> list[tuple[Viewer, str]]:
        """Return the viewers that must give up their seat, each with the reason."""
        running = [viewer for viewer in self.taken if not viewer.stopped]
        limit = self._limits.idle_seat_in_demand if self.line else self._limits.idle_seat
        out = {viewer: NOBODY_WATCHES for viewer in running if viewer.idle_seconds(now) > limit}
        if self.line and not out and len(running) == self.count:
            for viewer in running:
                if viewer.turn_seconds(now) > self._limits.longest_turn:
                    return [(viewer, LONG_ENOUGH)]
            if (viewer := self._beyond_its_share(running)) is not None:
                return [(viewer, OTHERS_WAIT)]
        return list(out.items())

    def _beyond_its_share(self, running: list[Viewer]) -> Viewer | None:
        """Return a viewer of the visitor with the most seats if a waiting visitor has at least two seats less."""
        seats = Counter(viewer.visitor for viewer in running)
        visitor, most = seats.most_common(1)[0]
        fewest = min(seats[viewer.visitor] for viewer in self.line)
        if most - fewest < 2:
            return None
        return least_missed(viewer for viewer in running if viewer.visitor == visitor)


def least_missed(viewers: Iterable[Viewer]) -> Viewer:
    """Return the first paused viewer, or the last viewer if none is paused. `viewers` are in the order they came."""
    viewers = list(viewers)
    return next((viewer for viewer in viewers if viewer.paused), viewers[-1])


class FairTurns:
    """Decides whose turn it is: the visitor whose streams have used the least time.

    A visitor that arrives or returns begins with the time of the visitor that has used the least. So nobody can save
    up unused time.
    """

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def order(self, visitors: Iterable[str]) -> dict[str, float]:
        """Return visitor -> used seconds for the visitors that have seats. The visitor with the least is next."""
        present = set(visitors)
        known = [self._used[visitor] for visitor in present if visitor in self._used]
        least = min(known, default=0.0)
        self._used = {visitor: self._used.get(visitor, least) for visitor in present}
        return self._used

    def used(self, visitor: str, seconds: float) -> None:
        """Add the seconds of a finished turn to a visitor's time."""
        if visitor in self._used:
            self._used[visitor] += seconds
