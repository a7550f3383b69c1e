"""Additions to vLLM's platform: early refusals, the log line at startup, and on a CPU the choice of the backend.

These classes are put in front of the platform class in use (``compat.adopt_platform``), so ``super()`` is vLLM's own.
They act only if ``--attention-backend power`` was requested.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.logger import init_logger

from vllm_power import compat, kv_cache, options, refusals
from vllm_power.layers import (
    DENSE,
    SLIDING_WINDOW,
    SPARSE,
    attention_layers,
    drafts,
    indices_by_kind,
    is_draft,
    is_selected,
)
from vllm_power.metrics import shared_dir
from vllm_power.options import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.power")

CPU_BACKEND = "vllm_power.cpu_backend.PowerCpuBackend"


class PowerPlatform:
    """Overrides of vLLM's Platform (vllm/platforms/interface.py) on every device."""

    device_type: str
    # vLLM copies these to Ray's workers (v1/executor/ray_executor.py).
    additional_env_vars: ClassVar[list[str]] = [shared_dir.VARIABLE]
    # Whether requests may ask for dense rows; None before an engine of ours is configured in this process.
    offers_dense: ClassVar[bool | None] = None

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Called once the configuration is complete, before anything is started. Raises ValueError to refuse it."""
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if is_selected(vllm_config) and not is_draft(vllm_config):
            on_cpu = cls.device_type == "cpu"
            refusals.check_config(vllm_config, on_cpu)
            refusals.check_executor(vllm_config, on_cpu)
            cls._choose_page(vllm_config)
            PowerPlatform.offers_dense = options.of_config(vllm_config).dense_requests
            _share_metrics()

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Called for each request in the API process. A refusal is answered with HTTP status 400."""
        super().validate_request(processed_inputs, params)  # type: ignore[misc]
        if PowerPlatform.offers_dense is not None:
            refusals.check_request(params, PowerPlatform.offers_dense)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """The path of the backend class for one layer. A layer with its own window keeps it, on vLLM's own backend."""
        if selected_backend is not None and selected_backend.name == NAME:
            refusals.check_layer(attn_selector_config)
            if not attn_selector_config.has_sliding_window:
                return cls._power_backend(selected_backend, attn_selector_config, num_heads)
            selected_backend = None
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)  # type: ignore[misc]

    @classmethod
    def _power_backend(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None) -> str:
        """If the platform honours the chosen backend, its checks of the backend's capabilities still apply."""
        return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)  # type: ignore[misc]

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """Called in each worker after the model is built: the first moment at which the layers are known."""
        super().update_block_size_for_backend(vllm_config)  # type: ignore[misc]
        if is_selected(vllm_config):
            on_cpu = cls.device_type == "cpu"
            refusals.kernel_page(vllm_config, on_cpu)
            reason = kv_cache.why_not(vllm_config) or _why_others_need_all(vllm_config)
            _configure_layers(
                vllm_config, refusals.kernel_pages(vllm_config, on_cpu), reclaims=reason is None
            )
            if reason is None:
                _prepare_connector(vllm_config)
            _report(vllm_config, reason)

    @classmethod
    def register_custom_kv_cache_specs(cls, vllm_config: "VllmConfig | None") -> None:
        """Called in the engine's process before it creates its scheduler, and elsewhere without a configuration."""
        super().register_custom_kv_cache_specs(vllm_config)  # type: ignore[misc]
        if vllm_config is not None and is_selected(vllm_config):
            from vllm_power.kv_cache_spec import PowerAttentionSpec
            from vllm_power.metrics.scheduler import CountedScheduler
            from vllm_power.scheduler import PowerScheduler

            compat.extend_scheduler(vllm_config, CountedScheduler, PowerScheduler)
            compat.tell_kv_cache_kind(PowerAttentionSpec)
            if kv_cache.why_not(vllm_config) is None:
                _prepare_connector(vllm_config)

    @classmethod
    def _choose_page(cls, vllm_config: "VllmConfig") -> None:
        """Does nothing on a GPU: vLLM asks the backend for its preferred page later."""


class PowerCpuPlatform(PowerPlatform):
    """Additions on a CPU: ``_power_backend`` returns ours (vllm/platforms/cpu.py ignores the chosen backend)."""

    @classmethod
    def _choose_page(cls, vllm_config: "VllmConfig") -> None:
        """Choose the largest page up to vLLM's 128 tokens that divides the pattern's block."""
        cache = vllm_config.cache_config
        if not cache.user_specified_block_size:
            fitting = refusals.kernel_pages(vllm_config, on_cpu=True)
            cache.block_size = max((page for page in fitting if page <= cache.block_size), default=fitting[0])

    @classmethod
    def _power_backend(cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None) -> str:
        return CPU_BACKEND


def _share_metrics() -> None:
    """Prepare the metrics of the engine in a process that starts or serves it. A failure is logged."""
    from vllm_power.metrics import collector

    try:
        shared_dir.open_board()
        collector.join_metrics()
    except Exception as error:
        logger.warning("PowerAttention: no metrics will be available: %r", error)


def _why_others_need_all(vllm_config: "VllmConfig") -> str | None:
    """Why no block may be returned early: a layer that does not run the pattern reads the KV cache of one that does."""
    kinds = {name: (layer, kind) for name, layer, kind in attention_layers(vllm_config)}
    for name, (layer, kind) in kinds.items():
        target = getattr(layer, "kv_sharing_target_layer_name", None)
        if target in kinds and kind != SPARSE and kinds[target][1] == SPARSE:
            return f"{name} does not run the pattern and reads the KV cache of {target}"
    return None


def _prepare_connector(vllm_config: "VllmConfig") -> None:
    """Prepare vLLM's KV connector, if one is in use, for pages that are returned early. In each process that has it."""
    if vllm_config.kv_transfer_config is not None:
        from vllm_power.kv_cache_spec import PowerAttentionSpec
        from vllm_power.offloading import PowerOffloadingScheduler

        compat.offload_pages(PowerAttentionSpec, PowerOffloadingScheduler)


def _configure_layers(vllm_config: "VllmConfig", kernel_pages: list[int], reclaims: bool) -> None:
    """Give the layers that run the pattern, those that draft included, the pages and the KV cache spec of this engine.

    kernel_pages, reclaims: as in :func:`kv_cache.backend_of_engine`.
    """
    ours: dict[type, type] = {}
    for _, layer, kind in list(attention_layers(vllm_config)):
        if kind == SPARSE:
            backend = layer.attn_backend
            if backend not in ours:
                ours[backend] = kv_cache.backend_of_engine(backend, vllm_config, kernel_pages, reclaims)
            layer.attn_backend = ours[backend]


def _report(vllm_config: "VllmConfig", reason: str | None) -> None:
    """Log once what runs: pattern, layers, mode and its cost. Refuses a model in which no layer runs the pattern.

    reason: why no block is returned early; None if blocks are.
    """
    from vllm_power.metrics import stages

    found = list(attention_layers(vllm_config))
    drafting = sum(kind == SPARSE and drafts(name, vllm_config) for name, _, kind in found)
    sparse = [layer for name, layer, kind in found if kind == SPARSE and not drafts(name, vllm_config)]
    layers = indices_by_kind(vllm_config)
    executor = sparse[0].attn_backend.executor_name(vllm_config) if sparse else None
    stages.post(vllm_config, executor, reason or "on")
    if not sparse and vllm_config.parallel_config.pipeline_parallel_size > 1:
        return  # all layers of this rank stay dense, but not necessarily of others (metrics.scheduler checks all)
    num_layers = sum(map(len, layers.values()))
    refusals.check_any_layer(len(sparse), num_layers)
    asked, max_len = options.of_config(vllm_config), vllm_config.model_config.max_model_len
    pattern = asked.effective_pattern
    others = sorted({*layers[DENSE], *layers[SLIDING_WINDOW]})
    dense = len(layers[DENSE]) / max(1, len(layers[DENSE]) + len(sparse))
    prefill, decode = (
        100 * (dense + (1 - dense) * share)
        for share in (_prefill_share(asked, max_len), _decode_share(asked, max_len))
    )
    logger.info_once(
        "PowerAttention: %s; reads %.1f%% of the block pairs at max_model_len %d; executor %s; "
        "%d of %d attention layers%s%s; KV reclamation %s; mode %s (%s): %s; attention work at max_model_len, as a "
        "share of dense: prefill %.0f%%, decode %.0f%%%s",
        str(pattern),
        100 * pattern.density(max_len),
        max_len,
        executor,
        len(sparse),
        num_layers,
        f" (not {', '.join(map(str, others))})" if others else "",
        f" and {drafting} that draft" if drafting else "",
        _reclamation(vllm_config, reason),
        asked.mode,
        options.why_mode(vllm_config),
        _row_rule(asked),
        prefill,
        decode,
        "" if asked.mode == "trained" else ADVICE,
        scope="global",
    )


ADVICE = (
    ". `vllm-power calibrate` finds the dense layers that this model needs; after `vllm-power adapt` decode and memory "
    "follow the pattern too"
)


def _reclamation(vllm_config: "VllmConfig", reason: str | None) -> str:
    if reason is not None:
        return f"off: {reason}"
    transfer = vllm_config.kv_transfer_config
    return "on" if transfer is None else f"on, {transfer.kv_connector} keeps copies"


def _row_rule(asked: options.PowerOptions) -> str:
    rule = asked.rows
    tail = f"the last {rule.dense_tail} tokens of a prompt" if rule.dense_tail else ""
    generated = "generated tokens" if rule.dense_decode else ""
    dense = " and ".join(filter(None, (tail, generated)))
    return f"{dense} see every earlier token" if dense else "every token sees the pattern"


def _prefill_share(asked: options.PowerOptions, num_tokens: int) -> float:
    """The share of a prompt's causal (query, key) pairs that a layer with the pattern reads."""
    tail = min(asked.dense_tail / num_tokens, 1.0)
    dense_rows = tail * (2 - tail)  # the last rows have the most keys
    return dense_rows + (1 - dense_rows) * asked.effective_pattern.density(num_tokens)


def _decode_share(asked: options.PowerOptions, num_tokens: int) -> float:
    """The share of all earlier keys that a generated token reads in a layer with the pattern."""
    pattern = asked.effective_pattern
    last = pattern.num_blocks(num_tokens) - 1
    return 1.0 if asked.rows.dense_decode else len(pattern.visible_blocks(last)) / (last + 1)
