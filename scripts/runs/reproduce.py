"""Trains every method from one teacher in the Shapes world, measures it and writes a report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from scripts.reproduction.plan import FULL, QUICK
from scripts.reproduction.runner import reproduce


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask for. Raises UserError if something cannot be used."""
    budget = QUICK if args.quick else FULL
    reproduce(
        budget if args.prompts is None else replace(budget, prompts=args.prompts),
        folder=args.folder and Path(args.folder),
        report=args.report and Path(args.report),
        plan_only=args.plan,
        overrides=tuple(args.overrides),
    )
