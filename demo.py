"""Make live video from prompts in the browser. Without options, use the Shapes model on this machine only."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path

from utils.checkout import find_shipped
from utils.cli import exit_code
from utils.signals import Stopper, StopSignals

log = logging.getLogger("demo")

DEFAULT_CONFIG = "configs/shapes/self_forcing_dmd.yaml"
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_arguments(parser, configs="+")
    add = parser.add_argument
    add("--download", action="store_true", help="first download missing published weights; default: off")
    add("--share", action="store_true", help="also make a public https address through Gradio's servers; default: off")
    add("--no-browser", action="store_true", help="do not open a browser window; default: open one on a desktop")
    add("--visitors-choose", action="store_true", help="let visitors from other machines choose among several "
        "configurations; it ends every running video; default: only this machine may choose")  # fmt: skip
    args = parser.parse_intermixed_args(arguments)
    named = [args.config_path] if isinstance(args.config_path, str) else args.config_path
    args.config_path = [text for text in named if os.path.exists(text) or not OVERRIDE.match(text)]
    args.overrides = [text for text in named if text not in args.config_path] + args.overrides
    if not args.config_path:
        parser.error("argument --config_path: give a file")
    return args


def add_server_arguments(parser: argparse.ArgumentParser, *, configs: str | None = None) -> None:
    """Add the options that every server of the page needs: the model, access, and clips.

    Args:
        configs: how many configurations may be named, as ``nargs`` of argparse. None: one.
    """
    add = parser.add_argument
    several = "; the page offers a choice if you give several, and begins with the first" if configs == "+" else ""
    add("--config_path", type=find_shipped, nargs=configs, default=DEFAULT_CONFIG, metavar="FILE",
        help=f"YAML file with the settings{several}; default: %(default)s")  # fmt: skip
    add("--checkpoint_path", type=find_shipped,
        help="weights of the generator: folder, .safetensors or .pt; default: generator.weights")  # fmt: skip
    add("--use_ema", action="store_true", help="use the averaged weights if a checkpoint holds both; "
        "default: generator.use_ema, or the raw ones")  # fmt: skip
    add("--tiny_decoder", type=Path, help="weights of TAEHV (taew2_1.pth), a faster and less sharp decoder that "
        "visitors may choose instead of the Wan VAE; default: none")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on; one that other machines can reach needs --auth or "
        "--insecure; default: %(default)s")  # fmt: skip
    add("--port", type=int, default=7860, help="port to listen on; default: %(default)s")
    add("--auth", metavar="USER:PASSWORD", action="append", help="account that visitors need; may be repeated; "
        "default: no password")  # fmt: skip
    add("--insecure", action="store_true", help="let anyone use the demo who can reach the address; default: off")
    add("--root-path", default="", help="path below which a proxy shows the page, such as /wan; default: none")
    add("--allowed-host", metavar="NAME", action="append", default=[], help="host name under which a proxy shows the "
        "page; may be repeated; default: this machine's, or any name if others may visit")  # fmt: skip
    add("--trusted-proxy", metavar="ADDRESS", action="append", default=[], help="address or network of a proxy whose "
        "X-Forwarded-For names the visitor; may be repeated; default: none")  # fmt: skip
    add("--max-viewers", type=int, default=4, help="number of videos made at the same time; further viewers wait; "
        "default: %(default)s")  # fmt: skip
    add("--batch", action="store_true", help="make chunks of several viewers as one batch if their settings are equal; "
        "default: off")  # fmt: skip
    add("--clips_folder", default="videos/demo", help="folder for finished clips; default: %(default)s")
    add("--longest_clip", type=float, default=120.0, help="longest clip in seconds; a longer video is cut there; "
        "default: %(default)s")  # fmt: skip
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
