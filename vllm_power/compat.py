"""Workarounds for vLLM 0.32 and 0.33, each with its reason, its symptom and the condition for its removal."""

import copyreg
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from vllm_power.dense_requests import is_dense
from vllm_power.options import NAME
from vllm_power.pattern import EVERY_ROW

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def make_backend_picklable(restore: Callable[[], Any]) -> None:
    """Keep the backend ``power`` valid when vLLM pickles it for a spawned engine process.

    restore: registers the backend and returns its enum member. It must be importable, so that it can be pickled.

    Why: vLLM unpickles the engine's configuration in that process before it loads plugins, and an enum member that was
    added at run time is still unknown then (v1/engine/core.py, v1/attention/backends/registry.py).
    Symptom: ``ValueError: 'vllm_power...' is not a valid AttentionBackendEnum`` in the engine process.
    Remove when: vLLM loads plugins before it unpickles, or pickles backends by name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def reduce(member: Any) -> tuple[Any, tuple[Any, ...]]:
        return (restore, ()) if member.name == NAME else (type(member), (member.value,))

    copyreg.pickle(AttentionBackendEnum, reduce)


def adopt_platform(on_gpu: type, on_cpu: type) -> None:
    """Put our overrides, ``on_gpu`` or ``on_cpu``, in front of the class of vLLM's current platform object.

    Why: vLLM's CPU platform ignores the chosen attention backend, and only a platform sees the whole configuration
    early enough to refuse it before anything is loaded. vLLM's ``platform_plugins`` could provide our class, but vLLM
    accepts only one such plugin, and skips it under ``VLLM_TARGET_DEVICE=cpu``. Both cases would silently end in dense
    attention.
    Symptom: "Cannot use AttentionBackendEnum.POWER backend on CPU." at INFO level, and dense attention.
    Remove when: ``CpuPlatform.get_attn_backend_cls`` honours ``selected_backend``, as the CUDA platform does.
    """
    from vllm.platforms import current_platform

    original = type(current_platform)
    if issubclass(original, (on_gpu, on_cpu)) or not (
        current_platform.is_cpu() or current_platform.is_cuda()
    ):
        return
    overrides = on_cpu if current_platform.is_cpu() else on_gpu
    current_platform.__class__ = type(f"Power{original.__name__}", (overrides, original), {})


def extend_scheduler(vllm_config: "VllmConfig", *extensions: type) -> None:
    """Put ``extensions`` in front of the class of this engine's scheduler.

    Why: only the scheduler knows what a step reads, for all ranks and without dummy batches. It also receives a request
    and its block hashes before the prefix cache is searched. vLLM has no hook for plugins there, and using
    ``--scheduler-cls`` would replace the user's own.
    Symptom: no ``vllm_power_...`` in /metrics; prefix hits on pages whose rows saw other keys.
    Remove when: SchedulerStats has a field for plugins, filled in the engine's process, and plugins can add extra keys
    to a request's hashes.
    """
    config = vllm_config.scheduler_config
    original = config.get_scheduler_cls()
    if not issubclass(original, extensions):
        extended = type(f"Power{original.__name__}", (*extensions, original), {})
        config.get_scheduler_cls = lambda: extended


def pass_request_to(manager: Any) -> None:
    """Make vLLM pass the Request that it is about to allocate for to ``manager.cache_blocks``, even without prefix
    caching. The manager sets ``enable_caching`` back when it has the request, because the call costs time in each step.

    Why: a request knows when its last query runs. The methods that allocate and free pages get only its id, and the
    coordinator skips ``cache_blocks`` of a manager without prefix caching (v1/core/kv_cache_coordinator.py).
    Symptom: without prefix caching, every request counts as one of max_model_len tokens, and more pages stay live.
    Remove when: ``remove_skipped_blocks`` or ``allocate_new_blocks`` gets the Request.
    """
    manager.enable_caching = True


def order_evictions(pool: Any, order: type) -> Any:
    """Replace the queue of free pages of ``pool`` by an ``order``, a subclass of its class; returns the queue.

    Why: vLLM reuses pages in the order in which they were freed, and a plugin cannot give a freed page another place
    (v1/core/block_pool.py). Pages that were returned early would be reused before older conversations.
    Symptom: the next turn of a chat finds fewer cached tokens with reclamation than without.
    Remove when: ``BlockPool.free_blocks`` takes a priority.
    """
    if not isinstance(pool.free_block_queue, order):
        pool.free_block_queue = order(pool.free_block_queue)
    return pool.free_block_queue


def tell_kv_cache_kind(spec: type) -> None:
    """Make vLLM's KV events and cache metadata report the blocks of ``spec`` as "full_attention".

    Why: vLLM derives the kind only from its own spec classes (``get_kv_cache_spec_kind`` in v1/kv_cache_interface.py).
    Symptom: events with the kind "unknown", which prefix-aware routers ignore.
    Remove when: a spec states its kind.
    """
    from vllm.v1 import kv_cache_interface

    original = kv_cache_interface.get_kv_cache_spec_kind
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def kind_of(found: Any) -> Any:
        if isinstance(found, spec):
            return kv_cache_interface.KVCacheSpecKind.FULL_ATTENTION
        return original(found)

    users = (
        "distributed.kv_transfer.kv_connector.v1.offloading.events",
        "v1.core.kv_cache_manager",
        "v1.engine.core",
        "v1.simple_kv_offload.manager",
    )
    modules = (sys.modules.get(f"vllm.{user}") for user in users)
    for module in (kv_cache_interface, *filter(None, modules)):
        module.get_kv_cache_spec_kind = kind_of


def offload_pages(spec: type, connector_scheduler: type) -> None:
    """Let vLLM's OffloadingConnector take KV cache groups of ``spec``, as windows as long as the longest sequence.

    connector_scheduler: a subclass of the connector's scheduler side that plans their loads.

    Why: the connector knows only vLLM's own spec classes (``get_sliding_window_size_in_chunks``, which vLLM 0.33 moved
    from offloading/scheduler.py to offloading/config.py and also calls in the workers), and it loads only pages
    without holes between them.
    Symptom: an AssertionError without a message at start.
    Remove when: the connector asks a group's manager which pages a hit needs.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading import config, scheduler

    offloading_connector.OffloadingConnectorScheduler = connector_scheduler
    name = "get_sliding_window_size_in_chunks"
    _wrap(scheduler if hasattr(scheduler, name) else config, name, partial(_knowing_window_of, spec))


def _knowing_window_of(spec: Any, original: Any) -> Any:
    def window(found: Any, tokens_per_chunk: int) -> int | None:
        if isinstance(found, spec):
            return -(-found.max_model_len // tokens_per_chunk)
        return original(found, tokens_per_chunk)

    return window


def replace_backend(layer: Any, backend: Any, implementation: Any) -> None:
    """Make a built attention layer run another backend. Call this before vLLM asks the layer for its KV cache spec.

    Why: vLLM chooses a layer's backend by its shapes and its kind, not by its index
    (model_executor/layers/attention/attention.py), so a layer that stays dense has to be changed after it was built.
    Symptom: ``dense_layers`` and layers that draft run the pattern.
    Remove when: the selector of attention backends receives the layer's name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    layer.attn_backend, layer.impl = backend, implementation
    layer.backend = AttentionBackendEnum[backend.get_name()]


def tell_prompt_lengths() -> None:
    """Make vLLM's model runners tell our builders each request's prompt length, or ``EVERY_ROW`` if it asked for that.

    Why: only the runners know it. They have a field for it, ``CommonAttentionMetadata.rswa_prefix_lens``, but fill it
    only for models with ``rswa_window`` (v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py). Backends that
    read the field also read that property, so filling only the field changes nothing for them.
    Symptom: with dense rows, every request is treated as one without a prompt.
    Remove when: the metadata always has the prompt lengths, and room for what a request asks of the backend.
    """
    v1 = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if v1 is not None:
        _wrap(v1.GPUModelRunner, "_update_states", _noting_dense_requests)
        _wrap(v1.GPUModelRunner, "_build_attention_metadata", partial(_filling_metadata, v1))
    v2 = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if v2 is not None:
        _wrap(v2.GPUModelRunner, "add_requests", _noting_dense_requests)
        _wrap(v2.GPUModelRunner, "prepare_inputs", _filling_batch)


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "__wrapped__"):
        setattr(owner, name, wraps(original)(wrapper(original)))


def _noting_dense_requests(original: Any) -> Any:
    """Keep the ids of requests that ask that all their rows see everything in the runner's ``power_dense``."""

    def update(self: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
        noted: set[str] = self.__dict__.setdefault("power_dense", set())
        noted -= step.finished_req_ids
        for new in step.scheduled_new_reqs:
            (noted.add if is_dense(new.sampling_params) else noted.discard)(new.req_id)
        return original(self, step, *args, **kwargs)

    return update


def _told(runner: Any, prompt_lens: Any, req_ids: Sequence[str]) -> Any:
    """``prompt_lens``, an int32 tensor on the host, with ``EVERY_ROW`` for requests that asked for it."""
    noted = runner.__dict__.get("power_dense")
    if noted and (rows := [row for row, req_id in enumerate(req_ids) if req_id in noted]):
        prompt_lens = prompt_lens.clone()
        prompt_lens[rows] = EVERY_ROW
    return prompt_lens


def _filling_metadata(module: Any, original: Any) -> Any:
    metadata = module.CommonAttentionMetadata

    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch

        def with_prompt_lengths(**fields: Any) -> Any:
            if fields.get("rswa_prefix_lens") is None:
                prompt_lens = batch.num_prompt_tokens_cpu_tensor[: fields["num_reqs"]]
                fields["rswa_prefix_lens"] = _told(self, prompt_lens, batch.req_ids)
            return metadata(**fields)

        module.CommonAttentionMetadata = with_prompt_lengths
        try:
            return original(self, *args, **kwargs)
        finally:
            module.CommonAttentionMetadata = metadata

    return build


def _filling_batch(original: Any) -> Any:
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        batch = original(self, *args, **kwargs)
        if batch.prompt_lens is None:
            prompt_lens = torch.from_numpy(self.req_states.prompt_len.np[batch.idx_mapping_np])
            batch.prompt_lens = _told(self, prompt_lens, batch.req_ids)
        return batch

    return prepare
