"""Who may stream: a seat for the first few viewers, a line for the others, and a fair share for each visitor.

Nothing here locks; the hub does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pipeline.serving.limits import Limits
from pipeline.serving.viewer import Viewer

NOBODY_WATCHES = "Stopped: nobody was watching."
OTHERS_WAIT = "Stopped: others are waiting, and you have more than your share of the seats."
LONG_ENOUGH = "Stopped: others are waiting, and this video has had its turn. Press Start to line up again."


class Seats:
    """Seats and the line in front of them.

    Args:
        count: streams that run at once.
        limits: how long a seat is kept.
    """

    def __init__(self, count: int, limits: Limits) -> None:
        self.count, self._limits = count, limits
        self.taken: list[Viewer] = []
        """In the order in which they were seated."""
        self.line: list[Viewer] = []
        """In the order in which they came."""

    def join(self, viewer: Viewer) -> None:
        """Line up."""
        self.line.append(viewer)

    def leave(self, viewer: Viewer) -> None:
        """Give up the seat."""
        self.taken.remove(viewer)

    def fill(self) -> list[Viewer]:
        """Seat those who are next; returns them."""
        seated = []
        while self.line and len(self.taken) < self.count:
            viewer = self.in_order()[0]
            self.line.remove(viewer)
            self.taken.append(viewer)
            seated.append(viewer)
        return seated

    def drop_stopped(self) -> list[Viewer]:
        """Take those who do not want a seat any more out of the line; returns them."""
        stopped = [viewer for viewer in self.line if viewer.stopped]
        self.line = [viewer for viewer in self.line if not viewer.stopped]
        return stopped

    def in_order(self) -> list[Viewer]:
        """The line in the order in which seats are given.

        Whoever's visitor has the fewest seats is next, and of these whoever came first.
        """
        given = Counter(viewer.visitor for viewer in self.taken)
        ranked = []
        for arrival, viewer in enumerate(self.line):
            ranked.append((given[viewer.visitor], arrival, viewer))
            given[viewer.visitor] += 1
        return [viewer for *_, viewer in sorted(ranked, key=lambda entry: entry[:2])]

    def to_stop(self, now: float) -> list[tuple[Viewer, str]]:
        """Seated viewers who have to make room, with the reason."""
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
        """A viewer of the visitor with the most seats, if somebody waits who would still have fewer afterwards."""
        seats = Counter(viewer.visitor for viewer in running)
        visitor, most = seats.most_common(1)[0]
        fewest = min(seats[viewer.visitor] for viewer in self.line)
        if most - fewest < 2:
            return None
        return least_missed(viewer for viewer in running if viewer.visitor == visitor)


def least_missed(viewers: Iterable[Viewer]) -> Viewer:
    """Return the paused viewer, or the one that came last if none is paused. `viewers` are in the order they came."""
    viewers = list(viewers)
    return next((viewer for viewer in viewers if viewer.paused), viewers[-1])


class FairTurns:
    """Whose turn it is: the visitor whose streams have used the least time.

    A visitor that comes, or comes back, begins with as much as the one who has used least, so that nobody saves up.
    """

    def __init__(self) -> None:
        self._used: dict[str, float] = {}

    def order(self, visitors: Iterable[str]) -> dict[str, float]:
        """The visitors that have seats, with what each has used; lower is next."""
        present = set(visitors)
        known = [self._used[visitor] for visitor in present if visitor in self._used]
        least = min(known, default=0.0)
        self._used = {visitor: self._used.get(visitor, least) for visitor in present}
        return self._used

    def used(self, visitor: str, seconds: float) -> None:
        """A turn is over."""
        if visitor in self._used:
            self._used[visitor] += seconds
