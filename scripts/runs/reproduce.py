"""Trains every method from one teacher in the Shapes world, measures it and writes a report."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from scripts.reproduction.plan import FORMS, FULL, QUICK
from scripts.reproduction.runner import reproduce


def run(args: argparse.Namespace) -> None:
    """Do what the arguments ask for. Raises UserError if something cannot be used."""
    budget = QUICK if args.quick else FULL
    if args.form is not None:
        budget = replace(budget, forms=tuple(FORMS) if args.form == "both" else (args.form,))
    if args.seeds is not None:
        budget = replace(budget, seeds=tuple(range(args.seeds)))
    if args.prompts is not None:
        budget = replace(budget, prompts=args.prompts)
    if args.rows is not None:
        budget = replace(budget, main=args.rows != "ablations", ablations=args.rows != "main")
    reproduce(
        budget,
        folder=args.folder and Path(args.folder),
        report=args.report and Path(args.report),
        plan_only=args.plan,
        overrides=tuple(args.overrides),
    )
