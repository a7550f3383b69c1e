"""The small model: transformers' Llama with initial weights, and its checkpoint for transformers and vLLM."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.passkey.settings import Settings

MAX_POSITIONS = 131_072
NORM_EPSILON = 1e-6


def new_model(settings: Settings) -> LlamaForCausalLM:
    """The model before its training, float32 on the CPU; the weights depend on sizes and seed only."""
    model = LlamaForCausalLM(config(settings)).float()
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                spread = 1.0 if "embed" in name else weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    spread *= (2 * settings.layers) ** -0.5  # the residual stream keeps its size
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model


def config(settings: Settings) -> LlamaConfig:
    """transformers' LlamaConfig. Not Qwen2's: transformers replaces the tokenizer of every Qwen2 model by Qwen2's."""
    return LlamaConfig(
        vocab_size=len(data.WORDS),
        hidden_size=settings.width,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.width // settings.heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=data.ID[data.END],
        pad_token_id=data.ID[data.END],
    )


def export(model: LlamaForCausalLM, options: PatternOptions, folder: Path) -> None:
    """Write ``model`` in bfloat16, which it is converted to, with the pattern in config.json (docs/options.md)."""
    use_power(model, options)
    model.to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> Any:
    """transformers' fast tokenizer over the task's words; any other word becomes one unknown token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(data.ID, unk_token=data.UNKNOWN))
    # A word with the space before it; a digit, a mark or a space alone.
    pieces = Regex(r" ?\p{L}+|\d|[^\s\p{L}\d]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=data.END,
        pad_token=data.END,
        unk_token=data.UNKNOWN,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
