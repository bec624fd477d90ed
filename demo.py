"""Live video from prompts in the browser: python demo.py, or with a configuration and a checkpoint of your own."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import socket
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import exit_code
from utils.errors import UserError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from pipeline.config import PipelineConfig
    from pipeline.serving.server import Server

log = logging.getLogger("demo")

LARGEST_MESSAGE = 32 * 1024  # bytes of a WebSocket message from a client
PING_SECONDS = 20  # between pings of a WebSocket, and until one without an answer is closed


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config_path", default="configs/shapes/self_forcing_dmd.yaml", help="YAML file; default: %(default)s")
    add("--checkpoint_path", help="weights of the generator: a folder, .safetensors or .pt")
    add("--use_ema", action="store_true", help="averaged weights, where a checkpoint holds both")
    add("--tiny_decoder", type=Path, help="TAEHV weights (taew2_1.pth) to offer beside the Wan VAE: faster, less sharp")
    add("--host", default="127.0.0.1", help="address to listen on; any but this machine needs --auth or --insecure")
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--auth", metavar="USER:PASSWORD", help="ask visitors for these")
    add("--insecure", action="store_true", help="let anyone in who reaches the address")
    add("--share", action="store_true", help="also make a public https address through Gradio's servers")
    add("--max-viewers", type=int, default=4, help="videos made at once; further viewers wait; default: %(default)s")
    add("--batch", action="store_true", help="make chunks of several viewers as one batch where they are alike")
    add("--clips_folder", default="videos/demo", help="where finished clips go; default: %(default)s")
    add("--longest_clip", type=float, default=120.0, help="seconds of a clip that are kept; default: %(default)s")
    add("--no-browser", action="store_true", help="do not open a browser window")
    add("overrides", nargs="*", metavar="key=value", help="any key of the configuration, such as rollout.window=9")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    from utils.files import ensure_writable_folder

    check(args)
    listener = listen(args.host, args.port)
    ensure_writable_folder(args.clips_folder)
    # Not utils.tracking's, which imports torch: the page should be there at once.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    serve(args, listener)


def check(args: argparse.Namespace) -> None:
    """Refuse mistakes before anything starts."""
    from pipeline.serving.guard import LOOPBACK

    open_to_others = args.host not in LOOPBACK or args.share
    if open_to_others and not args.auth and not args.insecure:
        asked = "--share" if args.share else f"--host {args.host}"
        raise UserError(f"{asked} lets others in: add --auth user:password, or --insecure to let anyone in")
    if args.auth is not None and not all(args.auth.partition(":")):
        raise UserError("--auth is not of the form user:password")
    if args.max_viewers < 1:
        raise UserError(f"--max-viewers {args.max_viewers} must be at least 1")
    if args.longest_clip <= 0:
        raise UserError(f"--longest_clip {args.longest_clip} must be above 0")
    for flag in ("config_path", "checkpoint_path", "tiny_decoder"):
        path = getattr(args, flag)
        if path is not None and not Path(path).exists():
            raise UserError(f"--{flag} {path}: no such file")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: a port that is taken is found out before anything loads."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Serve until interrupted. Raises UserError where the model does not load."""
    from pipeline.serving.guard import LOOPBACK, Guard
    from pipeline.serving.site import Site

    def failed() -> None:
        runner.should_exit = True

    server = build_server(args)
    site = Site(server, started=lambda: announce(args, listener), failed=failed)
    runner = make_runner(Guard(site, hosts=None if args.auth or args.insecure else LOOPBACK, auth=args.auth))
    runner.run(sockets=[listener])
    if server.error is not None:
        raise server.error


def make_runner(app: ASGIApp) -> uvicorn.Server:
    """What serves an application, with bounded messages, and finds out about clients that vanished."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            ws="auto",
            ws_max_size=LARGEST_MESSAGE,
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=PING_SECONDS,
            timeout_graceful_shutdown=2,
        )
    )


def build_server(args: argparse.Namespace) -> Server:
    """The model (not loaded yet), the hub and the gallery."""
    from pipeline.serving.clips import Gallery
    from pipeline.serving.hub import Hub
    from pipeline.serving.models import Models, Source, denoise_together
    from pipeline.serving.server import Server

    source = Source(lambda: read_config(args), model_arguments(args), args.use_ema, args.tiny_decoder)
    models = Models(source)
    gallery = Gallery(Path(args.clips_folder), models.command, longest=args.longest_clip)
    return Server(models, Hub(args.max_viewers, gallery, denoise_together if args.batch else None), gallery)


def read_config(args: argparse.Namespace) -> PipelineConfig:
    """The configuration; imports torch."""
    from pipeline.config import load_pipeline_config

    weights = [] if args.checkpoint_path is None else [f"generator.weights={args.checkpoint_path}"]
    return load_pipeline_config(args.config_path, [*weights, *args.overrides])


def model_arguments(args: argparse.Namespace) -> list[str]:
    """What tells inference.py to use the same model."""
    arguments = [f"--config_path={args.config_path}"]
    if args.checkpoint_path is not None:
        arguments.append(f"--checkpoint_path={args.checkpoint_path}")
    return [*arguments, *(["--use_ema"] if args.use_ema else []), *args.overrides]


def announce(args: argparse.Namespace, listener: socket.socket) -> None:
    """Say where the page is, open it where there is a desktop, and share it if asked to."""
    from pipeline.serving.guard import LOOPBACK

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("open http://%s:%d", shown, port)
    if not args.no_browser and host in LOOPBACK and has_desktop():
        webbrowser.open(f"http://{shown}:{port}")
    if args.share:
        from gradio.networking import setup_tunnel

        log.info("shared at %s", setup_tunnel(host, port, secrets.token_urlsafe(32), None, None))


def has_desktop() -> bool:
    """Whether a browser window can open here."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


if __name__ == "__main__":
    sys.exit(main())
