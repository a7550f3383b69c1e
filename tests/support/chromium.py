"""The page in Chromium, headless: what tests do with it, and the fixtures ``chromium`` and ``page`` to be imported."""

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

REMEDY = "the page is tested in Chromium: on Debian, apt install chromium chromium-driver"


class Page:
    """The open page."""

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def open(self, address: str, ready: str = "#plan-rows tr") -> "Page":
        self.browser.get(address)
        self.wait(lambda: self.browser.find_elements(By.CSS_SELECTOR, ready))
        return self

    def wait(self, condition: Callable[[], Any], seconds: float = 30) -> Any:
        return WebDriverWait(self.browser, seconds, 0.05).until(lambda _: condition())

    def at(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.at(name).text

    def shows(self, name: str, part: str) -> None:
        self.wait(lambda: part in self.text(name))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def type(self, name: str, text: str) -> None:
        """Type into a field, replacing its content."""
        self.at(name).send_keys(Keys.CONTROL + "a")
        self.at(name).send_keys(text)

    def emulate(self, width: int = 1100, height: int = 900, **media: str) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture(scope="session", name="chromium")
def chromium_fixture() -> Iterator[Chrome]:
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


@pytest.fixture(name="page")
def page_fixture(chromium: Chrome) -> Iterator[Page]:
    page = Page(chromium)
    page.emulate()
    yield page
    # Chromium notes answers of the kinds that the page expects and shows; anything else is a fault.
    expected = re.compile(r"status of (400|401|422|503) ")
    complaints = [entry for entry in chromium.get_log("browser") if not expected.search(entry["message"])]
    assert not complaints
