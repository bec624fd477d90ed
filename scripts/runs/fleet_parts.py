"""The parts of serve_fleet.py that Ray Serve runs: the replica with its model, and the router to the replicas."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from pipeline.serving.fleet import GREETING, SmallMessages, Sticky, claimed_folder, replica_of
from pipeline.serving.guard import Access, Guard
from pipeline.serving.limits import Limits
from pipeline.serving.logs import configure_logging
from pipeline.serving.run import LARGEST_MESSAGE
from pipeline.serving.server import Server
from pipeline.serving.site import Site
from utils.errors import UserError

log = logging.getLogger("fleet")

ROUTED_BY = "RAY_SERVE_SESSION_ID_HEADER_KEY"  # variable with the name of the header that a router may read
HEALTH_PERIOD = 2.0  # seconds between two health checks; Ray ends a replica after three failures
STARTS = 3  # failed starts of a replica before Ray gives up
UPSCALE_SECONDS = 10.0  # a replica is added if viewers have waited for this long
DOWNSCALE_SECONDS = 600.0  # a replica is removed if it has been idle for this long


class StickyRouter(RequestRouter):
    """Sends a request to the replica that its cookie names, else to the replica with the fewest connections."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas. They are tried one after the other."""
        wanted = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            wanted = replica_of(pending_request.metadata.session_id)
        own = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        others = [replica for replica in candidate_replicas if replica not in own]
        return [group for group in (own, others) if group]


@serve.ingress()
class Replica:
    """One model behind the page and the API of the demo.

    Args:
        args: the command line of serve_fleet.py.
        access: who may use the server.
        build_server: makes the server, like ``pipeline.serving.run.build_server``.

    Raises:
        UserError: the model cannot be loaded, or Ray was started without the variable that the router needs.
    """

    async def __init__(self, args: Namespace, access: Access, build_server: Callable[..., Server]) -> None:
        if os.environ.get(ROUTED_BY) != "cookie":
            raise UserError(f"{ROUTED_BY} is not 'cookie' here: set it before `ray start`, on every machine")
        configure_logging()
        self._args, self._access = args, access
        self._name = serve.get_replica_context().replica_tag
        self._files = ExitStack()
        folder = self._files.enter_context(claimed_folder(Path(args.clips_folder)))
        self._server = build_server(Namespace(**vars(args) | {"clips_folder": folder}), greeting=GREETING)
        await asyncio.get_running_loop().run_in_executor(None, self._server.load)
        if self._server.error is not None:
            raise self._server.error
        log.info("replica %s is process %d, with clips in %s", self._name, os.getpid(), folder)

    def __serve_build_asgi_app__(self) -> Sticky:
        """Return the application that Ray Serve calls for each request."""
        site = Site(self._server, started=lambda: None, failed=lambda: None, root_path=self._access.root_path)
        app = Guard(SmallMessages(site, LARGEST_MESSAGE), self._access, Limits())
        if self._args.trusted_proxy:
            app = ProxyHeadersMiddleware(app, trusted_hosts=self._args.trusted_proxy)
        return Sticky(app, self._name, self._access.root_path)

    def check_health(self) -> None:
        """End this process if a thread hangs. Ray then starts another replica.

        Raising an exception is not enough: Ray would wait for the viewers, and these wait for chunks.
        """
        stalled = self._server.hub.stalled(self._args.hang_seconds)
        if stalled is not None:
            log.error("replica %s hangs and ends: %s", self._name, stalled)
            logging.shutdown()
            os._exit(1)


def application(args: Namespace, access: Access, build_server: Callable[..., Server]) -> serve.Application:
    """Return the fleet as an application that Ray Serve can deploy."""
    scaling = AutoscalingConfig(
        min_replicas=args.replicas,
        max_replicas=max(args.replicas, args.max_replicas),
        target_ongoing_requests=args.max_viewers,  # an open page is one request
        upscale_delay_s=UPSCALE_SECONDS,
        downscale_delay_s=DOWNSCALE_SECONDS,
    )
    deployment = serve.deployment(
        Replica,
        name="demo",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        autoscaling_config=scaling,
        max_ongoing_requests=Limits().connections,
        logging_config={"enable_access_log": False},
        request_router_config=RequestRouterConfig(request_router_class=StickyRouter),
        health_check_period_s=HEALTH_PERIOD,
        health_check_timeout_s=10 * HEALTH_PERIOD,
        graceful_shutdown_timeout_s=Limits().longest_turn,  # seconds; videos may end before their replica is removed
        max_constructor_retry_count=STARTS,
    )
    return deployment.bind(args, access, build_server)
