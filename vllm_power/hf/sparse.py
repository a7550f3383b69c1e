"""Attention over whole texts with the training kernels, as an operator for torch.compile and autograd."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_power.hf.tiles import Lists


@dataclass(frozen=True)
class Plan:
    """The lists of a batch for the layers under the pattern, and for dense layers (None if there are no dense layers).

    Not a tuple, because loaders and trainers take tuples apart and rebuild them, each in its own way.
    """

    pattern: Lists
    dense: Lists | None = None

    def to(self, device: Any, non_blocking: bool = False) -> "Plan":
        """The same plan on ``device``."""
        return self._each(lambda part: part.to(device, non_blocking))

    def pin_memory(self) -> "Plan":
        """The same plan in pinned memory."""
        return self._each(Lists.pin_memory)

    def of_layer(self, dense: bool) -> Lists:
        """The lists of a layer. Raises ValueError if the layer is dense and there are no lists for dense layers."""
        if not dense:
            return self.pattern
        if self.dense is None:
            raise ValueError("power_plan has no lists for dense layers, and the model has some")
        return self.dense

    def _each(self, change: Callable[[Lists], Lists]) -> "Plan":
        return Plan(change(self.pattern), None if self.dense is None else change(self.dense))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, given: Lists, scale: float
) -> torch.Tensor:
    """query: [rows, H, Q, D], the last Q of the K tokens; key: [rows, G, K, D]; value: [rows, G, K, Dv]; G divides H.

    The tensors have one dtype, and ``given`` has the lists for these rows and tokens, on the same device. Returns
    [rows, Q, H, Dv], contiguous, with zeros for padding. Nothing is checked here: the lists determine what is read.
    """
    states = (part.transpose(1, 2) for part in (query, key, value))
    numbers = given.tile, given.parts, given.partial
    return _attention(*states, *given.tensors, scale, *numbers)[0]


@torch.library.custom_op("vllm_power::sparse_attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: torch.Tensor,
    chunks: torch.Tensor,
    sums: torch.Tensor,
    entries: torch.Tensor,
    scale: float,
    tile: int,
    parts: int,
    partial: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [rows, Q, H, Dv], and the logarithms of the softmax sums, float32 [rows, H, Q]."""
    from vllm_power.kernels import training_forward

    query, key, value = map(_dense_heads, (query, key, value))
    output, log_sums = _results(query, value)
    training_forward.forward(
        query, key, value, output, log_sums, tiles, entries, scale, tile, parts, partial,
        launch("forward", query, tile),
    )  # fmt: skip
    return output, log_sums


@_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> Any:
    return _results(query, value)


@torch.library.custom_op("vllm_power::sparse_attention_backward", mutates_args=())
def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    direction: torch.Tensor,
    tiles: torch.Tensor,
    chunks: torch.Tensor,
    sums: torch.Tensor,
    entries: torch.Tensor,
    scale: float,
    tile: int,
    parts: int,
    partial: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, each contiguous."""
    from vllm_power.kernels import training_backward

    query, key, value, direction = map(_dense_heads, (query, key, value, direction))
    found = _shaped(query, key, value)
    training_backward.backward(
        query, key, value, output, log_sums, direction, found, tiles, chunks, sums, entries, scale, tile, parts,
        partial, launch("query", query, tile), launch("key", query, tile),
    )  # fmt: skip
    return found


@_gradients.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> Any:
    return _shaped(query, key, value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.numbers = inputs[7:]


def _backward(ctx: Any, direction: torch.Tensor, of_sums: torch.Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, log_sums, *lists = ctx.saved_tensors
    found = _gradients(query, key, value, output, log_sums, direction, *lists, *ctx.numbers)
    return (*found, *[None] * 8)


_attention.register_autograd(_backward, setup_context=_keep)


# {(kernel, tile, whether one head of a token has at most 128 bytes): (warps, pipeline stages, tokens per iteration)}.
# Measured on an H200: 8 rows of 8K with heads of 64 and blocks of 64, and one row of 32K with heads of 128 and blocks
# of 256.
LAUNCH = {
    ("forward", 64, True): (4, 2, 64),
    ("query", 64, True): (4, 3, 32),
    ("key", 64, True): (4, 2, 64),
    ("forward", 128, True): (8, 3, 64),
    ("query", 128, True): (4, 3, 64),
    ("key", 128, True): (4, 3, 64),
    ("forward", 128, False): (8, 3, 64),
    ("query", 128, False): (8, 3, 64),
    ("key", 128, False): (8, 2, 64),
}


def launch(kernel: str, query: torch.Tensor, tile: int) -> dict[str, int]:
    """How to launch a kernel: "forward", "query" or "key"."""
    size = query.dtype.itemsize * query.shape[3]  # bytes of one head of a token
    found = LAUNCH.get((kernel, tile, size <= 128))
    if found is None:  # a size that fits into shared memory
        step = 64 if size <= 256 else 32 if size <= 512 else 16
        found = (8 if tile > 64 else 4, 2 if size <= 256 else 1, min(tile, step))
    return {
        "num_warps": found[0],
        "num_stages": found[1],
        "BLOCK_M" if kernel == "key" else "BLOCK_N": found[2],
    }


def _results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens, heads, _ = query.shape
    log_sums = query.new_empty((rows, heads, tokens), dtype=torch.float32)
    return query.new_empty((rows, tokens, heads, value.shape[3])), log_sums


def _shaped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New contiguous tensors of the same shapes."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _dense_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with each head contiguous, as the kernels require."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
