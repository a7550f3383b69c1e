"""A transformers model made fast to train: layers compiled one by one, lists instead of masks, a loss without logits.

Nothing here waits for the device: what the kernels need to know of a batch is made on the host, from the batch, and
travels with it (:class:`Planner`).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator
from transformers.modeling_outputs import CausalLMOutputWithPast

from vllm_power.hf import layers, tiles
from vllm_power.hf.attention import use_power
from vllm_power.hf.sparse import Plan
from vllm_power.options import PatternOptions
from vllm_power.pattern import ENDLESS, preset
from vllm_power.tools.adapt.linear_loss import linear_loss
from vllm_power.tools.adapt.relay import Relay

# What some models do to their logits before the loss; the loss here does not.
OTHER_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")

# Compiled variants of a layer: dense or not, with and without gradients, for each shape of a batch.
VARIANTS = 64


def has_plain_logits(model: Any) -> bool:
    """Whether the logits of ``model`` are its head's product and nothing more, so that ``linear_loss`` is its loss."""
    config = model.config.get_text_config()
    plain = all(getattr(config, name, None) in (None, 1.0) for name in OTHER_LOGITS)
    head = model.get_output_embeddings()
    return plain and head is not None and getattr(head, "bias", None) is None


class Planner:
    """Makes the plan of a batch for a model of ``config``, computed in ``dtype``.

    every_layer_dense: whether dense lists are wanted for a model without the pattern, such as a teacher.
    """

    def __init__(
        self, config: Any, options: PatternOptions, dtype: torch.dtype, every_layer_dense: bool = False
    ) -> None:
        text = config.get_text_config()
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.pattern, self.full = options.effective_pattern, preset("full")
        self.tiles = [tiles.tile_of(pattern, head_size, dtype) for pattern in (self.pattern, self.full)]
        self.rows = options.rows
        self.dense = every_layer_dense or bool(options.dense_layer_indices(text.num_hidden_layers))

    @staticmethod
    def suits(config: Any, device: torch.device) -> bool:
        """Whether the kernels can do all that a model of ``config`` does on ``device``."""
        text = config.get_text_config()
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return device.type == "cuda" and head_size <= tiles.WIDEST_HEAD and not layers.keeping_their_own(text)

    def __call__(self, position_ids: torch.Tensor, prompts: torch.Tensor | None = None) -> Plan:
        """position_ids: int [rows, length], on the CPU; a text begins wherever they do not rise by one.

        prompts: int [rows, length], at the first token of a text that has a prompt its length, elsewhere 0. Only such
        texts have rows that see everything.
        """
        rows, length = position_ids.shape
        texts = []
        for (row, start, end), prompt in texts_of(position_ids, prompts):
            dense = self.rows.dense_rows(prompt) if prompt and self.rows.has_dense_rows else (0, 0)
            texts.append(tiles.Text(row, start, end, dense[0], min(dense[1], end - start)))
        whole = [text._replace(dense_from=0, dense_to=0) for text in texts]
        return Plan(
            tiles.lists(self.pattern, texts, rows, length, self.tiles[0]),
            tiles.lists(self.full, whole, rows, length, self.tiles[1]) if self.dense else None,
        )


def texts_of(
    position_ids: torch.Tensor, prompts: torch.Tensor | None = None
) -> Iterator[tuple[tuple[int, int, int], int]]:
    """(row, start, end) of each text, and its prompt's length, 0 for none. Both tensors as a Planner takes them."""
    for row, positions in enumerate(position_ids.numpy()):
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        for start, end in itertools.pairwise([0, *breaks.tolist(), len(positions)]):
            yield (row, start, end), 0 if prompts is None else int(prompts[row, start])


def prompt_tokens(options: PatternOptions, prompts: Iterable[int]) -> dict[str, Any]:
    """What a model without a plan is given if some rows see everything. prompts: of each text, 0 for none.

    A text without a prompt is one whose prompt never ends: none of its rows sees everything.
    """
    if not options.rows.has_dense_rows:
        return {}
    return {"power_prompt_tokens": [prompt or ENDLESS for prompt in prompts]}


class Collator:
    """Rows of a batch together, with their plan, or without a planner with their prompts' lengths."""

    def __init__(self, planner: Planner | None, options: PatternOptions) -> None:
        self.planner = planner
        self.options = options

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        # The tokenizer's would add a mask, and texts would see each other.
        batch = default_data_collator(rows)
        prompts = batch.pop("prompts", None)
        if self.planner is not None:
            batch["power_plan"] = self.planner(batch["position_ids"], prompts)
            return batch
        found = (prompt for _, prompt in texts_of(batch["position_ids"], prompts))
        return batch | prompt_tokens(self.options, found)


def speed_up(
    model: Any,
    options: PatternOptions,
    dtype: torch.dtype,
    *,
    teacher: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    share: float = 0.0,
    relay: Relay | None = None,
    probe: float = 0.0,
) -> None:
    """Let ``model`` give its loss without logits in training, and take a Plan as ``power_plan``; in place.

    dtype: what is computed in, and what layers pass to each other; under autocast, weights may be in another one.
    teacher: what gives the hidden states and the head's weight of the model whose predictions are learnt, from the same
    arguments; ``share`` as in ``linear_loss``. relay: a probe that becomes a part of the model, and whose loss counts
    ``probe`` times as much per token as the loss of the text.
    """
    if relay is not None:
        model.relay = relay
        relay.watch(model)
    prepare(model, options, dtype)
    forward = model.forward

    @functools.wraps(forward)
    def without_logits(*given: Any, **named: Any) -> Any:
        if given or not model.training or named.get("labels") is None:
            return forward(*given, **named)
        labels, count = named.pop("labels"), named.pop("num_items_in_batch", None)
        weights, relayed = named.pop("label_weights", None), named.pop("relayed", None)
        try:
            hidden = hidden_states(model, **named)
            aim = teacher(**named) if teacher is not None else None
            loss = linear_loss(hidden, model.get_output_embeddings().weight, labels, aim, share, weights)
            if relay is not None and relayed is not None:
                loss = loss + probe * relay(relayed)
        finally:
            if relay is not None:
                relay.seen.clear()  # after an error it would keep what the layers computed
        return CausalLMOutputWithPast(loss=loss / ((labels[:, 1:] >= 0).sum() if count is None else count))

    model.forward = without_logits


def prepare(model: Any, options: PatternOptions, dtype: torch.dtype) -> None:
    """Let ``model`` take a Plan, and compute in ``dtype`` whatever the weights' dtype is; in place."""
    mark_dense(model, options.dense_layer_indices(model.config.get_text_config().num_hidden_layers))
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.to(dtype))


def hidden_states(model: Any, power_plan: Plan | None = None, **named: Any) -> torch.Tensor:
    """[rows, length, width]: what the head of ``model`` is given. named: its input_ids, position_ids and the like."""
    if power_plan is not None:
        # A mask that is ready: transformers looks at its dimensions alone, and no layer at it.
        ready = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=named["input_ids"].device)
        named |= {"attention_mask": ready, "power_plan": power_plan}
    return model.get_decoder()(use_cache=False, **named).last_hidden_state


def mark_dense(model: Any, dense_layers: frozenset[int]) -> None:
    """Tell each attention module whether it is dense: what is compiled must not depend on the number of a layer."""
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if number is not None:
            module.power_dense = number in dense_layers


def as_teacher(model: Any, device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What answers with the hidden states and the head's weight of ``model``, which is changed: frozen, and dense."""
    model.requires_grad_(False).eval().to(device)
    use_power(model, {"pattern": "full"})
    mark_dense(model, frozenset(range(model.config.get_text_config().num_hidden_layers)))

    @torch.no_grad()
    def answer(**named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states(model, **named), model.get_output_embeddings().weight

    return answer


def compile_layers(model: Any) -> None:
    """Compile each decoder layer and the last norm: one graph for all layers that do the same."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * VARIANTS)
    decoder = model.get_decoder()
    for layer in decoder.layers:
        layer.compile(dynamic=False)
    if hasattr(decoder, "norm"):
        decoder.norm.compile(dynamic=False)
