"""The architectures that vLLM serves as generators, and the transformers config that describes each."""

from dataclasses import dataclass

# Architectures under another name: vLLM runs the same class for a checkpoint of this one.
SAME_AS = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
    "IQuestCoderForCausalLM": "LlamaForCausalLM",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "TeleChat3ForCausalLM": "LlamaForCausalLM",
    "MiMoForCausalLM": "Qwen2ForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
}


@dataclass(frozen=True)
class Architecture:
    """name: in vLLM's registry. made_by: transformers' class, or None. model_type: of that class's config."""

    name: str
    made_by: str | None
    model_type: str | None
    multimodal: bool


def architectures() -> list[Architecture]:
    """Every text-generating architecture of vLLM's registry, text models first."""
    from vllm.model_executor.models import registry

    known = _model_types()
    found = []
    for multimodal, models in (
        (False, registry._TEXT_GENERATION_MODELS),
        (True, registry._MULTIMODAL_MODELS),
    ):
        for name in models:
            made_by = name if name in known else SAME_AS.get(name)
            made_by = made_by if made_by in known else None
            found.append(Architecture(name, made_by, known.get(made_by), multimodal))
    return found


def _model_types() -> dict[str | None, str]:
    """transformers' classes that generate, with the type of their config."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        getattr(auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}),
    )
    known: dict[str | None, str] = {}
    for mapping in mappings:
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                known.setdefault(name, model_type)
    # A text model that transformers lists under the type of its multimodal sibling has a config of its own.
    for name in known:
        own = getattr(getattr(transformers, str(name), None), "config_class", None)
        known[name] = getattr(own, "model_type", None) or known[name]
    return known
