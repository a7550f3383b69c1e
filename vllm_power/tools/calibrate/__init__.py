"""``vllm-power calibrate``: which layers of a model to keep dense, measured on the user's own text."""
