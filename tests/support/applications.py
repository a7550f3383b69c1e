"""Servers of the page for tests, in addition to `make_app`: an API key, vLLM's error format, a made-up engine."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from vllm_power.pattern import POWER
from vllm_power.tools.web.drawing import describe
from vllm_power.tools.web.explore import make_app
from vllm_power.tools.web.routes import Unavailable

KEY = "the key"
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
            raise Unavailable("no engine shares its metrics")
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
