"""Make the same videos many times, and count the different files: 1 if prompt, seed and settings alone decide a video.

    python scripts/repeat.py --runs 100 --prompt "a large red circle moving up and right on a navy background"

All other options are those of inference.py. Start busy loops beside it to see that a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import inference


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read --runs; `options` holds what is left for inference.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="how often to make the videos; default: %(default)s")
    args, options = parser.parse_known_args(arguments)
    args.options = options
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    found: dict[str, set[str]] = defaultdict(set)
    for run in range(1, args.runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            if code := inference.main([*args.options, "--output_folder", folder]):
                return code
            for path in Path(folder).glob("*.mp4"):
                found[path.name].add(hashlib.sha256(path.read_bytes()).hexdigest())
        print(f"run {run} of {args.runs}: {max(map(len, found.values()))} different files of a video at most")
    return int(any(len(hashes) > 1 for hashes in found.values()))


if __name__ == "__main__":
    sys.exit(main())
