"""Without a GPU, Triton kernels run in its interpreter. That has to be chosen before Triton is imported for the first
time, so it is done here and undone at once: servers that tests start must not inherit it. Where there is a GPU, the
tests that run on it are marked, for ``make test-gpu``."""

import os
import signal
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ON_A_GPU = (
    "kernels/",
    "test_gpu_backend.py",
    "e2e/test_dense_requests.py",
    "e2e/test_dense_rows.py",
    "e2e/test_equality.py",
    "e2e/test_invariance.py",
    "e2e/test_reclaim.py",
    "e2e/test_two_devices.py",
)
# These need vLLM's Python and none of its kernels; some tests elsewhere are marked themselves.
WITHOUT_KERNELS = (
    "bench/test_scheduler_alone.py",
    "metrics/",
    "test_compat.py",
    "test_dense_layers.py",
    "test_gpu_backend.py",
    "test_kv_",
    "test_lifetimes.py",
    "test_offloading.py",
    "test_options.py",
    "test_plugin.py",
    "test_prefix_",
    "test_refusals.py",
)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell that starts tests in the background has them ignore Ctrl-C, and all that they start in turn.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Several test processes share the cores; threads that wait for each other would take them from the rest.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401

    import vllm_power.kernels.decode
    import vllm_power.kernels.plan_gpu
    import vllm_power.kernels.prefill
    import vllm_power.kernels.training_backward
    import vllm_power.kernels.training_forward  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(HERE).as_posix()
        if place.startswith(WITHOUT_KERNELS):
            item.add_marker("without_kernels")
        if not torch.cuda.is_available():
            continue
        if item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="about vLLM's CPU build"))
        elif place.startswith(ON_A_GPU):
            item.add_marker("gpu")
