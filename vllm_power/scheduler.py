"""Additions to vLLM's scheduler (``compat.extend_scheduler``): the final max_model_len, and marked hashes."""

from dataclasses import replace
from typing import Any

from vllm_power import options
from vllm_power.kv_cache import PowerAttentionSpec
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
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)  # type: ignore[call-arg]
        asked = options.of_config(vllm_config)
        self.power_options = asked if asked.rows.has_dense_rows and not asked.share_dense_rows else None

    def add_request(self, request: Any) -> None:
        if self.power_options is not None and request.request_id not in self.requests:
            pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
            mark_dense_rows(request, self.power_options, pool.hash_block_size)
        super().add_request(request)  # type: ignore[misc]
