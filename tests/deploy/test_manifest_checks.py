"""The checks themselves: what they are there to find, they find."""

import copy

import pytest
from support.manifests import one, problems

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "pod"},
    "spec": {"containers": [{"name": "server", "image": "vllm-power:0.1.0"}]},
}


def test_right_objects_pass(tools):
    assert problems([POD], tools) == []


@pytest.mark.parametrize(
    "change, found",
    [
        ({"apiVersion": "v2"}, "Couldn't find schema"),
        ({"kind": "Pud"}, "Couldn't find schema"),
        ({"apiVersion": "policy/v1beta1", "kind": "PodDisruptionBudget"}, "Couldn't find schema"),
        ({"apiVersion": "example.com/v1", "kind": "Thing"}, "there is no Thing.json"),
        ({"spec": {"containers": [{"name": "server", "imag": "x"}]}}, "imag"),
        ({"spec": {"containers": "none"}}, "array"),
    ],
    ids=["unknown-api", "unknown-kind", "removed-api", "unknown-custom", "unknown-field", "wrong-type"],
)
def test_wrong_objects_are_found(tools, change, found):
    assert found in " ".join(problems([copy.deepcopy(POD) | change], tools))


def test_wrong_custom_resources_are_found_by_their_own_definitions(tools, render):
    objects = render("--set", "keda.enabled=true,podMonitor.enabled=true")
    scaled, monitor = one(objects, "ScaledObject"), one(objects, "PodMonitor")
    assert problems([scaled, monitor], tools) == []
    scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["policies"] = 3
    monitor["spec"]["podMetricsEndpoints"][0]["interval"] = 15
    found = " ".join(problems([scaled, monitor], tools))
    assert "policies must be array" in found
    assert "interval must be string" in found


def test_a_query_by_another_label_is_found(tools, render):
    scaled = one(render("--set", "keda.enabled=true"), "ScaledObject")
    metadata = scaled["spec"]["triggers"][0]["metadata"]
    metadata["query"] = 'sum(vllm:num_requests_waiting{model="some/model"})'
    assert "does not match" in " ".join(problems([scaled], tools))
