"""What each attention layer of a vLLM model runs: the only classification, which every module uses.

A layer runs the pattern ("sparse"), vLLM's own attention over all tokens ("dense") or over a window or chunk
("sliding_window"). ``drafts`` identifies the layers of a draft model or a drafting head.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_power import options
from vllm_power.options import NAME

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SPARSE, DENSE, SLIDING_WINDOW = "sparse", "dense", "sliding_window"


def is_selected(vllm_config: "VllmConfig") -> bool:
    """Whether ``power`` is the attention backend of this configuration, for all layers or for one kind of them."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(backend is not None and backend.name == NAME for backend in chosen)


def is_draft(vllm_config: "VllmConfig") -> bool:
    """Whether this is the configuration of a draft model, which vLLM makes from the target's."""
    return vllm_config.model_config is not None and vllm_config.model_config.runner_type == "draft"


def drafts(layer_name: str, vllm_config: "VllmConfig") -> bool:
    """Whether the layer belongs to a draft model or a drafting head. vLLM names the layers of a head ``mtp.``, or
    numbers them after the model's layers."""
    from vllm.model_executor.models.utils import extract_layer_index

    model = vllm_config.model_config
    if is_draft(vllm_config) or layer_name.startswith(("draft_model.", "mtp.")):
        return True
    return extract_layer_index(layer_name) >= model.get_total_num_hidden_layers()


def stays_dense(layer_name: str, vllm_config: "VllmConfig") -> bool:
    """Whether a layer that was built with our backend runs dense attention: if the option ``dense_layers`` names it, or
    if it drafts and power was not chosen for drafting (``--speculative-config '{"attention_backend": "power"}'``)."""
    from vllm.model_executor.models.utils import extract_layer_index

    if drafts(layer_name, vllm_config):
        asked = getattr(vllm_config.speculative_config, "attention_backend", None)
        return asked is None or asked.name != NAME
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    dense = options.of_config(vllm_config).dense_layer_indices(num_layers)
    return extract_layer_index(layer_name) in dense


def attention_layers(vllm_config: "VllmConfig") -> Iterator[tuple[str, Any, str]]:
    """The name, the layer and the kind of each built attention layer, including layers that draft."""
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if hasattr(layer, "attn_backend"):
            # A chunk (Llama-4) is a window too.
            windowed = any(
                getattr(layer, name, None) is not None for name in ("sliding_window", "attention_chunk_size")
            )
            kind = SPARSE if layer.attn_backend.get_name() == NAME else SLIDING_WINDOW if windowed else DENSE
            yield name, layer, kind


def indices_by_kind(vllm_config: "VllmConfig") -> dict[str, list[int]]:
    """The indices of the model's attention layers by what they run; layers that draft are not counted."""
    from vllm.model_executor.models.utils import extract_layer_index

    found: dict[str, list[int]] = {SPARSE: [], DENSE: [], SLIDING_WINDOW: []}
    for name, _, kind in attention_layers(vllm_config):
        if not drafts(name, vllm_config):
            found[kind].append(extract_layer_index(name))
    return found
