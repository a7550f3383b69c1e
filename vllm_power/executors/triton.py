"""Our own kernels over the plan."""

from vllm_power.executors import LayerCall, Part
from vllm_power.kernels.decode import decode
from vllm_power.kernels.prefill import prefill


def attend(part: Part, layer: LayerCall) -> None:
    """``executors.Attend``."""
    kernel, settings = (decode, {"workspace": part.workspace}) if part.is_decode else (prefill, {})
    kernel(
        query=layer.query,
        kv_cache=layer.kv_cache,
        output=layer.output,
        plan=part.plan,
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        k_scale=layer.k_scale,
        v_scale=layer.v_scale,
        sinks=layer.sinks,
        max_query_len=part.max_query_len,
        **settings,
    )
