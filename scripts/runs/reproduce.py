"""Trains every method from one teacher in the Shapes world, measures it and writes a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.reproduction.plan import FULL, QUICK
from scripts.reproduction.runner import reproduce


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask for. Raises UserError if something cannot be used."""
    reproduce(
        QUICK if args.quick else FULL,
        folder=args.folder and Path(args.folder),
        report=args.report and Path(args.report),
        plan_only=args.plan,
        overrides=tuple(args.overrides),
    )
