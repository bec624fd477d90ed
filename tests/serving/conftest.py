"""A real Chromium, controlled by playwright."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.serving.browser import FLAGS, PATIENCE, find_chromium, leaves
from tests.serving.served import serve  # noqa: F401, a fixture


@pytest.fixture(scope="module")  # playwright keeps an event loop running meanwhile
def chromium():
    """Give a headless browser. If there is none, the tests that need it are skipped."""
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
    """Give a function that opens pages of a server. No page may fail, or request anything from another address."""
    contexts, faults = [], []

    def open_page(address: str, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        context.set_default_timeout(1000 * PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if leaves(request.url, address) else None)
        page.on("websocket", lambda socket: faults.append(socket.url) if leaves(socket.url, address) else None)
        page.goto(address)
        page.wait_for_selector(".demo[data-state=ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults
