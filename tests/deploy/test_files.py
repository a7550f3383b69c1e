"""YAML, shell scripts and workflows: lint and schemas."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.manifests import CHART, ROOT

BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PLACES = ("deploy", "docker", ".github")
# Templates of the chart are YAML only when they are rendered.
YAML_FILES = [
    path
    for place in PLACES
    for path in sorted((ROOT / place).rglob("*"))
    if path.suffix in (".yaml", ".yml") and "templates" not in path.parts
]
RULES = (
    "{extends: default, rules: {document-start: disable, truthy: {check-keys: false}, comments-indentation: disable,"
    " line-length: {max: 140}, indentation: {indent-sequences: true}}}"
)


def scripts() -> list[Path]:
    """Return the shell scripts that git knows, by name or by their first line."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.splitlines() if Path(name).suffix in (".sh", "")]
    return [path for path in files if path.is_file() and is_shell(path)]


def is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    return path.suffix == ".sh" or re.match(rb"#!.*\b(ba)?sh\b", first) is not None


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_yaml():
    assert len(YAML_FILES) > 20
    run(BIN / "yamllint", "--strict", "-d", RULES, *YAML_FILES)


def test_rendered_chart_is_clean_yaml(helm, tmp_path):
    done = helm("template", "release", str(CHART), "--set", "model.name=some/model,keda.enabled=true")
    file = tmp_path / "rendered.yaml"
    file.write_text(done.stdout)
    # Helm writes lists at the level of their key.
    run(BIN / "yamllint", "--strict", "-d", RULES.replace("true}}}", "whatever}}}"), file)


def test_shell_scripts():
    found = scripts()
    assert ROOT / ".ci" / "run" in found
    for script in found:
        run("bash", "-n", script)
    run(BIN / "shellcheck", *found)


def test_shell_commands_in_manifests_and_workflows():
    for workflow in WORKFLOWS:
        for job in yaml.safe_load(workflow.read_text())["jobs"].values():
            for step in job["steps"]:
                if "run" in step:
                    script = re.sub(r"\$\{\{.*?\}\}", "value", step["run"])
                    done = subprocess.run(
                        [BIN / "shellcheck", "--shell=bash", "-"],
                        input=script,
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    assert done.returncode == 0, f"{workflow.name}: {step['run']}\n{done.stdout}"


# --- workflows -----------------------------------------------------------------------------------------------------

workflows = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)


def test_workflows_are_all_here():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "gpu.yml", "release.yml"]


def test_workflows_fit_their_schema():
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    run(
        BIN / "check-jsonschema", "--builtin-schema", "vendor.dependabot", ROOT / ".github" / "dependabot.yml"
    )


@workflows
def test_workflow_may_only_read_unless_a_job_says_so(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert "timeout-minutes" in job


@workflows
def test_actions_are_pinned(workflow):
    for action in re.findall(r"uses: (\S+)", workflow.read_text()):
        assert re.search(r"@[0-9a-f]{40}$", action), action


def test_pins_are_the_same_everywhere_and_say_their_version():
    """And somebody moves them."""
    lines = [line for workflow in WORKFLOWS for line in workflow.read_text().splitlines() if "uses: " in line]
    pins = {re.search(r"uses: (\S+)@(\S+)  # (v[\d.]+)$", line).groups() for line in lines}
    assert len({name for name, *_ in pins}) == len(pins) == 7
    moved = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {entry["package-ecosystem"] for entry in moved} >= {"github-actions", "docker", "npm"}


@workflows
def test_workflow_runs_what_a_developer_runs(workflow):
    """Every `make` target exists; nothing of what strangers can write is put into a script."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        for step in job["steps"]:
            script = step.get("run", "")
            assert set(re.findall(r"\bmake ([a-z0-9-]+)", script)) <= targets
            assert "github.event" not in script and "github.head_ref" not in script


# --- docs/deploy.md ------------------------------------------------------------------------------------------------


def documented(program: str) -> list[list[str]]:
    """Return the words of every use of a program in the shell blocks of the pages on deployment."""
    found = []
    for page in (ROOT / "docs" / "deploy.md", CHART / "README.md"):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if program in words:
                    found.append(words[words.index(program) + 1 :])
    return found


@pytest.mark.parametrize("program", ["docker", "helm", "kubectl"])
def test_documented_files_exist(program):
    commands = documented(program)
    assert commands
    for words in commands:
        for word in words:
            if word.startswith(("deploy/", "docker/")):
                assert (ROOT / word).exists(), word


def test_documented_helm_commands_render(helm):
    installs = [
        words for words in documented("helm") if words[0] == "install" and words[2].startswith("deploy/")
    ]
    assert len(installs) >= 2
    for words in installs:
        done = helm("template", *words[1:])
        assert done.returncode == 0, done.stderr


def test_documented_arguments_of_the_image_start_the_server():
    """`docker run ... IMAGE ARGUMENTS`: the start script takes the arguments as they stand in the page."""
    (words,) = [words for words in documented("docker") if words[0] == "run"]
    image = next(index for index, word in enumerate(words) if word.startswith("vllm-power:"))
    script = "import sys; sys.path.insert(0, 'docker'); import serve; print(*serve.command(sys.argv[1:], {}))"
    done = subprocess.run(
        [sys.executable, "-c", script, *words[image + 1 :]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("vllm serve Qwen/") and done.stdout.endswith("--attention-backend=power\n")
