"""Measures how long a new prompt takes from Enter to the screen: python -m tests.serving.measure_steering.

It controls a real Chromium on the page of `python demo.py`. The switches of each style are spread evenly over the time
of a chunk. It prints one line in Markdown for each style.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile

from playwright.sync_api import Page, sync_playwright

from tests.serving.browser import FLAGS, PATIENCE, find_chromium, running

PROMPTS = ("a large red circle moving up and right on a navy background",
           "a large green triangle moving down and left on a black background")  # fmt: skip
# In the page: switch at a phase of a chunk, and wait for the first frame whose chunk has the new prompt.
SWITCH = """async ([prompt, style, phase]) => {
    const page = window.selfForcing, { player } = page, shown = player.onFrame, seen = [];
    const frames = (done) => new Promise((resolve) => {
        player.onFrame = (frame) => { shown(frame); if (done(frame)) resolve(); };
    });
    const { first_frame, frames: count } = page.chunks.at(-1);
    await frames(({ index }) => index >= first_frame && (index - first_frame) % count === phase);
    await new Promise((resolve) => setTimeout(resolve, Math.random() * 1000 / player.fps));
    const known = page.chunks.at(-1).chunk;
    document.querySelector("#style").value = style;
    document.querySelector("#prompt").value = prompt;
    const start = performance.now(), enter = { key: "Enter", bubbles: true, cancelable: true };
    document.querySelector("#prompt").dispatchEvent(new KeyboardEvent("keydown", enter));
    let first;  // a chunk is described after its frames were sent
    await frames(({ index }) => {
        seen.push([index, performance.now()]);
        first = page.chunks.find((each) => each.chunk > known && each.prompt === prompt)?.first_frame;
        return first !== undefined && index >= first;
    });
    player.onFrame = shown;
    return (seen.find(([index]) => index >= first)[1] - start) / 1000;
}"""
HEADER = "| style | switches | median s | middle half s | longest s | the page's median s | left out | late |"


def measure(page: Page, style: str, count: int, frames: int) -> tuple[list[float], list[float], int, int]:
    """Return the seconds of each switch, as measured and as the page shows them, skipped frames, and stalls."""
    seconds, said = [], []
    before = page.evaluate("[selfForcing.player.missed, selfForcing.player.late]")
    for number in range(count):
        phase = number * frames // count
        seconds.append(page.evaluate(SWITCH, [PROMPTS[(number + 1) % 2], style, phase]))
        said.append(page.evaluate("selfForcing.response / 1000"))
        page.wait_for_timeout(1500)
    missed, late = page.evaluate("[selfForcing.player.missed, selfForcing.player.late]")
    return seconds, said, missed - before[0], late - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=24, help="switches of each style; default: %(default)s")
    parser.add_argument("--styles", nargs="+", default=["recache", "keep", "blend", "cut"])
    parser.add_argument("demo", nargs="*", help="further arguments of demo.py")
    args = parser.parse_args()
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        command = ("demo.py", "--no-browser", "--port", "0", "--clips_folder", folder, *args.demo)
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        with running(*command) as address:
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector(".demo[data-state=ready]", timeout=1000 * PATIENCE)
            page.fill("#prompt", PROMPTS[0])
            page.press("#prompt", "Enter")
            page.wait_for_function("selfForcing.chunks.length > 6", timeout=1000 * PATIENCE)
            frames = page.evaluate("selfForcing.chunks.at(-1).frames")
            for style in args.styles:
                seconds, said, missed, late = measure(page, style, args.count, frames)
                low, middle, high = statistics.quantiles(seconds, n=4)
                print(
                    f"| {style} | {len(seconds)} | {middle:.2f} | {low:.2f} to {high:.2f} | {max(seconds):.2f} | "
                    f"{statistics.median(said):.2f} | {missed} | {late} |",
                    flush=True,
                )
            page.click("#stop")
        browser.close()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
