"""A small Llama for training from scratch: plain modules whose state dict is that of transformers' LlamaForCausalLM.

On a GPU all documents of a step lie in one row, and which blocks a query sees is data, not code (packing.py): so a
layer is compiled once, for every length, block size and pattern.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vllm_power.hf import segments
from vllm_power.pattern import Pattern

Mask = BlockMask | Pattern
NORM_EPSILON = 1e-6
Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """The model's sizes, named as in a Llama's configuration where that is short."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    rope_theta: float = 1e7

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.width // self.heads


class Linear(nn.Linear):
    """Computes in its input's dtype, whatever its weights are kept in: bfloat16 arithmetic over float32 weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """Llama's RMSNorm: normalises in float32, scales in its input's dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        return self.weight.to(x.dtype) * wide.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.head_size = sizes.heads, sizes.head_size
        self.q_proj = Linear(sizes.width, sizes.width)
        self.k_proj = Linear(sizes.width, sizes.kv_heads * sizes.head_size)
        self.v_proj = Linear(sizes.width, sizes.kv_heads * sizes.head_size)
        self.o_proj = Linear(sizes.width, sizes.width)

    def forward(self, x: torch.Tensor, rotation: Rotation, mask: Mask) -> torch.Tensor:
        # [rows, heads or kv heads, length, head size]
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, rotation), rotate(key, rotation)
        if isinstance(mask, BlockMask):
            mixed = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        else:
            document = ((0, query.shape[2]),)
            mixed = segments.attend(query, key, value, mask, document, self.head_size**-0.5)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Llama's gated feed-forward network."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = Linear(sizes.width, sizes.ffn)
        self.up_proj = Linear(sizes.width, sizes.ffn)
        self.down_proj = Linear(sizes.ffn, sizes.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.width)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = Norm(sizes.width)
        self.mlp = MLP(sizes)

    def forward(self, x: torch.Tensor, rotation: Rotation, mask: Mask) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, layers and the last norm: transformers' LlamaModel."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = Norm(sizes.width)

    def forward(
        self, tokens: torch.Tensor, rotation: Rotation, mask: Mask, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Normed hidden states [rows, length, width], computed in ``dtype``. tokens: int64 [rows, length]."""
        x = self.embed_tokens(tokens).to(dtype)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        return self.norm(x)


class SmallModel(nn.Module):
    """LlamaForCausalLM. In training ``model`` gives hidden states, ``lm_head`` logits only where they are wanted."""

    def __init__(self, sizes: Sizes, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Decoder(sizes)
        self.lm_head = Linear(sizes.width, sizes.vocab_size)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    spread = 1.0 if "embed" in name else weight.shape[1] ** -0.5
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        spread *= (2 * sizes.layers) ** -0.5  # the residual stream keeps its size
                    weight.copy_(torch.randn(weight.shape, generator=generator) * spread)

    def forward(self, tokens: torch.Tensor, rotation: Rotation, mask: Mask) -> torch.Tensor:
        """Logits [rows, length, vocabulary] of every position; tokens int64 [rows, length]."""
        return self.lm_head(self.model(tokens, rotation, mask))


def rotation_at(positions: torch.Tensor, sizes: Sizes) -> Rotation:
    """(cosines, sines) of rotary embeddings, float32 [length, head size]; positions: int [length]."""
    exponents = torch.arange(0, sizes.head_size, 2, device=positions.device).float() / sizes.head_size
    angles = positions.float()[:, None] * sizes.rope_theta**-exponents
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn pairs (i, i + head size / 2) by their position's angles; keeps x's dtype."""
    cosines, sines = rotation
    low, high = x.chunk(2, -1)
    return (x * cosines + torch.cat((-high, low), -1) * sines).to(x.dtype)
