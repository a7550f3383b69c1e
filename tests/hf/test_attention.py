"""Whole transformers models under the pattern: every family, padding, packing, generation, storing; refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.oracle import WINDOW, under_oracle
from support.random_model import FAMILIES, family_config, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_power.hf.attention import register, use_power
from vllm_power.options import PatternOptions, resolve
from vllm_power.pattern import preset

OPTIONS = {"block_size": 32, "window_blocks": 2, "dense_layers": [2]}
PATTERN = preset("power", block_size=32, window_blocks=2)
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 16,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``load(family)``: a small random model, in float64 but for its norms, which transformers computes in float32."""
    folder = tmp_path_factory.mktemp("models")

    def load(family: str = "qwen2", **named: Any) -> Any:
        extra = {"sliding_window": WINDOW} if family == "gemma3_text" else {}
        model = make_model(folder / family, family, **SIZES, extra_config=extra)
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, **named).eval()

    return load


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 300, shape, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Up to what a float32 norm may round differently where its float64 inputs differ in the last digits."""
    tolerance = 64 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def logits_alone(model: Any, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(text[None]).logits[0] for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_follows_the_pattern(family: str, load: Callable[..., Any]) -> None:
    """Logits and gradients. Gemma's layers 0 and 2 have a window of their own, which wins over being named dense."""
    model, inputs = load(family), tokens(2, 300)
    windows = (0, 2) if family == "gemma3_text" else ()
    options = {**OPTIONS, "dense_layers": [1] if windows else [2]}
    results = []
    for context in (under_oracle(model, PATTERN, options["dense_layers"], windows), None):
        model.zero_grad()
        if context is None:
            use_power(model, options)
            output = model(inputs, labels=inputs)
            output.loss.backward()
        else:
            with context:
                output = model(inputs, labels=inputs)
                output.loss.backward()
        results.append([output.logits, *(weight.grad for weight in model.parameters())])
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs)
    with torch.no_grad():
        use_power(model, {**options, "dense_layers": []})
        assert (model(inputs).logits - results[0][0]).abs().max() > 0.01  # the dense layer counts


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(load: Callable[..., Any]) -> None:
    model = load()
    use_power(model, OPTIONS)
    texts = [tokens(length, seed=length) for length in (400, 333, 1)]
    alone = logits_alone(model, texts)
    for left in (True, False):
        batch, mask = torch.zeros(3, 400, dtype=torch.long), torch.zeros(3, 400, dtype=torch.long)
        places = [slice(400 - len(text), 400) if left else slice(0, len(text)) for text in texts]
        for row, (text, place) in enumerate(zip(texts, places, strict=True)):
            batch[row, place], mask[row, place] = text, 1
        logits = model(batch, attention_mask=mask).logits
        for row, place in enumerate(places):
            close(logits[row, place], alone[row])


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens_q", "both"])
@torch.no_grad()
def test_packed_texts_are_as_if_alone(told_by: str, load: Callable[..., Any]) -> None:
    model = load()
    use_power(model, OPTIONS)
    texts = [tokens(length, seed=length) for length in (200, 1, 333)]
    lengths = torch.tensor([len(text) for text in texts])
    named: dict[str, Any] = {"use_cache": False}
    if told_by != "cu_seq_lens_q":
        named["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if told_by != "position_ids":
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        named |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 333, "max_length_k": 333}
    packed = model(torch.cat(texts)[None], **named).logits[0]
    close(packed, torch.cat(logits_alone(model, texts)))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
@torch.no_grad()
def test_generation_with_a_cache(family: str, load: Callable[..., Any]) -> None:
    """Two prompts, one padded on the left, over several block boundaries: as each text whole, without a cache."""
    model = load(family)
    use_power(model, {**OPTIONS, "dense_layers": [1]})
    prompts, steps = [tokens(150, seed=1), tokens(121, seed=2)], 40
    batch, mask = torch.zeros(2, 150, dtype=torch.long), torch.zeros(2, 150, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    answers = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, answers.sequences[row, 150:]])
        expected = model(whole[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        close(torch.stack([step[row] for step in answers.logits]), expected.to(answers.logits[0].dtype))


@torch.no_grad()
def test_prefill_in_chunks(load: Callable[..., Any]) -> None:
    model, inputs = load(), tokens(1, 300)
    use_power(model, OPTIONS)
    first = model(inputs[:, :77])
    second = model(inputs[:, 77:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), model(inputs).logits)


def test_gradient_checkpointing_changes_nothing(load: Callable[..., Any]) -> None:
    model, inputs = load(), tokens(1, 200)
    use_power(model, OPTIONS)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        model(inputs, labels=inputs).loss.backward()
        grads.append([weight.grad for weight in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_config_carries_the_pattern(load: Callable[..., Any], tmp_path: Path) -> None:
    model, inputs = load(), tokens(1, 400)
    use_power(model, PatternOptions(**OPTIONS))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["power_attention"]
    assert stored == {"pattern": "power", **OPTIONS}
    assert resolve(None, stored).effective == PatternOptions(**OPTIONS).effective
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="power"
    ).eval()
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert (dense(inputs).logits - model(inputs).logits).abs().max() > 0.01


@torch.no_grad()
def test_a_config_is_enough() -> None:
    config = small_config("llama")
    use_power(config, OPTIONS)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.config._attn_implementation == "power"
    assert model.config.power_attention["block_size"] == 32
    model(tokens(1, 200))


def test_adapters_and_what_is_merged(load: Callable[..., Any], tmp_path: Path) -> None:
    """A model that PEFT has wrapped follows the pattern, and what is merged and saved says so."""
    model, inputs = load(), tokens(1, 300)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    use_power(wrapped, OPTIONS)
    logits = wrapped(inputs, labels=inputs).logits
    with torch.no_grad(), under_oracle(model, PATTERN, OPTIONS["dense_layers"]):
        close(logits, wrapped(inputs).logits)
    wrapped.merge_and_unload().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["power_attention"] == {
        "pattern": "power",
        **OPTIONS,
    }


# --- what is refused ------------------------------------------------------------------------------------------------


def small_config(family: str, **extra: Any) -> Any:
    return family_config(
        family,
        head_dim=16,
        extra=extra,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=4096,
    )


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"windov_blocks": 3}, "did you mean 'window_blocks'"),
        ({"dense_layers": [4]}, "the model has 4 layers"),
        ({"dense_layers": "0-3"}, "none of the 4 layers would run the pattern"),
        ({"executor": "triton"}, "unknown option 'executor'"),
    ],
)
def test_wrong_options(options: dict[str, Any], cause: str) -> None:
    config = small_config("llama")
    with pytest.raises(ValueError, match=cause):
        use_power(config, options)
    assert not hasattr(config, "power_attention")


def test_a_model_of_windows_only() -> None:
    with pytest.raises(ValueError, match="sliding_window = None"):
        use_power(small_config("mistral", sliding_window=512), {})


def test_an_encoder_decoder() -> None:
    with pytest.raises(ValueError, match="cross attention"):
        use_power(AutoConfig.for_model("t5"), {})


def test_no_pattern_in_the_config() -> None:
    register()
    config = small_config("llama")
    config._attn_implementation = "power"
    with pytest.raises(ValueError, match=r"Call .*use_power"):
        AutoModelForCausalLM.from_config(config)(tokens(1, 20))


@pytest.mark.parametrize(
    ("inputs", "cause"),
    [
        ({"attention_mask": torch.tensor([[1] * 20 + [0] * 20 + [1] * 20])}, "padding inside a text"),
        (
            {"attention_mask": torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()},
            "two-dimensional attention_mask",
        ),
        ({"position_ids": torch.arange(30).repeat(2)[None]}, "use_cache=False"),
        ({"cu_seq_lens_q": torch.tensor([0, 40, 20])}, "must rise from 0"),
    ],
    ids=["hole", "ready-made-mask", "packed-with-cache", "cu_seq_lens"],
)
def test_inputs_that_do_not_fit(inputs: dict[str, Any], cause: str, load: Callable[..., Any]) -> None:
    model = load()
    use_power(model, OPTIONS)
    with pytest.raises(ValueError, match=cause):
        model(tokens(1, 60), **inputs)


def test_a_static_cache(load: Callable[..., Any]) -> None:
    model = load()
    use_power(model, OPTIONS)
    with pytest.raises(ValueError, match="leave out cache_implementation"):
        model.generate(tokens(1, 20), max_new_tokens=5, cache_implementation="static", do_sample=False)


def test_dropout() -> None:
    config = small_config("llama", attention_dropout=0.1)
    use_power(config, OPTIONS)
    model = AutoModelForCausalLM.from_config(config).train()
    with pytest.raises(ValueError, match="attention_dropout = 0"):
        model(tokens(1, 20))


def test_attention_to_later_tokens() -> None:
    config = small_config("gemma3_text", use_bidirectional_attention=True)
    use_power(config, OPTIONS)
    with pytest.raises(ValueError, match="cannot do this"):
        AutoModelForCausalLM.from_config(config)(tokens(1, 20))
