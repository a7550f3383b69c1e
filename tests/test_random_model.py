"""The random models of the tests: made once, definite in what they say, and following their seed."""

import json

import pytest
import torch
from support.random_model import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_made_once_and_says_something_definite(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_model(tmp_path / family, family, num_layers=2, dtype="float32")
    weights = path / "model.safetensors"
    made = weights.stat().st_mtime_ns
    make_model(path, family, num_layers=2, dtype="float32")
    assert weights.stat().st_mtime_ns == made

    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == 2048
    text = "Attention, 1.5 times:\n\tünïcode 日本 <|end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    tokens = torch.tensor([tokenizer(text * 20).input_ids])
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        probabilities = model(tokens).logits.softmax(-1)
    assert probabilities.isfinite().all()
    assert probabilities.max(-1).values.mean() > 50 / 2048


def test_weights_follow_the_seed_and_not_the_dtype(tmp_path):
    from safetensors.torch import load_file

    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 512}
    exact, rounded, other = (
        load_file(make_model(tmp_path / name, **sizes, **options) / "model.safetensors")
        for name, options in {
            "exact": {"dtype": "float32"},
            "rounded": {"dtype": "bfloat16"},
            "other": {"seed": 1},
        }.items()
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert exact[name].bfloat16().equal(rounded[name])
    assert not other[name].equal(rounded[name])


def test_extra_config_reaches_the_checkpoint(tmp_path):
    extra = {"power_attention": {"pattern": "full"}}
    path = make_model(
        tmp_path / "model", "llama", num_layers=1, head_size=96, hidden_size=128, extra_config=extra
    )
    config = json.loads((path / "config.json").read_text())
    assert config["power_attention"] == {"pattern": "full"}
    assert (config["head_dim"], config["hidden_size"]) == (96, 128)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"family": "bert"}, "unknown model family"),
        ({"hidden_size": 100}, "hidden_size must be"),
        ({"vocab_size": 99}, "at least 260"),
    ],
)
def test_impossible_models_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_model(tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []
