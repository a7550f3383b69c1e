"""Which KV connectors keep reclamation on: OffloadingConnector, when it copies single pages to host memory.

It copies each page when its last token is computed, and looks prefixes up by hash, page for page. So a page is in host
memory, or on its way there, before it can die (``offloading`` has the rest). All other connectors keep all pages until
a request ends: they transfer whole sequences, or have not been examined.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OFFLOADING = "OffloadingConnector"
# Its settings that change neither what a key names nor when a page is copied.
HARMLESS = {
    "cache_policy_module_path",
    "cpu_bytes_to_use",
    "eviction_policy",
    "max_tracker_size",
    "offload_prompt_only",
    "self_describing_kv_events",
    "spec_module_path",
    "spec_name",
    "store_threshold",
}


def why_not(vllm_config: "VllmConfig") -> str | None:
    """Why no block can be returned early with this configuration's KV connector; None if blocks can be, or without one.

    May import vLLM's offloading code, and the module that ``spec_module_path`` names.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return None
    if transfer.kv_connector != OFFLOADING or transfer.kv_connector_module_path is not None:
        return f"the KV connector {transfer.kv_connector} transfers whole sequences"
    extra = transfer.kv_connector_extra_config
    if unknown := sorted(extra.keys() - HARMLESS):
        return f"{OFFLOADING} with {', '.join(unknown)} has not been examined"
    if not _keeps_pages_in_host_memory_alone(extra):
        return f"{OFFLOADING} with {extra['spec_name']} keeps blocks in more than host memory"
    if vllm_config.num_speculative_tokens:
        return f"{OFFLOADING} with speculative decoding has not been examined"
    if vllm_config.model_config.is_hybrid:
        return f"{OFFLOADING} may copy pages of a hybrid model after vLLM has zeroed them for another request"
    return None


def _keeps_pages_in_host_memory_alone(extra_config: dict[str, object]) -> bool:
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    spec = OffloadingSpecFactory.get_spec_cls(extra_config)
    return issubclass(spec, CPUOffloadingSpec) and not issubclass(spec, TieringOffloadingSpec)
