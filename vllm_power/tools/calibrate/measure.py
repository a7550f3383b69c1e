"""What the pattern does to a model: to each layer's attention, and to the distribution of the next token.

Only tokens past the pattern's dense range count (1,536 by default): before it, nothing is left out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_power.hf import layers
from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.pattern import Pattern

SCORED = 128  # tokens of each window whose next-token distribution is compared, spread evenly


@dataclass(frozen=True)
class Effect:
    """kl: of the dense model's next-token distribution from this one's, mean over tokens, in nats. agreement: share of
    tokens where both have the same best one, 0 to 1."""

    kl: float
    agreement: float


class Probe:
    """A model and windows of text. ``windows_read`` is called after each forward pass, for progress.

    model: from transformers, in evaluation mode; its attention is changed. windows: int64 [windows, tokens].
    options: the pattern; its dense layers do not matter.
    """

    def __init__(
        self,
        model: Any,
        options: PatternOptions,
        windows: torch.Tensor,
        windows_read: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.windows = windows
        self.windows_read = windows_read
        self._pattern = {name: value for name, value in options.set_by_user.items() if name != "dense_layers"}
        config = model.config.get_text_config()
        self.candidates = sorted(set(range(config.num_hidden_layers)) - layers.keeping_their_own(config))
        first = options.effective_pattern.dense_tokens
        last = windows.shape[1] - 1
        self._scored = torch.linspace(first, last, min(SCORED, last - first + 1)).round().long().unique()
        self._past_dense = first
        use_power(model, {"pattern": "full"})
        self._reference = list(self._distributions())

    def effect(self, dense_layers: Iterable[int]) -> Effect:
        """Of serving the model with these layers dense and the others under the pattern."""
        use_power(self.model, {**self._pattern, "dense_layers": sorted(dense_layers)})
        divergence, agreed, count = 0.0, 0, 0
        for dense, sparse in zip(self._reference, self._distributions(), strict=True):
            divergence += (dense.exp() * (dense - sparse)).sum(-1, dtype=torch.float64).sum().item()
            agreed += int((dense.argmax(-1) == sparse.argmax(-1)).sum())
            count += len(dense)
        return Effect(divergence / count, agreed / count)

    @torch.inference_mode()
    def output_errors(self) -> dict[int, float]:
        """{layer: how far its attention's output under the pattern is from the dense one, relative to that}.

        At the dense model's own inputs, so each layer's error is its alone. After the output projection.
        """
        use_power(self.model, self._pattern)
        squares = {layer: [0.0, 0.0] for layer in self.candidates}
        everything_dense = frozenset(self.candidates)

        def compare(module: Any, given: tuple[Any, ...], named: dict[str, Any], sparse: Any) -> Any:
            batch = named["attention_mask"]
            dense = module.forward(*given, **{**named, "attention_mask": batch.with_dense(everything_dense)})
            counted = [output[0][:, self._past_dense :].double() for output in (sparse, dense)]
            squares[module.layer_idx][0] += (counted[0] - counted[1]).square().sum().item()
            squares[module.layer_idx][1] += counted[1].square().sum().item()
            return dense

        hooks = [
            module.register_forward_hook(compare, with_kwargs=True)
            for layer, module in self._attention_modules().items()
            if layer in squares
        ]
        try:
            for _ in self._distributions():
                pass
        finally:
            for hook in hooks:
                hook.remove()
        return {layer: (error / size) ** 0.5 if size else 0.0 for layer, (error, size) in squares.items()}

    def _attention_modules(self) -> dict[int, Any]:
        found = {
            module.layer_idx: module
            for name, module in self.model.named_modules()
            if name.endswith("self_attn") and hasattr(module, "layer_idx")
        }
        if not set(self.candidates) <= found.keys():
            raise ValueError(f"{type(self.model).__name__} does not call its layers' attention self_attn")
        return found

    @torch.inference_mode()
    def _distributions(self) -> Iterable[torch.Tensor]:
        """Log-probabilities of the next token, float32 [scored tokens, vocabulary], of each window."""
        for window in self.windows:
            given = window[None].to(self.model.device)
            logits = self.model(given, use_cache=False, logits_to_keep=self._scored).logits
            self.windows_read()
            yield logits[0].float().log_softmax(-1)


def windows(text: str, tokenizer: Any, pattern: Pattern, tokens: int, count: int) -> torch.Tensor:
    """int64 [windows, tokens]: up to ``count`` windows, spread evenly over ``text``, that do not overlap.

    Each begins with what the tokenizer puts before a text. A text of fewer than ``tokens`` tokens is one window.
    Raises ValueError if a window would not reach past what every query sees under ``pattern``.
    """
    start = tokenizer("", verbose=False)["input_ids"]
    inside = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = min(tokens, len(start) + len(inside))
    if tokens <= pattern.dense_tokens:
        raise ValueError(
            f"windows of {tokens:,} tokens say nothing: up to {pattern.dense_tokens:,} tokens this pattern is plain "
            f"causal attention. The text has {len(inside):,} tokens; give one with more than "
            f"{2 * pattern.dense_tokens:,}, of the kind that will be served, and --tokens as long as its prompts"
        )
    length = tokens - len(start)
    count = min(count, len(inside) // length)
    begins = [number * (len(inside) - length) // max(1, count - 1) for number in range(count)]
    return torch.tensor([start + inside[begin : begin + length] for begin in begins])
