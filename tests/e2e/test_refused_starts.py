"""What PowerAttention does not serve is refused at start, with the cause and the remedy, and nothing is served."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import configuration
from support.engine_worker import Worker
from support.english_tokenizer import make_tokenizer

from vllm_power.tools.common.vllm_server import ServerFailed, serve

OTHER_BACKEND = "another attention backend"

# model type -> its config; without weights, for they are never reached
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": 2,
    },
    "bert": {
        "architectures": ["BertModel"],
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    },
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "d_model": 128,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "bloom": {"architectures": ["BloomForCausalLM"], "hidden_size": 128, "n_layer": 2, "n_head": 2},
}


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's folder without weights."""

    def make(model_type: str) -> Path:
        from transformers import AutoConfig

        folder = tmp_path_factory.mktemp(model_type)
        config = AutoConfig.for_model(model_type, vocab_size=512, dtype="float32", **SHAPES[model_type])
        config.save_pretrained(folder)
        make_tokenizer(512, 2048).save_pretrained(folder)
        return folder

    return make


@pytest.mark.without_kernels
@pytest.mark.parametrize(
    ("settings", "cause", "remedy"),
    [
        ({"additional_config": {"power": {"window_block": 5}}}, "'window_block'", "'window_blocks'"),
        ({"additional_config": {"power": {"pattern": "pover"}}}, "unknown pattern 'pover'", "'power'"),
        ({"additional_config": {"power": {"block_size": 100}}}, "100", "power of two"),
        ({"additional_config": {"power": "longnet"}}, "'longnet'", "object"),
        ({"block_size": 16}, "page (--block-size) of 16", "--block-size with a multiple of 32"),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "context parallelism",
            "Leave out --decode-context-parallel-size",
        ),
    ],
    ids=["option", "pattern", "range", "type", "page16", "context-parallel"],
)
def test_settings(
    settings: dict[str, Any], cause: str, remedy: str, small_model: Callable[..., Path], worker: Worker
) -> None:
    model = small_model("llama", num_heads=4, num_kv_heads=1)
    refused = worker.run(configuration.refusal, model, settings)
    assert refused is not None
    assert cause in refused
    assert remedy in refused


@pytest.mark.without_kernels
@pytest.mark.parametrize(
    ("model_type", "cause"),
    [("deepseek_v2", "MLA"), ("bert", "encoder-only"), ("whisper", "encoder-decoder")],
)
def test_models(model_type: str, cause: str, shape: Callable[[str], Path], worker: Worker) -> None:
    model = shape(model_type)
    refused = worker.run(configuration.refusal, model, {})
    assert refused is not None
    assert cause in refused
    assert OTHER_BACKEND in refused
    assert worker.run(configuration.refusal, model, {"attention_backend": None}) is None


def test_model_with_windows_only(small_model: Callable[..., Path], worker: Worker) -> None:
    """Its layers keep their own window, so none would run the pattern: seen once the layers exist."""
    model = small_model("mistral", extra_config={"sliding_window": 1024})
    with pytest.raises(RuntimeError, match="sliding window") as refused:
        worker.start(model)
    assert "--hf-overrides" in str(refused.value)
    worker.start(model, hf_overrides={"sliding_window": None})


@pytest.mark.without_kernels
def test_without_the_backend_nothing_is_refused(small_model: Callable[..., Path], worker: Worker) -> None:
    """The plugin minds its own backend only."""
    model = small_model("llama", num_heads=4, num_kv_heads=2)
    for settings in ({"block_size": 16}, {"additional_config": {"power": {"pattern": "pover"}}}):
        assert worker.run(configuration.refusal, model, settings) is not None
        assert worker.run(configuration.refusal, model, {**settings, "attention_backend": None}) is None


@pytest.mark.without_kernels
def test_command_with_a_wrong_option(small_model: Callable[..., Path], tmp_path: Path) -> None:
    log = failed_start(
        tmp_path,
        small_model("llama", num_heads=4, num_kv_heads=2),
        "--additional-config.power.window_block",
        "5",
    )
    assert "unknown option 'window_block'; did you mean 'window_blocks'?" in log


def test_command_with_alibi(shape: Callable[[str], Path], tmp_path: Path) -> None:
    """BLOOM's bias is known only where its layers are made, in the engine's process."""
    log = failed_start(tmp_path, shape("bloom"), "--load-format", "dummy", "--enforce-eager")
    assert "ALiBi" in log
    assert OTHER_BACKEND in log


def failed_start(tmp_path: Path, model: Path, *arguments: str) -> str:
    """`vllm serve` must end with an error, together with all its processes; returns its output."""
    log = tmp_path / "log"
    with (
        pytest.raises(ServerFailed) as failed,
        serve(
            model,
            "--attention-backend=power",
            "--kv-cache-memory-bytes=256M",
            *arguments,
            log=log,
            timeout=240,
        ) as server,
    ):
        pytest.fail(f"it serves at {server.url}")
    assert failed.value.returncode not in (0, None)
    return log.read_text()
