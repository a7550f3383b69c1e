"""adapt: settings, data and models that are refused, each with its cause in one line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.adapt_run import POWER
from support.english_tokenizer import make_tokenizer
from typer.testing import CliRunner

from vllm_power.tools.adapt import files
from vllm_power.tools.adapt.data import tokenized
from vllm_power.tools.adapt.run import run
from vllm_power.tools.adapt.settings import Settings, Stage, stages_of
from vllm_power.tools.cli import app
from vllm_power.tools.common.tokenizer import tokenizer_of


def test_stages() -> None:
    assert stages_of("4K:250M, 32K:0.5B") == (Stage(4096, 250_000_000), Stage(32_768, 500_000_000))
    assert stages_of("4K:200steps,8192:16K") == (Stage(4096, 200, True), Stage(8192, 16_000))
    assert [stage.steps(1000) for stage in (Stage(4, 1), Stage(4, 2001), Stage(4, 7, True))] == [1, 3, 7]


@pytest.mark.parametrize(
    ("stages", "cause"),
    [
        ("4K", "is not LENGTH:TOKENS"),
        ("4K:1T", "is not LENGTH:TOKENS"),
        ("4K:0", "trains nothing"),
        ("3K:1M,8K:1M", "not a multiple of 3,072"),
    ],
)
def test_wrong_stages(stages: str, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        stages_of(stages)


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    """`datasets` would read x1.jsonl for x[1].jsonl, without a word."""
    (tmp_path / "x[1].jsonl").write_text(json.dumps({"text": "this one"}) + "\n")
    (tmp_path / "x1.jsonl").write_text(json.dumps({"text": "another"}) + "\n")
    _, rows = files.load(str(tmp_path / "x[1].jsonl"), tmp_path / "cache")
    assert list(rows["text"]) == ["this one"]


def bomb(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n')


@pytest.mark.parametrize(
    ("name", "write", "cause"),
    [
        ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text": \n'), "line 2 is no JSON"),
        ("a.jsonl.gz", lambda path: path.write_bytes(b"no gzip"), "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", bomb, "expands to more than 100 times its size"),
        ("a.jsonl", lambda path: path.write_text('{"text": 5}\n'), "the column 'text' has int64, not text"),
        ("a.parquet", lambda path: path.write_bytes(b"PAR1"), "cannot be read: "),
        ("a.txt.xz", lambda path: path.write_bytes(b"no xz"), "cannot be read: "),
    ],
    ids=["damaged-line", "no-gzip", "bomb", "numbers", "no-parquet", "no-xz"],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(
    tmp_path: Path, name: str, write: Callable[[Path], object], cause: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=cause) as refused:
        tokenized([str(tmp_path / name)], "text", make_tokenizer(300, 256), tmp_path / "cache")
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_tokenizer_that_cannot_be_loaded_is_told_in_one_line(tmp_path: Path) -> None:
    """tokenizers raises a plain Exception for a file that it does not know."""
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unknown"}}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="no tokenizer that transformers can load") as refused:
        tokenizer_of(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"data": ("nowhere.jsonl",)}, "there is no such file"),
        ({"data": (__file__,)}, r"text is read from \.txt"),
        ({"field": "body"}, "no column 'body' but text: name the text's with --field"),
        ({"eval_tokens": 10**9}, "0 tokens apart from the held-out ones"),
        ({"eval_tokens": 100}, "fewer than a window of 128"),
        ({"stages": stages_of("512:1steps")}, "rope_parameters"),
        ({"stages": stages_of("64:1steps")}, "no token would be trained under the pattern"),
        ({"batch_tokens": 300}, "give --batch-tokens as a multiple of 128"),
        ({"power": {"windov_blocks": 2}}, "did you mean 'window_blocks'"),
        ({"power": {"dense_layers": "0-1"}}, "none of the 2 layers would run the pattern"),
        ({"probe": 1.0}, "give --recall"),
        ({"probe": 1.0, "recall": 1.0, "lora": 4}, "leave out --lora"),
        ({"probe": 1.0, "recall": 1.0, "power": {**POWER, "decode": "dense"}}, "dense_tail and decode"),
        ({"probe": 1.0, "recall": 1.0, "power": {"pattern": "full"}}, 'the pattern "full"'),
        ({"probe": 1.0, "recall": 1.0, "stages": stages_of("32:1steps,128:1steps")}, "of at least 64"),
        (
            {"probe": 1.0, "recall": 1.0, "stages": stages_of("120:1steps"), "batch_tokens": 120},
            "multiple of 16",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(
    change: dict[str, Any], cause: str, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=cause):
        run(settings(**change), tmp_path / "out")
    settings().check_folder(tmp_path / "out")  # is not claimed: the corrected command works there


@pytest.mark.parametrize(
    ("file", "change", "cause"),
    [
        ("tokenizer.json", None, "has no tokenizer"),
        ("config.json", '"attention_dropout": 0.1', "attention_dropout 0.1"),
        ("config.json", '"power_attention": {"window_blocks": 9}', "two different patterns"),
    ],
    ids=["tokenizer", "dropout", "another-pattern"],
)
def test_models_that_do_not_fit(
    file: str, change: str | None, cause: str, model: Path, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    changed = tmp_path / "model"
    changed.mkdir()
    for path in model.iterdir():
        if change or not path.name.startswith("tokenizer"):
            (changed / path.name).write_bytes(path.read_bytes())
    if change:
        known = json.loads((changed / file).read_text())
        (changed / file).write_text(json.dumps(known | json.loads(f"{{{change}}}")))
    with pytest.raises(ValueError, match=cause):
        run(settings(model=str(changed)), tmp_path / "out")


def test_a_folder_of_another_run(trained: Path, model: Path, settings: Callable[..., Settings]) -> None:
    with pytest.raises(ValueError, match=r"other settings \(seed 0 there, 1 here\)"):
        run(settings(seed=1), trained)
    with pytest.raises(ValueError, match="a model that was not made here"):
        run(settings(), model)


def test_the_command(model: Path, text: Path, tmp_path: Path) -> None:
    words = ["adapt", str(model), "--data", str(text), "--output", str(tmp_path / "out")]
    for extra, cause in (
        (["--stages", "4K"], "is not LENGTH:TOKENS"),
        (["--power", "{"], "--power is not JSON"),
        ([], "longer than the model's 256 positions"),
    ):
        done = CliRunner().invoke(app, [*words, *extra])
        assert done.exit_code == 1 and done.output.startswith("adapt: ") and cause in done.output
