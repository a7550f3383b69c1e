"""Which engines reclaim: if reclamation does not apply, vLLM's KV cache specs stay and the reason is reported."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm import EngineArgs
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_power import connectors, kv_cache, refusals
from vllm_power.cpu_backend import PowerCpuBackend
from vllm_power.kv_cache_spec import PowerAttentionSpec
from vllm_power.tools.bench.engine import TINY, model_folder

MAX_LEN = 1024


def connector(name="OffloadingConnector", **extra):
    return SimpleNamespace(
        kv_connector=name,
        kv_connector_module_path=None,
        kv_connector_extra_config={"cpu_bytes_to_use": 1, **extra},
    )


def config_with(**fields):
    base = {
        "additional_config": {"power": {"mode": "trained", **fields.pop("power", {})}},
        "kv_transfer_config": None,
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "model_config": SimpleNamespace(
            max_model_len=MAX_LEN,
            hf_config=None,
            hf_text_config=None,
            runner_type="generate",
            is_hybrid=False,
        ),
        "max_in_flight_tokens": 128,
        "num_speculative_tokens": 0,
        "num_lookahead_tokens": 0,
    }
    return SimpleNamespace(**{**base, **fields})


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({}, None),
        ({"power": {"reclaim": False}}, "reclaim is false"),
        ({"kv_transfer_config": connector("NixlConnector")}, "NixlConnector transfers whole sequences"),
        ({"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)}, "disable-hybrid"),
        ({"power": {"pattern": "full"}}, "full"),
        ({"power": {"decode": "dense"}}, "generated tokens see every block"),
        ({"power": {"mode": "training_free"}}, "generated tokens see every block"),
    ],
    ids=["on", "option", "connector", "hybrid_off", "full", "decode", "training_free"],
)
def test_where_it_cannot_apply_it_says_why(fields, reason):
    config = config_with(**fields)
    why = kv_cache.why_not(config)
    assert (why is None) if reason is None else (reason in why)


@pytest.mark.parametrize(
    "extra, fields, reason",
    [
        ({}, {}, None),
        ({"eviction_policy": "arc", "offload_prompt_only": False}, {}, None),
        ({"blocks_per_chunk": 4}, {}, "OffloadingConnector with blocks_per_chunk has not been examined"),
        ({"spec_name": "TieringOffloadingSpec"}, {}, "more than host memory"),
        ({}, {"num_speculative_tokens": 3}, "speculative decoding"),
        ({}, {"model_config": SimpleNamespace(is_hybrid=True)}, "hybrid model"),
    ],
    ids=["plain", "policy", "chunks", "tiers", "drafts", "mamba"],
)
def test_which_offloading_keeps_reclamation(extra, fields, reason):
    why = connectors.why_not(config_with(kv_transfer_config=connector(**extra), **fields))
    assert (why is None) if reason is None else (reason in why)


def test_the_option_kv_offloading_size():
    """vLLM's short form of OffloadingConnector."""
    with model_folder(TINY) as folder:
        config = EngineArgs(
            model=folder, skip_tokenizer_init=True, attention_backend="power", kv_offloading_size=1
        ).create_engine_config()
    assert config.kv_transfer_config.kv_connector == "OffloadingConnector"
    assert connectors.why_not(config) is None


@pytest.mark.parametrize("name", sorted(KVConnectorFactory._registry.keys() - {"OffloadingConnector"}))
def test_no_other_connector_of_vllm_keeps_reclamation(name):
    assert name in connectors.why_not(config_with(kv_transfer_config=connector(name)))


def test_the_table_of_connectors_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    table = re.findall(r"^\| (\w+Connector)\b[^|]*\|[^|]*\| (on|off)\b", page, flags=re.M)
    assert "OffloadingConnector" in dict(table)
    for name, reclamation in table:
        assert name in KVConnectorFactory._registry
        why = connectors.why_not(config_with(kv_transfer_config=connector(name)))
        assert (why is None) == (reclamation == "on")


def test_offloading_does_not_go_with_pages_that_vllm_zeroes():
    cache = SimpleNamespace(needs_kv_cache_zeroing=True)
    refusals.check_zeroed_pages(config_with(), cache)
    with pytest.raises(ValueError, match="differ in precision"):
        refusals.check_zeroed_pages(config_with(kv_transfer_config=connector()), cache)


def test_the_spec_of_a_layer_that_reclaims():
    full = FullAttentionSpec(block_size=256, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = kv_cache.reclaiming_spec(full, config_with())
    assert isinstance(spec, PowerAttentionSpec)
    assert spec.max_model_len == MAX_LEN
    assert spec.page_size_bytes == full.page_size_bytes
    window = SlidingWindowSpec(
        block_size=256, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=512
    )
    assert kv_cache.reclaiming_spec(window, config_with()) is window


def test_two_engines_of_a_process_keep_their_patterns():
    """Both are built before vLLM asks for the specs of the first: no state outside the configurations."""
    full = FullAttentionSpec(block_size=256, num_kv_heads=2, head_size=64, dtype=torch.float32)
    configs = [config_with(power={"window_blocks": window}) for window in (2, 7)]
    backends = [kv_cache.backend_of_engine(PowerCpuBackend, config, [32], True) for config in configs]
    windows = [backend.customize_spec(full).pattern.window_blocks for backend in backends]
    assert windows == [2, 7]
    assert PowerCpuBackend.customize_spec(full) is full
    assert backends[0].full_cls_name() == PowerCpuBackend.full_cls_name()  # vLLM groups layers by it


@pytest.mark.parametrize("reclaims", [True, False])
def test_the_kernels_pages_divide_the_block(reclaims):
    config = config_with(power={"block_size": 64})
    pages = refusals.kernel_pages(config, on_cpu=True)
    found = kv_cache.backend_of_engine(PowerCpuBackend, config, pages, reclaims)
    assert found.get_supported_kernel_block_sizes() == [32, 64]
    full = FullAttentionSpec(block_size=64, num_kv_heads=2, head_size=64, dtype=torch.float32)
    assert isinstance(found.customize_spec(full), PowerAttentionSpec) == reclaims
