"""The page around the API. A splash page is there at once; Gradio's page follows when Gradio is imported."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.api import PAGE, create_app
from pipeline.serving.server import Server

OWN_PATHS = ("/api/", "/page/", "/healthz", "/metrics")
TITLE = "Self Forcing"
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
# Relative paths, because a proxy may show the page at any path.
HEAD = '<link rel="stylesheet" href="page/style.css"><meta name="color-scheme" content="light dark">'
ON_LOAD = "import(new URL('page/app.js', document.baseURI).href).then((app) => app.start(element));"

T = TypeVar("T")


class Site:
    """The whole server as an ASGI application.

    Args:
        server: the server. Its model begins to load when the application has started and the page is ready.
        started: called on a thread as soon as requests are answered.
        failed: called once if the model cannot be loaded.
        root_path: the path below which a proxy shows the site, such as "/wan".
    """

    def __init__(
        self, server: Server, *, started: Callable[[], None], failed: Callable[[], None], root_path: str = ""
    ) -> None:
        self._server, self._started, self._failed, self._root_path = server, started, failed, root_path
        self._api = create_app(server, lifespan=self._lifespan)
        self._page: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith(OWN_PATHS):
            await self._api(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] not in ("GET", "HEAD"):  # Gradio's own uploads and events are not used
            await PlainTextResponse("this method is not allowed here\n", 405)(scope, receive, send)
        elif self._page is None and scope["path"] != "/":
            await PlainTextResponse("the page is still loading\n", 503, {"retry-after": "2"})(scope, receive, send)
        elif self._page is None:
            await HTMLResponse((PAGE / "splash.html").read_text(encoding="utf-8"))(scope, receive, send)
        else:
            await self._page(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            start = asyncio.create_task(self._start(stack))
            try:
                yield
            finally:
                start.cancel()
                await run_in_threadpool(self._server.close)

    async def _start(self, stack: AsyncExitStack) -> None:
        """Open the page, then load the model. If one fails, the server ends and says why."""
        try:
            self._server.report("opening the page", 0.02)
            await on_a_thread(self._started)
            page = await on_a_thread(lambda: gradio_page(self._root_path))
            await stack.enter_async_context(page.router.lifespan_context(page))
            self._page = page
            await on_a_thread(self._server.load)
        except Exception as error:
            self._server.fail(error)
        if self._server.error is not None:
            await asyncio.sleep(1.0)  # so that open pages can show the reason
            self._failed()


async def on_a_thread(run: Callable[[], T]) -> T:
    """Run a long function on a daemon thread and return its result. Such a thread does not stop the program's end."""
    loop, result = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def deliver(set_result: Callable, value: object) -> None:
        if not result.done():
            set_result(value)

    def work() -> None:
        try:
            outcome = result.set_result, run()
        except BaseException as error:
            outcome = result.set_exception, error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await result


def gradio_page(root_path: str = "") -> FastAPI:
    """Return a Gradio application with one component, which holds the page, for a site below `root_path`."""
    import gradio

    theme = gradio.themes.Base(font=SYSTEM_FONTS, font_mono=MONO_FONTS)
    with gradio.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML(
            (PAGE / "panel.html").read_text(encoding="utf-8"),
            js_on_load=ON_LOAD,
            apply_default_css=False,
            elem_id="self-forcing",
        )
    app = FastAPI(openapi_url=None)
    options = {"theme": theme, "head": HEAD, "footer_links": [], "ssr_mode": False, "root_path": root_path or None}
    return gradio.mount_gradio_app(app, blocks, path="/", **options)
