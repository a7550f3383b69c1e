"""What a scrape shows, and what a worker tells of its stage."""

from vllm_power.metrics import collector

STAGE = {
    "layers": {"sparse": [1, 2, 3], "dense": [0], "sliding_window": []},
    "executor": "triton",
    "page_size": 256,
    "reclamation": "on",
}


def figures() -> dict[str, float]:
    """The figures by name, those with a label of their own by name and label."""
    shown = {}
    for metric in collector.metrics():
        for sample in metric.samples:
            own = [value for label, value in sample.labels.items() if label in ("attention", "reason")]
            shown[".".join([sample.name.removeprefix("vllm_power_"), *own])] = sample.value
    return shown
