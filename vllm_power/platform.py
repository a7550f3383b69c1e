"""What we add to vLLM's platform: early refusals, the start-up line, and on a CPU the choice of the backend.

These classes stand in front of the platform class in use (``compat.adopt_platform``), so ``super()`` is vLLM's own.
They act only where ``--attention-backend power`` was asked for.
"""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_power import compat, options, refusals
from vllm_power.plugin import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.power")

CPU_BACKEND = "vllm_power.cpu_backend.PowerCpuBackend"


class PowerPlatform:
    """Overrides of vLLM's Platform (vllm/platforms/interface.py) on every device."""

    device_type: str

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Called once the configuration is complete, before anything is started. Raises ValueError to refuse it."""
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if is_selected(vllm_config) and not is_draft(vllm_config):
            refusals.check_config(vllm_config)
            refusals.check_executor(vllm_config, on_cpu=cls.device_type == "cpu")
            _share_figures()

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """The path of the class for one layer. A layer with a window of its own keeps it, on vLLM's own backend."""
        if selected_backend is not None and selected_backend.name == NAME:
            refusals.check_layer(attn_selector_config)
            if not attn_selector_config.has_sliding_window:
                return cls._power_backend(selected_backend, attn_selector_config, num_heads)
            selected_backend = None
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)  # type: ignore[misc]

    @classmethod
    def _power_backend(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None) -> str:
        """Where the platform honours the choice, its checks of the backend's capabilities stay in force."""
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)  # type: ignore[misc]

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """Called in each worker after the model was built: the first moment at which the layers are known."""
        super().update_block_size_for_backend(vllm_config)  # type: ignore[misc]
        if is_selected(vllm_config):
            refusals.check_page_size(vllm_config)
            _report(vllm_config)

    @classmethod
    def register_custom_kv_cache_specs(cls, vllm_config: "VllmConfig | None") -> None:
        """Called in the engine's process, before it makes its scheduler; without a configuration elsewhere."""
        super().register_custom_kv_cache_specs(vllm_config)  # type: ignore[misc]
        if vllm_config is not None and is_selected(vllm_config):
            compat.count_steps(vllm_config)


class PowerCpuPlatform(PowerPlatform):
    """In addition, on a CPU: ``_power_backend`` names ours (vllm/platforms/cpu.py ignores the chosen backend)."""

    @classmethod
    def _power_backend(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None) -> str:
        return CPU_BACKEND


def is_selected(vllm_config: "VllmConfig") -> bool:
    """Whether ``power`` is the attention backend of this configuration, for all layers or for one kind of them."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(backend is not None and backend.name == NAME for backend in chosen)


def is_draft(vllm_config: "VllmConfig") -> bool:
    """Whether this configuration is that of a draft model, made from the target's."""
    return vllm_config.model_config is not None and vllm_config.model_config.runner_type == "draft"


def _share_figures() -> None:
    """Make room, in a process that starts or serves the engine, for what that will count; log where there is none."""
    from vllm_power.metrics import board, reader

    try:
        board.open_board()
        reader.join_metrics()
    except Exception as error:
        logger.warning("PowerAttention: there will be no metrics of it: %r", error)


def _report(vllm_config: "VllmConfig") -> None:
    """Log once what runs: pattern, density, executor, layers, reclamation. Refuses a model with no layer for it."""
    from vllm.model_executor.models.utils import extract_layer_index

    from vllm_power.hybrid import drafts
    from vllm_power.kv_cache import why_not
    from vllm_power.metrics import stage

    built = {
        name: layer.attn_backend
        for name, layer in vllm_config.compilation_config.static_forward_context.items()
        if hasattr(layer, "attn_backend")
    }
    layers = {name: backend for name, backend in built.items() if not drafts(name, vllm_config)}
    drafting = [name for name in built.keys() - layers.keys() if built[name].get_name() == NAME]
    sparse = [backend for backend in layers.values() if backend.get_name() == NAME]
    dense = sorted(
        {extract_layer_index(name) for name, backend in layers.items() if backend.get_name() != NAME}
    )
    executor = sparse[0].executor_name(vllm_config) if sparse else None
    reason = why_not(vllm_config)
    stage.tell(vllm_config, executor, reason or "on")
    if not sparse and vllm_config.parallel_config.pipeline_parallel_size > 1:
        return  # this rank's layers all stay dense; another's need not (figures.steps looks at all of them)
    refusals.check_any_layer(len(sparse), len(layers))
    pattern = options.of_config(vllm_config).effective_pattern
    max_len = vllm_config.model_config.max_model_len
    logger.info_once(
        "PowerAttention: %s; reads %.1f%% of the block pairs at max_model_len %d; executor %s; "
        "%d of %d attention layers%s%s; KV reclamation %s",
        str(pattern),
        100 * pattern.density(max_len),
        max_len,
        executor,
        len(sparse),
        len(layers),
        f" (not {', '.join(map(str, dense))})" if dense else "",
        f" and {len(drafting)} that draft" if drafting else "",
        f"off: {reason}" if reason else "on",
        scope="global",
    )
