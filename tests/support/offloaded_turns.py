"""Serves chats on an engine with OffloadingConnector, with garbage in each page that is handed out. In its process."""

from typing import Any

from support import generation

GARBAGE = 1000.0  # finite: kernels may multiply the slots that no row sees yet by 0


def serve_turns(llm: Any, turns: list[list[list[int]]], max_tokens: int) -> dict[str, Any]:
    """Serve the prompts of each turn together.

    answers: [turn][prompt]. loaded: pages that came from host memory. reclaimed: pages that were returned early.
    free: free pages of the pool afterwards, and before.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    connector = get_kv_transfer_group()
    handed_out: list[int] = []
    hand_out, flush, free = pool.get_new_blocks, connector.handle_preemptions, pool.get_num_free_blocks()

    def note(number: int) -> list[Any]:
        blocks = hand_out(number)
        handed_out.extend(block.block_id for block in blocks)
        return blocks

    def flush_then_spoil(*given: Any) -> None:
        flush(*given)
        for cache in caches:
            cache[[0, *handed_out]] = GARBAGE
        handed_out.clear()

    pool.get_new_blocks, connector.handle_preemptions = note, flush_then_spoil
    answers = [generation.greedy(llm, prompts, max_tokens, prompt_logprobs=False) for prompts in turns]
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    return {
        "answers": answers,
        "loaded": connector.connector_worker.worker.loaded,
        "reclaimed": sum(manager.num_reclaimed for manager in managers if hasattr(manager, "num_reclaimed")),
        "free": (free, pool.get_num_free_blocks()),
    }
