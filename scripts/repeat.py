"""Make the same videos many times, and count the different files of each video.

    python scripts/repeat.py --runs 100 --prompt "a large red circle moving up and right on a navy background"

The count is 1 if the prompt, the seed and the settings alone decide a video. All other options are those of
inference.py. With --busy 2, two processes keep two cores busy, to show whether a busy machine changes a video.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import inference
from utils.cli import USER_ERROR, count

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1_000_000))"
"""A program that keeps one core busy until the program that started it ends."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read --runs and --busy. `options` holds the other arguments, for inference.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=count, default=10, help="how many times to make the videos; default: %(default)s"
    )
    parser.add_argument("--busy", type=int, default=0, help="number of cores to keep busy; default: %(default)s")
    args, options = parser.parse_known_args(arguments)
    if args.busy < 0:
        parser.error(f"argument --busy: {args.busy} must be at least 0")
    args.options = options
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with busy_cores(args.busy):
        return repeat(args.runs, args.options)


def repeat(runs: int, options: list[str]) -> int:
    """Make the videos `runs` times. Return 1 if the files of a video differ, or the exit code of a run that fails."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            if code := inference.main([*options, "--output_folder", folder]):
                return code
            for path in Path(folder).glob("*.mp4"):
                found[path.name].add(hashlib.sha256(path.read_bytes()).hexdigest())
        if not found:
            print("error: no video was made; leave --dry-run out", file=sys.stderr)
            return USER_ERROR
        print(f"run {run} of {runs}: at most {max(map(len, found.values()))} different files of a video")
    return int(any(len(hashes) > 1 for hashes in found.values()))


@contextmanager
def busy_cores(cores: int) -> Iterator[list[subprocess.Popen]]:
    """Run `cores` processes that only compute, each on its own core."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    sys.exit(main())
