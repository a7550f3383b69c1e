"""vLLM's entry point ``vllm.endpoint_plugins``: GET /power and its JSON on the API server.

vLLM loads endpoint plugins only where VLLM_PLUGINS names them, so a server has the page under ``VLLM_PLUGINS=power``.
"""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from vllm_power.tools.web import routes

if TYPE_CHECKING:
    from fastapi import FastAPI


class PowerEndpoints:
    """vLLM's protocol EndpointPlugin (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "power"
    required_tasks = None

    def attach_router(self, app: "FastAPI") -> None:
        routes.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """``state`` is the app's; without an engine (vLLM's render server) or another backend it has no view."""
        from vllm_power.layers import is_selected
        from vllm_power.tools.web import planner
        from vllm_power.tools.web.live import Engine

        if engine_client is not None and is_selected(engine_client.vllm_config):
            state.power = Engine(engine_client.vllm_config)
            state.power_model = planner.served(engine_client.vllm_config)
