"""A model saved by the transformers integration is served as it was trained, with no option given."""

from collections.abc import Callable
from pathlib import Path

import torch
from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens
from support.tolerance import Allowed, rms, truth
from transformers import AutoModelForCausalLM

from vllm_power.hf.attention import use_power
from vllm_power.pattern import preset

OPTIONS = {"block_size": 64, "window_blocks": 3, "dense_layers": [1]}
PATTERN = preset("power", block_size=64, window_blocks=3)


def test_served_as_trained(small_model: Callable[..., Path], tmp_path: Path, worker: Worker) -> None:
    plain = small_model("qwen2", num_layers=3, num_heads=4, num_kv_heads=2, head_size=64)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    use_power(model, OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(3):
        text = torch.tensor([random_tokens(1000, seed)])
        model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    prompt = random_tokens(2600)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, :-1]
    trained = logits.double().log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]

    worker.start(tmp_path, block_size=64)
    (served,) = worker.call(generation.greedy, [prompt])
    allowed = Allowed.by(tmp_path, "float32", prompt, PATTERN, dense_layers=(1,))
    allowed.check(served.prompt_logprobs, trained)
    for other in ({"pattern": PATTERN}, {"pattern": preset("full")}):
        assert rms(truth(tmp_path, prompt, **other).logprobs - trained) > allowed.wrong
