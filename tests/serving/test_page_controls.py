"""What steers a video on the page: sources, settings, earlier prompts, the timeline, links and parts of clips."""

import pytest
import torch

from pipeline.states import SwitchStyle
from pipeline.storyboard import check_cues, read_storyboard
from tests.serving.browser import running
from tests.serving.test_browser import GREEN_TRIANGLE, RED_CIRCLE, download, wait_for_frame, watch, write
from utils.shapes import render_at
from utils.video.write import VideoWriter

FPS = 12


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Address of `python demo.py`."""
    folder = tmp_path_factory.mktemp("clips")
    with running("demo.py", "--no-browser", "--port", "0", "--clips_folder", folder) as address:
        yield address


def change(page, name: str, value: object) -> None:
    """Type into a field of the settings and leave it with the keyboard."""
    page.fill(f"#{name}", str(value))
    page.press(f"#{name}", "Tab")


def test_a_video_file_is_followed_and_then_a_camera(demo, open_page, tmp_path):
    """The red circle stands on the left in the file, so it does in the video."""
    place = torch.tensor([[[14.0, 24.0]]]).expand(1, 48, 2)
    frames = ((render_at([RED_CIRCLE], place)[0] + 1) * 127.5).byte().permute(0, 2, 3, 1).contiguous()
    with VideoWriter(tmp_path / "left.mp4", FPS, scale=8) as writer:
        writer.write(frames)
    page = open_page(demo)
    page.click("#source")
    page.set_input_files("#video", tmp_path / "left.mp4")
    page.wait_for_selector("#source-on:visible")
    page.fill("#strength", "0.3")
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 4)
    red = (watch(page, 6)[:, 0] > 0.2).float().mean((0, 1))
    assert red[:24].mean() > 2 * red[24:].mean()
    page.click("#stop")
    page.wait_for_selector(".clip")
    page.click("#camera")
    page.wait_for_function("selfForcing.source.video.srcObject && selfForcing.source.armed")
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 4)
    assert page.evaluate("selfForcing.source.sent") > 4
    page.click("#source-off")
    page.wait_for_selector("#source-on", state="hidden")


def test_settings_change_while_the_video_runs(demo, open_page):
    page = open_page(demo)
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 3)
    change(page, "seed", 5)
    change(page, "steps", 2)
    change(page, "fps", 24)
    assert page.evaluate("selfForcing.player.fps") == 24
    page.wait_for_function("selfForcing.timeline.rows.some(({ settings }) => settings.steps === 2)")
    assert page.evaluate("selfForcing.timeline.rows.some(({ settings }) => settings.seed === 5)")
    change(page, "seed", -7)
    assert page.input_value("#seed") == "0"
    page.click("#stop")
    page.wait_for_selector(".clip")
    assert "--storyboard" in page.evaluate("document.querySelector('.clip code').textContent")


def test_earlier_prompts_are_kept_in_this_browser_until_they_are_cleared(demo, open_page):
    page = open_page(demo)
    write(page, RED_CIRCLE.prompt)
    page.reload()
    page.wait_for_selector(".demo[data-state=ready]")
    page.fill("#prompt", "")
    page.click("#history-open")
    page.keyboard.press("Enter")
    assert page.input_value("#prompt") == RED_CIRCLE.prompt
    page.click("#history-open")
    page.click("#history .clear")
    assert page.evaluate("selfForcing.history.prompts") == []


def test_the_exported_timeline_is_what_inference_reads(demo, open_page, tmp_path):
    """Switches of the video, planned prompts that were played, and prompts that were edited."""
    page = open_page(demo)
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 3)
    write(page, GREEN_TRIANGLE.prompt)
    page.wait_for_function("selfForcing.timeline.rows.length === 1")
    page.click("#timeline summary")
    for text in ("a 'quoted': \"prompt\" # 1", "one too many", "übermorgen 明天 🙂"):
        page.click("#timeline .add")
        page.fill("#timeline li:last-child .text", text)
        page.press("#timeline li:last-child .text", "Tab")
    page.click("#timeline li:nth-child(3) .remove")
    page.fill("#timeline li:nth-child(2) .at", "2.5")
    page.press("#timeline li:nth-child(2) .at", "Tab")
    page.wait_for_function("selfForcing.timeline.rows.some(({ done, prompt }) => done && prompt.startsWith('a '))")
    board = download(page, "#timeline .export", tmp_path / "storyboard.yaml")
    cues = read_storyboard(board, SwitchStyle.cut)
    check_cues(cues[1:], 1000.0)
    assert (cues[0].seconds, cues[0].prompt) == (0, RED_CIRCLE.prompt)
    rows = page.evaluate("selfForcing.timeline.rows.map(({ at, prompt, style }) => [at, prompt, style])")
    assert [[cue.seconds, cue.prompt, cue.style.value] for cue in cues[1:]] == rows
    assert len(rows) == 3 and rows[2][1] == "übermorgen 明天 🙂"


def test_a_link_carries_the_settings_and_nothing_else(demo, open_page):
    page = open_page(demo)
    page.fill("#prompt", "a b")
    for name, value in {"seed": 5, "fps": 24, "steps": 2}.items():
        change(page, name, value)
    link = page.evaluate("selfForcing.fields.link('a b')")
    assert page.evaluate("selfForcing.session") not in link
    other = page.context.browser.new_context().new_page()
    hostile = "&size=9x9&decoder=<img>&precision=fp64&style=none&fps=1e9&steps=999&blend=-1&prompt=%0Ac%0A%00d"
    for address, expected in ((link, ["a b", "5", "24", "2"]), (f"{demo}#seed=3{hostile}", ["c d", "3", "12", "8"])):
        other.goto("about:blank")
        other.goto(address)
        other.wait_for_selector(".demo[data-state=ready]")
        assert [other.input_value(f"#{name}") for name in ("prompt", "seed", "fps", "steps")] == expected
        assert "#" not in other.url
    assert other.input_value("#size") == "48x48" and other.input_value("#blend") == "4"
    other.context.close()


def test_only_a_part_is_recorded(demo, open_page):
    page = open_page(demo)
    page.uncheck("#record-all")
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 12)
    assert page.get_attribute("#record", "aria-pressed") == "false"
    page.click("#record")
    shown = page.evaluate("selfForcing.player.shown")
    wait_for_frame(page, shown + 30)
    page.click("#record")
    page.wait_for_selector(".clip")
    assert "from second" in page.inner_text(".clip .facts")
    page.click("#stop")


def test_the_new_controls_break_no_accessibility_rule_and_fit_a_phone(demo, open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(demo, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    for opened in ("#source", "#history-open", "#settings summary", "#timeline summary", "#timeline .add"):
        page.click(opened)
    page.keyboard.press("Tab")
    small = page.evaluate(
        """[...document.querySelectorAll(".demo :is(button, select, input, summary)")].filter((control) => {
            const area = control.labels?.[0]?.contains(control) ? control.labels[0] : control;
            const skipped = !control.offsetParent || control.type === "file" || control.closest("#thumbnail");
            return !skipped && area.getBoundingClientRect().height < 43.5;
        }).map((control) => control.outerHTML.slice(0, 80))"""
    )
    assert not small
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for theme in ("light", "dark"):
        problems = axe.run(page, context=".demo").response["violations"]
        assert not [(theme, each["id"], [node["html"] for node in each["nodes"]]) for each in problems]
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        page.click("#theme")
