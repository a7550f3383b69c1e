"""How often the passkey comes back, by length and depth, under any pattern."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt.engine import Planner, compile_layers, hidden_states, prepare
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.common.intervals import wilson
from vllm_power.tools.passkey.documents import planned

DEPTHS = 20


class Evaluation:
    """A stored model under a pattern.

    tokens: at once; longest: the longest context. On a GPU, all contexts are computed in rows of this length, so that
    the layers are compiled once. Raises OSError if there is no model in ``folder``.
    """

    def __init__(self, folder: Path, options: PatternOptions, tokens: int, longest: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        use_power(self.model, options)
        prepare(self.model, options, dtype)
        self.tokens, self.longest = tokens, longest
        self.planner: Planner | None = None
        if Planner.suits(self.model.config, self.device):
            self.planner = Planner(self.model.config, options, dtype)
            compile_layers(self.model)

    # Not inference_mode: tensors that it makes, and something keeps, could never be part of a training.
    @torch.no_grad()
    def correct(self, context: int, per_depth: int, seed: int = 1) -> list[int]:
        """For each of ``DEPTHS`` equal shares of the context, how many of ``per_depth`` passkeys in it are right.

        A passkey is right if each of its digits is the likeliest token after the right ones before it: exactly if
        greedy decoding writes it.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        documents = max(1, (max(self.tokens, self.longest) if self.planner else self.tokens) // context)
        shares = torch.arange(DEPTHS, device=self.device).repeat(per_depth)
        correct = torch.zeros(DEPTHS, dtype=torch.int64, device=self.device)
        named = self._rows(documents, context)
        for chunk in shares.split(documents):
            share = torch.cat((chunk, chunk.new_zeros(documents - len(chunk))))
            batch = data.sample(documents, context, generator, depth=(share / DEPTHS, (share + 1) / DEPTHS))
            tokens = batch.tokens.view(named["position_ids"].shape) if named else batch.tokens
            hidden = hidden_states(self.model, input_ids=tokens, **named).view(documents, context, -1)
            positions = batch.answer_positions()[:, data.digit_columns()]
            at_digits = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
            guesses = self.model.lm_head(at_digits.to(self.model.dtype)).argmax(-1) - data.FIRST_DIGIT
            right = (guesses == batch.digits).all(-1)[: len(chunk)]
            correct.index_add_(0, chunk, right.long())
        return correct.tolist()

    def _rows(self, documents: int, context: int) -> dict[str, Any]:
        """What the model is given in addition to the tokens; empty without a planner: each document is a row."""
        if self.planner is None:
            return {}
        named = planned(self.planner, (documents, context), self.longest)
        return {name: part.to(self.device) for name, part in named.items()}


def row_of(context: int, correct: list[int], per_depth: int) -> dict[str, Any]:
    """The result of one context: ``correct`` of ``total``, Wilson's 95% interval, and the count at each depth."""
    total = per_depth * len(correct)
    low, high = wilson(sum(correct), total)
    return {
        "task": "passkey",
        "context": context,
        "correct": sum(correct),
        "total": total,
        "interval": [round(low, 4), round(high, 4)],
        "by_depth": correct,
    }
