"""What a worker finds in the model that it built, for the engine: which layers run the pattern, and on which kernels.

A worker builds one stage of the model (all of it without pipeline parallelism). Its tensor-parallel peers build the
same stage.
"""

from typing import TYPE_CHECKING, Any

from vllm_power.layers import DENSE, SLIDING_WINDOW, SPARSE, indices_by_kind
from vllm_power.metrics import shared_dir

if TYPE_CHECKING:
    from vllm.config import VllmConfig

UNKNOWN = "unknown"


def post(vllm_config: "VllmConfig", executor: str | None, reclamation: str) -> None:
    """Leave a note about this worker's stage. A failure is logged.

    executor: what runs the plan; None if no layer of the stage runs the pattern. reclamation: "on", or why it is off.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
    from vllm.logger import init_logger

    if get_tensor_model_parallel_rank():
        return
    note = {
        "layers": indices_by_kind(vllm_config),
        "executor": executor,
        "page_size": vllm_config.cache_config.block_size,
        "reclamation": reclamation,
    }
    try:
        shared_dir.post(f"stage-{shared_dir.engine_name(vllm_config)}-{get_pp_group().rank_in_group}", note)
    except OSError as error:
        log = init_logger("vllm.power")
        log.warning("PowerAttention: /metrics will not show which layers run the pattern: %r", error)


def whole(vllm_config: "VllmConfig") -> dict[str, Any]:
    """The notes of all stages of this engine, merged. If some are missing, for example from another host, ``layers`` is
    None."""
    stages = list(shared_dir.notes(f"stage-{shared_dir.engine_name(vllm_config)}-").values())
    if len(stages) != vllm_config.parallel_config.pipeline_parallel_size:
        return {"layers": None, "executor": UNKNOWN, "page_size": None, "reclamation": UNKNOWN}
    return {
        "layers": {
            kind: sorted(index for stage in stages for index in stage["layers"][kind])
            for kind in (SPARSE, DENSE, SLIDING_WINDOW)
        },
        "executor": ", ".join(sorted({stage["executor"] for stage in stages if stage["executor"]})),
        "page_size": stages[0]["page_size"],
        "reclamation": stages[0]["reclamation"],
    }
