"""The time at which the next chunk is wanted. All times are simulated, so nothing depends on the machine."""

import math
import random
from collections.abc import Callable

import pytest

from pipeline.serving.pace import EXTRAPOLATION, LEAST_MARGIN, LONGEST_LEAD, MOST_UNSEEN, Pace

FPS = 12
FRAMES = 12
CHUNK_SECONDS = FRAMES / FPS
REPORT_FRAMES = 2  # between two reports of the viewer


def playing(produced: int, shown: int, *, at: float = 100.0, turnaround: float = 0.5) -> Pace:
    return Pace(FPS, produced=produced, sent=produced, shown=shown, shown_at=at, turnaround=turnaround)


def watch(pace: Pace, seconds: Callable[[int], float], chunks: int) -> list[float]:
    """Return for each chunk how many seconds before its first frame it arrived. If negative, the viewer had to wait."""
    slack = []
    pace.denoised()
    pace.decoded(FRAMES, seconds(0))
    pace.sent += FRAMES
    due, shown, late, number = 0.0, 0, 0, 1  # `due` is that of the frame after those shown
    while number <= chunks:
        shown += 1
        if shown % REPORT_FRAMES == 0:
            pace.report_shown(shown, due, late)
        now, due = due, due + 1 / FPS
        wanted = pace.wanted_at()
        if wanted > due and shown < pace.produced:
            continue
        arrived = max(wanted, now) + seconds(number)
        first_due = now + (pace.produced - shown + 1) / FPS
        slack.append(first_due - arrived)
        if arrived > first_due:  # the picture stands still, and everything after it comes later
            late, due = late + 1, due + arrived - first_due
        pace.denoised()
        pace.decoded(FRAMES, arrived - wanted)
        pace.sent += FRAMES
        number += 1
    return slack


def test_the_first_chunk_is_wanted_at_once():
    assert Pace(FPS).wanted_at() <= 0


def test_a_viewer_short_of_frames_wants_one_at_once():
    assert playing(12, 10).wanted_at() <= 100


def test_chunks_come_as_late_as_their_time_allows():
    """If a chunk takes a tenth of its playing time, it waits less than a fifth of that at the viewer. None is late."""
    draw = random.Random(0)
    slack = watch(Pace(FPS), lambda _: CHUNK_SECONDS * draw.uniform(0.08, 0.12), 60)
    assert min(slack) >= 0
    assert max(slack[10:]) < CHUNK_SECONDS / 5


@pytest.mark.parametrize("busy", [2, 4, 6])
def test_on_a_busy_machine_more_frames_wait(busy):
    """When chunks suddenly take longer and vary more, only the first few are late."""
    draw = random.Random(busy)
    slack = watch(Pace(FPS), lambda n: 0.1 * CHUNK_SECONDS * (1 if n < 30 else busy * draw.uniform(0.6, 1.4)), 90)
    assert sum(each < 0 for each in slack[:28]) == 0
    assert sum(each < 0 for each in slack[40:]) <= 2


def test_a_network_that_takes_longer_raises_the_margin():
    """The client reports late frames, because the server cannot see delays of the network."""
    pace = Pace(FPS)
    pace.report_shown(1, 1.0, late=0)
    for late in range(1, 4):
        before = pace.margin
        pace.report_shown(late, 1.0, late=late)
        assert pace.margin > 1.5 * before
    for _ in range(200):
        pace.decoded(FRAMES, 0.1)
    assert pace.margin == LEAST_MARGIN


def test_a_chunk_in_the_making_counts():
    pace = playing(24, 10)
    before = pace.wanted_at()
    pace.pending = 1
    assert pace.wanted_at() >= before + 12 / FPS or pace.wanted_at() == math.inf


def test_a_silent_viewer_gets_no_more_however_long_it_is_silent():
    """No chunk is wanted for the time after which a silent viewer no longer counts as watching."""
    pace = playing(120, 10)
    assert pace.wanted_at() == math.inf
    assert not pace.may_hurry()
    assert playing(30, 10).wanted_at() - 100 <= EXTRAPOLATION or playing(30, 10).wanted_at() == math.inf


@pytest.mark.parametrize("fps", [1, 2, 4, 12, 60])
def test_a_viewer_that_has_shown_everything_wants_more(fps):
    """This holds at any frame rate. Otherwise the picture would stop."""
    pace = Pace(fps, produced=12, sent=12, turnaround=0.01)
    pace.report_shown(12, 100.0)
    assert pace.wanted_at() < 100 + 1 / fps


def test_a_switch_is_made_at_once_unless_much_is_unseen():
    assert playing(24, 13).may_hurry()
    assert not playing(36, int(36 - MOST_UNSEEN * 12) - 1).may_hurry()


def test_frames_that_are_not_sent_are_not_watched():
    """If a client reports everything as shown but its socket takes nothing, the server does not buffer."""
    pace = Pace(FPS, produced=100, sent=4)
    pace.report_shown(10**9, now=100.0)
    assert pace.shown == 4
    assert pace.wanted_at() == math.inf
    assert not pace.may_hurry()


def test_the_lead_is_bounded_for_slow_models():
    """Otherwise a new prompt would wait for many chunks of the old one."""
    assert playing(0, 0, turnaround=60).lead == LONGEST_LEAD * 12 / FPS


def test_turnaround_follows_the_chunks_but_those_with_a_switch():
    pace = Pace(FPS, pending=3)
    pace.decoded(9, 1.0)
    assert (pace.produced, pace.pending, pace.turnaround) == (9, 2, 1.0)
    pace.decoded(12, 2.0)
    assert 1.0 < pace.turnaround < 2.0
    before = pace.turnaround
    pace.decoded(12, 9.0, usual=False)
    assert pace.turnaround == before
