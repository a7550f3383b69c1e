"""The arrows between the packages, each tried in a fresh interpreter (CONTRIBUTING.md)."""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import vllm_power", {"torch", "vllm", "triton", "pydantic"}),
        ("import vllm_power.pattern", {"torch", "vllm", "triton", "numpy", "pydantic"}),
        ("import vllm_power.options", {"torch", "vllm", "triton"}),
        ("import vllm_power.plugin", {"torch", "vllm", "triton"}),
        ("import vllm_power.tools.cli", {"torch", "vllm", "triton", "matplotlib"}),
        ("import vllm_power.kernels.plan, vllm_power.kernels.reference", {"vllm"}),
        ("import vllm_power.hf.attention, vllm_power.tools.calibrate.run", {"vllm"}),
    ],
)
def test_a_package_does_not_import_what_is_above_it(statement, absent):
    assert not modules_after(statement) & absent


def test_kernels_never_import_vllm():
    code = (
        "import pkgutil, importlib, vllm_power.kernels as k;"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(k.__path__, k.__name__ + '.')]"
    )
    assert "vllm" not in modules_after(code)


def test_the_engines_path_imports_no_tool():
    code = "import vllm_power.plugin as p; p.register(); import vllm_power.cpu_backend"
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {code}; print(*sorted(m for m in sys.modules if m.startswith('vllm_power.')))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(run.stdout.splitlines()[-1].split())
    assert "vllm_power.cpu_backend" in loaded
    rooms = (
        "vllm_power.tools.bench",
        "vllm_power.tools.demo",
        "vllm_power.tools.cli",
        "vllm_power.tools.evals",
        "vllm_power.tools.web",
        "vllm_power.hf",
    )
    assert not {module for module in loaded if module.startswith(rooms)}


def test_no_top_level_package_called_kernels():
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.strip() == "None"
