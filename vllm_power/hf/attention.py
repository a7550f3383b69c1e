"""The pattern in transformers, as ``attn_implementation="power"``.

    from vllm_power.hf.attention import use_power

    model = AutoModelForCausalLM.from_pretrained("MODEL")
    use_power(model, {"dense_layers": [0, 13]})     # the options of the server, by the same names
    ...                                             # train
    model.save_pretrained("trained")                # config.json has power_attention, which `vllm serve` reads

For a checkpoint that already has it, call ``register()``, then ``from_pretrained(..., attn_implementation="power")``.

transformers calls this module for the mask, once per forward pass, and for the attention, in each layer. The mask is a
Batch (batch.py), which records which tokens form one text: blocks are counted from the first token of each text. On
GPUs, Triton kernels follow lists of tiles (tiles.py, sparse.py). On CPUs, and for a few queries, the attention is dense
over the visible blocks (segments.py).

To find the texts, a Batch has to read the mask or the positions back from the device. A training loop that knows its
texts can pass ``power_plan``, a sparse.Plan, to the model in addition to its inputs. Then nothing is read back, and
whole layers can be compiled.

With ``dense_tail`` or ``decode: "dense"``, the rows that see everything depend on where each prompt ends: pass
``power_prompt_tokens`` to the model, one number per text (dense_rows.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flex_attention_mask, sdpa_mask

from vllm_power.hf import dense_rows, documents, layers, sparse
from vllm_power.hf.batch import Batch
from vllm_power.options import PatternOptions

NAME = "power"

# The number of queries from which transformers' own kernels for windows are worth their compilation.
MANY_QUERIES = 128

# Arguments of transformers' attention functions that change the result in ways that are not implemented here.
UNKNOWN_TO_PATTERN = ("softcap", "s_aux", "position_bias", "sliding_window")


def register() -> None:
    """Make ``attn_implementation="power"`` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, power_attention)
    AttentionMaskInterface.register(NAME, power_mask)


def use_power(model_or_config: Any, options: PatternOptions | Mapping[str, Any]) -> None:
    """Make a model run the pattern. ``model_or_config``: a transformers model, a PEFT wrapper of one, or a config.

    options: the server's options (docs/options.md) or a mapping of them; {} is the default pattern. They are stored in
    the config as ``power_attention``, so ``save_pretrained`` writes them.

    Raises ValueError for an unknown or invalid option, and for a model that cannot run under the pattern.
    """
    register()
    given = options if isinstance(options, PatternOptions) else PatternOptions.model_validate(options)
    is_model = isinstance(model_or_config, torch.nn.Module)
    config = model_or_config.config if is_model else model_or_config
    text_config = config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(
            "an encoder-decoder model has cross attention, which is not causal: the pattern does not fit"
        )
    layers.check(text_config, given)
    text_config.power_attention = {"pattern": given.pattern, **given.set_by_user}
    if not is_model:
        text_config._attn_implementation = NAME
        return
    parts = {name: NAME for name in config.sub_configs if getattr(config, name) is text_config}
    model_or_config.set_attn_implementation(parts or NAME)
    if text_config._attn_implementation != NAME:
        raise ValueError(
            f"{type(model_or_config).__name__} does not take attention implementations from transformers' "
            "AttentionInterface, so it cannot run under the pattern"
        )


def power_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **others: Any,
) -> Any:
    """The mask function that transformers' models call. attention_mask: bool [rows, tokens so far], False for padding.

    Layers with their own window (``local_size``) get transformers' own mask. Raises ValueError for a mask that the
    pattern cannot represent.
    """
    if local_size is not None:
        many = q_length >= MANY_QUERIES and torch.device(others.get("device", "cpu")).type == "cuda"
        own_mask = flex_attention_mask if many else sdpa_mask
        return own_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            **others,
        )
    if use_vmap:
        _refuse("the model adds a mask of its own to the causal one")
    if kv_offset or q_offset + q_length != kv_length:
        _refuse(
            f"there are {kv_length} keys for {q_offset + q_length} tokens, as with a static cache or prefix tuning",
            "Use the default, growing cache (leave out cache_implementation).",
        )
    if attention_mask is not None and attention_mask.shape[-1] != kv_length:
        _refuse(f"attention_mask has {attention_mask.shape[-1]} tokens, there are {kv_length}")
    told_apart = None if mask_function is causal_mask_function else mask_function
    found = layers.options_of(config)
    return Batch(
        found.effective_pattern,
        found.dense_layer_indices(config.num_hidden_layers),
        documents.of_labels(documents.labels(told_apart, attention_mask, batch_size, kv_length)),
        q_length,
        kv_length,
        found.rows,
    )


def power_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that each layer calls. Returns [rows, Q, H, D] and no weights.

    query: [rows, H, Q, D]; key and value: [rows, G, K, D]. attention_mask: the result of :func:`power_mask`. Raises
    ValueError for attention that the pattern cannot represent.
    """
    plan = named.get("power_plan")
    if plan is not None:
        return _planned(module, query, key, value, plan, dropout, scaling, named), None
    layer: Any = module.layer_idx
    own = layers.keeping_their_own(module.config)
    if layer in own and not isinstance(attention_mask, Batch):
        forward = flex_attention_forward if isinstance(attention_mask, BlockMask) else sdpa_attention_forward
        return forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named)
    if not isinstance(attention_mask, Batch):
        _refuse(
            "the mask of this layer was not made by the pattern",
            "Give a two-dimensional attention_mask (1 for tokens, 0 for padding) or none, not a ready-made mask.",
        )
    _check(module, dropout, named)
    batch = attention_mask
    if named.get("cu_seq_lens_q") is not None:
        batch = batch.packed(named["cu_seq_lens_q"])
        if own and batch is not attention_mask:
            _refuse(
                "cu_seq_lens_q alone, which layers with a window of their own do not follow",
                "Give position_ids that begin at 0 in each text, and use_cache=False.",
            )
    if named.get("position_ids") is not None:
        batch.check_positions(named["position_ids"])
    # Under autocast, rotary embeddings leave queries and keys in float32, while values have the lower precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    output = batch.attend(layer, query, key, value, scale)
    if batch.rule.has_dense_rows and layer not in batch.dense_layers:
        prompts = named.get("power_prompt_tokens")
        if prompts is None:
            _refuse(
                "dense_tail and decode need the length of each prompt",
                "Give the model power_prompt_tokens, one number per text (vllm_power.hf.dense_rows.prompt_tokens "
                "reads them from labels).",
            )
        output = dense_rows.replaced(output, query, key, value, batch.rows, prompts, batch.rule, scale)
    return output.transpose(1, 2).contiguous(), None


def _planned(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: sparse.Plan,
    dropout: float,
    scaling: float | None,
    named: Mapping[str, Any],
) -> torch.Tensor:
    """Attention by the lists that came with the batch. It is compiled, so it must not depend on the layer's index."""
    _check(module, dropout, named)
    lists = plan.of_layer(bool(module.power_dense))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return sparse.attend(query.to(value.dtype), key.to(value.dtype), value, lists, scale)


def _check(module: torch.nn.Module, dropout: float, named: Mapping[str, Any]) -> None:
    if dropout:
        _refuse("dropout in attention", "Set config.attention_dropout = 0.")
    for name in UNKNOWN_TO_PATTERN:
        if named.get(name) is not None:
            _refuse(f"attention with {name}")
    if named.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        _refuse("attention to later tokens")


def _refuse(cause: str, remedy: str = "Use another attention implementation for this model.") -> NoReturn:
    raise ValueError(f'attn_implementation="power" cannot do this: {cause}. {remedy}')
