"""``vllm-power doctor``: are this machine and this installation fit to serve, and if not, what to do."""
