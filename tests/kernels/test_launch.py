"""Launches that leave Triton out, against what Triton would launch: the same variant with the same arguments.

In Triton as it is, with a driver that compiles nothing and only notes what it is to launch.
"""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vllm_power.kernels import launch, prefill_sm90
from vllm_power.kernels.plan import Plan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the other tests of kernels launch for real"
)


class Compiled:
    """A stand-in for a compiled kernel that records launches in ``launched``."""

    function = packed_metadata = None

    def __init__(self, launched: list) -> None:
        self.launched = launched

    def launch_metadata(self, *arguments) -> None:
        pass

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        self.launched.append((self, (x, y, z), arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((self, grid, arguments))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was launched: the variant, the grid and the arguments."""
    notes: list = []

    def compiled(kernel, key, signature, device, constexprs, options, attrs, warmup):
        return kernel.device_caches[device][0].setdefault(key, Compiled(notes))

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(prefill_sm90, "num_multiprocessors", lambda device: 132)
    return notes


def call(
    dtype, page_size, head_size, kv_heads, group, soft_cap, with_sinks, tokens, segments, padding, shifted
) -> None:
    heads, width = kv_heads * group, head_size + padding
    query = torch.zeros(tokens, heads, head_size, dtype=dtype)
    output = torch.zeros(tokens * heads * width + shifted, dtype=dtype)[shifted:].view(tokens, heads, width)
    cache = torch.zeros(5, kv_heads, page_size, 2 * head_size, dtype=dtype)
    starts, lengths, pages, used = (
        torch.zeros(*shape, dtype=torch.int32)
        for shape in ((segments + 1,), (segments,), (segments, 40 + padding), (1,))
    )
    plan = Plan(starts, lengths, pages, used if tokens > 300 else None)
    sinks = torch.zeros(heads, dtype=dtype) if with_sinks else None
    prefill_sm90.prefill(
        query, cache, output[..., :head_size], plan, 0.1 * segments, soft_cap, sinks, min(tokens, 256)
    )


def test_variants_are_those_of_triton(launched: list) -> None:
    """Every case after every other, so that each finds what the ones before left."""
    kinds = itertools.product(
        (torch.bfloat16, torch.float16), (16, 256), (64, 128), (1, 4), (1, 7), (0.0, 30.0), (False, True),
        (100, 700), (1, 5), (0, 4), (0, 4),
    )  # fmt: skip
    for kind in kinds:
        call(*kind)
        fast = launched.pop()
        with mock.patch.object(launch, "_compiled", {}):
            call(*kind)
        slow = launched.pop()
        assert fast[0] is slow[0] and fast[1] == slow[1]
        for one, other in zip(fast[2], slow[2], strict=True):
            assert same(one, other)
    assert len(launch._compiled) > 100


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
    if hasattr(one, "base"):
        return (
            same(one.base, other.base) and one.layout == other.layout and one.block_shape == other.block_shape
        )
    return one == other and type(one) is type(other)
