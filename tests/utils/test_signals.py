"""The first signal is recorded. A second Ctrl-C ends the program at once."""

import os
import signal
from collections.abc import Iterator

import pytest

from utils.signals import StopSignals


@pytest.fixture
def hangup_is_heard() -> Iterator[None]:
    """Let this process receive SIGHUP, also if it was started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup_is_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_recorded_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    seen = []
    with StopSignals(on_signal=seen.append) as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number and seen == [number]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
