"""The entry point: idempotent, survives spawn, refuses an untested vLLM; the platform honours the choice."""

import multiprocessing
import pickle
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_power.metrics.shared_dir import VARIABLE
from vllm_power.options import NAME
from vllm_power.plugin import BACKEND, check_version, register

register()


def test_the_entry_point_is_this_function():
    (entry,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "power"]
    assert entry.load() is register


def test_registering_again_changes_nothing():
    member, platform = AttentionBackendEnum[NAME], type(current_platform)
    register()
    assert AttentionBackendEnum[NAME] is member
    assert type(current_platform) is platform
    assert member.get_path() == BACKEND


def test_members_survive_pickling_here():
    for member in (AttentionBackendEnum[NAME], AttentionBackendEnum.CPU_ATTN):
        assert pickle.loads(pickle.dumps(member)) is member


def _name_of(member, results):
    results.put((member.name, member.get_path()))


def test_the_name_survives_a_spawned_process_that_loaded_no_plugin():
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_name_of, args=(AttentionBackendEnum[NAME], results))
    child.start()
    assert results.get(timeout=120) == (NAME, BACKEND)
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.32.0+cpu", "0.33.0rc1"])
def test_tested_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "dev"])
def test_other_versions_are_refused_with_a_remedy(version):
    with pytest.raises(RuntimeError, match=r"works with vLLM 0\.32 and 0\.33.*pip install"):
        check_version(version)


def selector(**fields):
    import torch

    return AttentionSelectorConfig(
        head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=None, **fields
    )


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU platform's choice")
class TestCpuPlatform:
    def test_power_is_honoured(self):
        assert current_platform.get_attn_backend_cls(AttentionBackendEnum[NAME], selector()).endswith(
            "PowerCpuBackend"
        )

    def test_without_it_nothing_changes(self):
        for backend in (None, AttentionBackendEnum.CPU_ATTN):
            path = current_platform.get_attn_backend_cls(backend, selector(), num_heads=4)
            assert path == AttentionBackendEnum.CPU_ATTN.get_path()

    def test_a_models_own_window_stays_with_vllm(self):
        path = current_platform.get_attn_backend_cls(
            AttentionBackendEnum[NAME], selector(has_sliding_window=True)
        )
        assert path == AttentionBackendEnum.CPU_ATTN.get_path()

    @pytest.mark.parametrize(
        "fields, cause",
        [
            ({"use_mla": True}, "MLA"),
            ({"attn_type": "encoder_only"}, "encoder_only"),
            ({"attn_type": "encoder_decoder"}, "encoder_decoder"),
            ({"use_mm_prefix": True}, "bidirectional"),
            ({"use_non_causal": True}, "bidirectional"),
        ],
    )
    def test_what_it_can_not_do_is_refused(self, fields, cause):
        with pytest.raises(ValueError, match=cause):
            current_platform.get_attn_backend_cls(AttentionBackendEnum[NAME], selector(**fields))


def test_the_platform_is_adopted_when_vllm_is_told_its_target():
    # VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins; the choice must hold all the same.
    import os
    import subprocess
    import sys

    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.platforms import current_platform as p; print('adopted',"
        "type(p).__mro__[1].__name__)"
    )
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "adopted PowerCpuPlatform" in run.stdout


def test_selection_by_kind_counts():
    from vllm_power.layers import is_selected

    def config(backend, kinds):
        return SimpleNamespace(attention_config=SimpleNamespace(backend=backend, backend_per_kind=kinds))

    power, dense = AttentionBackendEnum[NAME], AttentionBackendEnum.CPU_ATTN
    assert is_selected(config(power, None))
    assert is_selected(config(dense, {"full_attention": power}))
    assert not is_selected(config(None, {"full_attention": dense}))


def test_rays_workers_get_the_folder_of_the_metrics(monkeypatch):
    """Otherwise executor and layers of an engine on Ray are "unknown". vLLM has two executors for Ray."""
    from vllm.ray.ray_env import get_env_vars_to_copy
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars

    monkeypatch.setenv(VARIABLE, "/folder")
    assert VARIABLE in get_env_vars_to_copy(additional_vars=set(current_platform.additional_env_vars))
    assert get_driver_env_vars(set())[VARIABLE] == "/folder"
