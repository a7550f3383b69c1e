"""The page in a browser: what tests do with it, and what serves it beside `make_app`: a guard, a made-up engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from vllm_power.pattern import POWER
from vllm_power.server.drawing import describe
from vllm_power.server.explore import make_app
from vllm_power.server.routes import Unavailable

KEY = "the key"
CHECKS = Path(__file__).with_name("page_checks.js").read_text()
MARKUP = "<img src=x onerror=alert(1)>"  # of a model's name: must be shown as it is


class Engine:
    """A made-up engine (routes.EngineView) whose figures grow each time they are asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.silent = False

    def info(self) -> dict[str, Any]:
        return {
            "model": MARKUP,
            "pattern": describe(POWER),
            "max_model_len": 32_768,
            "executor": "triton",
            "layers": {"sparse": [0, 1, 2], "dense": [3], "sliding_window": [], "total": 4},
            "page_size": 256,
            "reclamation": "on",
            "note": None,
        }

    def live(self) -> dict[str, Any]:
        self.asked += 1
        if self.silent:
            raise Unavailable("no engine shares its figures")
        return {
            "engines": {"heard": 1, "of": 1},
            "tokens": 1_000 * self.asked,
            "blocks_read": 250,
            "blocks_skipped": 750,
            "sequences_running": 3,
            "kv_blocks_live": 40,
            "kv_blocks_capacity": 4_000,
            "kv_blocks_reclaimed": 1_234,
            "executions": {"sparse": 30, "dense": 10, "sliding_window": 0},
            "refusals": {},
        }


def like_vllm(app: FastAPI) -> FastAPI:
    """Answers to nonsense as vLLM's API server gives them: 400, FastAPI's list printed into a message."""

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        problems = [{**problem, "loc": ".".join(map(str, problem["loc"]))} for problem in error.errors()]
        lines = "\n".join(f"  {problem}" for problem in problems)
        return JSONResponse({"error": {"message": f"{len(problems)} validation errors:\n{lines}"}}, 400)

    return app


def guarded() -> FastAPI:
    """The page behind an API key, as vLLM guards what lies under /v1."""
    app = make_app()

    @app.middleware("http")
    async def check(request: Request, call_next: Callable[..., Any]) -> Response:
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        if path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        answer: Response = await call_next(request)
        return answer

    return app


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
        """Into a field, with the keyboard, in place of what is there."""
        self.at(name).send_keys(Keys.CONTROL + "a")
        self.at(name).send_keys(text)

    def emulate(self, width: int = 1100, height: int = 900, **media: str) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
