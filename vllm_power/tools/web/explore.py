"""``vllm-power explore``: the page without an engine, to understand the pattern and to plan before there are GPUs.

Needs the extra `explore` alone: neither vLLM nor torch.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import socket

import uvicorn
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from vllm_power.tools.web import planner, routes
from vllm_power.tools.web.guard import HostCheck, hosts_of


def main(host: str, port: int, model: Path | None, allowed: Sequence[str] = ()) -> int:
    """Serve until Ctrl-C; returns the exit status.

    model: a folder or config.json to begin the planner with. allowed: more hosts to answer for than ``host``.
    """
    try:
        app = make_app(model, hosts_of(host, allowed))
    except (OSError, ValueError) as error:
        print(f"--model: {error}", file=sys.stderr)
        return 1
    server = _Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))
    try:
        with suppress(KeyboardInterrupt):  # uvicorn raises it again once everything is closed
            server.run()
    except SystemExit:  # it has said why it cannot listen
        print(f"Choose another address: vllm-power explore --host {host} --port {port + 1}", file=sys.stderr)
    return 0 if server.started else 1


def make_app(model: Path | None = None, hosts: frozenset[str] | None = None) -> FastAPI:
    """The application, without an engine. Raises OSError and ValueError as ``planner.of_path`` does.

    hosts: those that it answers for; None for all.
    """
    app = FastAPI(title="vllm-power explore", docs_url=None, redoc_url=None)
    routes.attach(app)
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts)

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("power")

    if model is not None:
        app.state.power_model = (model.resolve().name, planner.of_path(model))
    return app


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"The page is at http://{host}:{port}/power (Ctrl-C ends it)", flush=True)
