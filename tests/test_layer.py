"""A layer outside an engine asks the kernel for AMX tiles, as vLLM's worker does."""

import pytest
import torch

from vllm_power.tools.common import layer


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: calls.append("asked") or True)
    return calls


@pytest.mark.cpu
def test_a_layer_asks_for_amx_before_it_runs(asked, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr("vllm.engine.arg_utils.EngineArgs.__init__", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer.Layer("power", layer.Shape(), num_pages=4)
    assert asked == ["asked"]


def test_a_cpu_without_amx_asks_for_nothing(asked, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    layer.request_amx()
    assert asked == []


def test_a_kernel_that_refuses_amx_is_named(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    with pytest.raises(RuntimeError, match=r"Linux 5\.16"):
        layer.request_amx()
