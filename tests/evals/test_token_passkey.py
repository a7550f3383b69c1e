"""The passkey grid in the project's own passkey documents."""

import pytest

from vllm_power.tools.common.passkey_data import ANSWER
from vllm_power.tools.evals import token_passkey
from vllm_power.tools.passkey.model import make_tokenizer


def test_only_the_documents_own_tokenizer_speaks_them(tokenizer):
    assert token_passkey.is_spoken_by(make_tokenizer())
    assert not token_passkey.is_spoken_by(tokenizer)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_has_its_key_at_its_depth_and_room_for_the_answer(depth):
    tokens, key = token_passkey.prompt(1024, depth, number=3, seed=0)
    assert len(tokens) + len(ANSWER) == 1024
    text = make_tokenizer().decode(tokens)
    before, after = text.split(f"The passkey is {key}.")
    assert after.endswith("What is the passkey? The passkey is")
    assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.02)
    assert token_passkey.prompt(1024, depth, number=3, seed=0) == (tokens, key)
    assert token_passkey.prompt(1024, depth, number=4, seed=0)[1] != key


def test_auto_chooses_by_the_tokenizer(endpoint, evaluate, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "words")
    fake = endpoint()
    assert evaluate(fake, prompts="auto", tokenizer=str(tmp_path / "words")) == 0
    assert {type(prompt) for prompt in fake.prompts} == {list}
    other = endpoint()
    assert evaluate(other, prompts="auto") == 0
    assert {type(prompt) for prompt in other.prompts} == {str}
