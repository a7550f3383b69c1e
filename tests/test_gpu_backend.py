"""The glue for GPUs: vLLM's builder and implementation interfaces around the kernels, against the oracle."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.paged import Request, make_step
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_power import buffers, executors
from vllm_power.executors import PowerMetadata
from vllm_power.gpu_backend import PowerBackend, PowerImpl, PowerMetadataBuilder
from vllm_power.options import NAME
from vllm_power.pattern import RowRule, preset
from vllm_power.plugin import register
from vllm_power.prompt_lengths import DenseRuns
from vllm_power.warmup import warm_up

register()
PATTERN = preset("power", block_size=32, window_blocks=2)
PAGE_SIZE = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    model = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(model))
    return EngineArgs(
        model=str(directory),
        skip_tokenizer_init=True,
        attention_backend="power",
        max_model_len=2048,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        block_size=32 if DEVICE.type == "cpu" else PAGE_SIZE,
        additional_config={
            "power": {
                "mode": "trained",
                "block_size": PATTERN.block_size,
                "window_blocks": PATTERN.window_blocks,
            }
        },
    ).create_engine_config()


@pytest.fixture(scope="module")
def builder(config):
    spec = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=2, head_size=64, dtype=torch.float32)
    return PowerMetadataBuilder(spec, [], config, DEVICE)


def metadata_of(builder, step, padded_requests=0) -> PowerMetadata:
    starts, lengths, table = step.query_start_loc, step.seq_lens, step.page_table
    if padded_requests:
        starts = torch.cat([starts, starts[-1:].expand(padded_requests)])
        lengths = torch.cat([lengths, torch.full((padded_requests,), 77, dtype=torch.int32)])
        table = torch.cat([table, torch.full((padded_requests, table.shape[1]), 99, dtype=torch.int32)])
    new = starts.diff()
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(DEVICE),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(DEVICE),
        num_reqs=len(new),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(new.max()),
        max_seq_len=2048,
        block_table_tensor=table.to(DEVICE),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64, device=DEVICE),
    )
    return builder.build(0, common)


def attend(config, step, metadata, extra_rows=0, **extra):
    with set_current_vllm_config(config):
        impl = PowerImpl(4, 64, 0.125, 2, None, None, "auto", **extra)
    query = torch.nn.functional.pad(step.query, (0, 0, 0, 0, 0, extra_rows)).to(DEVICE)
    output = torch.full_like(query, float("nan"))
    impl.forward(SimpleNamespace(), query, query, query, step.kv_cache.to(DEVICE), metadata, output)
    return output.cpu()


@pytest.mark.parametrize(
    "requests, decodes, prefills",
    [
        ([Request(500, 1), Request(63, 1), Request(64, 1)], 3, 0),
        ([Request(0, 100), Request(450, 70)], 0, 2),
        ([Request(300, 1), Request(31, 1), Request(0, 40), Request(200, 130)], 2, 2),
    ],
    ids=["decode", "prefill", "mixed"],
)
@pytest.mark.parametrize("padded", [0, 3])
def test_a_step_equals_the_oracle(config, builder, requests, decodes, prefills, padded):
    step = make_step(PATTERN, requests, PAGE_SIZE, heads=4, kv_heads=2, head_size=64)
    metadata = metadata_of(builder, step, padded)
    assert [part.is_decode for part in metadata.parts] == [True] * (decodes > 0) + [False] * (prefills > 0)
    output = attend(config, step, metadata, extra_rows=5)
    torch.testing.assert_close(output[:-5].double(), step.oracle(PATTERN, 0.125), rtol=1e-4, atol=1e-5)
    assert output[-5:].isnan().all()  # rows past the step's tokens are not ours


def test_plans_stay_in_their_buffers(builder):
    steps = [make_step(PATTERN, [Request(length, 1)], PAGE_SIZE, 4, 2, 64) for length in (100, 900)]
    plans = [metadata_of(builder, step).parts[0].plan for step in steps]
    for name in ("segment_start_loc", "key_lens", "segment_pages"):
        assert getattr(plans[0], name).data_ptr() == getattr(plans[1], name).data_ptr()


def test_a_batch_that_looks_ahead_is_refused(builder):
    with pytest.raises(NotImplementedError, match="causal"):
        builder.build(0, SimpleNamespace(causal=False))


def test_capabilities(config):
    assert PowerBackend.get_name() == NAME
    assert not PowerBackend.is_sparse() and not PowerBackend.is_mla()
    for dtype, supported in (("fp8", True), ("fp8_e5m2", False), ("auto", True)):
        assert PowerBackend.supports_kv_cache_dtype(dtype) is supported
    assert PowerBackend.supports_head_size(96) and not PowerBackend.supports_head_size(72)
    assert PowerBackend.supports_compute_capability(DeviceCapability(8, 0))
    assert not PowerBackend.supports_compute_capability(DeviceCapability(7, 5))
    assert PowerMetadataBuilder.get_cudagraph_support(config, None) is AttentionCGSupport.UNIFORM_BATCH
    with set_current_vllm_config(config):
        assert PowerBackend.get_preferred_block_size(16) == PATTERN.block_size
    assert PowerBackend.get_preferred_block_size(16) == 256


def test_alibi_is_refused_by_the_layer(config):
    with set_current_vllm_config(config), pytest.raises(ValueError, match="ALiBi"):
        PowerImpl(4, 64, 0.125, 2, [0.5] * 4, None, "auto")


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("triton", torch.float32),
        ("reference", torch.float32),
        pytest.param(
            "flash_attn",
            torch.bfloat16,
            marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="FlashAttention runs on GPUs"),
        ),
    ],
)
def test_executors_agree_with_the_oracle(config, builder, name, dtype):
    requests = [Request(300, 1), Request(0, 90), Request(200, 130)]
    step = make_step(PATTERN, requests, PAGE_SIZE, heads=4, kv_heads=2, head_size=64, dtype=dtype)
    metadata = metadata_of(builder, step)
    for part in metadata.parts:
        part.executor = name
    output = attend(config, step, metadata)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(output.double(), step.oracle(PATTERN, 0.125), **close)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_a_models_attention_sinks_count(config, builder, name):
    step = make_step(PATTERN, [Request(300, 1), Request(200, 130)], PAGE_SIZE, 4, 2, 64)
    metadata = metadata_of(builder, step)
    for part in metadata.parts:
        part.executor = name
    sinks = torch.linspace(-1, 3, 4)
    output = attend(config, step, metadata, sinks=sinks.to(DEVICE))
    expected = step.oracle(PATTERN, 0.125, sinks=sinks)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    assert PowerBackend.supports_sink()


def test_memory_that_is_profiled_goes_to_the_first_builder(config, monkeypatch):
    """A profiling run makes the buffers once for all layers; the builder of the reserving layer's group takes them."""
    with set_current_vllm_config(config):
        impls = [PowerImpl(4, 64, 0.125, 2, None, None, "auto") for _ in range(2)]
    monkeypatch.setattr(buffers, "_reserved", {})
    monkeypatch.setattr(config.cache_config, "block_size", PAGE_SIZE)
    output = torch.full((3, 4, 64), float("nan"), device=DEVICE)
    for impl in impls:
        impl.forward(SimpleNamespace(), output, output, output, None, None, output)
    assert not output.any()
    (reserved,) = buffers._reserved.values()
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "device": DEVICE}
    taken = buffers.take(config, page_size=PAGE_SIZE, **shape)
    assert taken is reserved
    another = buffers.take(config, page_size=PAGE_SIZE, **shape)
    assert another is not reserved and another.num_bytes == reserved.num_bytes < 4 << 20
    for impl in impls:  # as vLLM does in its warm-up, with the KV cache in place
        impl.forward(SimpleNamespace(), output, output, output, None, None, output)
    assert buffers._reserved == {id(config): None}


def test_choice_of_executors(monkeypatch):
    half = (torch.bfloat16, 128)
    monkeypatch.setattr(executors, "flash_attn_version", lambda: 3)
    assert executors.choose("flash_attn", False, *half) == ("flash_attn", "flash_attn")
    assert executors.choose("reference", False, *half) == ("reference", "reference")
    assert executors.choose("auto", False, *half) == ("triton", "flash_attn")
    for takes_ours in ((True, *half), (False, torch.float32, 128), (False, torch.bfloat16, 512)):
        assert executors.choose("auto", *takes_ours) == ("triton", "triton")
    for version in (None, 2, 4):
        monkeypatch.setattr(executors, "flash_attn_version", lambda version=version: version)
        assert executors.choose("auto", False, *half) == ("triton", "triton")


def test_warm_up_runs_dense_rows_of_prompts(config, builder, monkeypatch):
    """Our kernels take a power of two as the bound on their number, so these sizes are all that a step can need."""
    with set_current_vllm_config(config):
        impl = PowerImpl(4, 64, 0.125, 2, None, None, "auto")
    cache = torch.randn(3, 2, PAGE_SIZE, 128, device=DEVICE)
    layer = SimpleNamespace(impl=impl, kv_cache=cache, num_heads=4, head_size=64, dtype=torch.float32)
    monkeypatch.setattr(builder, "layer_names", ["layer"])
    monkeypatch.setattr(builder, "max_num_reqs", 1)
    monkeypatch.setitem(config.compilation_config.static_forward_context, "layer", layer)
    monkeypatch.setattr(config.scheduler_config, "max_num_batched_tokens", 65)
    build, seen = builder.dense_part, []

    def dense_part(runs, pages):
        part = build(runs, pages)
        seen.append((int(runs.num_rows[0]), int(runs.num_keys[0]), part.max_query_len))
        return part

    monkeypatch.setattr(builder, "dense_part", dense_part)
    warm_up(builder)
    assert seen == []
    monkeypatch.setattr(builder, "rows", RowRule(16))
    monkeypatch.setattr(builder, "dense", "triton")
    warm_up(builder)
    assert seen == [*((size, size, size) for size in (1, 2, 4, 8, 16, 32, 64)), (65, 65, 128)]
    run = DenseRuns(*(np.array([number]) for number in (0, 0, 33, 40)))
    assert build(run, torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)).max_query_len == 64


def test_warm_up_runs_every_size_class(config, builder, monkeypatch):
    """Dummy steps over the null page: right kinds and sizes, and the layer's cache is left as it was."""
    with set_current_vllm_config(config):
        impl = PowerImpl(4, 64, 0.125, 2, None, None, "auto")
    cache = torch.randn(3, 2, PAGE_SIZE, 128, device=DEVICE)
    before = cache.clone()
    layer = SimpleNamespace(impl=impl, kv_cache=cache, num_heads=4, head_size=64, dtype=torch.float32)
    monkeypatch.setattr(builder, "layer_names", ["layer"])
    monkeypatch.setitem(config.compilation_config.static_forward_context, "layer", layer)
    seen = []
    for kind in ("prefill_part", "decode_part"):
        build = getattr(builder, kind)
        monkeypatch.setattr(
            builder, kind, lambda *a, kind=kind, build=build: seen.append((kind, a[3])) or build(*a)
        )
    warm_up(builder)
    assert [tokens for kind, tokens in seen if kind == "prefill_part"] == [2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert [tokens for kind, tokens in seen if kind == "decode_part"] == [1, 2, 3, 4, 6, 8]
    assert torch.equal(cache, before)
