"""A real Chromium, driven by playwright."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.serving.browser import FLAGS, PATIENCE, find_chromium, leaves
from tests.serving.served import serve  # noqa: F401, a fixture


@pytest.fixture(scope="module")  # playwright keeps an event loop running meanwhile
def chromium():
    """A headless browser; the tests that want one are skipped where there is none."""
    path = find_chromium()
    if path is None:
        pytest.skip("no chromium on this machine: apt install chromium to run the browser tests")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable]:
    """Opens pages of a server; in the end, none may have failed or asked for anything beyond the server."""
    contexts, faults = [], []

    def open_page(address: str, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if leaves(request.url, address) else None)
        page.on("websocket", lambda socket: faults.append(socket.url) if leaves(socket.url, address) else None)
        page.goto(address)
        page.wait_for_selector(".demo[data-state=ready]", timeout=1000 * PATIENCE)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults
