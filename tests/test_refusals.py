"""Refusals that need no engine: each names the cause and the remedy."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from vllm_power import refusals


def config(power=None, block_size=128, cache_dtype="auto"):
    return SimpleNamespace(
        additional_config={"power": power or {}},
        model_config=None,
        cache_config=SimpleNamespace(block_size=block_size, cache_dtype=cache_dtype),
    )


@pytest.mark.parametrize(
    "page, block, kernel",
    [
        (16, 256, 16),
        (128, 256, 128),
        (384, 256, 128),
        (528, 256, 16),
        (96, 256, 32),
        (512, 256, 256),
        (128, 64, 64),
        (1024, 1024, 256),
    ],
)
def test_the_kernels_page_divides_page_and_block(page, block, kernel):
    assert refusals.kernel_page(config({"block_size": block}, page), on_cpu=False) == kernel


@pytest.mark.parametrize(
    "page, on_cpu, multiple, sizes",
    [(16, True, 32, "32, 64, 128, 256"), (8, False, 16, "16, 32, 64, 128, 256")],
)
def test_a_page_that_the_kernels_do_not_take(page, on_cpu, multiple, sizes):
    with pytest.raises(
        ValueError, match=rf"{page} tokens on this device.*multiple of {multiple} .*{sizes}\), or leave"
    ):
        refusals.kernel_page(config(block_size=page), on_cpu)


def test_a_block_smaller_than_any_page():
    with pytest.raises(ValueError, match=r"block of 16 tokens is smaller.*32"):
        refusals.kernel_page(config({"block_size": 16}, 16), on_cpu=True)
    assert refusals.kernel_pages(config({"block_size": 16}), on_cpu=False) == [16]


@pytest.mark.parametrize(
    "executor, on_cpu, refused",
    [
        ("auto", True, False),
        ("cpu", True, False),
        ("triton", True, True),
        ("cpu", False, True),
        ("triton", False, False),
    ],
)
def test_executors_run_where_they_can(executor, on_cpu, refused):
    if not refused:
        refusals.check_executor(config({"executor": executor}), on_cpu)
        return
    with pytest.raises(ValueError, match=rf"executor {executor} does not run on a .*Leave out"):
        refusals.check_executor(config({"executor": executor}), on_cpu)


def test_flash_attention_over_fp8_is_refused():
    with pytest.raises(ValueError, match=r"fp8.*triton"):
        refusals.check_executor(config({"executor": "flash_attn"}, cache_dtype="fp8_e4m3"), on_cpu=False)


def test_no_layer_left():
    refusals.check_any_layer(1, 2)
    with pytest.raises(ValueError, match=r"none of the 2 attention layers.*hf-overrides"):
        refusals.check_any_layer(0, 2)


def test_dense_layers_over_fp8():
    wants_quantised = SimpleNamespace(supports_quant_query_input=True)
    refusals.check_dense_layer(wants_quantised, "auto")
    refusals.check_dense_layer(SimpleNamespace(), "fp8")
    with pytest.raises(ValueError, match="Leave out dense_layers"):
        refusals.check_dense_layer(wants_quantised, "fp8")


@pytest.mark.parametrize("version, refused", [(2, True), (3, False)])
def test_sinks_are_refused_where_flash_attention_does_not_know_them(monkeypatch, version, refused):
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda: version)
    ours, theirs = ("triton", "triton"), ("triton", "flash_attn")
    refusals.check_sinks(object(), ours)
    refusals.check_sinks(None, theirs)
    with pytest.raises(ValueError, match="attention sinks") if refused else nullcontext():
        refusals.check_sinks(object(), theirs)


@pytest.mark.parametrize(
    "power, refused",
    [
        ({}, False),
        ({"pattern": "full"}, False),
        ({"pattern": "full", "block_size": 16}, True),
        ({"block_size": 16, "window_blocks": 4096}, True),
        ({"block_size": 16, "sink_blocks": 4096}, True),
        ({"block_size": 16}, False),
    ],
    ids=str,
)
def test_a_pattern_too_large_to_list_is_refused_before_anything_is_loaded(power, refused):
    model = SimpleNamespace(
        use_mla=False,
        is_encoder_decoder=False,
        get_total_num_hidden_layers=lambda: 4,
        max_model_len=1 << 20,
        hf_config=None,
        hf_text_config=None,
        attn_type="decoder",
    )
    asked = config(power)
    asked.model_config = model
    asked.cache_config.user_specified_block_size = False
    asked.parallel_config = SimpleNamespace(decode_context_parallel_size=1)
    with pytest.raises(ValueError, match="larger block_size") if refused else nullcontext():
        refusals.check_config(asked, on_cpu=False)


def test_a_layer_that_wraps_the_backend():
    """As vLLM's prefix language models, static sinks and encoder layers do (model_executor/layers/attention)."""
    from vllm.v1.attention.backend import subclass_attention_backend

    from vllm_power.cpu_backend import PowerCpuBackend, PowerCpuMetadataBuilder

    wrapper = subclass_attention_backend("Prefix", PowerCpuBackend, PowerCpuMetadataBuilder)
    layer = SimpleNamespace(layer_name="layers.3.attn", attn_backend=PowerCpuBackend)
    refusals.check_wrapper(layer)
    layer.attn_backend = wrapper
    with pytest.raises(
        ValueError, match=r"layers\.3\.attn is a SimpleNamespace, which changes what a token sees"
    ):
        refusals.check_wrapper(layer)
