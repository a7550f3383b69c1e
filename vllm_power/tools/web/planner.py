"""The planner's routes: what can be chosen, a model's shape by its config.json, and the estimate."""

import json
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request

from vllm_power.tools.web import gpus, shapes
from vllm_power.tools.web.estimate import estimate
from vllm_power.tools.web.guard import GuardedRoute
from vllm_power.tools.web.question import Question

if TYPE_CHECKING:
    from vllm.config import VllmConfig


router = APIRouter(tags=["power"], route_class=GuardedRoute)

MOST_BYTES = 256 << 10  # of a config.json; the longest have about 50 kB
MOST_CHARACTERS = 500  # of an error, which may quote the request
CONFIG_BODY = {
    "requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}, "required": True}
}


@router.get("/v1/power/estimate")
def get_estimate(ask: Annotated[Question, Query()]) -> dict[str, Any]:
    """What a model costs under the pattern and dense (``estimate.estimate``)."""
    return estimate(ask)


@router.get("/v1/power/planner")
def get_planner(request: Request) -> dict[str, Any]:
    """The models and GPUs to choose from, and a question to begin with.

    Where the server knows a model (``app.state.power_shape``: its name and Shape), that one comes first.
    """
    models = dict([own]) if (own := getattr(request.app.state, "power_shape", None)) else {}
    models |= {name: shape for name, shape in shapes.known().items() if name not in models}
    first = next(iter(models.values()))
    return {
        "models": {name: shape.model_dump() for name, shape in models.items()},
        "gpus": {
            name: {"tflops": gpu.tflops, "tb_per_s": gpu.tb_per_s, **gpu.model_dump()}
            for name, gpu in gpus.known().items()
        },
        "question": Question(**first.model_dump()).model_dump(exclude_none=True),
    }


@router.post("/v1/power/shape", openapi_extra=CONFIG_BODY)
async def post_shape(request: Request) -> dict[str, Any]:
    """The shape of a model by the text of its config.json; 422 if it is no JSON, 400 if it cannot be planned."""
    text = await read_body(request)
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HTTPException(422, str(error)[:MOST_CHARACTERS]) from None
    except (ValueError, RecursionError) as error:  # a number with too many digits, or too deep
        raise HTTPException(400, str(error)[:MOST_CHARACTERS]) from None
    try:
        if not isinstance(config, dict):
            raise ValueError("config.json has no object")
        return shapes.of_config(config).model_dump()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, str(error)[:MOST_CHARACTERS]) from None


async def read_body(request: Request) -> bytes:
    """The body, read no further than a config.json can be long. Raises HTTPException with 413."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"config.json has at most {MOST_BYTES:,} bytes here")
    return body


def served(vllm_config: "VllmConfig") -> tuple[str, shapes.Shape] | None:
    """The name and shape of the model that an engine serves, for ``app.state.power_shape``; None for an odd one.

    Raises nothing: the page must not keep a server from starting.
    """
    from vllm.logger import init_logger

    from vllm_power import options

    model = vllm_config.model_config
    try:
        shape = shapes.of_config(model.hf_text_config.to_dict())
        dense = options.of_config(vllm_config).dense_layer_indices(shape.layers)
    except Exception as error:
        init_logger("vllm.power").info(
            "PowerAttention: the page's planner does not know this model: %r", error
        )
        return None
    return str(model.served_model_name), shape.model_copy(update={"dense_layers": len(dense)})
