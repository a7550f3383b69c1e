"""The layers of the package (pyproject.toml), and what an import brings along, in a fresh interpreter."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture
def layers(tmp_path):
    """``layers()`` runs the contracts of pyproject.toml, as ``make lint`` does, over a copy of the package."""
    shutil.copytree(
        ROOT / "vllm_power", tmp_path / "vllm_power", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "vllm_power" / "kernels" / "__init__.py").touch()
    command = [
        Path(sys.executable).with_name("lint-imports"),
        "--config",
        ROOT / "pyproject.toml",
        "--no-cache",
    ]
    return lambda: subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def test_every_layer_imports_only_those_below_it(layers):
    done = layers()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module, statement, contract",
    [
        ("pattern", "from vllm_power import options", "the engine's layers"),
        ("kv_cache", "def late():\n    from vllm_power.tools import cli", "the engine's layers"),
        ("cpu_backend", "from vllm_power import gpu_backend", "the engine's layers"),
        ("kernels/plan", "import vllm", "do not need vLLM"),
        ("options", "import torch", "neither torch nor vLLM"),
    ],
)
def test_a_forbidden_import_fails(layers, tmp_path, module, statement, contract):
    file = tmp_path / "vllm_power" / f"{module}.py"
    file.write_text(f"{file.read_text()}\n\n{statement}\n")
    done = layers()
    assert done.returncode == 1
    assert re.search(rf"{contract}.* BROKEN", done.stdout), done.stdout


def test_no_top_level_package_called_kernels():
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert run.stdout.strip() == "None"
