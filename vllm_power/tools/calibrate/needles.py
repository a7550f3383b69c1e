"""How likely a model's right answers are on needle prompts, by the layers that stay dense.

Many sets of dense layers are tried on the same prompt that differ in one layer. Layers below it compute the same in
all of them: they are computed once, and a trial begins at the layer that changes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_power.hf import layers
from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.common.recall import Example


@dataclass(frozen=True)
class Score:
    """Of one prompt. likelihood: log-probability of the answer, in nats. exact: whether greedy decoding gives it."""

    likelihood: float
    exact: bool


def mean_likelihood(scores: Sequence[Score]) -> float:
    """The mean over prompts, in nats per answer."""
    return sum(score.likelihood for score in scores) / len(scores)


class Needles:
    """A model from transformers, in evaluation mode; its attention and its layers' ``forward`` are changed.

    options: the pattern and the row rule; its dense layers do not matter. passed: called after each forward pass with
    the share of the layers that it took, for progress. Raises ValueError for a model whose layers are not found.
    """

    def __init__(
        self, model: Any, options: PatternOptions, passed: Callable[[float], None] = lambda share: None
    ) -> None:
        self.model = model
        self._passed = passed
        self._options = {name: value for name, value in options.set_by_user.items() if name != "dense_layers"}
        config = model.config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.candidates = sorted(set(range(self.num_layers)) - layers.keeping_their_own(config))
        self._stack = Stack(model, self.num_layers)
        # Layers that read another layer's keys cannot do without it.
        self._skips = not getattr(config, "num_kv_shared_layers", 0)

    def dense(self, examples: Iterable[Example]) -> list[Score]:
        """With dense attention in every row and layer."""
        use_power(self.model, {"pattern": "full"})
        return [self._score(example) for example in examples]

    def scores(self, dense_layers: Iterable[int], examples: Iterable[Example]) -> list[Score]:
        """With these layers dense and the others under the row rule."""
        self._keep(dense_layers)
        return [self._score(example) for example in examples]

    def with_one_more(
        self, kept: Sequence[int], tried: Iterable[int], examples: Iterable[Example]
    ) -> dict[int, list[Score]]:
        """{layer: scores with ``kept`` and this layer dense} for each of ``tried``."""
        found: dict[int, list[Score]] = {layer: [] for layer in sorted(tried)}
        for example in examples:
            reached, states = 0, None
            for layer in found:
                if layer > reached and self._skips:
                    self._keep(kept)
                    states = self._states(example, reached, layer, states)
                    reached = layer
                self._keep([*kept, layer])
                found[layer].append(self._score(example, reached, states))
        return found

    def _keep(self, dense_layers: Iterable[int]) -> None:
        use_power(self.model, {**self._options, "dense_layers": sorted(dense_layers)})

    @torch.inference_mode()
    def _score(self, example: Example, first: int = 0, states: torch.Tensor | None = None) -> Score:
        """states: what the layers below ``first`` gave."""
        with self._stack.part(first, self.num_layers, states):
            logits = self._forward(example)
        logprobs = logits.float().log_softmax(-1)
        answer = torch.tensor(example.answer_tokens, device=logits.device)
        likelihood = logprobs.gather(1, answer[:, None]).sum(dtype=torch.float64).item()
        return Score(likelihood, bool((logprobs.argmax(-1) == answer).all()))

    @torch.inference_mode()
    def _states(
        self, example: Example, first: int, end: int, states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What layer ``end`` - 1 gives, from what layer ``first`` - 1 gave."""
        part = self._stack.part(first, end, states)
        with part:
            self._forward(example)
        return part.result

    def _forward(self, example: Example) -> torch.Tensor:
        """Logits that predict the answer's tokens, [tokens of the answer, vocabulary]."""
        prompt = len(example.prompt)
        given = torch.tensor([[*example.prompt, *example.answer_tokens]], device=self.model.device)
        asked = torch.arange(prompt - 1, given.shape[1] - 1, device=self.model.device)
        found = self.model(given, use_cache=False, logits_to_keep=asked, power_prompt_tokens=[prompt]).logits[
            0
        ]
        self._passed(self._stack.share)
        return found


class Stack:
    """The decoder layers of a model, of which a forward pass may compute a part: a context manager, by :meth:`part`.

    Raises ValueError for a model whose layers are not found.
    """

    def __init__(self, model: Any, num_layers: int) -> None:
        self.num_layers = num_layers
        found = _decoder_layers(model)
        if sorted(found) != list(range(num_layers)):
            raise ValueError(f"{type(model).__name__} does not call its layers' attention self_attn")
        self.first, self.end = 0, num_layers
        self.given: torch.Tensor | None = None
        self.result: torch.Tensor | None = None
        for number, layer in found.items():
            layer.forward = self._in_part(number, layer.forward)

    def part(self, first: int, end: int, given: torch.Tensor | None) -> "Stack":
        """The layers ``first`` to ``end`` - 1. given: what the layer before gave; needed unless ``first`` is 0."""
        self.first, self.end, self.given, self.result = first, end, given, None
        return self

    @property
    def share(self) -> float:
        """The share of the layers that the part has."""
        return (self.end - self.first) / self.num_layers

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *error: object) -> None:
        self.first, self.end, self.given = 0, self.num_layers, None

    def _in_part(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
            if not self.first <= number < self.end:
                return hidden_states
            if number == self.first and self.given is not None:
                hidden_states = self.given
            output = forward(hidden_states, *others, **named)
            if number == self.end - 1:
                self.result = output
            return output

        return wrapped


def _decoder_layers(model: Any) -> dict[int, Any]:
    """The modules whose attention is called self_attn, by the number of their layer."""
    return {
        module.self_attn.layer_idx: module
        for module in model.modules()
        if hasattr(getattr(module, "self_attn", None), "layer_idx")
    }
