"""The shipped model, used through a real browser as a visitor does."""

import base64
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.serving.gifs import MOST_FRAMES
from tests.serving.browser import REPOSITORY, running, wait_until
from utils.shapes import Scene, measure, render_at
from utils.video.read import read_video

RED_CIRCLE = Scene("circle", "red", "large", "up and right", "navy")
GREEN_TRIANGLE = Scene("triangle", "green", "large", "down and left", "black")
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
RIGHT = 0.7  # share of the frames the detector must recognise; the model itself reaches about 0.93


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Give the address of `python demo.py`."""
    folder = tmp_path_factory.mktemp("clips")
    with running("demo.py", "--no-browser", "--port", "0", "--clips_folder", folder) as address:
        yield address


def write(page, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def shown(page) -> int:
    return page.evaluate("selfForcing.player.shown")


def wait_for_frame(page, number: int) -> None:
    page.wait_for_function(f"selfForcing.player.shown >= {number}")


def watch(page, count: int) -> torch.Tensor:
    """Return the next different pictures on the canvas, [F 3 48 48] in [-1, 1]."""
    pictures, last = [], None
    while len(pictures) < count:
        number, pixels = page.evaluate(
            """() => {
                const { canvas, player } = selfForcing;
                const data = player.context.getImageData(0, 0, player.canvas.width, player.canvas.height).data;
                return [player.shown, Array.from(data)];
            }"""
        )
        if number != last:
            last = number
            pictures.append(torch.tensor(pixels, dtype=torch.uint8).view(48, 48, 4)[..., :3])
        time.sleep(0.03)
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def recognised(frames: torch.Tensor, scene: Scene) -> float:
    """Return the share of frames that show the scene's object with its colour and shape."""
    seen = measure(frames, scene)
    return (seen.colour & seen.shape).float().mean().item()


def download(page, selector: str, path: Path) -> Path:
    with page.expect_download() as caught:
        page.click(selector)
    caught.value.save_as(path)
    return path


def test_a_prompt_is_shown_and_another_follows(demo, open_page):
    """Types, starts, sees the object, switches, and sees the other one within two chunks."""
    page = open_page(demo)
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 6)
    assert recognised(watch(page, 6), RED_CIRCLE) >= RIGHT
    write(page, GREEN_TRIANGLE.prompt)
    page.wait_for_function(f"selfForcing.answered.prompt === '{GREEN_TRIANGLE.prompt}'")
    answered = page.evaluate("selfForcing.answered")
    assert answered["chunk"] <= answered["after"] + 2, "the new prompt came later than two chunks on"
    first = page.evaluate(f"selfForcing.chunks.find((chunk) => chunk.prompt === '{GREEN_TRIANGLE.prompt}')")
    wait_for_frame(page, first["first_frame"] + first["frames"])
    assert recognised(watch(page, 6), GREEN_TRIANGLE) >= RIGHT
    page.click("#stop")
    page.wait_for_selector(".clip")
    assert "--switch=" in page.evaluate("document.querySelector('.clip code').textContent")


def test_a_video_is_held_and_goes_on_and_is_taken_home(demo, open_page, tmp_path):
    """The mp4 and the GIF of its clip play."""
    page = open_page(demo)
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 6)
    page.click("#pause")
    time.sleep(0.3)
    held = shown(page)
    time.sleep(0.5)
    assert shown(page) == held
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(" ")
    wait_for_frame(page, held + 3)
    page.click("#stop")
    page.wait_for_selector(".clip")
    video = read_video(download(page, ".clip .mp4", tmp_path / "clip.mp4"))
    assert video.shape[1:] == (384, 384, 3) and len(video) >= held + 3
    clip = video[:9, 4::8, 4::8].permute(0, 3, 1, 2).float() / 127.5 - 1
    assert recognised(clip, RED_CIRCLE) >= RIGHT
    with Image.open(download(page, ".clip .gif", tmp_path / "clip.gif")) as gif:
        assert gif.n_frames == min(len(video), MOST_FRAMES)


def test_two_tabs_at_once(demo, open_page):
    """Each viewer sees its own prompt."""
    pages = [open_page(demo), open_page(demo)]
    for page, scene in zip(pages, (RED_CIRCLE, GREEN_TRIANGLE), strict=True):
        write(page, scene.prompt)
    for page, scene in zip(pages, (RED_CIRCLE, GREEN_TRIANGLE), strict=True):
        wait_for_frame(page, 4)
        assert recognised(watch(page, 5), scene) >= RIGHT


def test_a_dropped_image_is_the_first_frame(demo, open_page, tmp_path):
    image = render_at([RED_CIRCLE], torch.tensor([[[20.0, 28.0]]]))[0, 0]
    path = tmp_path / "first.png"
    Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(path)
    page = open_page(demo)
    page.evaluate(
        """async (bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "first.png", { type: "image/png" }));
            for (const type of ["dragover", "drop"])
                document.querySelector("#stage").dispatchEvent(
                    new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        list(path.read_bytes()),
    )
    page.wait_for_selector("#thumbnail:visible")
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 3)
    assert recognised(watch(page, 5), RED_CIRCLE) >= RIGHT
    page.click("#stop")
    page.wait_for_selector(".clip")
    assert "--i2v" in page.evaluate("document.querySelector('.clip code').textContent")


def test_no_accessibility_rule_is_broken(demo, open_page):
    """axe-core finds no problem with the light and the dark theme, idle, running, and with a clip."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(demo)
    for theme in ("light", "dark"):
        write(page, RED_CIRCLE.prompt)
        wait_for_frame(page, 3)
        problems = axe.run(page, context=".demo").response["violations"]
        page.click("#stop")
        page.wait_for_selector(".clip")
        problems += axe.run(page, context=".demo").response["violations"]
        assert not [(theme, each["id"], [node["html"] for node in each["nodes"]]) for each in problems]
        page.click("#theme")


def test_a_clip_is_used_again_and_deleted_in_every_tab(demo, open_page):
    page = open_page(demo)
    page.fill("#seed", "5")
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 3)
    other = page.context.new_page()
    other.goto(demo)
    other.wait_for_selector(".demo[data-state=ready]")
    page.click("#stop")
    other.wait_for_selector(".clip")
    other.fill("#seed", "1")
    other.fill("#prompt", "something else")
    other.click(".clip .again")
    assert (other.input_value("#prompt"), other.input_value("#seed")) == (RED_CIRCLE.prompt, "5")
    other.click(".clip .delete")
    page.wait_for_selector(".clip", state="detached")
    other.wait_for_selector(".clip", state="detached")


def test_small_things_of_the_page(demo, open_page):
    """A reload keeps the prompt. Escape leaves a field. Long prompts and bad images get a message."""
    page = open_page(demo)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.fill("#prompt", "a b c")
    page.reload()
    page.wait_for_selector(".demo[data-state=ready]")
    assert page.input_value("#prompt") == "a b c"
    page.focus("#prompt")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == ""
    write(page, "long " * 500)
    assert "2500 characters" in page.inner_text("#notice") or "2499 characters" in page.inner_text("#notice")
    good, bad = ({"name": "a.png", "mimeType": "image/png", "buffer": data} for data in (PNG, b"no picture"))
    page.set_input_files("#file", good)
    page.wait_for_selector("#thumbnail:visible")
    page.set_input_files("#file", bad)
    page.wait_for_selector("#thumbnail", state="hidden")
    assert "not a PNG" in page.inner_text("#notice")


def test_phone_width(demo, open_page):
    """Nothing is wider than the page, and every button is large enough for a finger."""
    page = open_page(demo, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        """[...document.querySelectorAll(".composer button")].filter((button) => button.offsetParent &&
            !button.closest("#thumbnail") && button.getBoundingClientRect().height < 44).map((button) => button.id)"""
    )
    assert not small
    page.tap("#stop")
    page.wait_for_selector(".clip")


def test_every_control_has_a_name_and_the_keyboard_reaches_it(demo, open_page):
    page = open_page(demo)
    nameless = page.evaluate(
        """[...document.querySelectorAll(".demo button, .demo input, .demo select, .demo textarea")].filter((control) =>
            control.type !== "file" && !control.ariaLabel && !control.labels?.length && !control.textContent.trim())
            .map((control) => control.outerHTML)"""
    )
    assert not nameless
    reached = set()
    page.focus("#theme")
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "image", "start", "seed", "dice", "length", "fps", "steps"} <= reached


def test_the_command_of_a_clip_makes_the_same_video(demo, open_page, tmp_path):
    """The command on the card in the gallery writes exactly the frames that were shown."""
    page = open_page(demo)
    page.fill("#seed", "7")
    page.fill("#steps", "3")
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 10)
    write(page, GREEN_TRIANGLE.prompt)
    page.wait_for_function(f"selfForcing.answered.prompt === '{GREEN_TRIANGLE.prompt}'")
    page.click("#stop")
    page.wait_for_selector(".clip")
    seen = read_video(download(page, ".clip .mp4", tmp_path / "seen.mp4"))
    python, *arguments = shlex.split(page.evaluate("document.querySelector('.clip code').textContent"))
    assert python == "python"
    folder = ["--output_folder", str(tmp_path / "again")]
    subprocess.run([sys.executable, *arguments, *folder], cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (again,) = (tmp_path / "again").glob("*.mp4")
    assert torch.equal(read_video(again), seen)


def test_the_client_in_the_documentation_works(demo):
    code = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    code = code.replace("127.0.0.1:7860", demo.removeprefix("http://"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    with urllib.request.urlopen(run.stdout.strip()) as answer:
        assert answer.headers["content-type"] == "video/mp4"


def test_stop_frees_the_seat(demo, open_page):
    page = open_page(demo)
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 1)
    page.click("#stop")
    wait_until(lambda: b"self_forcing_viewers 0" in urllib.request.urlopen(f"{demo}/metrics").read(), 10)


def test_enter_while_the_model_loads_starts_as_soon_as_it_is_there(demo, open_page):
    page = open_page(demo)
    page.evaluate("selfForcing.setState('loading')")  # until the server says again how it is
    assert page.evaluate("getComputedStyle(selfForcing.player.canvas).visibility") == "hidden"
    write(page, RED_CIRCLE.prompt)
    wait_for_frame(page, 3)
    assert page.evaluate("getComputedStyle(selfForcing.player.canvas).visibility") == "visible"
    page.click("#stop")
