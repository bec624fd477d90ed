"""Measures a checkpoint: videos for VBench, or a table of what the Shapes detector finds."""

from __future__ import annotations

import argparse

from scripts.runs import shapes_table, vbench


def run(args: argparse.Namespace) -> None:
    """Make and measure the videos that the arguments ask for."""
    (shapes_table if args.vbench is None else vbench).run(args)
