"""What a worker finds in the model that it built, told to the engine: which layers run the pattern, on what kernels.

A worker builds one stage of the model (all of it without pipeline parallelism), and its tensor-parallel peers the same.
"""

from typing import TYPE_CHECKING, Any

from vllm_power.metrics import board
from vllm_power.metrics.names import DENSE, SLIDING_WINDOW, SPARSE
from vllm_power.plugin import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig

UNKNOWN = "unknown"


def tell(vllm_config: "VllmConfig", executor: str | None, reclamation: str) -> None:
    """Leave a note of this worker's stage; where that fails, the log says so.

    executor: what runs the plan; None in a stage without a layer for it. reclamation: "on", or why it is off.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
    from vllm.logger import init_logger

    from vllm_power.metrics import writer

    writer.work_for(vllm_config)
    if get_tensor_model_parallel_rank():
        return
    engine, number = vllm_config.parallel_config.data_parallel_index, get_pp_group().rank_in_group
    note = {
        "layers": layers(vllm_config),
        "executor": executor,
        "page_size": vllm_config.cache_config.block_size,
        "reclamation": reclamation,
    }
    try:
        board.post(f"stage-{engine}-{number}", note)
    except OSError as error:
        log = init_logger("vllm.power")
        log.warning("PowerAttention: /metrics will not know which layers run it: %r", error)


def layers(vllm_config: "VllmConfig") -> dict[str, list[int]]:
    """The model's attention layers by what they run; layers that draft are not counted."""
    from vllm.model_executor.models.utils import extract_layer_index

    from vllm_power.hybrid import drafts

    found: dict[str, list[int]] = {SPARSE: [], DENSE: [], SLIDING_WINDOW: []}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if hasattr(layer, "attn_backend") and not drafts(name, vllm_config):
            windowed = getattr(layer, "sliding_window", None) is not None
            kind = SPARSE if layer.attn_backend.get_name() == NAME else SLIDING_WINDOW if windowed else DENSE
            found[kind].append(extract_layer_index(name))
    return found


def whole(engine: str, num_stages: int) -> dict[str, Any]:
    """The notes of all stages as one. Where some are missing, as of workers on another host, layers are None."""
    stages = list(board.notes(f"stage-{engine}-").values())
    if len(stages) != num_stages:
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
