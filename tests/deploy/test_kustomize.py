"""The plain manifests: every overlay and component builds, fits Kubernetes, and is the same server as the chart's."""

import json
import shutil

import pytest
import yaml
from support.manifests import (
    ROOT,
    assert_hardened,
    assert_policy_covers,
    assert_serves_safely,
    container,
    kinds,
    one,
    pods,
)

KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent for path in KUBERNETES.glob("components/*/kustomization.yaml"))
BASE_KINDS = {"ConfigMap", "Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlay(overlay, kustomize, validate):
    objects = kustomize(overlay)
    validate(objects)
    assert kinds(objects) >= BASE_KINDS
    for pod in pods(objects):
        assert_hardened(pod)
        assert_serves_safely(pod)
    assert_policy_covers(objects)


def test_every_component_at_once(kustomize, validate, tmp_path):
    names = [component.name for component in COMPONENTS]
    assert names == ["keda", "model-cache", "pod-monitor", "secrets"]
    # kustomize takes no absolute paths, so everything goes into one folder.
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": ["../kubernetes/base"],
                "components": [f"../kubernetes/components/{name}" for name in names],
            }
        )
    )
    objects = kustomize(tmp_path / "all")
    validate(objects)
    assert kinds(objects) == BASE_KINDS | {"ScaledObject", "PodMonitor", "PersistentVolumeClaim"}
    assert_policy_covers(objects)
    deployment = one(objects, "Deployment")
    assert "replicas" not in deployment["spec"]
    assert {entry["name"] for entry in container(deployment)["env"]} == {"HF_TOKEN", "VLLM_API_KEY"}
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["models"] == {
        "name": "models",
        "persistentVolumeClaim": {"claimName": "vllm-power-models"},
    }
    settings = one(objects, "ConfigMap")["data"]
    (trigger,) = one(objects, "ScaledObject")["spec"]["triggers"]
    assert f'model_name="{settings["MODEL"]}"' in trigger["metadata"]["query"]


def test_a_name_prefix_reaches_what_keda_scales(kustomize, tmp_path):
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (tmp_path / "named").mkdir()
    named = {
        "namePrefix": "team-",
        "resources": ["../kubernetes/base"],
        "components": ["../kubernetes/components/keda"],
    }
    (tmp_path / "named" / "kustomization.yaml").write_text(yaml.safe_dump(named))
    objects = kustomize(tmp_path / "named")
    target = one(objects, "ScaledObject")["spec"]["scaleTargetRef"]["name"]
    assert target == one(objects, "Deployment")["metadata"]["name"] == "team-vllm-power"


def test_a_larger_model_brings_its_own_length(kustomize):
    """Qwen2.5-72B-Instruct has 32,768 positions: the base's length of another model would end its start."""
    settings = one(kustomize(KUBERNETES / "overlays" / "tensor-parallel"), "ConfigMap")["data"]
    assert (settings["MODEL"], settings["MAX_MODEL_LEN"]) == ("Qwen/Qwen2.5-72B-Instruct", "")


def test_every_volume_has_a_limit(kustomize):
    for overlay in OVERLAYS:
        spec = one(kustomize(overlay), "Deployment")["spec"]["template"]["spec"]
        for volume in spec["volumes"]:
            assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], volume["name"]


def test_settings_are_what_the_arguments_name(kustomize):
    for overlay in OVERLAYS:
        objects = kustomize(overlay)
        settings = one(objects, "ConfigMap")["data"]
        server = container(one(objects, "Deployment"))
        assert server["envFrom"] == [
            {"configMapRef": {"name": one(objects, "ConfigMap")["metadata"]["name"]}}
        ]
        text = " ".join(server["args"])
        assert set(settings) == {name for name in settings if f"$({name})" in text}
        assert text.count("$(") == sum(text.count(f"$({name})") for name in settings)
        assert json.loads(settings["ADDITIONAL_CONFIG"]).keys() == {"power"}


def test_gpus_are_the_tensor_parallel_size(kustomize):
    for overlay in OVERLAYS:
        objects = kustomize(overlay)
        gpus = container(one(objects, "Deployment"))["resources"]["limits"].get("nvidia.com/gpu")
        if overlay.name == "cpu-smoke":
            assert gpus is None
        else:
            assert gpus == one(objects, "ConfigMap")["data"]["TENSOR_PARALLEL_SIZE"]


def test_the_chart_makes_the_same_server(kustomize, render):
    """With its defaults. What differs is names, labels and how the arguments get their values."""
    plain = one(kustomize(KUBERNETES / "overlays" / "single-gpu"), "Deployment")["spec"]
    chart = one(render("--set", "model.name=Qwen/Qwen2.5-7B-Instruct-1M"), "Deployment")["spec"]
    assert plain["strategy"] == chart["strategy"]
    assert plain["progressDeadlineSeconds"] == chart["progressDeadlineSeconds"]
    ours, theirs = plain["template"]["spec"], chart["template"]["spec"]
    for spec in (ours, theirs):
        (server,) = spec.pop("containers")
        spec["server"] = server
        spec.pop("serviceAccountName")
        server["args"] = sorted(
            argument.split("=")[0] for argument in server["args"] if argument.startswith("--")
        )
    ours["server"].pop("envFrom")
    for argument in ("--additional-config", "--max-model-len"):  # the chart leaves out what has no value
        ours["server"]["args"].remove(argument)
    assert ours == theirs


def test_nothing_is_left_out():
    """Every YAML file is used by some kustomization."""
    named = set()
    for file in KUBERNETES.rglob("kustomization.yaml"):
        content = yaml.safe_load(file.read_text())
        names = content.get("resources", []) + content.get("configurations", [])
        named |= {(file.parent / name).resolve() for name in names}
    files = {path.resolve() for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"}
    assert files <= named
