"""Options: defaults, validation with the nearest known name, the checkpoint's pattern and the command line's."""

from types import SimpleNamespace

import pytest

from vllm_power.options import PowerOptions, of_config, resolve
from vllm_power.pattern import POWER, RowRule, preset


def config(additional_config=None, power_attention=None):
    checkpoint = SimpleNamespace(**({"power_attention": power_attention} if power_attention else {}))
    model = SimpleNamespace(hf_config=checkpoint, hf_text_config=checkpoint)
    return SimpleNamespace(additional_config=additional_config or {}, model_config=model)


def test_defaults_are_the_papers():
    assert of_config(config()).effective_pattern == POWER
    assert resolve({"pattern": "stride_slash"}, None).effective_pattern == preset("stride_slash")
    assert resolve({"pattern": "dilated", "window_blocks": 4}, None).effective_pattern == preset(
        "dilated", window_blocks=4
    )


def test_other_plugins_options_are_left_alone():
    options = of_config(config({"another_plugin": {"x": 1}, "power": {"block_size": 512}}))
    assert options.effective_pattern.block_size == 512


@pytest.mark.parametrize(
    "given, message",
    [
        ({"window_block": 5}, "unknown option 'window_block'; did you mean 'window_blocks'?"),
        ({"zzz": 5}, "unknown option 'zzz'; known: pattern, block_size"),
        ({"pattern": "powr"}, "unknown pattern 'powr'; did you mean 'power'?"),
        ({"pattern": 7}, "pattern"),
        ({"block_size": 100}, "block_size must be a power of two"),
        ({"block_size": "256"}, "block_size: Input should be a valid integer"),
        ({"window_blocks": 0}, "window_blocks must be at least 1"),
        (["power"], "must be an object of options"),
        ("power", "must be an object of options"),
    ],
)
def test_bad_options_are_refused_with_their_name_and_source(given, message):
    with pytest.raises(ValueError, match="--additional-config") as error:
        resolve(given, None)
    assert message in str(error.value)
    with pytest.raises(ValueError, match=r"config\.json"):
        resolve(None, given)


def test_the_checkpoints_pattern_is_used():
    stored = {"pattern": "power", "window_blocks": 3}
    assert of_config(config(power_attention=stored)).effective_pattern == preset("power", window_blocks=3)
    assert resolve({"window_blocks": 3}, stored).effective_pattern == preset("power", window_blocks=3)
    assert resolve({"pattern": "power"}, stored).effective_pattern == preset("power", window_blocks=3)


def test_a_contradiction_shows_both_and_can_be_overridden():
    stored = {"pattern": "power", "window_blocks": 3}
    with pytest.raises(ValueError, match="two different patterns") as error:
        resolve({"window_blocks": 5}, stored)
    for part in ("window 3", "window 5", "config.json", "--additional-config", "override_checkpoint"):
        assert part in str(error.value)
    options = resolve({"pattern": "sliding_window", "override_checkpoint": True}, stored)
    assert options.effective_pattern == preset("sliding_window")


def test_saying_what_the_checkpoint_defaults_to_is_no_contradiction():
    assert resolve({"window_blocks": 5}, {"pattern": "power"}).effective_pattern == POWER


def test_a_checkpoint_can_not_hold_what_is_the_servers():
    with pytest.raises(ValueError, match="unknown option 'override_checkpoint'"):
        resolve(None, {"override_checkpoint": True})


def test_every_option_is_described():
    assert all(field.description for field in PowerOptions.model_fields.values())


def test_options_that_are_no_pattern_survive_beside_a_checkpoints_pattern():
    asked = {"pattern": "power", "executor": "reference", "reclaim": False}
    merged = resolve(asked, {"pattern": "power", "window_blocks": 7})
    assert (merged.executor, merged.reclaim) == ("reference", False)
    assert merged.effective_pattern == preset("power", window_blocks=7)


def test_the_mode_follows_the_checkpoint():
    free = resolve(None, None)
    assert (free.mode, free.rows, free.dense_layers) == (
        "training_free",
        RowRule(128, True, on_request=True),
        {"every": 7, "keep": 2},
    )
    trained = resolve(None, {"pattern": "power"})
    assert (trained.mode, trained.rows, trained.dense_layers) == ("trained", RowRule(), [])
    stored = {"pattern": "power", "dense_tail": 64, "decode": "dense", "dense_layers": [3]}
    assert resolve(None, stored).rows == RowRule(64, True)
    assert resolve(None, stored).dense_layers == [3]
    asked = {"mode": "training_free", "dense_tail": 32, "dense_layers": []}
    assert (resolve(asked, None).rows, resolve(asked, None).dense_layers) == (
        RowRule(32, True, on_request=True),
        [],
    )
    assert resolve({"mode": "trained"}, None).rows == RowRule()


def test_another_row_rule_than_the_checkpoints_is_a_contradiction():
    with pytest.raises(ValueError, match="two different patterns"):
        resolve({"dense_tail": 32}, {"dense_tail": 64})
    assert resolve({"dense_tail": 32}, {"pattern": "power"}).dense_tail == 32


def test_a_small_model_keeps_a_layer_for_the_pattern():
    assert resolve(None, None).dense_layer_indices(2) == frozenset()
    assert resolve(None, None).dense_layer_indices(3) == {0, 1}
    assert resolve({"dense_layers": [0, 1]}, None).dense_layer_indices(2) == {0, 1}


def test_a_configuration_is_parsed_once():
    made = config({"power": {"block_size": 512}})
    assert of_config(made) is of_config(made)
    assert of_config(config({"power": {"block_size": 64}})).effective_pattern.block_size == 64
