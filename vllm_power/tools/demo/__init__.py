"""``vllm-power demo``: a real server with a small model, and requests to it."""
