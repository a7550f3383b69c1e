"""The estimate: its counts against the pattern's definition, its memory, its models and GPUs."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import NAMES, POWER, RowRule, preset
from vllm_power.tools.web import gpus, shapes
from vllm_power.tools.web.counts import held, prompt_pairs, token_pairs, tokens_read
from vllm_power.tools.web.estimate import estimate
from vllm_power.tools.web.question import Question

# --- counts are the pattern's ----------------------------------------------------------------------------------------


@given(st.sampled_from(NAMES), st.integers(1, 700))
@settings(deadline=None, max_examples=40)
def test_pairs_of_a_prompt_are_those_of_its_tokens(name, tokens):
    pattern = preset(name, block_size=16)
    seen = [tokens_read(pattern, position) for position in range(tokens)]
    assert token_pairs(pattern, tokens) == sum(seen)


@given(st.sampled_from(NAMES), st.integers(1, 700), st.integers(0, 800), st.booleans())
@settings(deadline=None, max_examples=40)
def test_pairs_of_a_prompt_with_dense_rows(name, tokens, tail, decode):
    pattern, rule = preset(name, block_size=16), RowRule(tail, decode)
    seen = [
        position + 1 if rule.sees_everything(position, tokens) else tokens_read(pattern, position)
        for position in range(tokens)
    ]
    assert prompt_pairs(pattern, tokens, rule) == sum(seen)


@given(st.sampled_from(NAMES), st.integers(0, 700))
@settings(deadline=None, max_examples=40)
def test_tokens_read_are_those_that_the_definition_shows(name, position):
    pattern = preset(name, block_size=16)
    assert tokens_read(pattern, position) == sum(
        pattern.sees(position // 16, key // 16) for key in range(position + 1)
    )


@pytest.mark.parametrize("prompt, output", [(131_072, 1_024), (10_000, 1), (300, 5_000), (1, 1)])
def test_blocks_held_are_those_of_the_cache_manager(prompt, output):
    from vllm_power.kv_cache_spec import PowerAttentionSpec

    chunk = min(prompt, 2_048)
    spec = PowerAttentionSpec(
        block_size=256,
        num_kv_heads=1,
        head_size=128,
        dtype="bfloat16",
        pattern=POWER,
        max_model_len=1 << 20,
        max_in_flight_tokens=chunk,
        lookahead_tokens=0,
    )
    of_request = held(POWER, prompt, output, chunk)
    assert of_request.peak == spec.peak_pages(0, prompt + output)
    lives = lifetimes(POWER, spec.lifetimes(prompt + output).last)
    assert of_request.decode == max(lives.live[min(prompt // 256, lives.last) :])
    assert of_request.decode <= of_request.peak <= of_request.dense


def test_blocks_after_a_long_prompt():
    """The first token of the answer still lies in the prompt's last block."""
    assert held(POWER, 131_071, 1_025, 8_192).decode / 512 == pytest.approx(0.074, abs=0.0005)


def test_without_a_pattern_nothing_is_saved():
    answer = estimate(Question(model="Qwen3-8B", pattern="full", context=50_000, chunk=1_000))
    assert answer["prefill"]["ratio"] == answer["decode"]["ratio"] == answer["workload"]["ratio"] == 1
    all_dense = estimate(Question(model="Qwen3-8B", dense_layers=36, context=50_000))
    assert all_dense["prefill"]["ratio"] == 1
    assert len(set(all_dense["memory"]["request_bytes"].values())) == 1


def test_dense_layers_cost_what_they_cost():
    of_layers = [
        estimate(Question(model="Qwen2-7B", dense_layers=number))["prefill"]["attention_flops"]
        for number in (0, 14, 28)
    ]
    assert of_layers[1]["power"] == (of_layers[0]["power"] + of_layers[2]["power"]) / 2
    assert of_layers[2]["power"] == of_layers[2]["dense"] == of_layers[0]["dense"]


def test_a_mode_sets_what_is_left_out():
    free = Question(model="Qwen2-7B", mode="training_free")
    assert (free.dense_tail, free.decode, free.dense_layers) == (128, "dense", 8)
    some = Question(model="Qwen2-7B", mode="training_free", dense_layers=3, decode="pattern")
    assert (some.dense_tail, some.decode, some.dense_layers) == (128, "pattern", 3)
    trained = Question(model="Qwen2-7B", mode="trained")
    assert trained == Question(model="Qwen2-7B")
    assert (trained.dense_tail, trained.decode, trained.dense_layers) == (0, "pattern", 0)
    assert Question(model="Qwen2-7B", mode="training_free", layers=2).dense_layers == 0


def test_dense_rows_cost_what_they_cost():
    plain, tail, decode = (
        estimate(Question(model="Qwen2-7B", **rows))
        for rows in ({}, {"dense_tail": 128}, {"dense_tail": 128, "decode": "dense"})
    )
    assert plain["prefill"]["seconds"]["power"] < tail["prefill"]["seconds"]["power"]
    assert tail["prefill"] == decode["prefill"]
    assert tail["decode"] == plain["decode"]
    assert decode["decode"]["ratio"] == 1
    request = tail["memory"]["request_bytes"]
    assert request["decode"] == plain["memory"]["request_bytes"]["decode"]
    assert plain["memory"]["request_bytes"]["peak"] < request["peak"] < request["dense"]
    assert len(set(decode["memory"]["request_bytes"].values())) == 1


def test_each_mode_is_told():
    for mode in ("trained", "training_free"):
        answer = estimate(Question(model="Qwen2-7B", mode=mode))
        told = answer["modes"][mode]
        assert told["first_token"] == answer["prefill"]["ratio"]
        assert told["decode_step"] == answer["decode"]["ratio"]
        assert told["workload"] == answer["workload"]["ratio"]
        assert answer["served"]["mode"] == mode
    assert answer["modes"] == estimate(Question(model="Qwen2-7B", dense_layers=9))["modes"]


def test_layers_with_a_window_cost_the_same_either_way():
    shape = shapes.known()["Qwen2-7B"].model_dump() | {"window_layers": 28, "window_tokens": 4_096}
    answer = estimate(Question(**shape))
    assert answer["prefill"]["ratio"] == answer["decode"]["ratio"] == 1
    few = estimate(Question(**shape, context=1_000))["prefill"]["attention_flops"]["dense"]
    assert few == estimate(Question(model="Qwen2-7B", context=1_000))["prefill"]["attention_flops"]["dense"]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_kv_bytes_of_a_request():
    memory = estimate(Question(model="Qwen2-7B", context=131_072, output=1))["memory"]
    assert memory["request_bytes"]["dense"] == 131_072 * 2 * 4 * 128 * 2 * 28
    assert memory["weight_bytes"] == pytest.approx(15.23e9, rel=0.001)
    half = estimate(Question(model="Qwen2-7B", context=131_072, output=1, kv_bytes=1))["memory"]
    assert 2 * half["request_bytes"]["peak"] == memory["request_bytes"]["peak"]


def test_gpus_that_are_more_than_kv_heads_hold_copies():
    four, eight = (
        estimate(Question(model="Qwen2-7B", gpus=number))["memory"]["request_bytes"]["dense"]
        for number in (4, 8)
    )
    assert eight == 2 * four


def test_what_fits_together():
    memory = estimate(Question(model="Qwen2-7B"))["memory"]
    request, fits, space = memory["request_bytes"], memory["fits"], memory["kv_space_bytes"]
    assert fits["dense"] * request["dense"] <= space < (fits["dense"] + 1) * request["dense"]
    together = request["peak"] + (fits["power"] - 1) * request["decode"]
    assert together <= space < together + request["decode"]


def test_what_does_not_fit():
    large = Question(model="Llama-3.1-70B", gpu="L4")
    answer = estimate(large)
    assert answer["memory"]["fits"] == {"dense": 0, "power": 0}
    assert answer["workload"] == {"seconds": {"dense": None, "power": None}, "ratio": None}
    only_power = estimate(Question(model="Qwen2-7B", gpu="L4", concurrency=1))
    assert only_power["memory"]["fits"]["dense"] == 0 < only_power["memory"]["fits"]["power"]
    assert only_power["workload"]["seconds"]["dense"] is None
    assert only_power["workload"]["seconds"]["power"] > 0


def test_requests_that_do_not_fit_together_take_turns():
    answers = {number: estimate(Question(model="Qwen2-7B", concurrency=number)) for number in (16, 17, 32)}
    fits = answers[16]["memory"]["fits"]["dense"]
    assert fits == 16
    one_turn = answers[16]["workload"]["seconds"]["dense"]
    assert answers[32]["workload"]["seconds"]["dense"] == pytest.approx(2 * one_turn)
    assert one_turn < answers[17]["workload"]["seconds"]["dense"] < 2 * one_turn


# --- models and GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, billions",
    [
        ("Qwen2-7B", 7.62),
        ("Qwen2.5-14B", 14.77),
        ("Qwen2.5-32B", 32.76),
        ("Qwen2.5-72B", 72.71),
        ("Qwen3-8B", 8.19),
        ("Qwen3-32B", 32.76),
        ("Qwen3-30B-A3B", 30.53),
        ("Qwen3-235B-A22B", 235.09),
        ("Llama-3.1-8B", 8.03),
        ("Llama-3.1-70B", 70.55),
        ("Mistral-Nemo-12B", 12.25),
        ("Mixtral-8x7B", 46.70),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, billions):
    assert shapes.known()[name].parameters / 1e9 == pytest.approx(billions, rel=0.001)


def test_every_preset_is_counted():
    counted = test_presets_have_the_published_number_of_parameters.pytestmark[0].args[1]
    assert {name for name, _ in counted} == set(shapes.known())


def test_experts_are_read_as_they_are_chosen():
    shape = shapes.known()["Qwen3-30B-A3B"]
    outside = shape.vocab_size * shape.hidden_size
    assert shape.read_parameters(1) == pytest.approx(shape.active_parameters + outside)
    assert shape.read_parameters(10_000) == pytest.approx(shape.parameters - outside)


def test_a_gpu_that_was_not_measured_reaches_the_h200s_share():
    h200, h100 = gpus.known()["H200 SXM"], gpus.known()["H100 SXM"]
    assert (h200.tflops, h200.tb_per_s) == (670, 4.25)
    assert h100.tflops == pytest.approx(670)  # the same chip
    assert h100.tb_per_s / h100.sheet_tb_per_s == pytest.approx(4.25 / 4.8)
    assert all(gpu.source.startswith("https://www.nvidia.com/") for gpu in gpus.known().values())


CONFIG = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 100}


@pytest.mark.parametrize(
    "more, expected",
    [
        ({}, {"kv_heads": 8, "head_size": 8, "intermediate_size": 256}),
        ({"num_key_value_heads": 2, "head_dim": 128}, {"kv_heads": 2, "head_size": 128}),
        ({"sliding_window": 4096}, {"window_layers": 4, "window_tokens": 4096}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"window_layers": 0}),
        (
            {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2},
            {"window_layers": 2, "window_tokens": 128},
        ),
        (
            {
                "num_experts": 16,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "intermediate_size": 99,
            },
            {"experts": 16, "experts_per_token": 2, "expert_size": 32, "intermediate_size": 0},
        ),
        ({"power_attention": {"dense_layers": {"every": 2, "keep": 1}}}, {"dense_layers": 2}),
    ],
    ids=["plain", "grouped", "window", "window-off", "window-in-some", "experts", "trained"],
)
def test_a_config_json_is_read(more, expected):
    for config in (CONFIG | more, {"text_config": CONFIG | more}):
        shape = shapes.of_config(config).model_dump()
        assert {name: shape[name] for name in expected} == expected


@pytest.mark.parametrize(
    "config, reason",
    [
        ({}, "no num_hidden_layers"),
        (CONFIG | {"kv_lora_rank": 512}, "multi-head latent"),
        (CONFIG | {"is_encoder_decoder": True}, "encoder-decoder"),
        (CONFIG | {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        (CONFIG | {"power_attention": {"dense_layers": [4]}}, "names layer 4"),
        (CONFIG | {"num_hidden_layers": "four"}, "no num_hidden_layers"),
        (CONFIG | {"num_hidden_layers": 0}, "greater than or equal to 1"),
        (CONFIG | {"num_attention_heads": 0}, "not that of a language model"),
        (CONFIG | {"text_config": "x"}, "not that of a language model"),
        (CONFIG | {"layer_types": 5}, "not that of a language model"),
        (CONFIG | {"power_attention": "x"}, "not that of a language model"),
        # What would fill the memory is refused before it is counted.
        (CONFIG | {"power_attention": {"dense_layers": "0-300000000"}}, "no model has"),
        (
            CONFIG
            | {"num_hidden_layers": 10**8, "power_attention": {"dense_layers": {"every": 1, "keep": 1}}},
            "less than or equal to 1024",
        ),
    ],
)
def test_a_config_json_that_cannot_be_planned_says_why(config, reason):
    with pytest.raises(ValueError, match=reason):
        shapes.of_config(config)


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({}, "name a model"),
        ({"model": "GPT-9"}, "unknown model 'GPT-9': one of Qwen2-7B"),
        ({"gpu": "TPU"}, "unknown GPU 'TPU': one of H200 SXM"),
        ({"dense_layers": 29}, "more than the 28 layers"),
        ({"kv_heads": 5}, "must divide"),
        ({"experts_per_token": 3}, "cannot use 3 of 0 experts"),
        ({"block_size": 100}, "power of two"),
        ({"context": 0}, "greater than or equal to 1"),
        ({"context": 1 << 23, "block_size": 16}, "ask for fewer tokens"),
        ({"contxt": 5}, "not permitted"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_question_without_sense_is_refused_with_its_cause(asked, reason):
    model = {} if not asked or "model" in asked else {"model": "Qwen2-7B"}
    with pytest.raises(ValueError, match=reason):
        Question(**model, **asked)


def test_the_engines_model_comes_first():
    from vllm_power.tools.web import planner

    config = SimpleNamespace(to_dict=lambda: CONFIG)
    model = SimpleNamespace(hf_config=config, hf_text_config=config, served_model_name="mine")
    engine = SimpleNamespace(model_config=model, additional_config={"power": {"dense_layers": [0]}})
    name, fields = planner.served(engine)
    assert (name, fields["layers"], fields["dense_layers"]) == ("mine", 4, 1)
    assert (fields["mode"], fields["dense_tail"], fields["decode"]) == ("training_free", 128, "dense")
    assert Question(**fields).rows == RowRule(128, True)
    config.to_dict = lambda: {"kv_lora_rank": 1}
    assert planner.served(engine) is None
