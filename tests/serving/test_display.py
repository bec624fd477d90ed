"""The browser shows every frame in time. The source sends numbered frames of 832x480 pixels, 24 per second."""

import os
import time

import pytest

from tests.serving.browser import running
from tests.serving.synthetic import BITS, BLOCK

FPS, SECONDS = 24, 3
BUSY = 1.5  # programs that run or wait, for each core
MOST_MISSED = 0.05
FIRST_FRAME_SECONDS = 0.15
# Records when the canvas was painted and the number in the picture, independently of the player.
SPY = f"""() => {{
window.painted = [];
const draw = CanvasRenderingContext2D.prototype.drawImage;
CanvasRenderingContext2D.prototype.drawImage = function (...image) {{
    draw.apply(this, image);
    if (this.canvas.id !== "canvas") return;
    const row = this.getImageData(0, {BLOCK // 2}, {BITS * BLOCK}, 1).data;
    let number = 0;
    for (let bit = 0; bit < {BITS}; bit++) number |= (row[4 * ({BLOCK} * bit + {BLOCK // 2})] > 127) << bit;
    painted.push([number, performance.now()]);
}};
}}"""


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    with running("tests/serving/synthetic.py", tmp_path_factory.mktemp("clips")) as address:
        yield address


@pytest.fixture
def playing(synthetic, open_page):
    """Give a page that already shows frames of the source."""
    page = open_page(synthetic)
    page.evaluate(SPY)
    page.fill("#prompt", "numbers")
    page.press("#prompt", "Enter")
    page.wait_for_function("selfForcing.player.shown > 24")
    return page


def test_frames_are_shown_at_the_asked_rate(playing):
    """At most one in twenty of the frames of three seconds is missed. Other work may disturb one or two tries."""
    shares = []
    while len(shares) < 4:
        shares.append(missed_share(playing))
        if shares[-1] <= MOST_MISSED:
            return
    skip_where_busy(f"{shares} of the frames missed")
    raise AssertionError(shares)


def skip_where_busy(what: str) -> None:
    """Skip the test if the machine has more work than cores, because then frames are late."""
    load = os.getloadavg()[0] / os.cpu_count()
    if load > BUSY:
        pytest.skip(f"{what}, on a machine with {load:.1f} programs waiting for each core")


def missed_share(playing) -> float:
    """Return the share of frames that were skipped or shown at least half a period too early or late."""
    start = playing.evaluate("performance.now()")
    time.sleep(SECONDS)
    painted = [(number, at) for number, at in playing.evaluate("painted") if at > start]
    numbers = [number for number, _ in painted]
    assert numbers == sorted(set(numbers)), "frames out of order"
    due = max(numbers[-1] - numbers[0] + 1, FPS * SECONDS - 2)
    period = 1000 / FPS
    offsets = sorted(at - number * period for number, at in painted)
    usual = offsets[len(offsets) // 2]
    in_time = sum(abs(offset - usual) <= period / 2 for offset in offsets)
    return (due - in_time) / due


def test_the_first_frame_follows_its_chunk(playing):
    """One of three starts must succeed, for the same reason."""
    waits = []
    for _ in range(3):
        first = playing.evaluate("selfForcing.firstFrame")
        waits.append(first["shown"] - first["ready"])
        playing.click("#stop")
        playing.evaluate("selfForcing.player.reset(0, 24)")
        playing.click("#start")
        playing.wait_for_function("selfForcing.player.shown > 0")
    if min(waits) > FIRST_FRAME_SECONDS:
        skip_where_busy(f"first frames after {waits} seconds")
        raise AssertionError(waits)
