"""A model's tokenizer, or one sentence that says why there is none."""

from typing import Any


def tokenizer_of(model: str, **options: Any) -> Any:
    """Return transformers' tokenizer in a folder or of a name. Raises ValueError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, **options)
    except Exception as error:  # whatever a library that reads one of its files raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{model} has no tokenizer that transformers can load: put the original's tokenizer files there "
            f"({lines[0]})"
        ) from error
