"""Read the answer of a chat: a reasoning model thinks first, and not every server takes the thoughts out."""

import re
from typing import Any

# An answer of N tokens is looked for in its first 8 characters per token: a longer text may name anything.
CHARACTERS_PER_TOKEN = 8


def read(choice: Any, *, max_tokens: int, continued: bool) -> tuple[str, str | None]:
    """Return the text of a choice's answer, and why there is none; None if there is one.

    max_tokens: of the answer alone. continued: whether the model continued the beginning of an answer. Then it does not
    think, but vLLM may take all of it for thoughts, because it looks for their end.
    """
    message, cut = choice.message, choice.finish_reason == "length"
    content = message.content or ""
    thoughts = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None) or ""
    if continued:
        text = content or thoughts
    else:
        opened, _, rest = content.rpartition("</think>")
        text = rest if opened else re.sub(r"^\s*<think>.*", "", content, flags=re.DOTALL)
        if not text.strip() and not cut:
            text = thoughts  # it ended in its thoughts: the answer is among them, if anywhere
    if text.strip():
        return text[: max_tokens * CHARACTERS_PER_TOKEN], None
    return "", "cut off in its thoughts" if cut and (thoughts or content) else "empty"
