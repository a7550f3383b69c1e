"""The served model's tokenizer, which prompts are measured with."""

import sys
from typing import Any

from vllm_power.tools.common.tokenizer import tokenizer_of
from vllm_power.tools.evals.settings import EvalError

CHAT_TOKENS = 64  # room for a chat template that is not known here


def load(source: str) -> Any:
    """transformers' tokenizer in a folder or of a name."""
    try:
        # Texts are cut to size here: no warning where one is longer than the model takes.
        return tokenizer_of(source, model_max_length=sys.maxsize)
    except ValueError as error:
        raise EvalError(
            f"there is no tokenizer at {source!r} ({str(error.__cause__).strip().splitlines()[0]}): "
            "give the served model's folder or name with --tokenizer"
        ) from error


def chat_tokens(tokenizer: Any) -> int:
    """Tokens that a chat has in addition to its question."""
    if not tokenizer.chat_template:
        return CHAT_TOKENS
    empty = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False
    )
    return len(tokenizer(empty, add_special_tokens=False).input_ids)
