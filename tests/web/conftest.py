"""A server with the page several times, each behind a path prefix of its own: alone, behind an API key,
and with a made-up engine. No engine is started."""

import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI
from support.applications import Engine, guarded, like_vllm
from support.chromium import Page, chromium_fixture, page_fixture  # noqa: F401

from vllm_power.tools.web.explore import make_app


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="session")
def url(engine: Engine) -> Iterator[str]:
    with_engine = like_vllm(make_app())
    with_engine.state.power = engine
    app = FastAPI()
    for prefix, part in (("/a/prefix", make_app()), ("/guarded", guarded()), ("/engine", with_engine)):
        app.mount(prefix, part)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def explore(page: Page, url: str) -> Page:
    return page.open(f"{url}/a/prefix/power")


@pytest.fixture
def live(page: Page, url: str, engine: Engine) -> Page:
    engine.silent = False
    return page.open(f"{url}/engine/power", ready="#live-figures div")
