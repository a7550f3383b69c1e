"""The hooks in vLLM's model runners, on vLLM's own classes: they exist as we call them, and tell prompt lengths."""

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker import gpu_model_runner as v1
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu_input_batch import InputBatch as InputBatchV1

from vllm_power import compat
from vllm_power.dense_requests import DENSE, KEY
from vllm_power.pattern import EVERY_ROW

compat.tell_prompt_lengths()

DENSE_PARAMS = SamplingParams(extra_args={KEY: DENSE})


def step_with(*requests: tuple[str, SamplingParams | None]) -> Any:
    new = [SimpleNamespace(req_id=name, sampling_params=params) for name, params in requests]
    return SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=new)


@pytest.mark.parametrize(
    "runner, method, first",
    [
        (v1.GPUModelRunner, "_update_states", "scheduler_output"),
        (v1.GPUModelRunner, "_build_attention_metadata", "num_tokens"),
        (v2.GPUModelRunner, "add_requests", "scheduler_output"),
        (v2.GPUModelRunner, "prepare_inputs", "scheduler_output"),
    ],
)
def test_the_hooked_methods_take_what_the_hooks_pass_on(runner: type, method: str, first: str) -> None:
    hooked = getattr(runner, method)
    assert list(inspect.signature(hooked.__wrapped__).parameters)[:2] == ["self", first]
    compat.tell_prompt_lengths()
    assert getattr(runner, method) is hooked


def test_what_the_hooks_read_is_where_they_look() -> None:
    """Their runners' constructors need a device, so the names are read from the sources."""
    assert "rswa_prefix_lens" in CommonAttentionMetadata.__dataclass_fields__
    assert {"prompt_lens", "idx_mapping_np", "req_ids"} <= InputBatch.__dataclass_fields__.keys()
    assert "self.num_prompt_tokens_cpu_tensor" in inspect.getsource(InputBatchV1.__init__)
    assert "def req_ids" in inspect.getsource(InputBatchV1)
    built = inspect.getsource(v1.GPUModelRunner._build_attention_metadata.__wrapped__)
    assert "CommonAttentionMetadata(" in built and "num_reqs=" in built
    prepared = inspect.getsource(v2.GPUModelRunner.prepare_inputs.__wrapped__)
    assert "self.req_states.prompt_len." in prepared


def test_runner_v1_fills_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v1, "CommonAttentionMetadata", lambda **fields: fields)
    batch = SimpleNamespace(
        num_prompt_tokens_cpu_tensor=torch.tensor([70, 80, 90], dtype=torch.int32), req_ids=["a", "b"]
    )
    runner = SimpleNamespace(input_batch=batch)
    note = compat._noting_dense_requests(lambda self, step: None)
    note(runner, step_with(("a", None), ("b", DENSE_PARAMS)))
    build = compat._filling_metadata(v1, lambda self: v1.CommonAttentionMetadata(num_reqs=2))
    assert build(runner)["rswa_prefix_lens"].tolist() == [70, EVERY_ROW]
    note(runner, step_with(("b", None)))
    assert build(runner)["rswa_prefix_lens"].tolist() == [70, 80]


def test_runner_v2_fills_the_batch() -> None:
    runner = SimpleNamespace(
        req_states=SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([70, 80, 90], dtype=np.int32)))
    )
    note = compat._noting_dense_requests(lambda self, step: None)
    note(runner, step_with(("a", DENSE_PARAMS), ("b", None)))
    batch = SimpleNamespace(prompt_lens=None, idx_mapping_np=np.array([2, 0]), req_ids=["b", "a"])
    prepare = compat._filling_batch(lambda self: batch)
    assert prepare(runner).prompt_lens.tolist() == [90, EVERY_ROW]
