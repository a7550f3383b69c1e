"""Training on a GPU: attention forward and backward against its peers, and whole steps, in one run.

The model is of SmolLM2-135M's shape with random weights: speed does not depend on them. Its rows have 8,192 tokens and
the pattern's blocks 64, so 128 blocks per row as in the paper's setting of 32K in blocks of 256.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from vllm_power.hf import sparse, tiles
from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt.engine import Collator, Planner, as_teacher, compile_layers, speed_up
from vllm_power.tools.adapt.linear_loss import linear_loss
from vllm_power.tools.common import results

MODEL = "SmolLM2-135M's shape, random weights"
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
OPTIONS = PatternOptions.model_validate({"block_size": 64})
LENGTH = 8192
BF16_PEAK = 989e12  # of an H100 or H200, dense, by the vendor's datasheet

Row = dict[str, Any]


def main(rows: int = 8, steps: int = 4, folder: Path = results.FOLDER) -> int:
    """Measure, print and append to ``folder``/adapted.jsonl. rows: at once; steps: batches that are timed."""
    here = results.machine()
    measured = [*attention(rows)]
    for kind in ("power", "dense", "distill"):
        measured += whole_steps(kind, rows, steps)
        torch.cuda.empty_cache()
    for row in measured:
        print(f"{row['pattern']:12} {row['task']:14} {row['value']:14,.3f}  {row['options']}")
    results.append("adapted", measured, folder, here)
    return 0


def row_of(pattern: str, task: str, value: float, **options: Any) -> Row:
    if pattern != "dense":
        options = {**OPTIONS.set_by_user, **options}
    about = {"model": MODEL, "pattern": pattern, "options": options, "tokens": 0, "seed": 0}
    return {**about, "task": task, "context": LENGTH, "value": value}


# --- attention alone --------------------------------------------------------------------------------------------------


def attention(rows: int) -> list[Row]:
    """Milliseconds of one layer, forward and backward, bfloat16: "attention_ms"."""
    heads, kv_heads, size = 9, 3, 64
    pattern = OPTIONS.effective_pattern
    states = [
        torch.randn(rows, LENGTH, count, size, device="cuda", dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    repeated = [states[0], *(part.detach().repeat_interleave(3, 1).requires_grad_() for part in states[1:])]
    texts = [tiles.Text(row, 0, LENGTH) for row in range(rows)]
    made = tiles.lists(pattern, texts, rows, LENGTH, tiles.tile_of(pattern, size, torch.bfloat16)).to("cuda")
    blocks = pattern.num_blocks(LENGTH)
    sees = torch.zeros(blocks, blocks, dtype=torch.bool)
    for block in range(blocks):
        sees[block, list(pattern.visible_blocks(block))] = True
    sees = sees.cuda()

    def rule(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & sees[query // pattern.block_size, key // pattern.block_size]

    mask = create_block_mask(rule, None, None, LENGTH, LENGTH, device="cuda")
    flex: Any = torch.compile(flex_attention)

    def power(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return sparse.attend(query, key, value, made, size**-0.5).transpose(1, 2)

    ways: dict[str, tuple[str, list[torch.Tensor], Callable[..., torch.Tensor]]] = {
        "power": ("power", states, power),
        "flex": ("power", states, partial(flex, block_mask=mask, enable_gqa=True)),
    }
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        ways[backend.name.lower()] = "dense", repeated, _dense_by(backend)
    found = []
    for name, (under, given, way) in ways.items():
        try:
            value = milliseconds(partial(_both, way, given))
        except RuntimeError as error:  # a backend that this machine lacks
            print(f"{name}: {error}")
            continue
        found.append(row_of(under, "attention_ms", value, rows=rows, impl=name))
    return found


def _dense_by(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    return attend


def _both(way: Callable[..., torch.Tensor], given: list[torch.Tensor]) -> None:
    output = way(*given)
    torch.autograd.grad(output, given, output.detach())


def milliseconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The median of ``repeats`` calls after three to warm up."""
    times = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return median(times)


# --- whole steps ------------------------------------------------------------------------------------------------------


def whole_steps(kind: str, rows: int, steps: int) -> list[Row]:
    """Tokens per second and the share of the chip's peak: forward, backward and, every ``steps`` batches, AdamW.

    kind: "power"; "distill", with a dense teacher; "dense", the same engine over PyTorch's dense attention.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).train()
    planner = None
    if kind == "dense":
        model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.bfloat16())
    else:
        teacher = None
        if kind == "distill":
            original = LlamaForCausalLM(LlamaConfig(**SHAPE)).to("cuda", torch.bfloat16)
            teacher = as_teacher(original, torch.device("cuda"))
            compile_layers(original)
        use_power(model, OPTIONS)
        planner = Planner(model.config, OPTIONS, torch.bfloat16, every_layer_dense=kind == "distill")
        speed_up(model, OPTIONS, torch.bfloat16, teacher=teacher, share=0.5 if teacher else 0.0)
    compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    collate = Collator(planner)
    tokens = torch.randint(0, SHAPE["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(0))
    row = {"input_ids": tokens, "position_ids": torch.arange(LENGTH), "labels": tokens}

    def step() -> None:
        for _ in range(steps):
            batch = {
                name: part.pin_memory().to("cuda", non_blocking=True)
                for name, part in collate([row] * rows).items()
            }
            with torch.autocast("cuda", torch.bfloat16):
                if planner is None:
                    labels = batch.pop("labels")
                    hidden = model.model(**batch, use_cache=False).last_hidden_state
                    loss = linear_loss(hidden, model.lm_head.weight, labels)
                else:
                    loss = model(**batch, num_items_in_batch=1).loss
            (loss / (rows * LENGTH * steps)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    rate = steps * rows * LENGTH / (milliseconds(step, repeats=3) / 1000)
    pattern = "dense" if kind == "dense" else "power"
    options = {"rows": rows} | ({"distill": 0.5} if kind == "distill" else {})
    found = [row_of(pattern, "tokens_per_s", rate, **options)]
    if kind != "distill":
        found.append(row_of(pattern, "flop_use", rate * operations(pattern) / BF16_PEAK, **options))
    return found


def operations(pattern: str) -> float:
    """Floating-point operations for a token: six for each weight, and the visible pairs'; none counted twice."""
    width, inner, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    weights = layers * (width * (width + 2 * 192) + width * width + 3 * width * inner)
    weights += width * SHAPE["vocab_size"]
    seen = OPTIONS.effective_pattern
    pairs = LENGTH * (LENGTH + 1) / 2
    if pattern != "dense":
        pairs = (seen.visible_pairs(LENGTH) - seen.num_blocks(LENGTH) / 2) * seen.block_size**2
    return 6 * weights + 3 * 4 * width * layers * pairs / LENGTH
