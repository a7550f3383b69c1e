"""Requests that ask that all their rows see everything: ``"vllm_xargs": {"power": "dense"}`` in the request's body.

vLLM passes this object to the engine and the workers as ``SamplingParams.extra_args``, without looking at it.
"""

from typing import Any

KEY = "power"
DENSE = "dense"


def asked_of(params: Any) -> Any:
    """What a request's SamplingParams, or PoolingParams, give under ``power``; None if they give nothing."""
    return (getattr(params, "extra_args", None) or {}).get(KEY)


def is_dense(params: Any) -> bool:
    """Whether the request of these SamplingParams asks that all its rows see everything."""
    return asked_of(params) == DENSE
