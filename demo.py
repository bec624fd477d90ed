"""Live video from prompts in the browser: python demo.py, or with a configuration and a checkpoint of your own."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import re
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import exit_code, merged_overrides
from utils.errors import UserError
from utils.signals import StopSignals

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from pipeline.loading import PipelineConfig
    from pipeline.serving.door import Door
    from pipeline.serving.guard import Access
    from pipeline.serving.server import Server

log = logging.getLogger("demo")

KEYS = {"checkpoint_path": "generator.weights"}
"""Options that set a key of the configuration: option -> key."""
LARGEST_MESSAGE = 32 * 1024  # bytes of a WebSocket message from a client
PING_SECONDS = 20  # between pings of a WebSocket, and until one without an answer is closed
BACKLOG = 64  # connections that are accepted in one go, so that a flood cannot use up the files of the process
ROOT_PATH = re.compile(r"(/[\w.~-]+)*")


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


class Stopper:
    """Ends the server when a signal asks for it, also before there is one."""

    def __init__(self) -> None:
        self.asked = False
        self.leaves_threads = False
        self._end: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        """Ask for the end."""
        self.asked = True
        self._end()

    def ends(self, end: Callable[[], None]) -> None:
        """What to call from now on."""
        self._end = end
        if self.asked:
            end()

    def leave_threads(self) -> None:
        """Say that threads still work that nobody waits for."""
        self.leaves_threads = True


def run(args: argparse.Namespace, stop: Stopper) -> None:
    from pipeline.serving.logs import configure_logging
    from utils.files import ensure_writable_folder
    from utils.locks import folder_lock

    access = check(args)
    listener = listen(args.host, args.port)
    folder = ensure_writable_folder(args.clips_folder)
    configure_logging()
    with folder_lock(folder, "the demo"):
        serve(args, access, listener, stop)


def check(args: argparse.Namespace) -> Access:
    """Refuse mistakes before anything starts; returns who may come in."""
    from pipeline.serving.guard import LOOPBACK, Access

    open_to_others = args.host not in LOOPBACK or args.share
    if open_to_others and not args.auth and not args.insecure:
        asked = "--share" if args.share else f"--host {args.host}"
        raise UserError(f"{asked} lets others in: add --auth user:password, or --insecure to let anyone in")
    if not all(all(account.partition(":")) for account in args.auth or []):
        raise UserError("--auth is not of the form user:password")
    merged_overrides(args, KEYS)
    if args.max_viewers < 1:
        raise UserError(f"--max-viewers {args.max_viewers} must be at least 1")
    if not 0 < args.longest_clip < float("inf"):
        raise UserError(f"--longest_clip {args.longest_clip} must be above 0 and finite")
    for flag in ("config_path", "checkpoint_path", "tiny_decoder"):
        path = getattr(args, flag)
        if path is not None and not Path(path).exists():
            raise UserError(f"--{flag} {path}: no such file")
    for proxy in args.trusted_proxy:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError:
            raise UserError(f"--trusted-proxy {proxy}: give an address or a network, such as 127.0.0.1") from None
    root_path = f"/{args.root_path.strip('/')}".rstrip("/")
    if not ROOT_PATH.fullmatch(root_path):
        raise UserError(f"--root-path {args.root_path}: give a path such as /wan")
    names = tuple(name.lower() for name in args.allowed_host)
    hosts = None if open_to_others and not names else (*LOOPBACK, args.host, *names)
    return Access(hosts, names, tuple(args.auth or ()), root_path)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: a port that is taken is found out before anything loads."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error


def serve(args: argparse.Namespace, access: Access, listener: socket.socket, stop: Stopper) -> None:
    """Serve until a signal asks for the end. Raises UserError if the model does not load."""
    from pipeline.serving.door import Door
    from pipeline.serving.guard import Guard, proxy_check
    from pipeline.serving.site import Site

    def end() -> None:
        runner.should_exit = True  # uvicorn's own way to be asked

    address = listener.getsockname()[:2]
    server = build_server(args)
    site = Site(
        server,
        started=lambda: announce(args, address),
        failed=end,
        root_path=access.root_path,
    )
    door = Door(server.limits, proxy_check(args.trusted_proxy))
    runner = make_runner(Guard(site, access, server.limits), door, args.trusted_proxy)
    stop.ends(end)
    if not stop.asked:
        runner.run(sockets=[listener])
    if server.error is not None:
        raise server.error
    if server.state == "loading":
        stop.leave_threads()


def make_runner(app: ASGIApp, door: Door, proxies: list[str]) -> uvicorn.Server:
    """What serves an application, with bounded messages and connections, and finds out about clients that vanished."""
    from contextlib import nullcontext

    import uvicorn

    class Runner(uvicorn.Server):
        def capture_signals(self):  # the caller does
            return nullcontext()

    return Runner(
        uvicorn.Config(
            app,
            **door.protocols(),
            log_config=None,
            log_level="warning",
            backlog=BACKLOG,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=proxies,
            timeout_keep_alive=int(door.limits.idle),
            timeout_graceful_shutdown=2,
            ws_max_size=LARGEST_MESSAGE,
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=PING_SECONDS,
            ws_per_message_deflate=False,  # frames are compressed already, and a stranger's zip may be a bomb
        )
    )


def build_server(args: argparse.Namespace, *, greeting: str = "") -> Server:
    """The model (not loaded yet), the hub and the gallery. ``greeting`` is for clients of another server."""
    from pipeline.serving.clips import Gallery
    from pipeline.serving.hub import Hub
    from pipeline.serving.models import Models, ModelSource
    from pipeline.serving.server import Server

    source = ModelSource(lambda: read_config(args), model_arguments(args), args.use_ema, args.tiny_decoder)
    models = Models(source)
    gallery = Gallery(Path(args.clips_folder), models.command, longest=args.longest_clip)
    hub = Hub(args.max_viewers, gallery, models.denoise_batch if args.batch else None)
    return Server(models, hub, gallery, greeting=greeting)


def read_config(args: argparse.Namespace) -> PipelineConfig:
    """The configuration; imports torch."""
    from pipeline.config import load_pipeline_config

    config = load_pipeline_config(args.config_path, merged_overrides(args, KEYS))
    if args.download:
        from pipeline.download import download_weights

        download_weights(config)
    return config


def model_arguments(args: argparse.Namespace) -> list[str]:
    """What tells inference.py to use the same model."""
    arguments = [f"--config_path={args.config_path}"]
    if args.checkpoint_path is not None:
        arguments.append(f"--checkpoint_path={args.checkpoint_path}")
    return [*arguments, *(["--use_ema"] if args.use_ema else []), *args.overrides]


def announce(args: argparse.Namespace, address: tuple[str, int]) -> None:
    """Say where the page is, open it where there is a desktop, and share it if asked to."""
    from pipeline.serving.guard import LOOPBACK

    host, port = address
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
