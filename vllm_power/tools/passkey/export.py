"""Write the small model as a folder that transformers and vLLM load: weights, config.json, tokenizer."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from vllm_power.pattern import Pattern, preset
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.passkey.small_model import NORM_EPSILON, Sizes, SmallModel

MAX_POSITIONS = 131_072


def export(model: SmallModel, pattern: Pattern, folder: Path) -> None:
    """Write ``model`` in bfloat16, with the pattern it was trained under in its config."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        exported = LlamaForCausalLM(config(model.sizes, pattern))
    weights = {name: weight.detach().cpu().bfloat16() for name, weight in model.state_dict().items()}
    exported.load_state_dict(weights, strict=True, assign=True)
    exported.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def config(sizes: Sizes, pattern: Pattern) -> Any:
    """transformers' LlamaConfig; ``power_attention`` is read by the backend (README.md, "Options").

    Not Qwen2's: transformers replaces the tokenizer of every Qwen2 model by Qwen2's own.
    """
    from transformers import LlamaConfig

    paper = preset(pattern.name)
    changed = {
        field.name: getattr(pattern, field.name)
        for field in fields(Pattern)
        if getattr(pattern, field.name) != getattr(paper, field.name)
    }
    return LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_size,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=data.ID[data.END],
        pad_token_id=data.ID[data.END],
        dtype="bfloat16",
        power_attention={"pattern": pattern.name, **changed},
    )


def make_tokenizer() -> Any:
    """transformers' fast tokenizer over the task's words; any other word becomes one unknown token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
