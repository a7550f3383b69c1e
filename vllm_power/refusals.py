"""Refusals of what PowerAttention cannot serve: at startup, with cause and remedy, never silently dense or wrong."""

from typing import TYPE_CHECKING, Any

from vllm_power import dense_requests, options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

OTHER_BACKEND = "Serve this model with another attention backend (leave out --attention-backend power)."


# The page sizes of the kernels: ours on GPUs (gpu_backend), vLLM's C++ attention on CPUs.
GPU_PAGES = (16, 32, 64, 128, 256)
CPU_PAGES = (32, 64, 128, 256, 512)


def check_config(vllm_config: "VllmConfig", on_cpu: bool) -> None:
    """Refuse what the configuration alone rules out. Raises ValueError."""
    asked = options.of_config(vllm_config)
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    if model is not None:
        if model.use_mla:
            _refuse("multi-head latent attention (MLA) keeps compressed keys that the pattern does not cover")
        if model.is_encoder_decoder:
            _refuse("an encoder-decoder model has cross attention, which is not causal")
        asked.dense_layer_indices(model.get_total_num_hidden_layers())
        asked.effective_pattern.check_length(model.max_model_len)
        if getattr(model, "rswa_window", None) is not None:
            _refuse("reference sliding window attention (R-SWA) has its own rule for generated tokens")
        if model.attn_type == "encoder_only":
            _refuse("an encoder-only model attends in both directions; the pattern is causal")
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        _refuse(
            "context parallelism spreads the tokens of a block over ranks",
            "Leave out --decode-context-parallel-size and --prefill-context-parallel-size; "
            "--tensor-parallel-size works.",
        )
    if vllm_config.cache_config.user_specified_block_size:
        kernel_page(vllm_config, on_cpu)


def check_executor(vllm_config: "VllmConfig", on_cpu: bool) -> None:
    """Refuse an executor that this device or this KV cache does not support. Raises ValueError."""
    executor = options.of_config(vllm_config).executor
    if executor != "auto" and (executor == "cpu") is not on_cpu:
        where = "a CPU" if on_cpu else "a GPU"
        _refuse(f"the executor {executor} does not run on {where}", "Leave out the option executor.")
    if executor == "flash_attn" and vllm_config.cache_config.cache_dtype.startswith("fp8"):
        _refuse(
            "the executor flash_attn reads an fp8 KV cache only with quantised queries",
            'Use the executor "triton".',
        )


def kernel_pages(vllm_config: "VllmConfig", on_cpu: bool) -> list[int]:
    """The kernels' page sizes that divide the pattern's block, ascending. Raises ValueError if there are none."""
    block_size = options.of_config(vllm_config).effective_pattern.block_size
    fitting = [size for size in (CPU_PAGES if on_cpu else GPU_PAGES) if block_size % size == 0]
    if not fitting:
        _refuse(
            f"the pattern's block of {block_size} tokens is smaller than a page of vLLM's CPU attention",
            f'Use {{"power": {{"block_size": {CPU_PAGES[0]}}}}} or larger blocks, or a GPU.',
        )
    return fitting


def kernel_page(vllm_config: "VllmConfig", on_cpu: bool) -> int:
    """The page that the kernels see: the largest of theirs that divides both the pattern's block and vLLM's page.

    vLLM's page may be larger: it splits it (``prepare_kernel_block_sizes`` in vllm/v1/worker/utils.py).
    Raises ValueError if none divides both.
    """
    page_size, fitting = vllm_config.cache_config.block_size, kernel_pages(vllm_config, on_cpu)
    found = [size for size in fitting if page_size % size == 0]
    if not found:
        _refuse(
            f"the kernels do not support a page (--block-size) of {page_size} tokens on this device",
            f"Use --block-size with a multiple of {fitting[0]} (the best are {', '.join(map(str, fitting))}), or leave "
            "it out.",
        )
    return found[-1]


def check_layer(selector: Any) -> None:
    """Refuse a layer by vLLM's AttentionSelectorConfig (v1/attention/selector.py). Raises ValueError."""
    if selector.use_mla:
        _refuse("multi-head latent attention (MLA) keeps compressed keys that the pattern does not cover")
    if selector.attn_type != "decoder":
        _refuse(f"{selector.attn_type} attention is not causal self-attention over the paged cache")
    if selector.use_mm_prefix or selector.use_non_causal:
        _refuse("this model lets some tokens see later ones (bidirectional attention)")


def check_wrapper(layer: Any) -> None:
    """Refuse a built layer whose class wraps our backend in its own. Raises ValueError."""
    backend = layer.attn_backend
    if backend.__module__.partition(".")[0] != "vllm_power" or "<locals>" in backend.__qualname__:
        _refuse(
            f"{layer.layer_name} is a {type(layer).__name__}, which changes what a token sees beyond the pattern"
        )


def check_alibi(alibi_slopes: Any) -> None:
    """Refuse ALiBi: its bias grows with the distance, which a rewritten page table loses. Raises ValueError."""
    if alibi_slopes is not None:
        _refuse("ALiBi needs the distance to each key, which is lost when blocks are left out")


def check_sinks(sinks: Any, executors: tuple[str, str]) -> None:
    """Refuse a model's attention sinks on kernels that do not support them. Raises ValueError."""
    if sinks is not None and "flash_attn" in executors:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        if get_flash_attn_version() == 2:
            _refuse(
                "FlashAttention 2, the executor flash_attn on this GPU, does not support attention sinks",
                'Use the executor "triton".',
            )


def check_causal(step: Any) -> None:
    """Refuse a step (vLLM's CommonAttentionMetadata) that looks ahead. Raises NotImplementedError."""
    if step.causal is not True:
        raise NotImplementedError("PowerAttention is causal: this batch asks for attention to later tokens")


def check_request(params: Any, offers_dense: bool) -> None:
    """Refuse a request (its vLLM SamplingParams) that asks for what is not served. Raises VLLMValidationError.

    offers_dense: whether requests may ask that all their rows see everything.
    """
    asked = dense_requests.asked_of(params)
    if asked is None:
        return
    from vllm.exceptions import VLLMValidationError  # vLLM answers any other with status 500

    if asked != dense_requests.DENSE:
        raise VLLMValidationError(
            f'vllm_xargs.{dense_requests.KEY} must be "{dense_requests.DENSE}" or left out, not {asked!r}'
        )
    if not offers_dense:
        raise VLLMValidationError(
            f'this server does not serve vllm_xargs.{dense_requests.KEY} "{dense_requests.DENSE}": start it with '
            '--additional-config \'{"power": {"dense_requests": true}}\', or leave it out'
        )


def check_dense_layer(implementation: Any, kv_cache_dtype: str) -> None:
    """Refuse a dense layer whose kernels need a quantised query, which vLLM did not prepare. Raises ValueError."""
    if kv_cache_dtype.startswith("fp8") and getattr(implementation, "supports_quant_query_input", False):
        _refuse(
            "dense layers over an fp8 KV cache need quantised queries on this device",
            "Leave out dense_layers or --kv-cache-dtype fp8.",
        )


def check_any_layer(sparse: int, layers: int) -> None:
    """Refuse a model none of whose ``layers`` attention layers would run the pattern. Raises ValueError."""
    if not sparse:
        _refuse(
            f"none of the {layers} attention layers would run the pattern: each has its own sliding window or stays "
            "dense",
            "If the model is meant to see everything, switch its window off "
            "(--hf-overrides '{\"sliding_window\": null}'), or name fewer dense_layers; otherwise use another backend.",
        )


def check_zeroed_pages(vllm_config: "VllmConfig", kv_cache_config: Any) -> None:
    """Refuse a KV connector that may copy a page after vLLM has zeroed it for another request. Raises ValueError.

    vLLM waits for the copies of pages that it hands out again, but zeroes them first (v1/worker/gpu/model_runner.py).
    """
    if vllm_config.kv_transfer_config is not None and kv_cache_config.needs_kv_cache_zeroing:
        _refuse(
            "the layers' KV caches differ in precision, so vLLM zeroes pages that the KV connector may still have to "
            "copy",
            'Use one precision for all layers, {"power": {"reclaim": false}}, or no connector.',
        )


def _refuse(cause: str, remedy: str = OTHER_BACKEND) -> None:
    raise ValueError(f"--attention-backend power cannot serve this: {cause}. {remedy}")
