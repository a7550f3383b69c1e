"""The routes: GET /power is the page, GET /v1/power/... its JSON, for a running engine and for `vllm-power explore`.

The JSON lies under /v1 because vLLM's --api-key guards that and not the rest; without it the page shows nothing.
Everything is read-only. ``app.state.power`` tells about the engine (:class:`EngineView`); where it is missing there is
no engine.
"""

from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse

from vllm_power.tools.web import planner
from vllm_power.tools.web.drawing import Drawing, draw
from vllm_power.tools.web.guard import GuardedRoute

PAGE = Path(__file__).with_name("page")
MEDIA_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8"} | {
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked for again: a new version shows at once
}
NO_ENGINE = "no engine runs PowerAttention here: `vllm serve MODEL --attention-backend power` has one"


class EngineView(Protocol):
    """What the routes ask about a running engine. Both return what JSON can hold."""

    def info(self) -> dict[str, Any]:
        """What does not change while the server runs."""

    def live(self) -> dict[str, Any]:
        """Counters and gauges of now. Raises Unavailable, with the reason, where there are none."""


class Unavailable(RuntimeError):
    """There are no metrics; the message says why."""


page = APIRouter(include_in_schema=False, route_class=GuardedRoute)
json = APIRouter(prefix="/v1/power", tags=["power"], route_class=GuardedRoute)


def attach(app: FastAPI) -> None:
    """Add the routes to ``app``."""
    app.include_router(page)
    app.include_router(json)
    app.include_router(planner.router)


@page.get("/power")
def index() -> Response:
    """The page."""
    return _file("index.html")


@page.get("/power/{name}")
def asset(name: str) -> Response:
    """A file of the page."""
    return _file(name)


def _file(name: str) -> Response:
    # Only names that are there: no path of a request ever reaches the file system.
    files = {file.name: file for file in PAGE.iterdir() if file.suffix in MEDIA_TYPES}
    if name not in files:
        raise HTTPException(404, "there is no such file")
    return FileResponse(files[name], media_type=MEDIA_TYPES[files[name].suffix], headers=PAGE_HEADERS)


@json.get("/info")
def info(request: Request) -> dict[str, Any]:
    """What serves: pattern, options, executor, layers, versions. Without an engine, the versions alone."""
    engine: EngineView | None = getattr(request.app.state, "power", None)
    if engine is None:
        return {"engine": False, "versions": versions()}
    return {"engine": True, "versions": versions(), **engine.info()}


@json.get("/live")
def live(request: Request) -> dict[str, Any]:
    """The engine's current metrics; 404 without an engine, 503 if it has none to share, both with the reason."""
    engine: EngineView | None = getattr(request.app.state, "power", None)
    if engine is None:
        raise HTTPException(404, NO_ENGINE)
    try:
        return engine.live()
    except Unavailable as reason:
        raise HTTPException(503, str(reason)) from None


@json.get("/pattern")
def pattern(drawing: Annotated[Drawing, Query()]) -> dict[str, Any]:
    """What to draw of a pattern over a sequence (``drawing.py``)."""
    return draw(drawing)


def versions() -> dict[str, str | None]:
    """The installed versions of what matters; null for what is not there."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("vllm-power", "vllm", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
