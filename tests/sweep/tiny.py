"""A tiny random checkpoint of any architecture that transformers can configure."""

from pathlib import Path
from typing import Any

from support.random_model import spread

VOCABULARY = 512
POSITIONS = 2048

# What a config gets of each size that it has. Heads of 32 are the smallest that vLLM's CPU attention takes.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "max_position_embeddings": POSITIONS,
    "sliding_window": 64,
    "attention_chunk_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "expert_ffn_hidden_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "hidden_size_per_layer_input": 32,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_d_ssm": 256,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "mamba_chunk_size": 64,
    "mamba_dt_rank": 8,
    "ssm_state_size": 16,
    "state_size": 16,
    "n_groups": 1,
    "chunk_size": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "mtp_num_hidden_layers": 0,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    # vision and audio towers, which the sweep does not run
    "embed_dim": 128,
    "depth": 2,
    "num_heads": 4,
    "image_size": 64,
    "patch_size": 16,
    "out_hidden_size": 128,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "d_model": 128,
    "projection_dim": 128,
}

DERIVED = ("num_key_value_heads", "head_dim")  # None in a config that leaves them to other sizes

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# What a model type needs in addition, so that some layers see everything, and sizes that depend on each other.
NEEDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": [SLIDING, FULL] * 2},
    "gemma3n_text": {
        "layer_types": [SLIDING, FULL] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {"layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 0},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "rope"},
    "lfm2": {
        "layer_types": ["conv", FULL] * 2,
        "tie_word_embeddings": True,
        "block_dim": 128,
        "conv_dim": 128,
        "conv_dim_out": 128,
        "block_multiple_of": 32,
        "block_auto_adjust_ff_dim": False,
        "block_ffn_dim_multiplier": 1.0,
    },
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2, "num_dense_layers": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "attention"]},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 32,
        "attention_head_dim": 64,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "qwen3_next": {"layer_types": [LINEAR, FULL] * 2},
    "qwen3_5_text": {"layer_types": [LINEAR, FULL] * 2},
    "qwen3_5_moe_text": {"layer_types": [LINEAR, FULL] * 2},
    "olmo_hybrid": {"layer_types": [LINEAR, FULL] * 2},
    "gpt2": {"n_inner": None},
    "gptj": {"rotary_dim": 16},
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid"},
    "mistral": {"sliding_window": None},
    "mamba2": {"num_heads": 8},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True},
    "laguna": {
        "layer_types": [SLIDING, FULL] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
        "num_attention_heads_per_layer": [4] * 4,
    },
    "llama4_text": {"num_experts_per_tok": 1, "no_rope_layers": [1, 1, 1, 0]},
    "afmoe": {
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm4_moe": {"head_dim": 32},
    "glm4v_moe_text": {"head_dim": 32, "use_qk_norm": False},
}


def config_of(model_type: str, **more: Any) -> Any:
    """transformers' config of a model type in tiny sizes."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **(tiny_fields(AutoConfig.for_model(model_type)) | more))


def tiny_fields(default: Any) -> dict[str, Any]:
    """The fields that make a config like ``default`` tiny, its sub-configs included."""
    named, given = getattr(default, "attribute_map", {}), vars(default)
    fields: dict[str, Any] = {}
    for name, value in SIZES.items():
        stored = named.get(name, name)
        # What is off stays off; a list (one size per layer) has its own entry in NEEDS.
        if isinstance(given.get(stored), int | float) or (stored in given and name in DERIVED):
            fields[stored] = value
    rope = given.get("rope_parameters") or {}
    if sections := rope.get("mrope_section"):
        pairs = [size * SIZES["head_dim"] // 2 // sum(sections) for size in sections[1:]]
        fields["rope_parameters"] = {**rope, "mrope_section": [SIZES["head_dim"] // 2 - sum(pairs), *pairs]}
    for name in default.sub_configs:
        sub = given.get(name)
        if sub is None and name == "vision_config":
            sub = default.sub_configs[name]()  # Gemma 4 has none by default, and vLLM wants one
        if sub is not None:
            fields[name] = {"model_type": sub.model_type, **tiny_fields(sub)}
    return fields | NEEDS.get(default.model_type, {})


def save(made_by: str, name: str, model_type: str, folder: Path, seed: int = 0) -> None:
    """A random checkpoint in ``folder``. name: the architecture that its config.json names."""
    import torch
    import transformers

    config = config_of(model_type)
    model = getattr(transformers, made_by)(config).float()
    fill(model, torch.Generator().manual_seed(seed))
    model.config.architectures = [made_by]
    model.save_pretrained(folder)
    if name != made_by:
        file = folder / "config.json"
        file.write_text(file.read_text().replace(f'"{made_by}"', f'"{name}"'))


def fill(model: Any, generator: Any) -> None:
    """Noise that keeps its spread from layer to layer. Norms, biases and a state's parameters keep their meaning."""
    import torch

    ties = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            is_matrix = weight.dim() == 2 or (weight.dim() == 3 and "expert" in name)
            if is_matrix and not name.endswith("A_log"):
                gives_logits = "embed_tokens" in name and ties
                role = "lm_head" if gives_logits else name
                weight.copy_(noise * spread(role, weight.shape[-1], model.config.model_type))
            else:
                weight.add_(noise * 0.1)
