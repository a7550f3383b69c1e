"""Additions to vLLM's scheduler (``compat.extend_scheduler``): the final max_model_len, and marked hashes."""

from dataclasses import replace
from typing import Any

from vllm_power import options, refusals
from vllm_power.dense_requests import DENSE, KEY, is_dense
from vllm_power.kv_cache import PowerAttentionManager
from vllm_power.kv_cache_spec import PowerAttentionSpec
from vllm_power.prefix_hashes import mark_dense_rows


class PowerScheduler:
    """A base in front of vLLM's scheduler class, whichever is in use."""

    requests: dict[str, Any]

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        # The specs were made when the layers were built. `--max-model-len auto` fits the length to the memory later.
        for group in kv_cache_config.kv_cache_groups:
            spec = group.kv_cache_spec
            if isinstance(spec, PowerAttentionSpec):
                group.kv_cache_spec = replace(spec, max_model_len=vllm_config.model_config.max_model_len)
                refusals.check_zeroed_pages(vllm_config, kv_cache_config)
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)  # type: ignore[call-arg]
        asked = options.of_config(vllm_config)
        self.power_options = asked if asked.rows.has_dense_rows else None
        for manager in self.kv_cache_manager.coordinator.single_type_managers:  # type: ignore[attr-defined]
            if isinstance(manager, PowerAttentionManager):
                manager.known_requests = self.requests

    def add_request(self, request: Any) -> None:
        session = self.requests.get(request.request_id)
        if session is not None:
            _keep_asking(session, request)
        elif self.power_options is not None:
            pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
            mark_dense_rows(request, self.power_options, pool.hash_block_size)
        super().add_request(request)  # type: ignore[misc]


def _keep_asking(session: Any, part: Any) -> None:
    """The first part of a streaming input session decides whether all its rows see everything."""
    if part.sampling_params is not None:
        others = {key: value for key, value in (part.sampling_params.extra_args or {}).items() if key != KEY}
        part.sampling_params.extra_args = others | ({KEY: DENSE} if is_dense(session.sampling_params) else {})
