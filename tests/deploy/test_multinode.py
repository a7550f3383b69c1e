"""More than one node: the group of pods over LeaderWorkerSet, and values for the production stack's chart."""

import yaml
from support.manifests import (
    ROOT,
    as_pod,
    assert_hardened,
    assert_serves_safely,
    kinds,
    one,
    pod_templates,
    problems,
)

MULTINODE = ROOT / "deploy" / "multinode"


def test_group(kustomize, validate):
    objects = kustomize(MULTINODE / "leaderworkerset")
    assert kinds(objects) == {"ConfigMap", "LeaderWorkerSet", "Service", "NetworkPolicy"}
    validate(objects)


def test_pods_of_a_group_are_hardened(kustomize):
    leader, worker = pod_templates(one(kustomize(MULTINODE / "leaderworkerset"), "LeaderWorkerSet"))
    for template in (leader, worker):
        assert_hardened(template["spec"])
    assert_serves_safely(leader["spec"])


def test_nodes_of_a_group_fit_together(kustomize):
    objects = kustomize(MULTINODE / "leaderworkerset")
    group = one(objects, "LeaderWorkerSet")
    settings = one(objects, "ConfigMap")["data"]
    assert int(settings["PIPELINE_PARALLEL_SIZE"]) == group["spec"]["leaderWorkerTemplate"]["size"]
    # The leader is ready only when its workers are in.
    assert group["spec"]["startupPolicy"] == "LeaderCreated"
    (leader,), (worker,) = (template["spec"]["containers"] for template in pod_templates(group))
    for each in (leader, worker):
        assert each["envFrom"] == [{"configMapRef": {"name": one(objects, "ConfigMap")["metadata"]["name"]}}]
        assert each["resources"]["limits"]["nvidia.com/gpu"] == settings["TENSOR_PARALLEL_SIZE"]
        assert "VLLM_HOST_IP" in {entry["name"] for entry in each["env"]}
    api = {"--port", "--served-model-name", "--shutdown-timeout"}
    assert names(leader) - names(worker) == api
    assert names(worker) - names(leader) == {"--headless"}
    assert "--node-rank=0" in leader["args"]
    assert "--node-rank=$(LWS_WORKER_INDEX)" in worker["args"]
    assert leader["image"] == worker["image"] and leader["image"].startswith("vllm-power:")


def test_workers_outlive_the_leaders_drain(kustomize):
    group = one(kustomize(MULTINODE / "leaderworkerset"), "LeaderWorkerSet")
    leader, worker = (template["spec"] for template in pod_templates(group))
    timeout = int(
        next(arg for arg in leader["containers"][0]["args"] if "shutdown-timeout" in arg).split("=")[1]
    )
    assert wait(worker) >= wait(leader) + timeout
    assert worker["terminationGracePeriodSeconds"] > wait(worker) + 15


def test_selectors_meet_the_pods(kustomize):
    objects = kustomize(MULTINODE / "leaderworkerset")
    leader, worker = (t["metadata"]["labels"] for t in pod_templates(one(objects, "LeaderWorkerSet")))
    service = one(objects, "Service")["spec"]["selector"].items()
    assert service <= leader.items() and not service <= worker.items()
    policy = one(objects, "NetworkPolicy")["spec"]
    for rule in policy["podSelector"]["matchExpressions"]:
        assert leader[rule["key"]] in rule["values"] and worker[rule["key"]] in rule["values"]
    # Servers of one node have a policy of their own, which this one must not widen.
    single = one(kustomize(ROOT / "deploy" / "kubernetes" / "base"), "NetworkPolicy")["spec"]["podSelector"]
    assert not single["matchLabels"].items() <= leader.items()


def test_a_wrong_group_is_found(kustomize, tools):
    """The checks see into the pods of a custom resource."""
    group = one(kustomize(MULTINODE / "leaderworkerset"), "LeaderWorkerSet")
    pod_templates(group)[1]["spec"]["containers"][0]["enviroment"] = []
    group["spec"]["leaderWorkerTemplate"]["sise"] = 3
    found = " ".join(problems([group], tools))
    assert "enviroment" in found and "sise" in found
    assert as_pod(pod_templates(group)[0])["kind"] == "Pod"


def test_stack_serves_with_the_backend():
    """Against the real chart by hand (docs/deploy.md); here, what that chart can't know."""
    values = yaml.safe_load((MULTINODE / "production-stack" / "values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    assert "--attention-backend=power" in model["vllmConfig"]["extraArgs"]
    assert values["routerSpec"]["routingLogic"] == "prefixaware"
    assert model["vllmConfig"]["enablePrefixCaching"] is True


def test_stack_scales_on_its_own_model(validate):
    values = yaml.safe_load((MULTINODE / "production-stack" / "values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    scaled = yaml.safe_load((MULTINODE / "production-stack" / "scaled-object.yaml").read_text())
    validate([scaled])
    assert scaled["spec"]["scaleTargetRef"]["name"] == f"stack-{model['name']}-deployment-vllm"
    assert f'model_name="{model["modelURL"]}"' in scaled["spec"]["triggers"][0]["metadata"]["query"]


def names(server: dict) -> set[str]:
    """Return the names of a server's arguments."""
    return {argument.split("=")[0] for argument in server["args"] if argument.startswith("--")}


def wait(pod: dict) -> int:
    """Return how many seconds a pod waits before its server gets SIGTERM."""
    return int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
