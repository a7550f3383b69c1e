"""vLLM's entry point (``vllm.general_plugins``). vLLM calls it in every process, sometimes more than once."""

from typing import Any

from vllm_power.options import NAME, TESTED

BACKEND = "vllm_power.gpu_backend.PowerBackend"


def register() -> None:
    """Register ``--attention-backend power`` with vLLM in this process. Idempotent.

    Raises RuntimeError for a version of vLLM outside the tested range.
    """
    import vllm

    check_version(vllm.__version__)

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_power import compat
    from vllm_power.platform import PowerCpuPlatform, PowerPlatform

    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, BACKEND)
        compat.make_backend_picklable(restore_backend)
    compat.adopt_platform(PowerPlatform, PowerCpuPlatform)


def restore_backend() -> Any:
    """The backend's member of vLLM's enum. Unpickling the backend in a new process calls this."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[NAME]


def check_version(version: str) -> None:
    """Raises RuntimeError unless ``version`` of vLLM is one that this release was tested with."""
    parts = version.split(".")
    if tuple(int(part) if part.isdigit() else -1 for part in parts[:2]) not in TESTED:
        tested = " and ".join(".".join(map(str, release)) for release in TESTED)
        raise RuntimeError(
            f"vllm-power works with vLLM {tested}, and this is vLLM {version}. Install one of these "
            "(pip install 'vllm>=0.32,<0.34'), or uninstall vllm-power to use this vLLM without it."
        )
