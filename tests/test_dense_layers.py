"""Naming the layers that stay dense, and which layers do."""

from types import SimpleNamespace

import pytest

from vllm_power.options import canonical, indices, resolve


@pytest.mark.parametrize(
    "value, expected",
    [
        ([], set()),
        ("", set()),
        ([0, 27], {0, 27}),
        ("0-1,26-27", {0, 1, 26, 27}),
        ("3", {3}),
        ("5, 7-7", {5, 7}),
        ({"every": 7, "keep": 2}, {0, 1, 7, 8, 14, 15, 21, 22}),
        ({"every": 1, "keep": 0}, set()),
    ],
)
def test_ways_to_name_layers(value, expected):
    assert indices(value, 28) == expected
    assert resolve({"dense_layers": value}, None).dense_layer_indices(28) == expected


@pytest.mark.parametrize("value", [[28], "0,28", "26-28", [-1]])
def test_an_index_outside_names_the_models_count(value):
    with pytest.raises(ValueError, match="the model has 28 layers, 0 to 27"):
        indices(value, 28)


@pytest.mark.parametrize(
    "value, message",
    [
        ("3-1", "runs backwards"),
        ("0-300000000", "no model has"),
        ("a", "neither a layer nor a range"),
        ("1-", "neither a layer nor a range"),
        ({"every": 7}, "dense_layers"),
        ({"every": 2, "keep": 3}, "cannot keep 3 of every 2"),
        (7, "dense_layers"),
        ([0.5], "dense_layers"),
    ],
)
def test_what_names_none_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        resolve({"dense_layers": value}, None)


def test_two_names_of_the_same_layers_are_no_contradiction():
    assert canonical("0-1") == canonical([1, 0])
    assert resolve({"dense_layers": "0-1"}, {"dense_layers": [0, 1]}).dense_layer_indices(4) == {0, 1}
    with pytest.raises(ValueError, match="two different patterns"):
        resolve({"dense_layers": "0-2"}, {"dense_layers": [0, 1]})


@pytest.mark.parametrize(
    "layer, runner, dense, drafting",
    [
        ("model.layers.0.self_attn.attn", "generate", True, False),
        ("model.layers.1.self_attn.attn", "generate", False, False),
        ("language_model.model.layers.3.self_attn.attn", "generate", True, False),
        ("model.layers.4.self_attn.attn", "generate", True, True),  # a drafting head's layer
        ("mtp.layers.0.self_attn.attn", "generate", True, True),
        ("draft_model.model.layers.1.self_attn.attn", "generate", True, True),
        ("model.layers.1.self_attn.attn", "draft", True, True),
    ],
)
def test_which_layers_stay_dense(layer, runner, dense, drafting):
    """Layers that draft are dense unless vLLM was told to draft with this backend."""
    from vllm_power.layers import drafts, stays_dense

    model = SimpleNamespace(
        runner_type=runner, get_total_num_hidden_layers=lambda: 4, hf_config=None, hf_text_config=None
    )
    config = SimpleNamespace(
        model_config=model, additional_config={"power": {"dense_layers": [0, 3]}}, speculative_config=None
    )
    assert drafts(layer, config) is drafting
    assert stays_dense(layer, config) is dense
    for backend, still_dense in (("FLASH_ATTN", dense), ("POWER", dense and not drafting)):
        config.speculative_config = SimpleNamespace(attention_backend=SimpleNamespace(name=backend))
        assert stays_dense(layer, config) is still_dense
