"""Live video from prompts in the browser: python demo.py, or with a configuration and a checkpoint of your own."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from utils.cli import exit_code
from utils.signals import Stopper, StopSignals

log = logging.getLogger("demo")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_arguments(parser)
    add = parser.add_argument
    add("--download", action="store_true", help="fetch the published weights that are missing first")
    add("--share", action="store_true", help="also make a public https address through Gradio's servers")
    add("--no-browser", action="store_true", help="do not open a browser window")
    return parser.parse_intermixed_args(arguments)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every server of the page needs: the model, who may come in, and the clips."""
    add = parser.add_argument
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml", help="YAML file; default: %(default)s")
    add("--checkpoint_path", help="weights of the generator: a folder, .safetensors or .pt")
    add("--use_ema", action="store_true", help="averaged weights, where a checkpoint holds both")
    add("--tiny_decoder", type=Path, help="TAEHV weights (taew2_1.pth) to offer beside the Wan VAE: faster, less sharp")
    add("--host", default="127.0.0.1", help="address to listen on; any but this machine needs --auth or --insecure")
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--auth", metavar="USER:PASSWORD", action="append", help="ask visitors for these; repeat it for more accounts")
    add("--insecure", action="store_true", help="let anyone in who reaches the address")
    add("--root-path", default="", help="path below which a proxy shows the page, such as /wan")
    add("--allowed-host", metavar="NAME", action="append", default=[], help="name by which a proxy makes it known")
    add("--trusted-proxy", metavar="ADDRESS", action="append", default=[],
        help="proxy, or network of proxies, whose X-Forwarded-For says who a visitor is")  # fmt: skip
    add("--max-viewers", type=int, default=4, help="videos made at once; further viewers wait; default: %(default)s")
    add("--batch", action="store_true", help="make chunks of several viewers as one batch where they are alike")
    add("--clips_folder", default="videos/demo", help="where finished clips go; default: %(default)s")
    add("--longest_clip", type=float, default=120.0, help="seconds of a clip that are kept; default: %(default)s")
    add("overrides", nargs="*", metavar="key=value", help="any key of the configuration, such as rollout.window=9")


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    stop = Stopper()
    try:
        with StopSignals(on_signal=lambda number: stop()) as signals:
            code = exit_code(lambda: run(args, stop))
        if signals.received is not None and code == 0:
            log.info("stopped by %s", signals.received.name)
            code = 128 + signals.received
    except KeyboardInterrupt:  # the second Ctrl-C
        print("stopped at once", file=sys.stderr)
        os._exit(130)
    if stop.leaves_threads:  # in the middle of loading, which cannot be interrupted
        logging.shutdown()
        os._exit(code)
    return code


def run(args: argparse.Namespace, stop: Stopper) -> None:
    from pipeline.serving.run import main as serve

    serve(args, stop)


if __name__ == "__main__":
    sys.exit(main())
