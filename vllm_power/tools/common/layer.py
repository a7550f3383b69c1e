"""One attention layer of a real vLLM backend without an engine: builder, implementation and a filled KV cache."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """The attention shape of a model."""

    heads: int = 8
    kv_heads: int = 2
    head_size: int = 128
    dtype: str = "bfloat16"
    max_model_len: int = 131_072


@dataclass
class Batch:
    """The requests of a step: cached tokens and new tokens of each."""

    computed: Sequence[int]
    new: Sequence[int]

    def common_metadata(self, page_size: int, num_pages: int) -> Any:
        """vLLM's CommonAttentionMetadata for this step, with pages in random order."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        new = torch.tensor(list(self.new))
        lengths = torch.tensor(list(self.computed)) + new
        pages_of = -(-lengths // page_size)
        order = torch.randperm(num_pages - 1)[: int(pages_of.sum())].int() + 1
        table = torch.zeros(len(new), int(pages_of.max()), dtype=torch.int32)
        slots = []
        for row, own in enumerate(order.split(pages_of.tolist())):
            table[row, : len(own)] = own
            positions = torch.arange(int(lengths[row] - new[row]), int(lengths[row]))
            slots.append(own[positions // page_size].long() * page_size + positions % page_size)
        starts = torch.tensor([0, *self.new]).cumsum(0).int()
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths.int(),
            num_reqs=len(new),
            num_actual_tokens=int(new.sum()),
            max_query_len=int(new.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=torch.cat(slots),
        )


@dataclass
class Layer:
    """Builder and implementation of ``backend`` with a KV cache of ``num_pages`` random pages, on the CPU."""

    backend: str
    shape: Shape
    num_pages: int
    page_size: int = 128
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.attention import Attention

        request_amx()
        shape = self.shape
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(_model_config(shape)))
            self.config = EngineArgs(
                model=directory,
                skip_tokenizer_init=True,
                attention_backend=self.backend,
                block_size=self.page_size,
                max_model_len=shape.max_model_len,
                additional_config={"power": {"mode": "trained", **self.options}},
            ).create_engine_config()
        dtype = getattr(torch, shape.dtype)
        name = "model.layers.0.self_attn.attn"
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with set_current_vllm_config(self.config):
                self.layer = Attention(
                    shape.heads,
                    shape.head_size,
                    shape.head_size**-0.5,
                    num_kv_heads=shape.kv_heads,
                    cache_config=self.config.cache_config,
                    prefix=name,
                )
                spec = self.layer.get_kv_cache_spec(self.config)
                builder = self.layer.attn_backend.get_builder_cls()
                self.builder = builder(spec, [name], self.config, torch.device("cpu"))
        finally:
            torch.set_default_dtype(default)
        cache_shape = (self.num_pages, shape.kv_heads, self.page_size, 2 * shape.head_size)
        self.cache = torch.randn(cache_shape, dtype=dtype)

    def run(self, step: Any, tensors: tuple[torch.Tensor, ...], layers: int) -> None:
        """Run a step as the engine does: build the metadata once, then write the cache and attend in each layer."""
        query, key, value, output = tensors
        metadata = self.builder.build(0, step)
        for _ in range(layers):
            self.layer.impl.do_kv_cache_update(self.layer, key, value, self.cache, step.slot_mapping)
            self.layer.impl.forward(self.layer, query, key, value, self.cache, metadata, output)


def request_amx() -> None:
    """Request an Intel CPU's AMX tiles from the kernel, once per process and before vLLM's C++ attention runs.

    vLLM's worker does this when it starts. Without it the first tile instruction ends the process with SIGILL.
    Raises RuntimeError if the kernel refuses.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise RuntimeError(
            "this CPU has AMX, but the kernel does not grant its tiles to this process: use Linux 5.16 or later, and "
            "in a virtual machine or sandbox one that passes AMX through"
        )


def _model_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.heads * shape.head_size,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": 1024,
        "max_position_embeddings": shape.max_model_len,
        "torch_dtype": shape.dtype,
    }
