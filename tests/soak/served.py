"""The server under load: a tiny random model, a pool for little more than one longest request, drafts by n-grams."""

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.engine_worker import NGRAM_DRAFTS
from support.random_model import make_model
from support.shared_server import keep_the_engine_to_one_core

from vllm_power.tools.common.vllm_server import Server, serve

MAX_MODEL_LEN = 32_768
NAME = "soak"
ENVIRONMENT = {
    "VLLM_PLUGINS": "power",
    # oneDNN keeps the last 1,024 shapes of matrix products. With 64 it is full before memory is compared.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def model(folder: Path) -> Path:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "num_layers": 2, "vocab_size": 512}
    return make_model(folder, "llama", **sizes)


@contextmanager
def start(model: Path, log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """Blocks and pages of 64 tokens: the longest request needs up to 291 pages at once, and the pool has 300."""
    with serve(
        model,
        f"--served-model-name={NAME}",
        "--attention-backend=power",
        '--additional-config={"power": {"mode": "trained", "block_size": 64}}',
        "--block-size=64",
        "--dtype=float32",
        f"--max-model-len={MAX_MODEL_LEN}",
        "--max-num-batched-tokens=1024",
        "--max-num-seqs=64",
        f"--kv-cache-memory-bytes={300 * 64 * 2048}",
        f"--speculative-config={json.dumps(NGRAM_DRAFTS)}",
        "--enforce-eager",
        *arguments,
        env=ENVIRONMENT | environment,
        log=log,
    ) as server:
        keep_the_engine_to_one_core(server)
        yield server


def get(server: Server, path: str) -> str:
    """The text of an answer; raises OSError unless its status is 200."""
    with urllib.request.urlopen(server.url + path, timeout=60) as answer:
        return answer.read().decode()


def metric(text: str, name: str) -> float:
    """The sum over all labels in the text of /metrics."""
    values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"/metrics has no {name}"
    return sum(map(float, values))
