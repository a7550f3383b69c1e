"""Which engines reclaim: if reclamation does not apply, vLLM's KV cache specs stay and the reason is reported."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_power import kv_cache
from vllm_power.kv_cache import PowerAttentionSpec

MAX_LEN = 1024


def config_with(**fields):
    base = {
        "additional_config": {"power": {"mode": "trained", **fields.pop("power", {})}},
        "kv_transfer_config": None,
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "model_config": SimpleNamespace(
            max_model_len=MAX_LEN, hf_config=None, hf_text_config=None, runner_type="generate"
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
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)}, "disable-hybrid"),
        ({"power": {"pattern": "full"}}, "full"),
        ({"power": {"decode": "dense"}}, "generated tokens see every block"),
        ({"power": {"mode": "training_free"}}, "generated tokens see every block"),
    ],
    ids=["on", "option", "connector", "hybrid_off", "full", "decode", "training_free"],
)
def test_where_it_can_not_apply_the_spec_stays_and_says_why(fields, reason):
    config = config_with(**fields)
    why = kv_cache.why_not(config)
    assert (why is None) if reason is None else (reason in why)
    kv_cache.configure(config)
    full = FullAttentionSpec(block_size=256, num_kv_heads=2, head_size=64, dtype=torch.float32)
    spec = kv_cache.customize_spec(full)
    assert isinstance(spec, PowerAttentionSpec) is (reason is None)
    assert spec.page_size_bytes == full.page_size_bytes


def test_a_draft_model_leaves_the_targets_settings_alone():
    kv_cache.configure(config_with())
    draft = config_with()
    draft.model_config.runner_type, draft.model_config.max_model_len = "draft", 64
    kv_cache.configure(draft)
    full = FullAttentionSpec(block_size=256, num_kv_heads=2, head_size=64, dtype=torch.float32)
    assert kv_cache.customize_spec(full).max_model_len == MAX_LEN
