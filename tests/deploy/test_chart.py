"""The Helm chart: what it renders fits Kubernetes, drains and scales as it should, and bad values are refused."""

import base64
import json
import subprocess
import sys

import jsonschema
import pytest
import yaml
from support.manifests import (
    CHART,
    ROOT,
    assert_hardened,
    assert_policy_covers,
    assert_serves_safely,
    container,
    kinds,
    one,
    pod_templates,
    pods,
)

from vllm_power.options import PowerOptions

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
ALWAYS = {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "Pod"}

# A name for each set of values, the values, and the kinds that come with them.
MATRIX = {
    "defaults": ([], set()),
    "everything": (
        [
            "power.pattern=stride_slash",
            "power.stride=64",
            "model.servedName=short-name",
            "model.revision=main",
            "model.maxLength=131072",
            "tensorParallelSize=4",
            "pipelineParallelSize=2",
            "replicas=3",
            "modelCache.enabled=true",
            "modelCache.storageClass=fast",
            "compileCache.existingClaim=compiled",
            "hfToken.existingSecret=hub",
            "apiKey.existingSecret=keys",
            "podMonitor.enabled=true",
            "podMonitor.labels.release=prometheus",
            "keda.enabled=true",
            "image.pullSecrets[0].name=registry",
            "priorityClassName=high",
            "runtimeClassName=nvidia",
            "nodeSelector.gpu=h200",
            "extraArgs[0]=--kv-cache-dtype=fp8",
            "extraEnv[0].name=NCCL_DEBUG",
            "extraEnv[0].value=WARN",
            "podAnnotations.note=a",
            "podLabels.team=b",
            "service.annotations.note=a",
            "serviceAccount.annotations.note=a",
        ],
        {"PersistentVolumeClaim", "PodMonitor", "ScaledObject"},
    ),
    "no-gpu": (["gpu.resource=", "tolerations=null", "image.tag=0.1.0-cpu"], set()),
    "existing-claim": (
        ["modelCache.enabled=true", "modelCache.existingClaim=weights", "modelCache.readOnly=true"],
        set(),
    ),
    "one-pod-claim": (
        ["modelCache.enabled=true", "modelCache.accessModes={ReadWriteOnce}", "strategy.type=Recreate"],
        {"PersistentVolumeClaim"},
    ),
    "openshift": (["podSecurityContext.runAsUser=null", "podSecurityContext.fsGroup=null"], set()),
    "load-balancer": (
        [
            "service.type=LoadBalancer",
            "service.port=80",
            "replicas=2",
            "networkPolicy.ingressFrom[0].ipBlock.cidr=203.0.113.0/24",
        ],
        set(),
    ),
    "load-balancer-open": (["service.type=LoadBalancer", "networkPolicy.enabled=false"], set()),
    "made-key": (["apiKey.create=true"], {"Secret"}),
    "closed": (["networkPolicy.ingressFrom=null", "networkPolicy.metricsFrom=null"], set()),
}


def settings(values):
    return [argument for value in values for argument in ("--set", value)]


@pytest.fixture(params=MATRIX, scope="module")
def rendered(request, render):
    values, more = MATRIX[request.param]
    return render(*settings(values)), more


def test_lint(helm):
    done = helm("lint", "--strict", str(CHART), "--set", "model.name=some/model")
    assert done.returncode == 0, done.stdout + done.stderr


def test_objects_fit_their_schemas(rendered, validate):
    objects, more = rendered
    assert kinds(objects) | {"NetworkPolicy"} == ALWAYS | more
    validate(objects)
    assert all(entry["metadata"]["namespace"] == "models" for entry in objects)


def test_every_pod_is_hardened_and_drains(rendered):
    objects, _ = rendered
    for pod in pods(objects):
        assert_hardened(pod)
    (template,) = pod_templates(one(objects, "Deployment"))
    assert_serves_safely(template["spec"])
    if "NetworkPolicy" in kinds(objects):
        assert_policy_covers(objects)


def test_roll_out_waits_for_the_longest_load(render):
    deployment = one(render("--set", "probes.startup.failureThreshold=1000"), "Deployment")
    assert deployment["spec"]["progressDeadlineSeconds"] > 10000


def test_arguments_of_the_server(render):
    values = MATRIX["everything"][0]
    arguments = container(one(render(*settings(values)), "Deployment"))["args"]
    assert arguments[0] == "some/model"
    options = json.loads(next(a for a in arguments if a.startswith("--additional-config=")).split("=", 1)[1])
    assert options == {"power": {"pattern": "stride_slash", "stride": 64}}
    assert {
        "--served-model-name=short-name",
        "--revision=main",
        "--tensor-parallel-size=4",
        "--pipeline-parallel-size=2",
        "--max-model-len=131072",
        "--kv-cache-dtype=fp8",
    } <= set(arguments)


@pytest.mark.parametrize(
    "given, argument",
    [
        ([], None),
        (["--set", "model.maxLength=null"], None),
        (["--set-string", "model.maxLength="], None),
        (["--set", "model.maxLength=auto"], "--max-model-len=auto"),
        (["--set", "model.maxLength=32768"], "--max-model-len=32768"),
        (["--set", "model.maxLength=1048576"], "--max-model-len=1048576"),
    ],
    ids=["left-out", "null", "empty", "auto", "number", "a-million"],
)
def test_the_longest_context_is_the_models_own_unless_it_is_set(render, given, argument):
    arguments = container(one(render(*given), "Deployment"))["args"]
    found = [entry for entry in arguments if "max-model-len" in entry]
    assert found == ([argument] if argument else [])


def test_gpus_are_tensor_times_pipeline(render):
    deployment = one(render(*settings(["tensorParallelSize=4", "pipelineParallelSize=2"])), "Deployment")
    resources = container(deployment)["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"
    without = container(one(render("--set", "gpu.resource="), "Deployment"))["resources"]
    assert without["limits"].keys() == {"memory"}


def test_secrets_are_references(render):
    objects = render(*settings(["apiKey.existingSecret=keys", "hfToken.existingSecret=hub"]))
    environment = {entry["name"]: entry for entry in container(one(objects, "Deployment"))["env"]}
    assert environment["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "keys", "key": "api-key"}
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert "Secret" not in kinds(objects)


def test_a_key_that_the_chart_makes(render):
    objects = render("--set", "apiKey.create=true")
    secret = one(objects, "Secret")
    name = secret["metadata"]["name"]
    assert len(base64.b64decode(secret["data"]["api-key"])) == 40
    wanted = {"name": name, "key": "api-key"}
    server = {entry["name"]: entry for entry in container(one(objects, "Deployment"))["env"]}
    assert server["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"] == wanted
    (pod,) = [entry for entry in objects if entry["kind"] == "Pod"]
    tested = {entry["name"]: entry for entry in pod["spec"]["containers"][0]["env"]}
    assert tested["API_KEY"]["valueFrom"]["secretKeyRef"] == wanted


def test_downloaded_weights_have_a_limit(render):
    spec = one(render(), "Deployment")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert all(entry["emptyDir"]["sizeLimit"] for entry in volumes.values())
    assert volumes["models"] == {"name": "models", "emptyDir": {"sizeLimit": "200Gi"}}


def test_keda_counts_waiting_requests_of_this_model(render):
    objects = render("--set", "keda.enabled=true")
    (trigger,) = one(objects, "ScaledObject")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert query == 'sum(vllm:num_requests_waiting{namespace="models", model_name="some/model"})'
    assert "replicas" not in one(objects, "Deployment")["spec"]


def test_nobody_is_let_in_where_nobody_is_named(render):
    policy = one(render(*settings(MATRIX["closed"][0])), "NetworkPolicy")
    assert policy["spec"]["ingress"] == []


def test_digest_instead_of_tag(render):
    objects = render(
        "--set", "image.tag=sha256:0123", "--set", "image.repository=registry.example/vllm-power"
    )
    assert container(one(objects, "Deployment"))["image"] == "registry.example/vllm-power@sha256:0123"


def test_long_names_are_cut(render, validate):
    objects = render("--set", f"fullnameOverride={'n' * 53}")
    validate(objects)
    assert all(len(entry["metadata"]["name"]) <= 63 for entry in objects)


def test_helm_test_is_python_and_asks_the_service(render):
    (pod,) = [entry for entry in render("--set", "service.port=80") if entry["kind"] == "Pod"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (test,) = pod["spec"]["containers"]
    compile(test["args"][0], "helm-test", "exec")
    environment = {entry["name"]: entry["value"] for entry in test["env"]}
    assert environment["SERVER"] == "http://release-vllm-power:80"
    # The test's pod must not be taken for a server: it would get traffic, and be counted.
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "test"


# --- bad values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, reason",
    [
        (["model.name="], "model/name"),
        (["tensorParalelSize=2"], "tensorParalelSize"),
        (["tensorParallelSize=0"], "tensorParallelSize"),
        (["tensorParallelSize=two"], "tensorParallelSize"),
        (["power.pattern=powr"], "pattern"),
        (["power.window=5"], "window"),
        (["power.block_size=100"], "block_size"),
        (["shm.size=8GB"], "shm/size"),
        (["extraArgs[0]=--attention-backend=FLASH_ATTN"], "extraArgs"),
        (["extraArgs[0]=--api-key=secret"], "extraArgs"),
        (["extraArgs[0]=--shutdown_timeout=1"], "extraArgs"),
        (["extraArgs[0]=-tp"], "extraArgs"),
        (["extraEnv[0].name=VLLM_API_KEY", "extraEnv[0].value=secret"], "extraEnv"),
        (["modelCache.accessModes={ReadWrite}"], "accessModes"),
        (["keda.enabled=true", "keda.minReplicas=0"], "minReplicas"),
        (["keda.enabled=true", "keda.minReplicas=5"], "minReplicas is more than"),
        (["service.type=ExternalName"], "service/type"),
        (["service.type=LoadBalancer"], "ipBlock"),
        (["service.type=NodePort"], "networkPolicy.enabled to false"),
        (["model.maxLength=0"], "maxLength"),
        (["model.maxLength=all"], "maxLength"),
        (["apiKey.create=true", "apiKey.existingSecret=a"], "one of the two"),
        (["podMonitor.interval=15"], "interval"),
        (["terminationGracePeriodSeconds=145"], "must be more than 145"),
        (["drain.shutdownTimeoutSeconds=170"], "must be more than 195"),
        (["modelCache.enabled=true", "modelCache.accessModes={ReadWriteOnce}"], "wait for ever"),
        (
            [
                "modelCache.enabled=true",
                "modelCache.accessModes={ReadWriteOnce}",
                "strategy.type=Recreate",
                "replicas=2",
            ],
            "one pod at a time",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_bad_values_are_refused(refused, values, reason):
    name = [] if values[0].startswith("model.name") else ["--set", "model.name=some/model"]
    assert reason in refused(*name, *settings(values))


def test_a_model_must_be_named(refused):
    assert "model/name" in refused()


# --- schema, values and README say the same -----------------------------------------------------------------------


def test_schema_is_one():
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_every_default_is_in_the_schema_and_described():
    sys.path.insert(0, str(ROOT / "deploy" / "tools"))
    try:
        import values_table
    finally:
        sys.path.pop(0)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values_table.rows(SCHEMA, values)
    assert values_table.readme() == (CHART / "README.md").read_text(), (
        "regenerate the table: .venv/bin/python deploy/tools/values_table.py"
    )


def test_pattern_options_are_those_of_the_plugin():
    named = SCHEMA["properties"]["power"]["properties"]
    assert named.keys() == PowerOptions.model_fields.keys(), (
        "update `power` in deploy/helm/vllm-power/values.schema.json"
    )
    options = PowerOptions.model_json_schema()["properties"]
    for name, option in options.items():
        if "enum" in option:
            assert named[name]["enum"] == option["enum"], name


def test_versions_are_the_package_s():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    tracked = subprocess.run(
        [
            "git",
            "grep",
            "-hoE",
            r"(vllm-power:|newTag: |tag: )[0-9]+\.[0-9]+\.[0-9]+",
            "--",
            "deploy",
            "docker",
            "docs",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert {line.split(":")[1].strip() for line in tracked.stdout.splitlines()} <= {version}
