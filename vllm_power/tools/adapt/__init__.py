"""``vllm-power adapt``: continued pre-training of a model under the pattern."""
