"""The fleet of serve_fleet.py: its application, and the cluster that serves it."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.serving.run import build_server as build_demo
from pipeline.serving.run import check, listen
from pipeline.serving.server import Server
from utils.errors import UserError
from utils.signals import StopSignals

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger("fleet")

ROOT = Path(__file__).resolve().parents[2]
NAME = "self-forcing"  # of the application in Ray Serve


def load_ray() -> ModuleType:
    """Import Ray Serve, which is optional. It reads :func:`set_environment` at that moment."""
    import ray.serve

    return ray


def make_application(args: argparse.Namespace, build_server: Callable[..., Server] = build_demo) -> Application:
    """Check the arguments and return the application. Raises UserError."""
    for name in ("replicas", "max_replicas", "gpus", "cpus", "hang_seconds"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: give a finite number that is not negative"
            )
    if args.replicas < 1:
        raise UserError(f"--replicas {args.replicas} must be at least 1")
    access = replace(check(args), cookie_key=secrets.token_bytes(32))
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise UserError("a fleet needs Ray Serve, which is not installed: pip install -e '.[fleet]'")
    from scripts.runs.fleet_parts import application

    return application(args, access, build_server)


def run(args: argparse.Namespace, build_server: Callable[..., Server] = build_demo) -> None:
    """Deploy the fleet. Without --address, serve until a signal asks for the end.

    Args:
        args: the command line.
        build_server: makes the server of a replica. Every machine must be able to import it.

    Raises:
        UserError: an argument cannot be used, the port is taken, or a replica does not start.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    set_environment()
    target = make_application(args, build_server)
    if args.address is None:
        listen(args.host, args.port).close()
    ray = load_ray()
    ray.init(address=args.address, include_dashboard=False if args.address is None else None, log_to_driver=True)
    try:
        with StopSignals() as signals:  # after ray.init, which sets its own handlers
            check_room(args, ray.cluster_resources())
            ray.serve.start(proxy_location="EveryNode", http_options={"host": args.host, "port": args.port})
            ray.serve.run_many([ray.serve.RunTarget(target, name=NAME)], wait_for_applications_running=False)
            wait_until_running(signals)
            log.info("open http://%s:%d", args.host, args.port)
            while args.address is None and signals.received is None:
                time.sleep(0.2)
    finally:
        ray.shutdown()  # ends a cluster of its own; another cluster keeps the application


def set_environment() -> None:
    """Set the environment variables that the processes of a new cluster read."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # equal lines of different replicas are not repetitions
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")  # such as one that is frozen as a whole
    os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = "cookie"  # scripts.runs.fleet_parts.ROUTED_BY
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def check_room(args: argparse.Namespace, have: dict[str, float]) -> None:
    """Raise UserError if a new cluster has no room for the replicas. Another cluster may grow, so it is not checked."""
    for kind, each in (("GPU", args.gpus), ("CPU", args.cpus)):
        if args.address is None and args.replicas * each > have.get(kind, 0):
            raise UserError(
                f"--replicas {args.replicas} with --{kind.lower()}s {each:g} need {args.replicas * each:g} {kind}s, "
                f"and {have.get(kind, 0):g} are here; give a smaller --replicas or --{kind.lower()}s"
            )


def wait_until_running(signals: StopSignals) -> None:
    """Wait for the first replicas. Raises UserError with the reason if they do not start."""
    serve = load_ray().serve
    while signals.received is None:
        application = serve.status().applications.get(NAME)
        if application is not None and application.status == "RUNNING":
            return
        if application is not None and application.status == "DEPLOY_FAILED":
            raise UserError(f"the fleet did not start: {failure_reason(application)}")
        time.sleep(0.5)


def failure_reason(application: Any) -> str:
    """Return the last line of Ray's message about an application that failed."""
    texts = [deployment.message for deployment in application.deployments.values()]
    lines = [line.strip() for text in [application.message, *texts] for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "UserError" in line or "Error:" in line]
    return (errors or lines or ["Ray gives no reason"])[-1]
