"""``vllm-power recall``: what a model recalls from long prompts, dense and under the backend."""
