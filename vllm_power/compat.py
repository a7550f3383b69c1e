"""Work-arounds for vLLM 0.32 and 0.33, each with its reason, its symptom and when it can go."""

import copyreg
from typing import TYPE_CHECKING, Any

from vllm_power.plugin import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def make_backend_picklable() -> None:
    """Let the name ``power`` survive the journey into a spawned engine process.

    Why: vLLM unpickles the engine's configuration before it loads plugins there, and an enum member that was added at
    run time is unknown at that moment (v1/engine/core.py, v1/attention/backends/registry.py).
    Symptom: ``ValueError: 'vllm_power...' is not a valid AttentionBackendEnum`` in the engine process.
    Goes when: vLLM loads plugins before it unpickles, or pickles backends by name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> tuple[Any, tuple[Any, ...]]:
    if member.name == NAME:
        return _restore_backend, ()
    return type(member), (member.value,)


def _restore_backend() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_power.plugin import register

    register()
    return AttentionBackendEnum[NAME]


def adopt_platform() -> None:
    """Put our few overrides in front of the class of vLLM's current platform object.

    Why: vLLM's CPU platform ignores the chosen attention backend, and only a platform sees the whole configuration
    early enough to refuse it before anything is loaded. vLLM's ``platform_plugins`` could bring our class, but has room
    for a single such plugin, and is skipped under ``VLLM_TARGET_DEVICE=cpu``: both would end in dense attention
    without a word.
    Symptom: "Cannot use AttentionBackendEnum.POWER backend on CPU." at INFO level, and dense attention.
    Goes when: ``CpuPlatform.get_attn_backend_cls`` honours ``selected_backend``, as the CUDA platform does.
    """
    from vllm.platforms import current_platform

    from vllm_power.platform import PowerCpuPlatform, PowerPlatform

    original = type(current_platform)
    if issubclass(original, PowerPlatform) or not (current_platform.is_cpu() or current_platform.is_cuda()):
        return
    overrides = PowerCpuPlatform if current_platform.is_cpu() else PowerPlatform
    current_platform.__class__ = type(f"Power{original.__name__}", (overrides, original), {})


def count_steps(vllm_config: "VllmConfig") -> None:
    """Put our count of each step in front of the scheduler's class, in the engine that has this configuration.

    Why: the scheduler alone knows what a step reads, for all ranks and without dummy batches, and vLLM has no place
    for a plugin there. Its own ``--scheduler-cls`` would take the place of a user's.
    Symptom: no ``vllm_power_...`` in /metrics.
    Goes when: SchedulerStats has a field for plugins, filled in the engine's process.
    """
    from vllm_power.metrics.steps import CountedScheduler

    config = vllm_config.scheduler_config
    original = config.get_scheduler_cls()
    if not issubclass(original, CountedScheduler):
        counted = type(f"Counted{original.__name__}", (CountedScheduler, original), {})
        config.get_scheduler_cls = lambda: counted
