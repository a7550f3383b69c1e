"""vLLM's complete configuration as `vllm serve` makes it, without starting anything. In the engine's process."""

from pathlib import Path
from typing import Any


def refusal(model: Path, settings: dict[str, Any]) -> str | None:
    """The error that refuses the configuration; None if it is accepted."""
    try:
        _configure(model, settings)
    except ValueError as error:
        return str(error)
    return None


def compile_hash(model: Path, settings: dict[str, Any]) -> str:
    """The key of vLLM's compile cache."""
    return _configure(model, settings).compute_hash()


def _configure(model: Path, settings: dict[str, Any]) -> Any:
    from vllm import EngineArgs

    defaults = {"attention_backend": "power", "skip_tokenizer_init": True}
    return EngineArgs(model=str(model), **(defaults | settings)).create_engine_config()
