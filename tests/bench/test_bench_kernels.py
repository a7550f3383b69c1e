"""``vllm-power bench kernels``: a failing peer is reported, a failing kernel of ours ends the run; no measurements."""

from types import SimpleNamespace

import pytest
import torch

from vllm_power.tools.bench import kernels
from vllm_power.tools.bench import kernels_peers as peers

WORK = SimpleNamespace(context=1024, batch=1, page=16, caches=[None], dtype=torch.bfloat16)


def failing(name):
    def peer(work, layer):
        raise RuntimeError("the cause")

    peer.__name__ = name
    return peer


def test_a_peer_that_fails_is_left_out_and_told(capsys):
    assert kernels.measure("prefill", WORK, failing("flex")) is None
    assert "flex, 1024 x 1, page 16: RuntimeError: the cause" in capsys.readouterr().err


def test_our_own_kernel_that_fails_ends_the_run(monkeypatch):
    monkeypatch.setattr(peers, "power", failing("power"))
    with pytest.raises(RuntimeError, match="the cause"):
        kernels.measure("prefill", WORK, peers.power)
