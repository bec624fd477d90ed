"""Run demo.py after its arguments are read: check access, serve the page, load the model, and end on a signal."""

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
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from pipeline.serving.clips import Gallery
from pipeline.serving.door import Door
from pipeline.serving.guard import LOOPBACK, Access, Guard, proxy_check
from pipeline.serving.hub import Hub
from pipeline.serving.logs import configure_logging
from pipeline.serving.models import Models
from pipeline.serving.server import Server
from pipeline.serving.site import Site
from pipeline.serving.spec import ModelSource
from utils.cli import merged_overrides
from utils.errors import UserError
from utils.files import ensure_writable_folder
from utils.locks import folder_lock
from utils.signals import Stopper

log = logging.getLogger("demo")
KEYS = {"checkpoint_path": "generator.weights"}
"""Options that set a key of the configuration: option -> key."""
LARGEST_MESSAGE = 128 * 1024  # bytes of a WebSocket message from a client
PING_SECONDS = 20  # between two pings of a WebSocket, and the time that an answer may take
BACKLOG = 64  # connections that are accepted at a time, so that a flood cannot use up the files of the process
ROOT_PATH = re.compile(r"(/[\w.~-]+)*")


def main(args: argparse.Namespace, stop: Stopper) -> None:
    """Serve until a signal asks for the end.

    Raises:
        UserError: the arguments contradict each other, the port or the folder is in use, or the model cannot be loaded.
    """
    access = check(args)
    listener = listen(args.host, args.port)
    folder = ensure_writable_folder(args.clips_folder)
    configure_logging()
    with folder_lock(folder, "the demo"):
        serve(args, access, listener, stop)


def check(args: argparse.Namespace) -> Access:
    """Check the arguments before anything starts. Return who may use the server. Raises UserError."""
    open_to_others = args.host not in LOOPBACK or args.share
    if open_to_others and not args.auth and not args.insecure:
        asked = "--share" if args.share else f"--host {args.host}"
        raise UserError(f"{asked} lets others use the demo: add --auth user:password, or --insecure to allow anyone")
    if not all(all(account.partition(":")) for account in args.auth or []):
        raise UserError("--auth must be of the form user:password")
    if args.max_viewers < 1:
        raise UserError(f"--max-viewers {args.max_viewers} must be at least 1")
    if not 0 < args.longest_clip < float("inf"):
        raise UserError(f"--longest_clip {args.longest_clip} must be above 0 and finite")
    check_files(args)
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


def check_files(args: argparse.Namespace) -> None:
    """Raise UserError if a file of the command line is missing, or weights are given for several models."""
    named = [("config_path", path) for path in config_paths(args)]
    for flag, path in [*named, ("checkpoint_path", args.checkpoint_path), ("tiny_decoder", args.tiny_decoder)]:
        if path is not None and not Path(path).exists():
            raise UserError(f"--{flag} {path}: no such file")
    overrides = merged_overrides(args, KEYS)
    if len(named) > 1 and any(text.startswith("generator.weights=") for text in overrides):
        raise UserError(
            f"--checkpoint_path belongs to one model, and --config_path names {len(named)}; write generator.weights "
            "into each file"
        )


def config_paths(args: argparse.Namespace) -> list[str]:
    """Return the configurations of a command line. A program that takes one of them has a string."""
    return [args.config_path] if isinstance(args.config_path, str) else args.config_path


def is_private(args: argparse.Namespace) -> bool:
    """Return whether only this machine can reach the server: no other address, no public one, and no proxy."""
    return args.host in LOOPBACK and not (args.share or args.root_path or args.allowed_host or args.trusted_proxy)


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket, before anything loads. Raises UserError if the port is in use."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error


def serve(args: argparse.Namespace, access: Access, listener: socket.socket, stop: Stopper) -> None:
    """Serve until a signal asks for the end. Raises UserError if the model cannot be loaded."""

    def end() -> None:
        runner.should_exit = True  # asks uvicorn to end

    address = listener.getsockname()[:2]
    private = is_private(args)
    server = build_server(args, may_choose=private or args.visitors_choose, offer_download=private)
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
    """Return the server of an application. It limits messages and connections, and notices clients that vanished."""

    class Runner(uvicorn.Server):
        def capture_signals(self):  # the caller handles signals
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
            ws_per_message_deflate=False,  # frames are compressed already, and compressed messages may be bombs
        )
    )


def build_server(
    args: argparse.Namespace, *, greeting: str = "", may_choose: bool = False, offer_download: bool = False
) -> Server:
    """Return the server with its models (not loaded yet), hub and gallery.

    Args:
        greeting, may_choose: see :class:`Server`.
        offer_download: whether the page offers to download published weights that are missing.

    Raises:
        UserError: one of several configurations cannot be used.
    """
    source = ModelSource(
        "",
        args.checkpoint_path,
        tuple(args.overrides),
        args.use_ema,
        download=args.download,
        offer_download=offer_download,
        tiny_decoder=args.tiny_decoder,
    )
    models = Models(*(replace(source, config_path=path) for path in config_paths(args)))
    for name in models.names if len(models.names) > 1 else ():  # loading checks a single one
        models.check(name)
    gallery = Gallery(Path(args.clips_folder), models.command, longest=args.longest_clip)
    hub = Hub(args.max_viewers, gallery, models.denoise_batch if args.batch else None)
    return Server(models, hub, gallery, greeting=greeting, may_choose=may_choose)


def announce(args: argparse.Namespace, address: tuple[str, int]) -> None:
    """Log the address of the page, open it if there is a desktop, and share it if that was asked for."""
    host, port = address
    shown = f"[{host}]" if ":" in host else host
    log.info("open http://%s:%d", shown, port)
    if not args.no_browser and host in LOOPBACK and has_desktop():
        webbrowser.open(f"http://{shown}:{port}")
    if args.share:
        from gradio.networking import setup_tunnel

        log.info("shared at %s", setup_tunnel(host, port, secrets.token_urlsafe(32), None, None))


def has_desktop() -> bool:
    """Return whether a browser window can open here."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
