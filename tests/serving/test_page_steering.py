"""How soon a new prompt is seen, and the choice of a model.

The source takes a fraction of a chunk's time, as the shipped model does.
"""

import statistics

import pytest

from tests.serving.browser import running
from tests.serving.test_display import skip_where_busy

FPS, CHUNK_SECONDS = 12, 1.0
SHARES = {"keep": 0.75, "cut": 0.4}  # of a chunk, in the middle of a few switches


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Chunks of a second, a tenth of a second in the making."""
    folder = tmp_path_factory.mktemp("clips")
    options = ("--seconds=0.1", "--height=96", "--width=96", "--names", "first", "second", "third", "--absent", "third")
    with running("tests/serving/synthetic.py", folder, *options) as address:
        yield address


def switch(page, prompt: str, style: str) -> float:
    """Seconds from Enter to the new prompt, as the page says them."""
    before = page.evaluate("selfForcing.answered.first")
    page.select_option("#style", style)
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_function(f"selfForcing.answered.first > {before}", timeout=20_000)
    return page.evaluate("selfForcing.response / 1000")


@pytest.mark.parametrize(("style", "share"), SHARES.items())
def test_a_new_prompt_is_seen_before_the_frames_in_hand_would_be_over(source, open_page, style, share):
    """Enter with the prompt that is on already is answered by a chunk of its own too, not by the one in view."""
    page = open_page(source)
    page.fill("#fps", str(FPS))
    page.fill("#prompt", "numbers 0")
    page.press("#prompt", "Enter")
    page.wait_for_function("selfForcing.chunks.length > 3", timeout=20_000)
    seconds = []
    for number in (1, 2, 2, 3):
        seconds.append(switch(page, f"numbers {number}", style))
        page.wait_for_timeout(400 + 170 * len(seconds))  # another part of a chunk each time
    if statistics.median(seconds) > share * CHUNK_SECONDS:
        skip_where_busy(f"new prompts after {seconds} seconds")
    assert statistics.median(seconds) <= share * CHUNK_SECONDS


def test_the_page_offers_the_models(source, open_page):
    """Choosing one ends the video and says why. The next video comes from the other model."""
    page = open_page(source)
    assert page.locator("#models option").all_text_contents() == ["first", "second", "third"]
    page.press("#prompt", "Enter")
    page.wait_for_function("selfForcing.player.shown >= 3")
    page.select_option("#models", "second")
    page.wait_for_selector("#notice:has-text('another model was chosen: second')")
    page.wait_for_selector(".clip")
    page.wait_for_function("selfForcing.state === 'ready' && selfForcing.get('models').value === 'second'")
    page.press("#prompt", "Enter")
    page.wait_for_function("selfForcing.state === 'running' && selfForcing.player.shown >= 3")


def test_missing_weights_are_downloaded_with_a_button(source, open_page):
    """The page says which file is missing and how large it is. After the download the model is there."""
    page = open_page(source)
    page.select_option("#models", "third")
    page.wait_for_selector("#cover:has-text('Weights of this model are missing')")
    assert "wan/model.safetensors: 5.00 GB" in page.text_content("#missing")
    assert page.is_disabled("#start")
    page.click("#download:has-text('Download 5.00 GB')")
    page.wait_for_function("selfForcing.state === 'ready'")
    page.press("#prompt", "Enter")
    page.wait_for_function("selfForcing.player.shown >= 3")
    assert page.is_hidden("#download") and page.is_hidden("#missing")
