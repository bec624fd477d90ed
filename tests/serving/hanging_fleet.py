"""The program serve_fleet.py with the prompt "hang", whose generator then hangs for ever."""

from __future__ import annotations

import sys
import threading
from argparse import Namespace

from pipeline.serving import run
from pipeline.serving.server import Server
from pipeline.serving.spec import StreamSpec
from scripts.runs.serve_fleet import run as serve
from scripts.serve_fleet import make_parser
from utils.cli import exit_code


def build_server(args: Namespace, *, greeting: str) -> Server:
    server = run.build_server(args, greeting=greeting)
    open_session = server.model.open

    def open_or_hang(spec: StreamSpec):
        if spec.prompt == "hang":
            threading.Event().wait()
        return open_session(spec)

    server.model.open = open_or_hang
    return server


if __name__ == "__main__":
    from tests.serving.hanging_fleet import build_server as importable

    arguments = make_parser().parse_intermixed_args(sys.argv[1:])
    sys.exit(exit_code(lambda: serve(arguments, importable)))
