"""Executors: each runs ordinary causal paged attention over the same plan, on its own kernels.

An executor is a function :data:`Attend`; ``executors.NAME.attend``. The CPU's is different: there the plan goes through
vLLM's own backend (``executors.cpu``).
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vllm_power.kernels.plan import Plan

GPU_EXECUTORS = ("triton", "flash_attn", "reference")
FASTEST = Path(__file__).with_name("fastest.json")


@dataclass
class LayerCall:
    """One layer's attention in one step.

    query, output: [T, H, D]. kv_cache: [pages, G, page_size, 2 * D], keys before values, any strides but the last.
    k_scale, v_scale: float32 scalars on the device that an fp8 cache is multiplied by; None where it is not fp8.
    sinks: [H], the model's attention sinks, if it has any.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    output: torch.Tensor
    scale: float
    soft_cap: float
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    sinks: torch.Tensor | None


@dataclass
class Part:
    """The requests of a step that go through one kernel.

    end: their tokens end there, among those of the step. max_query_len: the most query tokens a segment can have.
    workspace: float32, for a decode kernel's pieces.
    """

    plan: Plan
    end: int
    max_query_len: int
    is_decode: bool
    workspace: torch.Tensor
    attend: "Attend"


# Writes the attention of the part's tokens into the layer's output.
Attend = Callable[[Part, LayerCall], None]


@dataclass(frozen=True)
class Choice:
    """The executors of a server: one for prefill, one for decode."""

    prefill: str
    decode: str

    def __str__(self) -> str:
        return self.prefill if self.prefill == self.decode else f"{self.prefill} (decode: {self.decode})"


def choose(asked: str, capability: tuple[int, int] | None, is_fp8: bool) -> Choice:
    """The executors for the option ``executor``; ``auto`` takes the faster of each kind as the benchmark found it.

    capability: the GPU's, None without one. One that was not measured gets our own kernels, which run on all.
    """
    if asked != "auto":
        return Choice(asked, asked)
    measured = _fastest().get(".".join(map(str, capability or ())), {})
    names = {kind: measured.get(kind, "triton") for kind in ("prefill", "decode")}
    return Choice(**{kind: "triton" if is_fp8 else name for kind, name in names.items()})


def load(name: str) -> Attend:
    """The function of the executor ``name``, one of ``GPU_EXECUTORS``."""
    return importlib.import_module(f"vllm_power.executors.{name}").attend


@cache
def _fastest() -> dict[str, Any]:
    """{compute capability: {"prefill": executor, "decode": executor}}, as docs/results/kernels.jsonl has them."""
    return json.loads(FASTEST.read_text())
