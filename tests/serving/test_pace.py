"""When the next chunk is wanted."""

import math

import pytest

from pipeline.serving.pace import EXTRAPOLATION, LEAD_SECONDS, LONGEST_LEAD, Pace

FPS = 10


def playing(produced: int, shown: int, *, at: float = 100.0, turnaround: float = 0.5) -> Pace:
    return Pace(FPS, produced=produced, sent=produced, shown=shown, shown_at=at, turnaround=turnaround, chunk_frames=12)


def test_the_first_chunk_is_wanted_at_once():
    assert Pace(FPS).wanted_at() <= 0


def test_a_viewer_short_of_frames_wants_one_at_once():
    assert playing(12, 10).wanted_at() <= 100


def test_a_viewer_with_plenty_wants_one_just_in_time():
    """It is wanted when what is left plays as long as a chunk takes, half as long again, and a little."""
    pace = playing(24, 10)
    left_then = (24 - 10) / FPS - (pace.wanted_at() - 100)
    assert left_then == pytest.approx(1.5 * 0.5 + LEAD_SECONDS)


def test_a_chunk_in_the_making_counts():
    pace = playing(24, 10)
    before = pace.wanted_at()
    pace.pending = 1
    assert pace.wanted_at() >= before + 12 / FPS or pace.wanted_at() == math.inf


def test_a_silent_viewer_gets_no_more_however_long_it_is_silent():
    """Nothing is wanted further ahead than a viewer is believed to watch in silence."""
    pace = playing(120, 10)
    assert pace.wanted_at() == math.inf
    assert playing(30, 10).wanted_at() - 100 <= EXTRAPOLATION or playing(30, 10).wanted_at() == math.inf


def test_frames_that_are_not_sent_are_not_watched():
    """A client that claims to have seen everything while its socket takes nothing does not make the server buffer."""
    pace = Pace(FPS, produced=100, sent=4)
    pace.report_shown(10**9, now=100.0)
    assert pace.shown == 4
    assert pace.wanted_at() == math.inf


def test_the_lead_is_bounded_for_slow_models():
    """Else a new prompt would wait behind many chunks of the old one."""
    assert playing(0, 0, turnaround=60).lead == LONGEST_LEAD * 12 / FPS


def test_turnaround_follows_the_chunks():
    pace = Pace(FPS, pending=2)
    pace.decoded(9, 1.0)
    assert (pace.produced, pace.pending, pace.turnaround) == (9, 1, 1.0)
    pace.decoded(12, 2.0)
    assert 1.0 < pace.turnaround < 2.0
