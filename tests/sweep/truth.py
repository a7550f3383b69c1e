"""transformers under the same explicit mask: an independent model around an independent attention, where it can."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_power.kernels.reference import attention, visibility_mask
from vllm_power.pattern import Pattern, preset

NAME = "sweep"
_pattern: list[Pattern] = []
_ran: set[int] = set()  # the layers whose attention asked for the pattern


def of_transformers(
    made_by: str,
    folder: Path,
    texts: list[list[int]],
    told: list[torch.Tensor],
    without: list[torch.Tensor],
    pattern: Pattern,
    apart: Callable[[list[torch.Tensor], list[torch.Tensor]], float],
) -> dict[str, Any]:
    """How far ``told`` is from transformers in float32 under ``pattern``, or why transformers cannot say.

    without: vLLM's own dense log-probabilities. Where they already differ from transformers', it cannot judge.
    made_by: transformers' class. apart: the measure.
    """
    try:
        model = _load(made_by, folder)
        dense = [_logprobs(model, text, preset("full", block_size=pattern.block_size)) for text in texts]
        sparse = [_logprobs(model, text, pattern) for text in texts]
    except Exception as error:
        return {
            "transformers": None,
            "transformers_why": f"{type(error).__name__}: {error}".splitlines()[0][:160],
        }
    if not _ran:
        return {"transformers": None, "transformers_why": "its attention cannot be given a mask"}
    themselves = apart(without, dense)
    figures = {"transformers": apart(told, sparse), "transformers_dense": themselves}
    if figures["transformers"] > 10 * max(themselves, 1e-3):
        return figures
    if themselves > 0.1 * apart(dense, sparse):
        why = f"vLLM's own dense attention differs from transformers by {themselves:.0e}"
        return figures | {"transformers": None, "transformers_why": why}
    return figures


def _load(made_by: str, folder: Path) -> Any:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model = getattr(transformers, made_by).from_pretrained(folder, dtype=torch.float32).eval()
    text = model.config.get_text_config()
    parts = {part: NAME for part in model.config.sub_configs if getattr(model.config, part) is text}
    model.set_attn_implementation(parts or NAME)
    return model


@torch.inference_mode()
def _logprobs(model: Any, text: list[int], pattern: Pattern) -> torch.Tensor:
    _pattern[:] = [pattern]
    inputs = torch.tensor([text])
    logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, inputs[0, 1:, None])[:, 0]


def _mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **named: Any) -> torch.Tensor:
    """transformers' own mask, and for layers without a window the pattern. bool [1, 1, tokens, tokens]"""
    from transformers.masking_utils import sdpa_mask

    named["allow_is_causal_skip"] = False
    own = sdpa_mask(batch_size, q_length, kv_length, *args, **named)
    if named.get("local_size") is not None:
        return own
    return own & visibility_mask(_pattern[0], torch.arange(q_length), kv_length)


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **named: Any
) -> Any:
    _ran.add(id(module))
    sinks = named.get("s_aux")
    one = attention(
        query[0].transpose(0, 1).double(),
        key[0].transpose(0, 1).double(),
        value[0].transpose(0, 1).double(),
        mask[0, 0],
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        named.get("softcap") or 0.0,
        None if sinks is None else sinks.double(),
    )
    return one.to(query.dtype)[None], None
