"""Chromium, and a server with the page several times, each behind a path prefix of its own: alone, behind an API key,
and with a made-up engine. No engine is started."""

import re
import shutil
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from browser import Engine, Page, guarded, like_vllm
from fastapi import FastAPI
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from vllm_power.server.explore import make_app

REMEDY = "the page is tested in Chromium: on Debian, apt install chromium chromium-driver"


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


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.fail(REMEDY, pytrace=False)
    options = ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(chromium: Chrome) -> Iterator[Page]:
    page = Page(chromium)
    page.emulate()
    yield page
    # Chromium notes answers of the kinds that the page expects and shows; anything else is a fault.
    expected = re.compile(r"status of (400|401|422|503) ")
    complaints = [entry for entry in chromium.get_log("browser") if not expected.search(entry["message"])]
    assert not complaints


@pytest.fixture
def explore(page: Page, url: str) -> Page:
    return page.open(f"{url}/a/prefix/power")


@pytest.fixture
def live(page: Page, url: str, engine: Engine) -> Page:
    engine.silent = False
    return page.open(f"{url}/engine/power", ready="#live-figures div")
