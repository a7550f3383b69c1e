"""The trained model as it is served: in the precision of the original, adapters merged, the pattern in its config."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt.settings import Settings


def save_weights(trainer: Trainer, folder: Path) -> None:
    """What was trained, whole, whatever the processes share: the model, or the adapter. All processes call it."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))


def export(
    weights: Path, settings: Settings, options: PatternOptions, original: Any, tokenizer: Any, output: Path
) -> None:
    """Write the model of ``weights`` (from :func:`save_weights`) to ``output``. original: the config of settings.model.

    Adapters are merged in float32 and rounded once.
    """
    if settings.lora:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(weights)).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    use_power(model, options)
    model.config.use_cache = getattr(original, "use_cache", True)
    model.to(original.dtype or torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
