"""Without a GPU, Triton kernels run in its interpreter. That has to be chosen before Triton is imported for the first
time, so it is done here and undone at once: servers that tests start must not inherit it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401
    import vllm_power.kernels.decode
    import vllm_power.kernels.plan_gpu
    import vllm_power.kernels.prefill  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
