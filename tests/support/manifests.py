"""Kubernetes objects against their schemas, the oldest and the newest Kubernetes; and how to get at their parts."""

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from kubernetes_validate import utils

VERSIONS = ("1.29", "1.37")
ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "vllm-power"
SCHEMAS = ROOT / "tests" / "deploy" / "schemas"
# Custom resources whose own definitions npm has.
WITH_DEFINITIONS = {"ScaledObject", "PodMonitor"}

Object = dict[str, Any]

# Otherwise a file of several megabytes is read for every object.
utils.schema_contents = functools.cache(utils.schema_contents)


def problems(objects: list[Object], tools: Path) -> list[str]:
    """Return what is wrong with the objects."""
    found = []
    for entry in objects:
        group = entry["apiVersion"].rpartition("/")[0]
        if entry["kind"] == "LeaderWorkerSet":
            found += custom_problems(entry)
            found += problems(list(map(as_pod, pod_templates(entry))), tools)
        elif "." in group and not group.endswith(".k8s.io"):
            found += custom_problems(entry)
        else:
            found += [
                f"{version}: {problem}" for version in VERSIONS for problem in core_problems(entry, version)
            ]
    return found + definition_problems(
        [entry for entry in objects if entry["kind"] in WITH_DEFINITIONS], tools
    )


def core_problems(entry: Object, version: str) -> list[str]:
    """Return what is wrong with an object of Kubernetes' own, for one version. Fields nobody knows are wrong."""
    try:
        kubernetes_validate.validate(entry, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{title(entry)}: {'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{title(entry)}: {error.message}"]
    return []


def custom_problems(entry: Object) -> list[str]:
    """Return what is wrong with a custom resource, by a small strict schema: only fields that are meant to be used."""
    file = SCHEMAS / f"{entry['kind']}.json"
    if not file.exists():
        return [f"{title(entry)}: there is no {file.name}"]
    validator = jsonschema.Draft202012Validator(json.loads(file.read_text()))
    return [f"{title(entry)}: {error.json_path}: {error.message}" for error in validator.iter_errors(entry)]


def definition_problems(objects: list[Object], tools: Path) -> list[str]:
    """Return what is wrong with custom resources, by their published definitions."""
    if not objects:
        return []
    done = subprocess.run(
        ["node", ROOT / "deploy" / "tools" / "validate.mjs", tools],
        input=json.dumps(objects),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = zip(objects, json.loads(done.stdout), strict=True)
    return [f"{title(entry)}: {message}" for entry, message in answers if message]


def title(entry: Object) -> str:
    """Return kind and name."""
    return f"{entry['kind']}/{entry['metadata']['name']}"


def one(objects: list[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = [entry for entry in objects if entry["kind"] == kind]
    return found


def kinds(objects: list[Object]) -> set[str]:
    """Return which kinds there are."""
    return {entry["kind"] for entry in objects}


def pod_templates(entry: Object) -> list[Object]:
    """Return the pod templates of a workload."""
    if entry["kind"] == "LeaderWorkerSet":
        group = entry["spec"]["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    if entry["kind"] == "Pod":
        return [entry]
    return [entry["spec"]["template"]] if "template" in entry.get("spec", {}) else []


def as_pod(template: Object) -> Object:
    """Return the pod that a template makes."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod", **template["metadata"]},
        "spec": template["spec"],
    }


def pods(objects: list[Object]) -> list[Object]:
    """Return the specification of every pod that the objects make."""
    return [template["spec"] for entry in objects for template in pod_templates(entry)]


def container(entry: Object) -> Object:
    """Return the only container of a workload."""
    (template,) = pod_templates(entry)
    (found,) = template["spec"]["containers"]
    return found


def assert_hardened(pod: Object) -> None:
    """What holds for every pod of ours: no privileges, nothing written but on volumes, no token, no service links."""
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in pod["containers"]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in each["resources"]["limits"]
        assert {"cpu", "memory"} <= each["resources"]["requests"].keys()


def assert_serves_safely(pod: Object) -> None:
    """What holds for every server's pod: room to write, probes on /health, and time to drain."""
    (server,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    assert mounts.keys() == {"/dev/shm", "/tmp", "/cache", "/models"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == volumes.keys()
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
    (timeout,) = [arg.split("=")[1] for arg in server["args"] if arg.startswith("--shutdown-timeout=")]
    command, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + int(timeout) + 15


def assert_policy_covers(objects: list[Object]) -> None:
    """Every selector meets the labels of the pods: of the network policy, the disruption budget and the service."""
    (template,) = pod_templates(one(objects, "Deployment"))
    labels = template["metadata"]["labels"].items()
    selectors = [
        one(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        one(objects, "Service")["spec"]["selector"],
    ]
    for entry in objects:
        if entry["kind"] == "NetworkPolicy":
            selectors.append(entry["spec"]["podSelector"]["matchLabels"])
        if entry["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            selectors.append(entry["spec"]["selector"]["matchLabels"])
    for selector in selectors:
        assert selector
        assert selector.items() <= labels
