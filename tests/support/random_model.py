"""Small random models that real engines load offline, for tests.

The weights are noise, but not flat noise: what attention reads changes the answer, and the next token's
logits are far enough apart that two correct computations mostly agree on the best one.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from support.english_tokenizer import make_tokenizer

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
UNUSUAL = ("gemma4_text", "llama4_text")  # transformers' own model types

# Spread of what a weight matrix puts out, for inputs of spread 1. Tried on 3,000 tokens and 4 layers: leaving
# out the keys that the power pattern leaves out moves logprobs by 0.4 on average, bfloat16 rounding by 0.07.
# Larger gains in attention make the model chaotic: rounding grows faster than what is to be seen.
ATTENTION_GAIN = 1.0
MLP_GAIN = 0.5
EMBEDDING_GAIN = 1.0
LOGITS_GAIN = 6.0


def make_model(
    directory: str | Path,
    family: str = "qwen2",
    *,
    hidden_size: int | None = None,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    vocab_size: int = 2048,
    max_positions: int = 40960,
    dtype: str = "bfloat16",
    seed: int = 0,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Make a model and its tokenizer in `directory`, unless the same one is there; return the directory.

    hidden_size defaults to num_heads * head_size, which Qwen2 demands; extra_config goes into config.json.
    gemma3_text alternates layers with a sliding window (512 tokens) and full ones; the others have no window.
    Raises ValueError for an unknown family or for sizes that the family cannot have.
    """
    directory = Path(directory)
    recipe = {key: value for key, value in locals().items() if key != "directory"}
    recorded = directory / "recipe.json"
    if recorded.exists() and json.loads(recorded.read_text()) == recipe:
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Created next to its destination and then moved, so an interruption leaves nothing incomplete.
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        made = Path(folder) / "model"
        config = family_config(
            family,
            hidden_size=hidden_size or num_heads * head_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_size,
            vocab_size=vocab_size,
            max_position_embeddings=max_positions,
            extra=extra_config or {},
        )
        save_random_model(config, made, dtype=dtype, seed=seed)
        make_tokenizer(vocab_size, max_positions).save_pretrained(made)
        (made / recorded.name).write_text(json.dumps(recipe, indent=2))
        shutil.rmtree(directory, ignore_errors=True)
        made.rename(directory)
    return directory


def family_config(family: str, *, head_dim: int, extra: dict[str, Any], **sizes: int) -> Any:
    """Return transformers' config of a family, with the given sizes (named as in config.json)."""
    if family not in (*FAMILIES, *UNUSUAL):
        raise ValueError(f"unknown model family {family!r}; known: {', '.join(FAMILIES)}")
    if family == "qwen2" and head_dim * sizes["num_attention_heads"] != sizes["hidden_size"]:
        raise ValueError("Qwen2 derives its head size: hidden_size must be num_heads * head_size")
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        **sizes,
        "intermediate_size": 2 * sizes["hidden_size"],
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if family != "qwen2":
        settings["head_dim"] = head_dim
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "gemma3_text":
        kinds = ("sliding_attention", "full_attention")
        settings |= {
            "layer_types": [kinds[layer % 2] for layer in range(sizes["num_hidden_layers"])],
            "query_pre_attn_scalar": head_dim,
            "sliding_window": 512,
        }
    if family == "gemma4_text":  # the last two layers read the KV cache of the two before them
        kinds = ("sliding_attention", "full_attention")
        settings |= {
            "layer_types": [kinds[layer % 2] for layer in range(sizes["num_hidden_layers"])],
            "sliding_window": 512,
            "global_head_dim": head_dim,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": sizes["vocab_size"],
        }
    if family == "llama4_text":  # every fourth layer sees everything, the others a chunk
        settings |= {
            "intermediate_size_mlp": 2 * sizes["hidden_size"],
            "attention_chunk_size": 1024,
            "moe_layers": [],
            "interleave_moe_layer_step": 100,
            "no_rope_layers": [int(layer % 4 != 3) for layer in range(sizes["num_hidden_layers"])],
        }
    return AutoConfig.for_model(family, **(settings | extra))


def save_random_model(config: Any, directory: Path, *, dtype: str, seed: int) -> None:
    """Fill a model with noise and save it. The noise depends on the seed alone, not on the dtype."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it is a file of a few megabytes
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                weight.copy_(noise * spread(name, weight.shape[1], config.model_type))
            else:
                # Biases and norms keep their meaning (0, 1, or Gemma's 1 + 0) and get a little noise.
                weight.add_(noise * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def spread(name: str, fan_in: int, model_type: str) -> float:
    """Return the standard deviation of the entries of the weight matrix `name`."""
    if "embed_tokens" in name:
        # Gemma multiplies embeddings by the root of the hidden size itself.
        return EMBEDDING_GAIN * (fan_in**-0.5 if model_type.startswith("gemma") else 1.0)
    if "lm_head" in name:
        return LOGITS_GAIN * fan_in**-0.5
    return (MLP_GAIN if "mlp" in name else ATTENTION_GAIN) * fan_in**-0.5
