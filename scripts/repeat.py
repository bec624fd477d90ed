"""Make the same videos many times, and count the different files: 1 if prompt, seed and settings alone decide a video.

    python scripts/repeat.py --runs 100 --prompt "a large red circle moving up and right on a navy background"

All other options are those of inference.py. With --busy 2, two processes keep two cores busy meanwhile, to see that a
busy machine changes nothing.
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

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1_000_000))"
"""A program that keeps one core busy as long as the one that started it lives."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read --runs and --busy; `options` holds what is left for inference.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="how often to make the videos; default: %(default)s")
    parser.add_argument("--busy", type=int, default=0, help="cores to keep busy meanwhile; default: %(default)s")
    args, options = parser.parse_known_args(arguments)
    args.options = options
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    with busy_cores(args.busy):
        return repeat(args.runs, args.options)


def repeat(runs: int, options: list[str]) -> int:
    """Make the videos `runs` times. Return 1 if a video has more than one content, or the code of a run that fails."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            if code := inference.main([*options, "--output_folder", folder]):
                return code
            for path in Path(folder).glob("*.mp4"):
                found[path.name].add(hashlib.sha256(path.read_bytes()).hexdigest())
        print(f"run {run} of {runs}: {max(map(len, found.values()))} different files of a video at most")
    return int(any(len(hashes) > 1 for hashes in found.values()))


@contextmanager
def busy_cores(count: int) -> Iterator[list[subprocess.Popen]]:
    """Run so many processes that do nothing but compute, each on a core of its own."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    sys.exit(main())
