"""The time until a new prompt is visible. The source makes a chunk in a part of its time, as the shipped model does."""

import statistics

import pytest

from tests.serving.browser import running
from tests.serving.test_display import skip_where_busy

FPS, CHUNK_SECONDS = 12, 1.0
SWITCHES = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Give a source of chunks that last a second and take a tenth of a second to make."""
    folder = tmp_path_factory.mktemp("clips")
    with running("tests/serving/synthetic.py", folder, "--seconds=0.1", "--height=96", "--width=96") as address:
        yield address


@pytest.fixture
def playing(source, open_page):
    page = open_page(source)
    page.fill("#fps", str(FPS))
    page.fill("#prompt", "numbers 0")
    page.press("#prompt", "Enter")
    page.wait_for_function("selfForcing.chunks.length > 3", timeout=20_000)
    return page


def switch(page, number: int, style: str) -> float:
    """Return the seconds from Enter to the new prompt, as the page shows them."""
    page.select_option("#style", style)
    page.fill("#prompt", f"numbers {number}")
    page.press("#prompt", "Enter")
    page.wait_for_function(f"selfForcing.answered.prompt === 'numbers {number}'", timeout=20_000)
    return page.evaluate("selfForcing.response / 1000")


@pytest.mark.parametrize(("style", "share"), [("keep", 0.75), ("cut", 0.4)])
def test_a_new_prompt_is_seen_before_the_frames_in_hand_would_be_over(playing, style, share):
    """The median of a few switches is a part of a chunk's time."""
    seconds = []
    for number in range(1, SWITCHES + 1):
        seconds.append(switch(playing, number, style))
        playing.wait_for_timeout(300 + 170 * number)  # another part of a chunk each time
    if statistics.median(seconds) > share * CHUNK_SECONDS:
        skip_where_busy(f"new prompts after {seconds} seconds")
    assert statistics.median(seconds) <= share * CHUNK_SECONDS


def test_enter_with_the_prompt_in_view_is_answered_by_a_chunk_of_its_own(playing):
    switch(playing, 1, "keep")
    first = playing.evaluate("selfForcing.answered.first")
    playing.press("#prompt", "Enter")
    playing.wait_for_function(f"selfForcing.answered.first > {first}", timeout=20_000)
