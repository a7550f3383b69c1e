"""The planner's routes: what can be chosen, a model's shape by its config.json, and the estimate."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from vllm_power import options
from vllm_power.tools.web import gpus, shapes
from vllm_power.tools.web.estimate import estimate
from vllm_power.tools.web.guard import GuardedRoute
from vllm_power.tools.web.question import Question, fields_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


router = APIRouter(tags=["power"], route_class=GuardedRoute)

MOST_BYTES = 256 << 10  # of a config.json; the longest have about 50 kB
MOST_CHARACTERS = 500  # of an error, which may quote the request
PARAMETERS = [
    {"in": "query", "name": name, "required": False, "schema": schema}
    for name, schema in Question.model_json_schema()["properties"].items()
]
CONFIG_BODY = {
    "requestBody": {"content": {"application/json": {"schema": {"type": "object"}}}, "required": True}
}


def question_of(request: Request) -> Question:
    """The question in a request's query. FastAPI's own models do not tell what was left out, which a preset decides."""
    try:
        return Question.model_validate(dict(request.query_params))
    except ValidationError as error:
        told = [{**problem, "loc": ("query", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(told) from None


@router.get("/v1/power/estimate", openapi_extra={"parameters": PARAMETERS})
def get_estimate(ask: Annotated[Question, Depends(question_of)]) -> dict[str, Any]:
    """What a model costs under the pattern and dense (``estimate.estimate``)."""
    return estimate(ask)


@router.get("/v1/power/planner")
def get_planner(request: Request) -> dict[str, Any]:
    """The models and GPUs to choose from, and a question to begin with.

    Where the server knows a model (``app.state.power_model``: its name and the fields of a question about it), that
    one comes first. The others are served as checkpoints that were not trained under the pattern.
    """
    models = dict([own]) if (own := getattr(request.app.state, "power_model", None)) else {}
    as_is = options.resolve(None, None)
    models |= {name: fields(shape, as_is) for name, shape in shapes.known().items() if name not in models}
    first = next(iter(models.values()))
    return {
        "models": models,
        "gpus": {
            name: {"tflops": gpu.tflops, "tb_per_s": gpu.tb_per_s, **gpu.model_dump()}
            for name, gpu in gpus.known().items()
        },
        "question": Question(**first).model_dump(exclude_none=True),
    }


@router.post("/v1/power/shape", openapi_extra=CONFIG_BODY)
async def post_shape(request: Request) -> dict[str, Any]:
    """The shape of a model and how it is served, by the text of its config.json.

    The status is 422 if it is no JSON, 400 if it cannot be planned."""
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
        return of_config(config)
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


def fields(shape: shapes.Shape, asked: options.PowerOptions) -> dict[str, Any]:
    """The fields of a question about a model that is served under these options."""
    return shape.model_dump() | fields_of(asked, shape.layers, shape.window_layers)


def of_path(path: Path) -> dict[str, Any]:
    """The fields of a question about the model in a folder, or of a config.json.

    Raises ValueError as ``shapes.of_config`` does and for a file that is no JSON, and OSError if there is none.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object")
    return of_config(config)


def of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a question about a model by its config.json. Raises ValueError as ``shapes.of_config`` does."""
    text = config.get("text_config") or config
    shape = shapes.of_config(config)
    return fields(shape, options.resolve(None, config.get("power_attention") or text.get("power_attention")))


def served(vllm_config: "VllmConfig") -> tuple[str, dict[str, Any]] | None:
    """What an engine serves, for ``app.state.power_model``: its name and a question's fields; None for an odd one.

    Raises nothing: the page must not keep a server from starting.
    """
    from vllm.logger import init_logger

    model = vllm_config.model_config
    try:
        shape = shapes.of_config(model.hf_text_config.to_dict())
        found = fields(shape, options.of_config(vllm_config))
    except Exception as error:
        init_logger("vllm.power").info(
            "PowerAttention: the page's planner does not know this model: %r", error
        )
        return None
    return str(model.served_model_name), found
